"""The limit below which nothing is known: which one is chosen, and that the card's figures are a recount's."""

import csv
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from weightnet import Classifier
from weightnet.zoo.cards import EMBEDDED, read_card, write_card

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("set_known")


@pytest.fixture(scope="module")
def select() -> ModuleType:
    return load_script("build_unknown")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the default model, photos by class, and photos of nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for suffix in (".onnx", ".safetensors"):
        (tmp_path / f"models/default{suffix}").symlink_to(EMBEDDED / f"default{suffix}")
    card = read_card(EMBEDDED / "default.json")
    write_card(dataclasses.replace(card, known_from=None, notes={}), tmp_path / "models/default.json")
    cat, rng = cv2.imread(str(SCRIPTS.parent / "examples/cat.png")), np.random.default_rng(0)
    for folder, count in (("val/cat", 24), ("val/dog", 6), ("unknown", 12)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            grain = rng.normal(0, 3 + 12 * number, cat.shape)
            photo = rng.integers(0, 256, (64, 64, 3)) if folder == "unknown" else (cat + grain).clip(0, 255)
            assert cv2.imwrite(str(tmp_path / folder / f"{number}.jpg"), photo.astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("good", "unknown", "limit"),
    [
        ([0.5] * 19 + [0.2], [0.1, 0.3], 0.5),  # one in twenty may be lost
        ([0.5] * 18 + [0.2, 0.25], [0.1, 0.3], 0.2),  # but not two
        ([0.8, 0.9], [0.1, 0.2], 0.8),
        ([0.1, 0.2], [0.8, 0.9], 0.1),  # nothing is caught, and nothing lost
    ],
)
def test_choose_limit_catches_the_most_that_the_good_ones_allow(
    script: ModuleType, good: list[float], unknown: list[float], limit: float
) -> None:
    assert script.choose_limit(np.array(good), np.array(unknown)) == limit


def test_set_known_writes_a_limit_and_its_figures_into_the_card(folders: Path, script: ModuleType) -> None:
    arguments = ["default", "--good", ".", "--unknown", "unknown", "--models", "models"]
    assert script.main(arguments) == 0
    card = read_card("models/default.json")
    limit = card.known_from
    assert limit is not None

    def unknown(paths: list[Path]) -> list[bool]:
        return [not prediction.known for prediction in Classifier("models/default.onnx")(paths)]

    val, others = sorted(Path("val").glob("*/*")), sorted(Path("unknown").iterdir())
    best = [prediction.top[0].label for prediction in Classifier("models/default.onnx")(val)]
    right = np.array([label == path.parent.name for label, path in zip(best, val, strict=True)])
    lost, sets = np.array(unknown(val)), np.array([script.sets_the_limit(f"{p.parent.name}/{p.name}") for p in val])
    assert np.mean(lost[sets & right]) <= 0.05
    lost, right = lost[~sets], right[~sets]
    assert 0 < right.sum() < len(right)
    reported = [path for path in others if not script.sets_the_limit(path.name)]
    assert 0 < len(reported) < len(others)
    assert card.measured["known"] == {
        "unknown_photos": len(reported),
        "caught": round(np.mean(unknown(reported)), 4),
        "lost": round(lost.mean(), 4),
        "lost_right": round(lost[right].mean(), 4),
        "caught_wrong": round(lost[~right].mean(), 4),
    }
    assert card.measured["top1"] == read_card(EMBEDDED / "default.json").measured["top1"], "the rest stays"
    assert script.main(arguments) == 0
    assert read_card("models/default.json") == card, "set again, it is the same, and its command is there once"
    own = "python scripts/set_known.py default --good . --unknown unknown"
    assert card.made_by["commands"][-1] == own


def test_set_known_wants_readable_photos(folders: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "val/cat/text.jpg").write_text("no photo")
    arguments = ["default", "--good", ".", "--unknown", "unknown", "--models", "models"]
    assert script.main(arguments) == 1
    assert "text.jpg" in capsys.readouterr().err
    assert script.main([*arguments[:4], "models", *arguments[5:]]) == 1
    assert "must hold dozens of photos" in capsys.readouterr().err
    shutil.rmtree("val/cat")
    assert script.main(arguments) == 1
    assert "rightly" in capsys.readouterr().err
    assert read_card("models/default.json").known_from is None


def test_build_unknown_leaves_out_what_the_model_knows(
    select: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos/images").mkdir(parents=True)
    labels = {"tench": 1, "goldfish": 2, "kelpie": 228, "tabby": 282, "minivan": 657, "alp": 971}
    with (tmp_path / "photos/images.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["ImageId", "TrueLabel"])
        table.writeheader()
        for name, number in labels.items():
            table.writerow({"ImageId": name, "TrueLabel": number})
            (tmp_path / "photos/images" / f"{name}.png").touch()
    arguments = ["default", "--photos", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert select.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alp.png", "goldfish.png"]
    assert select.main(arguments) == 1
    assert "OUT must not exist" in capsys.readouterr().err
    (tmp_path / "photos/images/alp.png").unlink()
    assert select.main([*arguments[:-1], str(tmp_path / "other")]) == 1
    assert "PHOTOS must hold images.csv" in capsys.readouterr().err


def test_table_names_imagenet_classes_and_labels_of_the_default(select: ModuleType) -> None:
    card = read_card(EMBEDDED / "default.json")
    with (SCRIPTS / "everyday112_in_imagenet.csv").open(newline="", encoding="utf-8") as file:
        rows = {int(row["imagenet_index"]): row["label"] for row in csv.DictReader(file)}
    assert set(rows.values()) <= {entry.label for entry in card.classes}
    for entry in card.classes:
        assert entry.imagenet_index is None or rows[entry.imagenet_index] == entry.label
    assert select.shown_classes(card) == set(rows)


def test_default_says_what_it_does_not_know() -> None:
    card = read_card(EMBEDDED / "default.json")
    assert card.known_from is not None
    assert card.measured["known"]["lost_right"] < card.measured["known"]["caught"]
