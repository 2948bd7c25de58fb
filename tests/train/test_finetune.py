"""Fine-tuning: a few dozen photos are enough where a trained network is at the start."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import weightnet
from weightnet.errors import UsageError
from weightnet.train.config import TrainConfig
from weightnet.train.loop import fit

from .conftest import MakeConfig

WNIDS = ("n01443537", "n01882714", "n02165456", "n07753592")  # goldfish, koala, ladybug, banana


@pytest.fixture
def few_photos(shared: Path, tmp_path: Path) -> Path:
    """Twelve photos each of four classes that the embedded model does not know; 38 each for validation."""
    root, seen = tmp_path / "few", dict.fromkeys(WNIDS, 0)
    with tarfile.open(shared / "data/tiny100-val.tar.xz") as archive:
        for member in archive:
            wnid = Path(member.name).parent.name
            if wnid in seen and member.isfile():
                split = "train" if seen[wnid] < 12 else "val"
                seen[wnid] += 1
                target = root / split / wnid / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    assert set(seen.values()) == {50}
    return root


@pytest.mark.filterwarnings("ignore:The classifier is new:weightnet.WeightsWarning")
@pytest.mark.parametrize(("freeze", "accuracy"), [(True, 0.6), (False, 0.7)])
def test_48_photos_are_enough(few_photos: Path, tmp_path: Path, freeze: bool, accuracy: float) -> None:
    options: dict[str, Any] = {"train_size": 112, "resize": 128, "crop": 112, "interpolation": "area", "min_scale": 0.3}
    options |= {"model": "shufflenet_v2_x0_5", "pretrained": "default", "freeze": freeze, "workers": 0, "device": "cpu"}
    options |= {"epochs": 20, "batch_size": 16, "learning_rate": 1.0 if freeze else 0.1, "evaluate_every": 20}
    card = fit(TrainConfig(data=str(few_photos), out=str(tmp_path / "run"), **options))
    assert card.measured["photos"] == 152
    assert card.measured["top1"] > accuracy


def test_fit_frozen_changes_the_classifier_alone(photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(out=str(tmp_path / "before")))
    fit(make_config(pretrained=str(tmp_path / "before"), freeze=True, ema_decay=0.5))
    before, after = (weightnet.load(str(tmp_path / name)).state_dict() for name in ("before", "run"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.0.weight", "classifier.0.bias"}


def test_fit_trains_all_unless_frozen(photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(out=str(tmp_path / "before")))
    fit(make_config(pretrained=str(tmp_path / "before")))
    before, after = (weightnet.load(str(tmp_path / name)).state_dict() for name in ("before", "run"))
    assert not [name for name, value in after.items() if torch.equal(value, before[name]) and "tracked" not in name]


def test_freeze_needs_pretrained_weights(make_config: MakeConfig) -> None:
    with pytest.raises(UsageError, match="freeze must come with pretrained weights"):
        make_config(freeze=True)
    with pytest.raises(UsageError, match="freeze must be true or false"):
        make_config(freeze=1, pretrained="default")
