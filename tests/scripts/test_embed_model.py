"""Embedding a run: the figures of the card against a recount, and what is refused."""

import csv
import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import weightnet
from weightnet.errors import UsageError
from weightnet.images.decode import read_image
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.predict.engines import open_engine
from weightnet.predict.interface import OUTPUTS
from weightnet.zoo.cards import Card, read_card, write_card

SCRIPT = Path(__file__).parents[2] / "scripts" / "embed_model.py"
CLASSES = [  # folder, label, wnid, imagenet_index, source
    ("cat", "cat", "n02121620", "", "pets"),
    ("dog", "dog", "n02084071", "", "pets"),
    ("dalmatian", "dalmatian", "n02110341", "251", "caltech"),
    ("wild_cat", "wild cat", "", "", "caltech"),
    ("chair", "chair", "n03001627", "", "caltech"),
    ("n02102040", "English springer", "n02102040", "217", "imagenette"),
]
PHOTOS = 9  # of each class
COMMANDS = ["--command", "python scripts/build_everyday112.py --out data", "--command", "weightnet train --out run"]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("embed_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["embed_model"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CLASS_TABLE", tmp_path / "data" / "classes.csv")
    yield module
    del sys.modules["embed_model"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A tiny Everyday-112 of noise, of which only the validation photos are there."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    rows = [("split", "folder", "file", "source", "source_path", "sha256"), ("train", "cat", "no.png", "pets", "", "")]
    for folder, _, _, _, source in CLASSES:
        (data / "val" / folder).mkdir(parents=True)
        for index in range(PHOTOS):
            noise = rng.normal(rng.integers(0, 256, 3), 40, (40, 50, 3)).clip(0, 255).astype(np.uint8)
            assert cv2.imwrite(str(data / "val" / folder / f"{index}.png"), noise)
            rows.append(("val", folder, f"{index}.png", source, "", ""))
    for name, table in (
        ("photos.csv", rows),
        ("classes.csv", [("folder", "label", "wnid", "imagenet_index"), *(row[:4] for row in CLASSES)]),
    ):
        with (data / name).open("w", newline="") as file:
            csv.writer(file).writerows(table)
    return data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of a network whose answers depend on the photo."""
    spec = NetworkSpec(
        (16, 32, 64), M=2, G=2, stage_repeats=(1, 1, 1), stem_channels=8, head_channels=32, num_classes=len(CLASSES)
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = ShuffleNetV2(spec)
        network(torch.randn(16, 3, 32, 32) * 50 * torch.rand(16, 3, 1, 1))  # batch statistics
        torch.nn.init.normal_(network.classifier[0].weight, 0, 20)
        network.first_conv[1].running_var[0] = 1e5  # more than float16 has
    run = tmp_path / "run"
    run.mkdir()
    save_file(network.state_dict(), run / "weights.safetensors")
    config = {"data": "/home/somebody/data", "out": "/home/somebody/run", "epochs": 40}
    card = Card(
        "run",
        spec,
        tuple(ClassLabel(label, wnid or None, int(index) if index else None) for _, label, wnid, index, _ in CLASSES),
        Preprocess(resize=36, crop=32, interpolation="area"),
        measured={"step": 7, "top1": 0.5, "on": "/home/somebody/data/val"},
        made_by={"command": "weightnet train --config /home/somebody/run/config.yaml", "config": config, "steps": 7},
        terms="free",
        notes={"weights_sha256": "of the run"},
    )
    write_card(card, run / "weights.json")
    return run


@pytest.fixture
def embedded(script: ModuleType, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an embedded model `default`, made by the command line."""
    monkeypatch.chdir(tmp_path)
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "embedded"]) == 0
    return tmp_path / "embedded"


def change_card(run: Path, **changes: Any) -> None:
    path = run / "weights.json"
    write_card(dataclasses.replace(read_card(path), **changes), path)


def recount(model: Path, data: Path) -> tuple[Any, Any, Any]:
    """Logits (N, C), labels and sources of the validation photos, one at a time."""
    network = weightnet.load(str(model))
    preprocess = weightnet.preprocess_for(network)
    logits, labels, sources = [], [], []
    for label, (folder, *_, source) in enumerate(CLASSES):
        for index in range(PHOTOS):
            x = torch.from_numpy(preprocess(read_image(data / "val" / folder / f"{index}.png")))[None]
            with torch.inference_mode():
                logits.append(network(x)[0].double().numpy())
            labels.append(label)
            sources.append(source)
    return np.stack(logits), np.array(labels), np.array(sources)


