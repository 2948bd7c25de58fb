"""A run folder with a small model, pictures of every kind of place, and a run's rows."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from weightnet.bulk.pipeline import Summary, classify_many
from weightnet.bulk.worker import BulkConfig

from ..conftest import write_tar


@pytest.fixture(scope="session")
def model(make_run) -> str:
    return str(make_run())


def png(seed: int) -> bytes:
    """A picture; another for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.imencode(".png", cv2.resize(small, (60, 48), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def shard(path: Path, members: dict[str, bytes]) -> str:
    """Write a tar file."""
    return str(write_tar(path, members))


def table(path: Path, cells: list[Any], kind: Any, *, name: str = "image", group: int = 1000) -> str:
    """Write a Parquet file with one column of photos beside another."""
    columns = {"number": pa.array(range(len(cells))), name: pa.array(cells, kind)}
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 23 files, two of which are no photos."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed in range(21):
        (folder / ("sub" if seed % 2 else ".") / f"{seed:02d}.png").write_bytes(png(seed))
    (folder / "05broken.jpg").write_bytes(b"hello")
    (folder / "sub/empty.png").write_bytes(b"")
    return folder


@pytest.fixture
def bulk(tmp_path, model) -> Callable[..., Summary]:
    """Run in this process, by default over tmp_path/photos into tmp_path/out."""

    def run(*inputs: str, stdin: Any = None, reports: list[str] | None = None, **options: Any) -> Summary:
        settings = {"out": str(tmp_path / "out"), "model": model, "rows_per_file": 4, "device": "cpu", **options}
        said: list[str] = [] if reports is None else reports
        names = inputs or (str(tmp_path / "photos"),)
        return classify_many(names, BulkConfig(**settings), report=said.append, stdin=stdin)

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, in the order of its files."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("part-*")):
        if file.suffix == ".parquet":
            rows += parquet.read_table(file).to_pylist()
        elif file.suffix == ".jsonl":
            rows += map(json.loads, file.read_text().splitlines())
        else:
            rows += csv.DictReader(io.StringIO(file.read_bytes().decode(), newline=""))
    return rows
