"""Tiny photos and a tiny network to train on."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.train.config import TrainConfig

COLOURS_BGR = {"blue": (220, 60, 60), "green": (60, 220, 60), "red": (60, 60, 220)}
TINY = NetworkSpec(
    (16, 32, 64), M=2, G=2, dropout=0.3, stage_repeats=(1, 1, 1), stem_channels=8, head_channels=32
)  # as 2.0x, with dropout

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network of the zoo, `tiny`, that takes milliseconds a step; one thread, for bits that do not depend on more."""
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(VARIANTS["shufflenet_v2_x0_5"], spec=TINY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of three colours of noise: 12 photos of each for training, 4 for validation. Not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    make_photos(root)
    return root


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """The same as `photos`, for this test alone."""
    make_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def make_config(photos: Path, tmp_path: Path) -> MakeConfig:
    """A run of two epochs of four steps on `photos`, into the folder `run`."""

    def make(**changes: Any) -> TrainConfig:
        options: dict[str, Any] = {
            "data": str(photos),
            "out": str(tmp_path / "run"),
            "model": "tiny",
            "epochs": 2,
            "batch_size": 9,
            "learning_rate": 2.0,
            "train_size": 32,
            "resize": 36,
            "crop": 32,
            "workers": 0,
            "device": "cpu",
        }
        return TrainConfig(**{**options, **changes})

    return make


def make_photos(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS_BGR.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(36, 60, 2)
                noise = rng.normal(colour, 60, (height, width, 3)).clip(0, 255).astype(np.uint8)
                assert cv2.imwrite(str(folder / f"{index}.png"), noise)


def weights_of(run: str | Path) -> bytes:
    return (Path(run) / "weights.safetensors").read_bytes()


def log_of(run: str | Path) -> bytes:
    return (Path(run) / "log.csv").read_bytes()
