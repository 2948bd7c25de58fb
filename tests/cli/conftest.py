"""A run folder with a small model, and the command line in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from weightnet.cli import main
from weightnet.images.labels import ClassLabel

CLASSES = tuple(map(ClassLabel, ("cat", "dog", "[red]fox[/red]", "tree", "house")))


@pytest.fixture(scope="session")
def run_folder(make_run) -> Path:
    return make_run(classes=CLASSES, measured={"top1": 0.25})


@pytest.fixture(scope="session")
def telling_folder(make_run) -> Path:
    """The same model, with a limit under which it knows nothing of any photo."""
    return make_run(classes=CLASSES, measured={"top1": 0.25}, known_from=1.0)


@pytest.fixture
def as_default(run_folder, monkeypatch) -> None:
    """Make the run folder's model the embedded default."""
    embedded = {"default": run_folder / "weights.safetensors"}
    monkeypatch.setattr("weightnet.zoo.hub.embedded_models", lambda: embedded)
    monkeypatch.setattr("weightnet.zoo.cards.embedded_models", lambda: embedded)


@pytest.fixture(scope="session")
def png() -> bytes:
    small = np.random.default_rng(1).integers(0, 256, (4, 5, 3), np.uint8)
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
