"""The recipes in `configs/`."""

from pathlib import Path

import pytest

import weightnet
from weightnet.nn.variants import VARIANTS
from weightnet.train.config import TrainConfig, read_options
from weightnet.train.loop import fit

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_a_configuration_without_folders(path: Path) -> None:
    options = read_options(path)
    assert not {"data", "out"} & options.keys()
    config = TrainConfig.from_options({**options, "data": "photos", "out": "run"})
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_says_its_cost_and_result(path: Path) -> None:
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("Cost: " in line for line in comments)
    assert any("Result: " in line for line in comments)


def test_recipes_have_every_row_of_the_published_tables() -> None:
    for name, variant in ((name, variant) for name, variant in VARIANTS.items() if name != "tiny"):  # the tests' own
        path = FOLDER / "imagenet" / f"{name}.yaml"
        assert read_options(path) == {"model": name, "epochs": 240, "batch_size": 1024, "workers": 8}
        assert f"published top-1 error {variant.printed.top1_error}%" in path.read_text(encoding="utf-8")


def test_debug_recipe_trains(photos: Path, tmp_path: Path) -> None:
    options = read_options(next(path for path in CONFIGS if path.stem == "debug"))
    card = fit(TrainConfig.from_options({**options, "data": str(photos), "out": str(tmp_path / "run")}))
    assert (card.made_by["steps"], card.measured["photos"]) == (4, 12)
    assert weightnet.load(str(tmp_path / "run")).spec == card.network
