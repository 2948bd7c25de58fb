"""Measure how much of a training run's speed its input pipeline costs, on a folder of photos.

    python benchmarks/input_pipeline.py DATA [--steps N] [--out benchmarks/results/input_pipeline.json]
    python benchmarks/input_pipeline.py --table benchmarks/results/input_pipeline.json

S is the rate of steps on one batch that is in memory, D that of the pipeline alone (photos read, cropped, coloured,
batched), T that of both together, as in a run: all in photos per second, on the same cores. A pipeline that wastes
nothing gives T = 1 / (1 / S + 1 / D); the table states T as a share of that. Photos come from files, and from the cache
of decoded ones. The three take turns, and figures are medians over the turns.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from inference import show

import weightnet
from weightnet.errors import UsageError
from weightnet.train import data
from weightnet.train.config import TrainConfig
from weightnet.train.folders import read_folders
from weightnet.train.loop import _start, start_fabric
from weightnet.train.memory import keep_freed_memory
from weightnet.train.step import update

SIZES = (64, 128)
TURNS = 3
WARM_UP = 5  # steps


def rate(photos: int, work: Callable[[], Any]) -> float:
    """Return photos per second of some work."""
    begun_at = time.perf_counter()
    work()
    return photos / (time.perf_counter() - begun_at)


def measure(root: str, size: int, cache: int, steps: int) -> dict[str, float]:
    """Return S, D, T and the share that T is of what they allow."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"train_size": size, "resize": size, "crop": size, "cache": cache, "device": "cpu"}
        config = TrainConfig(data=root, out=folder, batch_size=128, min_scale=0.2, interpolation="area", **options)
        photos, _ = read_folders(root)
        fabric = start_fabric(config)
        state, model = _start(fabric, config, photos.classes, None, begun=False)
        batches = data.EpochBatches(photos.labels, config)
        if batches.steps < steps:
            raise UsageError(f"DATA must have photos for {steps} steps of 128. Got {len(photos)}. Lower --steps.")
        rates: dict[str, list[float]] = {"S": [], "D": [], "T": []}
        with data.cached(photos, config, Path(folder, "photos.cache"), lambda: None) as kept:
            loader = data.training_loader(photos, batches, config, kept)  # one for all epochs, as a run has it

            def some() -> Any:
                return itertools.islice(loader, steps)

            def train_on(loaded: Iterable[Any]) -> None:
                for batch in loaded:
                    update(fabric, model, state, batch, config, 10**6)

            first = next(iter(some()))
            train_on([first] * WARM_UP)
            for _ in range(TURNS):
                rates["S"].append(rate(128 * steps, lambda: train_on([first] * steps)))
                rates["D"].append(rate(128 * steps, lambda: list(some())))
                rates["T"].append(rate(128 * steps, lambda: train_on(some())))
            cast(data.TrainingPhotos, loader.dataset).close()
    S, D, T = (statistics.median(rates[name]) for name in "SDT")
    return {"S": round(S), "D": round(D), "T": round(T), "D/S": round(D / S, 2), "share": round(T * (1 / S + 1 / D), 3)}


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as a table in Markdown, by title."""
    lines = ["| photos | S | D | T | D / S | T of 1 / (1 / S + 1 / D) |", "|---|---|---|---|---|---|"]
    for photos, row in report["rows"].items():
        lines.append(
            f"| {photos} | {row['S']:,} | {row['D']:,} | {row['T']:,} | {row['D/S']:.1f} | {row['share']:.0%} |"
        )
    return {"rates": "\n".join(lines)}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder with train/ and val/")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    options = parser.parse_args()
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.data is None:
        parser.error("DATA must name the photos")
    keep_freed_memory()  # as `weightnet train` does
    rows = {}
    for size, cache in itertools.product(SIZES, (0, 192)):
        rows[f"{size} px, {'cache' if cache else 'files'}"] = measure(options.data, size, cache, options.steps)
    report = {
        "command": f"python benchmarks/input_pipeline.py DATA --steps {options.steps}",
        "threads": torch.get_num_threads(),
        "batch": 128,
        "network": "shufflenet_v2_x0_5",
        "torch": str(torch.__version__),
        "weightnet": weightnet.__version__,
        "rows": rows,
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