def test_embed_measures_the_file_as_it_ships(embedded: Path, data: Path) -> None:
    measured = read_card(embedded / "default.json").measured
    logits, labels, sources = recount(embedded / "default.safetensors", data)
    best = logits.argmax(1)
    right = best == labels
    assert 0 < right.mean() < 0.9
    assert measured["photos"] == len(CLASSES) * PHOTOS
    assert measured["top1"] == round(right.mean(), 4)
    top5 = [label in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True)]
    assert measured["top5"] == round(np.mean(top5), 4)
    assert measured["class_averaged_top1"] == round(np.mean([right[labels == c].mean() for c in range(6)]), 4)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert measured["loss"] == pytest.approx(-log_probabilities[np.arange(len(labels)), labels].mean(), abs=1e-3)
    assert 0 < measured["ece"] < 1
    names = {"pets": "cats and dogs", "caltech": "Caltech-101", "imagenette": "Imagenette"}
    for source, title in names.items():
        assert measured["sources"][title]["photos"] == (sources == source).sum()
        assert measured["sources"][title]["top1"] == round(right[sources == source].mean(), 4)


def test_embed_exports_the_model_beside_its_weights(embedded: Path, data: Path) -> None:
    assert sorted(path.name for path in embedded.iterdir()) == ["default.json", "default.onnx", "default.safetensors"]
    engine = open_engine(embedded / "default.onnx")
    assert engine.outputs == OUTPUTS
    logits, _, _ = recount(embedded / "default.safetensors", data)
    photos = [data / "val" / folder / "0.png" for folder, *_ in CLASSES]
    batch = np.stack([engine.card.preprocess(read_image(photo)) for photo in photos])
    np.testing.assert_allclose(engine.run(batch), logits[::PHOTOS], rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_embed_exports_in_half_precision_what_is_too_large(
    embedded: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = embedded / "default.onnx"
    monkeypatch.setattr(script, "MAX_FILE_BYTES", exported.stat().st_size - 1)
    card = script.export(embedded / "default.safetensors")
    assert card == read_card(embedded / "default.json")
    assert card.notes["exports"][".onnx"]["precision"] == "fp16"
    monkeypatch.setattr(script, "MAX_FILE_BYTES", 10)
    with pytest.raises(UsageError, match="must be under 10 bytes"):
        script.export(embedded / "default.safetensors")
    assert not exported.exists()


def test_embed_takes_a_folder_of_photos_by_class(
    script: ModuleType, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "of_tables"]) == 0
    (data / "photos.csv").unlink()
    options = ["--photos", "Six", "--knows", "six kinds of noise", "--tried", "five"]
    assert script.main(["six", "run", "data", *COMMANDS, *options, "--out", "of_folders"]) == 0
    one, two = read_card("of_tables/default.json"), read_card("of_folders/six.json")
    common = ("photos", "top1", "top5", "class_averaged_top1", "loss", "ece")
    assert two.measured == {name: one.measured[name] for name in common} | {
        "on": "the validation photos of Six, none of which was trained on"
    }
    assert (two.name, two.notes["knows"], "lenient" in two.notes) == ("six", "six kinds of noise", False)
    assert (one.notes.get("tried"), two.notes["tried"]) == (None, "five")
    own = "python scripts/embed_model.py six run data --photos Six --knows 'six kinds of noise' --tried five"
    assert two.made_by["commands"][-1] == own


def test_embed_calibrates_on_every_second_photo_and_measures_on_the_others(
    script: ModuleType, run: Path, data: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.main(["default", "run", "data", *COMMANDS, "--calibrate", "--out", "calibrated"]) == 0
    calibrated = Path("calibrated")
    card, before = read_card(calibrated / "default.json"), read_card(embedded / "default.json")
    raw, labels, _ = recount(embedded / "default.safetensors", data)
    logits, _, _ = recount(calibrated / "default.safetensors", data)

    def loss(logits: Any, labels: Any) -> float:
        return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]))

    factor = float(np.median(logits / raw))
    assert card.notes["calibration"].startswith(f"logits are scaled by {factor:.2g}")
    np.testing.assert_allclose(logits, raw * factor, atol=2e-3 * np.abs(logits).max())
    assert card.measured["loss"] == pytest.approx(loss(logits[1::2], labels[1::2]), abs=1e-3)
    for name in ("top1", "top5", "class_averaged_top1", "sources"):
        assert card.measured[name] == before.measured[name]
    assert card.made_by["commands"][-1].endswith("run data --calibrate")
    assert card.notes["exports"][".onnx"]["largest_error"]["logits"] < 1e-4


def test_embed_evens_out_a_share_of_how_often_classes_were_drawn(
    script: ModuleType, run: Path, data: Path, embedded: Path
) -> None:
    made_by = read_card(run / "weights.json").made_by
    change_card(run, made_by={**made_by, "config": {**made_by["config"], "balance": 0.5}})
    with (data / "photos.csv").open("a", newline="") as file:  # 1, 4, 9, ... photos, drawn 1 to 2 to 3 ...
        rows = [("train", row[0], f"{n}.png", "", "", "") for k, row in enumerate(CLASSES) for n in range((k + 1) ** 2)]
        csv.writer(file).writerows(rows[1:])  # one is there
    assert script.main(["default", "run", "data", *COMMANDS, "--even-out", "0.3", "--out", "evened"]) == 0
    before, after = (load_file(folder / "default.safetensors") for folder in (embedded, Path("evened")))
    share = np.arange(1, 7) / np.arange(1, 7).sum()
    lowered = before["classifier.0.bias"] - after["classifier.0.bias"]
    np.testing.assert_allclose(lowered, 0.3 * np.log(share), atol=1e-6)
    assert read_card(Path("evened/default.json")).made_by["commands"][-1].endswith("run data --even-out 0.3")
    (data / "photos.csv").write_text((data / "photos.csv").read_text().replace("train,dog,", "val,dog,"))
    assert script.main(["default", "run", "data", *COMMANDS, "--even-out", "0.3", "--out", "again"]) == 1


