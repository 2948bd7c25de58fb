"""A run that is killed at any moment, as often as one likes, ends with the very files of a run that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from weightnet.export.model import export_model
from weightnet.zoo.weights import load

from .conftest import rows_of

PATIENCE_S = 60


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    """The model as a file that starts quickly."""
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    export_model(load(model, pretrained=True), path)
    return path


def many_photos(folder: Path, count: int) -> list[str]:
    """Return a list of photos that take their time, with a broken one now and then."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    (folder / "photo").write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    (folder / "broken").write_bytes(b"hello")
    paths = [str(folder / f"{number:04d}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        os.link(folder / ("broken" if number % 10 == 3 else "photo"), path)
    return paths


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def run_through_kills(command: list[str], out: Path, *, kills: int, seed: int) -> int:
    """Start the command and kill it at a random moment, several times; then let it end and return its exit code."""
    chance = random.Random(seed)
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            target = len(parts(out)) + chance.randrange(3)
            given_up_at = time.monotonic() + PATIENCE_S
            while not ((out / "_run.json").exists() and len(parts(out)) >= target) and process.poll() is None:
                assert time.monotonic() < given_up_at
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
        finally:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        if kill and code == 1:
            break  # on a busy machine a later kill may come too late
        assert code == -signal.SIGKILL, f"it ended with {code} before it could be killed"
        rows_of(out)  # every file that is there is whole
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.parametrize(
    ("kills", "count"), [(2, 40), pytest.param(12, 400, marks=pytest.mark.full)], ids=["twice", "often"]
)
@pytest.mark.parametrize("format", ["jsonl", pytest.param("parquet", marks=pytest.mark.full)])
def test_run_through_kills_gives_each_photo_once(exported, bulk, tmp_path, kills, count, format):
    paths = many_photos(tmp_path / "photos", count)
    (tmp_path / "list.txt").write_text("\n".join(paths))
    options = ["--model", str(exported), "--format", format, "--rows-per-file", "3"]
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "weightnet",
        "classify-many",
        str(tmp_path / "list.txt"),
        "--out",
        str(out),
        *options,
    ]
    assert run_through_kills(command, out, kills=kills, seed=count) == 1  # some photos are broken
    rows = rows_of(out)
    assert [row["path"] for row in rows] == paths
    assert [row["status"] for row in rows] == ["error" if number % 10 == 3 else "ok" for number in range(count)]

    bulk(str(tmp_path / "list.txt"), out=str(tmp_path / "whole"), model=str(exported), format=format, rows_per_file=3)
    for killed, whole in zip(parts(out), parts(tmp_path / "whole"), strict=True):
        assert killed.read_bytes() == whole.read_bytes(), killed.name
