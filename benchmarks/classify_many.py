"""Measure how near `weightnet classify-many` comes to what decoding and the network allow, on a folder of photos.

    python benchmarks/classify_many.py PHOTOS [--model M] [--count N] [--out benchmarks/results/classify_many.json]

D is the rate of decoding and preprocessing alone, in as many threads as there are cores; N that of the network alone on
prepared batches; T that of the run, rows written and all: in photos per second, on the same cores. A run that wastes
nothing gives T = 1 / (1 / D + 1 / N); the table states T as a share of that. The three take turns, and figures are
medians over the turns, after one turn that is not counted. The time to load the model is left out on all sides.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import weightnet
from weightnet.bulk.manifest import Manifest
from weightnet.bulk.sources import list_photos
from weightnet.bulk.worker import BulkConfig, Worker, write_partitions
from weightnet.images.decode import read_image
from weightnet.predict.engines import open_engine

TURNS = 5


def rate(photos: int, work: Callable[[], Any]) -> float:
    """Return photos per second of some work."""
    begun_at = time.perf_counter()
    work()
    return photos / (time.perf_counter() - begun_at)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return D, N, T and the share that T is of what they allow."""
    engine = open_engine(options.model, engine=options.engine)
    preprocess = engine.card.preprocess
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = list_photos([options.photos], cache=tempfile.gettempdir(), report=print)
    paths = [path for path, _ in found.photos(0, len(found))]
    paths = list(itertools.islice(itertools.cycle(paths), options.count))
    batch = np.stack([preprocess(read_image(path)) for path in paths[: options.batch_size]])
    rates: dict[str, list[float]] = {"D": [], "N": [], "T": []}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as threads:
        Path(folder, "list.txt").write_text("\n".join(paths), encoding="utf-8")
        listing = list_photos([f"{folder}/list.txt"], cache=folder, report=print)
        config = BulkConfig(
            out=folder, model=options.model, engine=options.engine, batch_size=options.batch_size, format="jsonl"
        )
        worker = Worker(config)

        def decode() -> None:
            for _ in threads.map(lambda path: preprocess(read_image(path)), paths, chunksize=8):
                pass

        def network() -> None:
            for _ in range(len(paths) // len(batch)):
                engine.run(batch)

        def run(turn: int) -> None:
            out = Path(folder, str(turn))
            out.mkdir()
            manifest = Manifest(out, {}, total=len(listing), rows_per_file=10_000, format="jsonl")
            for _ in write_partitions(worker, listing, manifest, manifest.pending(), lambda: None):
                pass

        for turn in range(TURNS + 1):
            turns = {
                "D": rate(len(paths), decode),
                "N": rate(len(paths) // len(batch) * len(batch), network),
                "T": rate(len(paths), lambda turn=turn: run(turn)),  # type: ignore[misc]
            }
            if turn:
                for name, value in turns.items():
                    rates[name].append(value)
    D, N, T = (statistics.median(rates[name]) for name in "DNT")
    bound = 1 / (1 / D + 1 / N)
    spread = {f"{name}_spread": [round(min(rates[name]), 1), round(max(rates[name]), 1)] for name in "DNT"}
    figures = {"D": round(D, 1), "N": round(N, 1), "bound": round(bound, 1), "T": round(T, 1)}
    return {**figures, "share": round(T / bound, 3), **spread, "cores": cores, "load": round(os.getloadavg()[0], 2)}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--model", default="default")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    row = measure(options)
    print("| D | N | 1 / (1 / D + 1 / N) | T | share |\n|---|---|---|---|---|")
    print(f"| {row['D']} | {row['N']} | {row['bound']} | {row['T']} | {row['share']} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    report = {
        "command": f"python benchmarks/classify_many.py PHOTOS --model {Path(options.model).name} --engine "
        f"{options.engine} --batch-size {options.batch_size} --count {options.count}",
        "weightnet": weightnet.__version__,
        "commit": commit.strip(),
        "machine": platform.processor() or platform.machine(),
        **row,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