def test_embed_finds_the_factor_that_makes_probabilities_true(
    script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (20_000, 6))
    draws = rng.gumbel(size=logits.shape) + 1.7 * logits  # the largest is one of the softmax
    photos = script.Photos("drawn", [], draws.argmax(1))
    monkeypatch.setattr(script, "classify", lambda weights, card, photos: logits)
    state = load_file(run / "weights.safetensors")
    scaled, factor = script.calibrated(state, read_card(run / "weights.json"), photos)
    assert factor == pytest.approx(1.7, rel=0.03)
    for name, array in state.items():
        by = factor if name.startswith("classifier") else 1
        np.testing.assert_allclose(scaled[name], array * by, rtol=1e-6)


def test_embed_counts_overlaps_leniently_beside(embedded: Path, data: Path) -> None:
    measured = read_card(embedded / "default.json").measured
    logits, labels, _ = recount(embedded / "default.safetensors", data)
    pairs = [{0, 3}, {1, 2}, {1, 5}]  # cat, wild cat; dog, dalmatian; dog, English springer
    lenient = np.array([a == b or {a, b} in pairs for a, b in zip(logits.argmax(1).tolist(), labels, strict=True)])
    assert measured["lenient_top1"] == round(lenient.mean(), 4) > measured["top1"]
    assert measured["lenient_class_averaged_top1"] == round(np.mean([lenient[labels == c].mean() for c in range(6)]), 4)
    assert measured["sources"]["cats and dogs"]["lenient_top1"] == round(lenient[labels < 2].mean(), 4)


def test_embed_writes_half_precision_but_for_single_axes(embedded: Path, run: Path) -> None:
    arrays, trained = load_file(embedded / "default.safetensors"), load_file(run / "weights.safetensors")
    assert arrays.keys() == {name for name in trained if not name.endswith("num_batches_tracked")}
    for name, array in arrays.items():
        assert array.dtype == (np.float16 if array.ndim > 1 else np.float32)
        np.testing.assert_array_equal(array, trained[name].astype(array.dtype))
    assert arrays["first_conv.1.running_var"][0] == 1e5


def test_embed_card_says_how_it_was_made_and_nothing_of_this_machine(embedded: Path, tmp_path: Path) -> None:
    text = (embedded / "default.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "/home/" not in text
    card = json.loads(text)
    assert card["name"] == "default"
    own = "python scripts/embed_model.py default run data"
    assert card["made_by"]["commands"] == [COMMANDS[1], COMMANDS[3], own]
    assert card["made_by"]["config"] == {"epochs": 40}
    assert card["classes"][2] == {"label": "dalmatian", "wnid": "n02110341", "imagenet_index": 251}
    assert card["terms"] == "free"
    sha256 = hashlib.sha256((embedded / "default.safetensors").read_bytes()).hexdigest()
    assert card["notes"]["weights_sha256"] == sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": {}}, "RUN must be finished"),
        ({"measured": {"step": 6}}, "RUN must be finished"),
        ({"terms": ""}, "must state the terms"),
        ({"classes": tuple(ClassLabel(str(number)) for number in range(6))}, "must know the classes of DATA"),
    ],
)
def test_embed_refuses_a_run(
    script: ModuleType,
    run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    change_card(run, **changes)
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train --data /home/me", "train --data=/home/me", "train --data '~/photos'"])
def test_embed_refuses_folders_of_this_machine(
    script: ModuleType,
    run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["default", "run", "data", "--command", command, "--out", "out"]) == 2
    assert "no folder of one machine" in capsys.readouterr().err


def test_embed_refuses_weights_beyond_float16(
    script: ModuleType, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arrays = weightnet.load(str(run)).state_dict()
    arrays["classifier.0.weight"][0, 0] = 1e5
    save_file(arrays, run / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "out"]) == 2
    assert "must fit into float16" in capsys.readouterr().err


def test_embed_wants_every_photo(
    script: ModuleType, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (data / "val" / "chair" / "3.png").unlink()
    monkeypatch.chdir(tmp_path)
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "out"]) == 1
    assert "3.png" in capsys.readouterr().err
    (data / "classes.csv").unlink()
    assert script.main(["default", "run", "data", *COMMANDS, "--out", "out"]) == 1
    assert "made by build_everyday112.py" in capsys.readouterr().err
    assert not Path("out").exists()


def test_embed_table_of_pairs_names_classes_of_everyday112(script: ModuleType) -> None:
    with SCRIPT.with_name("everyday112_classes.csv").open(newline="", encoding="utf-8") as file:
        labels = {row["label"] for row in csv.DictReader(file)}
    assert {label for pair in script.LENIENT_PAIRS for label in pair} <= labels
