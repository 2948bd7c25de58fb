"""`fit` in one process: what it learns and leaves in the run folder."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import nn

import weightnet
from weightnet.errors import DataError, TrainingError, WeightsWarning
from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS
from weightnet.train.loop import Progress, _process_group, fit
from weightnet.train.step import averaged_model, parameter_groups
from weightnet.zoo.cards import read_card, write_card
from weightnet.zoo.convert import convert

from .conftest import COLOURS_BGR, MakeConfig, log_of, weights_of

# What a run learns and leaves


def test_fit_learns_and_leaves_a_model(photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    reports: list[Progress] = []
    card = fit(make_config(epochs=12, evaluate_every=5, terms="free"), report=reports.append)
    assert card.measured["top1"] > 0.9
    assert card.measured["top5"] == 1.0
    assert (card.measured["photos"], card.measured["unreadable"], card.measured["epoch"]) == (12, 0, 12)
    assert card.measured["on"] == f"{photos}/val"
    assert (card.name, card.terms, card.made_by["steps"]) == ("run", "free", 48)
    assert [label.label for label in card.classes] == list(COLOURS_BGR)
    assert [p.step for p in reports if p.measured is None] == list(range(1, 49))
    assert [p.epoch for p in reports if p.measured is not None] == [5, 10, 12]
    assert reports[-1].loss < reports[0].loss
    assert read_card(tmp_path / "run" / "weights.json").measured == card.measured
    assert not {path.suffix for path in (tmp_path / "run").iterdir()} & {".part", ".cache"}


def test_fit_leaves_a_model_for_load_and_classifier(photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=12, ema_decay=0.8, evaluate_every=12))
    network = weightnet.load(str(tmp_path / "run"))
    assert network.spec == dataclasses.replace(VARIANTS["tiny"].spec, num_classes=3)
    predictions = weightnet.Classifier(tmp_path / "run")([photos / "val" / name / "0.png" for name in COLOURS_BGR])
    assert [prediction.top[0].label for prediction in predictions] == list(COLOURS_BGR)


def test_fit_logs_each_evaluation(tmp_path: Path, make_config: MakeConfig) -> None:
    losses: list[float] = []
    card = fit(make_config(epochs=2), report=lambda p: losses.append(p.loss) if p.measured is None else None)
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["top1"]) == card.measured["top1"]
    assert float(rows[0]["train_loss"]) == pytest.approx(np.mean(losses[:4]))
    assert float(rows[1]["train_loss"]) == pytest.approx(np.mean(losses[4:]))


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_fit_measures_the_weights_that_it_keeps(
    photos: Path, tmp_path: Path, make_config: MakeConfig, ema_decay: float
) -> None:
    card = fit(make_config(ema_decay=ema_decay))
    network = weightnet.load(str(tmp_path / "run"))
    paths = sorted((photos / "val").rglob("*.png"))
    labels = torch.tensor([list(COLOURS_BGR).index(path.parent.name) for path in paths])
    preprocess = weightnet.preprocess_for(network)
    assert preprocess == Preprocess(resize=36, crop=32)
    with torch.inference_mode():
        logits = torch.cat([network(torch.from_numpy(preprocess(read_image(path)))[None]) for path in paths])
    assert card.measured["top1"] == (logits.argmax(1) == labels).double().mean().item()
    assert card.measured["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_fit_first_steps_are_those_of_plain_sgd(tmp_path: Path, make_config: MakeConfig, photos: Path) -> None:
    """Two steps against a loop written down here from the recipe."""
    from weightnet.train import data
    from weightnet.train.folders import read_folders

    config = make_config(epochs=1, batch_size=18, weight_decay=0.1, momentum=0.8)
    vanilla = dataclasses.replace(VARIANTS["tiny"].spec, dropout=0.0)
    VARIANTS["tiny"] = dataclasses.replace(VARIANTS["tiny"], spec=vanilla)
    start: dict[str, Any] = {}

    def report(progress: Progress) -> None:
        if progress.step == 1:  # the first checkpoint is that of the start
            start.update(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["network"])

    fit(config, report=report)
    network = ShuffleNetV2(dataclasses.replace(vanilla, num_classes=3)).train()
    network.load_state_dict(start)
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    folder, _ = read_folders(photos)
    for step, batch in enumerate(data.training_loader(folder, data.EpochBatches(folder.labels, config), config, None)):
        x = torch.stack([torch.from_numpy(config.preprocess.normalize(photo.numpy())) for photo in batch.photos])
        log_probabilities = network(x).log_softmax(1)
        target = F.one_hot(batch.labels, 3) * 0.9 + 0.1 / 3
        loss = -(log_probabilities * target).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = 2.0 * 18 / 128 * (1 - step / 2)
        with torch.no_grad():
            for (name, p), gradient in zip(network.named_parameters(), gradients, strict=True):
                velocity[name] = 0.8 * velocity[name] + gradient + (0.1 * p if p.ndim > 1 else 0)
                p -= rate * velocity[name]
    trained = dict(weightnet.load(str(tmp_path / "run")).named_parameters())
    for name, p in network.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=1e-3, atol=1e-4, msg=name)


def test_parameter_groups_decay_weights_only() -> None:
    network = ShuffleNetV2(VARIANTS["tiny"].spec)
    decayed, free = parameter_groups(network, 4e-5)
    names = {id(p): name for name, p in network.named_parameters()}
    got = {names[id(p)] for p in free["params"]}
    assert (decayed["weight_decay"], free["weight_decay"]) == (4e-5, 0.0)
    assert got | {names[id(p)] for p in decayed["params"]} == set(names.values())
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert got == {name for name in names.values() if name.endswith(".bias") or name.rpartition(".")[0] in norms}
    assert all("fc2" in name or not name.endswith("bias") for name in names.values() if name not in got)


def test_averaged_model_follows_its_ramp_then_its_decay() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = averaged_model(network, 0.5)
    want = 0.0
    for n, value in enumerate([1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]):
        nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        want = decay * want + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(want)


def test_fit_averages_batch_statistics_without_their_start(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=5, ema_decay=0.999))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    last, averaged = (
        saved[part][prefix + "features.0.bn2.running_var"] for part, prefix in (("network", ""), ("average", "module."))
    )
    assert (averaged / last).median() < 2  # by plain averaging about 100: the variance begins at 1


def test_fit_in_mixed_precision(tmp_path: Path, make_config: MakeConfig) -> None:
    card = fit(make_config(epochs=12, evaluate_every=12, precision="bf16-mixed"))
    assert card.measured["top1"] > 0.6
    assert weightnet.load(str(tmp_path / "run")).first_conv[0].weight.dtype == torch.float32


def test_fit_starts_from_pretrained_weights_and_their_pixels(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=1))
    path = tmp_path / "run" / "weights.json"
    card = read_card(path)
    write_card(dataclasses.replace(card, preprocess=Preprocess(mean=None, std=None, channel_order="RGB")), path)
    options = {"pretrained": str(tmp_path / "run"), "out": str(tmp_path / "tuned"), "epochs": 1, "resize": 40}
    tuned = fit(make_config(**options, learning_rate=1e-9))
    assert tuned.preprocess == Preprocess(mean=None, std=None, channel_order="RGB", resize=40, crop=32)
    before, after = (safetensors.numpy.load_file(tmp_path / run / "weights.safetensors") for run in ("run", "tuned"))
    np.testing.assert_allclose(after["classifier.0.weight"], before["classifier.0.weight"], atol=1e-6)
    # Four batches of raw pixels have moved the mean by more than normalised ones, which are about 1, ever could.
    assert np.abs(after["first_conv.1.running_mean"] - before["first_conv.1.running_mean"]).max() > 2


def test_fit_begins_a_new_classifier_for_other_classes_of_the_same_number(
    own_photos: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    fit(make_config(epochs=1))
    options = {"pretrained": str(tmp_path / "run"), "out": str(tmp_path / "tuned"), "epochs": 1, "learning_rate": 1e-9}
    for part in ("train", "val"):
        (own_photos / part / "red").rename(own_photos / part / "crimson")
    with pytest.warns(WeightsWarning, match=r"The classifier is new: .*run knows other classes"):
        fit(make_config(**options, data=str(own_photos)))
    before, after = (safetensors.numpy.load_file(tmp_path / run / "weights.safetensors") for run in ("run", "tuned"))
    assert np.abs(after["classifier.0.weight"] - before["classifier.0.weight"]).max() > 1e-3
    np.testing.assert_allclose(after["conv_last.0.weight"], before["conv_last.0.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("message", "raised"), [("[gloo/pair.cc] closed by peer", TrainingError), ("a bug", RuntimeError)]
)
def test_process_says_that_another_has_ended(message: str, raised: type[Exception]) -> None:
    class TwoProcesses:
        world_size = 2

        def launch(self) -> None: ...

    with pytest.raises(raised, match=re.escape(message)), _process_group(TwoProcesses()):  # type: ignore[arg-type]
        raise RuntimeError(message)


def test_fit_gives_the_same_bits_for_any_workers_and_cache(tmp_path: Path, make_config: MakeConfig) -> None:
    plain = tmp_path / "plain"
    fit(make_config(out=str(plain)))
    for name, options in {"forked": {"workers": None}, "cached": {"workers": 1, "cache": 64}}.items():
        fit(make_config(out=str(tmp_path / name), **options))  # the photos are smaller than that
        assert weights_of(tmp_path / name) == weights_of(plain)
        assert log_of(tmp_path / name) == log_of(plain)


def test_fit_depends_on_the_seed(tmp_path: Path, make_config: MakeConfig) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for seed, run in enumerate(runs):
        fit(make_config(out=str(run), seed=seed, epochs=1))
    assert weights_of(runs[0]) != weights_of(runs[1])


def test_fit_leaves_the_callers_random_numbers(make_config: MakeConfig) -> None:
    before = torch.get_rng_state()
    fit(make_config(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


# Photos that cannot be read


@pytest.mark.parametrize("cache", [0, 64])
def test_fit_counts_and_lists_unreadable_photos(
    own_photos: Path, tmp_path: Path, make_config: MakeConfig, cache: int
) -> None:
    for name in ("train/red/0.png", "train/blue/5.png", "val/green/1.png"):
        (own_photos / name).write_bytes(b"")
    reports: list[Progress] = []
    card = fit(make_config(data=str(own_photos), cache=cache), report=reports.append)
    assert (card.measured["photos"], card.measured["unreadable"]) == (11, 1)
    assert reports[-1].unreadable == 3
    with (tmp_path / "run" / "unreadable.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["photo"] for row in rows] == ["train/blue/5.png", "train/red/0.png", "val/green/1.png"]
    assert all("empty" in row["reason"] for row in rows)


def test_fit_passes_over_batches_without_photos(own_photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    """With two of twelve photos left of two classes, many batches of two have none or one."""
    for name in ("blue", "green"):
        for index in range(10):
            (own_photos / "train" / name / f"{index}.png").write_bytes(b"")
    config = make_config(data=str(own_photos), batch_size=2)
    steps: list[int] = []
    card = fit(config, report=lambda p: steps.append(p.step) if p.measured is None else None)
    assert 3 < len(steps) < card.made_by["steps"] == 36
    assert math.isfinite(card.measured["loss"])


@pytest.mark.parametrize("cache", [0, 64])
@pytest.mark.parametrize("batch_size", [9, 2])
def test_fit_ends_where_no_photo_can_be_read(
    own_photos: Path, make_config: MakeConfig, cache: int, batch_size: int
) -> None:
    for path in (own_photos / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"Got (4|18) steps in a row without two.*must not be empty"):
        fit(make_config(data=str(own_photos), cache=cache, batch_size=batch_size))


def test_fit_ends_where_no_validation_photo_can_be_read(own_photos: Path, make_config: MakeConfig) -> None:
    for path in (own_photos / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"val must hold photos that can be read\. Got none among 12"):
        fit(make_config(data=str(own_photos)))


@pytest.mark.parametrize("batch_size", [36, 100])
def test_fit_takes_fewer_photos_than_a_batch(make_config: MakeConfig, batch_size: int) -> None:
    assert fit(make_config(batch_size=batch_size, epochs=3)).made_by["steps"] == 3


def test_fit_takes_two_photos(own_photos: Path, make_config: MakeConfig) -> None:
    for path in (own_photos / "train").rglob("*.png"):
        if path.name != "0.png" or path.parent.name == "red":
            path.unlink()
    for split in ("train", "val"):
        for path in (own_photos / split / "red").iterdir():
            path.unlink()
        (own_photos / split / "red").rmdir()
    card = fit(make_config(data=str(own_photos)))
    assert (card.made_by["train_photos"], card.made_by["steps"]) == (2, 2)


def test_run_folder_can_be_converted(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=1))
    convert(tmp_path / "run" / "weights.safetensors", tmp_path / "copy.safetensors")
    assert json.loads((tmp_path / "copy.json").read_text())["classes"][0]["label"] == "blue"
