"""The picture of a run."""

from pathlib import Path
from typing import Any

import cv2
import pytest

from weightnet.errors import TrainingError
from weightnet.train import run as run_module
from weightnet.train.loop import fit

from .conftest import MakeConfig


def test_fit_draws_its_curves(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=3))
    picture = cv2.imread(str(tmp_path / "run" / "curves.png"))
    assert picture is not None
    assert picture.shape == (480, 1200, 3)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}) > 50  # lines, not an empty page


def test_fit_keeps_the_model_where_the_curves_cannot_be_written(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_module.write_atomically

    def refuse(path: Path, content: bytes) -> None:
        if path.name == "curves.png":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(run_module, "write_atomically", refuse)
    with pytest.raises(TrainingError, match="The model is whole: make room, and resume"):
        fit(make_config())
    monkeypatch.setattr(run_module, "write_atomically", write)
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    report: list[Any] = []
    fit(make_config(), resume=True, report=report.append)
    assert (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before
    assert report == []
