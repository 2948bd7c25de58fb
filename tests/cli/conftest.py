"""A run folder with a small model, and the command line in this process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightnet.cli import main
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo.cards import Card, read_card, write_card

LABELS = ("cat", "dog", "[red]fox[/red]", "tree", "house")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    spec = NetworkSpec(
        (16, 32, 64), M=2, G=2, stage_repeats=(1, 1, 1), stem_channels=8, head_channels=32, num_classes=len(LABELS)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(ShuffleNetV2(spec).state_dict(), folder / "weights.safetensors")
    preprocess = Preprocess(resize=40, crop=32, interpolation="area")
    classes = tuple(ClassLabel(label) for label in LABELS)
    write_card(Card("tiny", spec, classes, preprocess, measured={"top1": 0.25}), folder / "weights.json")
    return folder


@pytest.fixture
def as_default(run_folder, monkeypatch) -> None:
    """Make the run folder's model the embedded default."""
    embedded = {"default": run_folder / "weights.safetensors"}
    monkeypatch.setattr("weightnet.zoo.hub.embedded_models", lambda: embedded)
    monkeypatch.setattr("weightnet.zoo.cards.embedded_models", lambda: embedded)


@pytest.fixture(scope="session")
def png() -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    picture = cv2.resize(small, (60, 48), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".png", picture)[1].tobytes()


@pytest.fixture
def photos(tmp_path, png, monkeypatch) -> Path:
    """The current folder, with two photos and a broken one in a subfolder."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png)
    (tmp_path / "sub" / "broken.jpg").write_bytes(b"hello")
    return tmp_path


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> Any:
        """The JSON on standard output."""
        return json.loads(self.out)


@pytest.fixture
def weightnet(capsys) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return run


@pytest.fixture
def telling_folder(run_folder, tmp_path_factory) -> Path:
    """The run folder's model, with a limit under which it knows nothing of any photo."""
    folder = tmp_path_factory.mktemp("telling")
    (folder / "weights.safetensors").symlink_to(run_folder / "weights.safetensors")
    write_card(dataclasses.replace(read_card(run_folder / "weights.json"), known_from=1.0), folder / "weights.json")
    return folder
