"""Measure what one photo takes from the command's start to its end, each time in a new process.

    python benchmarks/cold_start.py [--processes N] [--out benchmarks/results/cold_start.json]

`weightnet predict PHOTO` with the embedded model as it is, and in PyTorch where that is installed, beside a bare script
that imports NumPy, OpenCV and ONNX Runtime and runs the same file once, and beside Python alone. The four take turns.
Figures are medians and quartiles over the processes, after one of each that is not counted: wall-clock and processor
time in seconds, and peak memory (resident set) in megabytes.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import weightnet
from weightnet.zoo.hub import embedded_export

PHOTO = Path(__file__).parents[1] / "examples" / "cat.png"
# An installed package has its modules compiled; a checkout keeps them from the first process on, unless told not to.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
BARE = """
import sys
import cv2, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
photo = cv2.resize(cv2.imread(sys.argv[2]), (144, 144), interpolation=cv2.INTER_AREA)
x = photo.transpose(2, 0, 1)[None].astype(np.float32)
print(session.run(["logits"], {"input": x})[0].argmax())
"""


def commands() -> dict[str, list[str]]:
    """Return what is measured, by its name."""
    predict = [sys.executable, "-m", "weightnet", "predict", str(PHOTO)]
    bare = [sys.executable, "-c", BARE, str(embedded_export("default")), str(PHOTO)]
    named = {"weightnet predict": predict, "the same by a bare script": bare, "python": [sys.executable, "-c", "pass"]}
    if importlib.util.find_spec("torch"):
        named["weightnet predict, engine torch"] = [*predict, "--engine", "torch"]
    return named


def one_process(command: Sequence[str]) -> dict[str, float]:
    """Run a command and return its times in seconds and its peak memory in megabytes."""
    begun_at = time.perf_counter()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begun_at
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{' '.join(command)} gave exit code {process.returncode}"
    kilobytes = used.ru_maxrss if sys.platform != "darwin" else used.ru_maxrss / 1024
    return {"wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": kilobytes * 1024 / 1e6}


def summary(measured: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the median and the quartiles of each figure."""
    rows = {}
    for figure in measured[0]:
        quartiles = statistics.quantiles([one[figure] for one in measured], n=4, method="inclusive")
        rows[figure] = dict(zip(("q1", "median", "q3"), (round(value, 3) for value in quartiles), strict=True))
    return rows


def versions() -> dict[str, str]:
    """Return the versions of the packages that are measured."""
    names = ("weightnet", "numpy", "opencv-python-headless", "onnxruntime", "torch")
    found = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in found}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=10, help="of each kind, at least 2 (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.processes < 2:
        parser.error("--processes must be at least 2, for quartiles")
    named, load = commands(), os.getloadavg()[0]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for turn in range(options.processes + 1):
        for name, command in named.items():
            figures = one_process(command)
            if turn:  # the first fills the system's file cache, and compiles modules
                measured[name].append(figures)
    rows: dict[str, Any] = {name: summary(figures) for name, figures in measured.items()}
    del rows["python"]["peak_mb"]  # a child's peak begins with what its parent had, here more than it needs itself
    print("| | wall clock, s | processor, s | peak memory, MB |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        peak = f"{row['peak_mb']['median']:.0f}" if "peak_mb" in row else "-"
        print(f"| {name} | {row['wall_s']['median']:.2f} | {row['cpu_s']['median']:.2f} | {peak} |")
    report = {
        "command": f"python benchmarks/cold_start.py --processes {options.processes}",
        "processes": options.processes,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_before": round(load, 2),
        "python": platform.python_version(),
        "weightnet": weightnet.__version__,
        "versions": versions(),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
