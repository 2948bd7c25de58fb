"""Compare with the original framework, where it is installed: its eager and its fastest mode, and our exported files.

    python benchmarks/original.py --original-python PATH [--rounds N] [--out benchmarks/results/original.json]
    python benchmarks/original.py --table benchmarks/results/original.json

PATH is a Python 3.10 in whose environment MegEngine is: `pip install MegEngine==1.13.0 "numpy<2"`.

Both sides compute the same networks at 224 px, with new weights and batch norms calibrated on noise, from NumPy arrays
to NumPy arrays; that their logits are equal is checked first. `original_lite.py` says in which modes the original runs.
In one thread and in two, batch by batch, all take turns, one run each a round: figures are medians and quartiles over
the rounds, in milliseconds a batch. We are held to so many processor cores; the original may use all for its so many
threads, since others of its threads wait in loops, and each of its processes is stopped while others run. How much
faster we are is said against the original's fastest mode of each row.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference import BATCHES, FILES, SIZE_PX, THREADS, child, commit, export, has_bfloat16, machine, network_of, show

NETWORKS = ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0")
ORIGINAL_SCRIPTS = ("original_megengine.py", "original_lite.py")  # in order: the first writes what the second runs
OURS = ("onnxruntime", "openvino", "openvino bf16")
TOLERANCE = 1e-4  # of the largest logit
BFLOAT16_TOLERANCE = 2e-1  # as for exported files: these weights are random


def export_all(folder: Path) -> None:
    """Write every network for both sides."""
    import torch

    import weightnet

    for name in NETWORKS:
        network = network_of(name)
        torch.save(network.state_dict(), folder / f"{name}.pt")
        weightnet.convert(folder / f"{name}.pt", folder / f"{name}.pkl")
        export(network, name, folder)


class Original:
    """A process of the original framework."""

    def __init__(self, python: str, script: str, folder: Path, threads: int) -> None:
        self._folder, self._log = folder, folder / f"{script}.log"
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),  # pages of it
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        )

    def ask(self, task: dict[str, Any]) -> Any:
        """Return the answer to a task; the process is stopped until the next one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace")[-1000:]
            raise SystemExit(f"The original's process must answer {task}. It ended, and wrote last: {last}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def turns(self, name: str, batch: int, expected: Any) -> dict[str, Callable[[], float]]:
        """Return a function for each mode that runs the network once and returns the milliseconds it took."""
        import numpy as np

        modes = self.ask({"network": name, "batch": batch})
        for mode in modes:
            check(f"the original's {mode}", np.load(self._folder / f"{name}_{batch}_{mode}.npy"), expected, TOLERANCE)
        return {f"original {mode}": lambda mode=mode: self.ask({"run": mode}) for mode in modes}  # type: ignore[misc]

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()


def check(what: str, got: Any, expected: Any, allowed: float) -> None:
    """Check that logits are equal; end the program where they are not."""
    error = float(abs(got - expected).max() / abs(expected).max()) if got.shape == expected.shape else float("inf")
    if not error <= allowed:
        raise SystemExit(f"All sides must give the same logits within {allowed:.0e}. Got {what}: off by {error:.1e}.")


def our_turns(name: str, folder: Path, x_BCHW: Any, expected: Any) -> dict[str, Callable[[], float]]:
    """Return a function for each engine that runs the network once and returns the milliseconds it took."""
    from weightnet.predict.engines import open_engine

    def timed(run: Callable[[Any], Any]) -> float:
        begun_at = time.perf_counter()
        run(x_BCHW)
        return 1e3 * (time.perf_counter() - begun_at)

    turns: dict[str, Callable[[], float]] = {}
    for engine in OURS:
        file = folder / f"{name}{FILES[engine]}"
        if file.exists():
            opened = open_engine(file)
            allowed = BFLOAT16_TOLERANCE if engine == "openvino bf16" else TOLERANCE
            check(engine, opened.run(x_BCHW), expected, allowed)
            turns[engine] = lambda run=opened.run: timed(run)  # type: ignore[misc]
    return turns


def measure(python: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of every network, batch and side in this process and the original's."""
    import numpy as np
    import torch

    originals = [Original(python, script, folder, threads) for script in ORIGINAL_SCRIPTS]
    figures: dict[str, Any] = {}
    for name in NETWORKS:
        network = network_of(name)
        for batch in BATCHES:
            x_BCHW = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
            with torch.inference_mode():
                expected = network(torch.from_numpy(x_BCHW)).numpy()
            turns = our_turns(name, folder, x_BCHW, expected)
            for original in originals:
                turns |= original.turns(name, batch, expected)
            times: dict[str, list[float]] = {side: [] for side in turns}
            for number in range(rounds + 1):
                for side, turn in turns.items():
                    ms = turn()
                    if number:  # the first round warms up
                        times[side].append(ms)
            figures.setdefault(name, {})[str(batch)] = {
                side: [round(q, 3) for q in statistics.quantiles(ms)] for side, ms in times.items()
            }
            print(f"  {threads} threads, {name}, batch {batch} done", file=sys.stderr, flush=True)
    for original in originals:
        original.end()
    return figures


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as tables in Markdown, by title."""
    return {
        "on one core": side_table(report["threads"]["1"], low=report["bfloat16"]),
        "on two cores": side_table(report["threads"]["2"], low=report["bfloat16"]),
    }


def side_table(networks: dict[str, Any], *, low: bool) -> str:
    """Return medians in milliseconds a batch, and how many times as fast as the original's fastest mode ours are."""
    ours = OURS if low else OURS[:2]
    ratios = ["float32 to the fastest", "bfloat16 to the fastest"][: len(ours) - 1]
    columns = ["network", "batch", "original, eager", "original, fastest", *ours, *ratios]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, batches in networks.items():
        for batch, sides in batches.items():
            ms = {side: quartiles[1] for side, quartiles in sides.items()}
            fastest, mode = min((time_ms, side) for side, time_ms in ms.items() if side.startswith("original"))
            cells = [f"`{name}`", batch, f"{ms['original eager']:.3g}"]
            cells.append(f"{fastest:.3g} ({mode.removeprefix('original ')})")
            cells += [f"{ms[engine]:.3g}" for engine in ours]
            cells.append(f"{fastest / min(ms['onnxruntime'], ms['openvino']):.2f}")
            cells += [f"{fastest / ms['openvino bf16']:.2f}"] if low else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_all(python: str, rounds: int) -> dict[str, Any]:
    """Return the whole report."""
    import onnxruntime
    import openvino

    import weightnet

    version = "import megengine; print(megengine.__version__)"
    done = subprocess.run([python, "-c", version], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--original-python must be a Python that has MegEngine. Got {python}: {done.stderr[-300:]}")
    measured_on = machine()
    with tempfile.TemporaryDirectory() as folder:
        export_all(Path(folder))
        arguments = ["--original-python", python, "--rounds", str(rounds), "--measure-in", folder]
        threads = {str(count): child(__file__, [*arguments, str(count)], count) for count in THREADS}
    return {
        "command": f"python benchmarks/original.py --original-python PATH --rounds {rounds}",
        "size_px": SIZE_PX,
        "commit": commit(),
        "machine": measured_on,
        "bfloat16": has_bfloat16(),
        "versions": {
            "megengine": done.stdout.split()[-1],
            "weightnet": weightnet.__version__,
            "onnxruntime": onnxruntime.__version__,
            "openvino": openvino.__version__,
        },
        "threads": threads,
    }


def main() -> None:
    """Measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original-python", metavar="PATH", help="a Python 3.10 that has MegEngine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a report, and measure nothing")
    parser.add_argument("--measure-in", nargs=2, help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if not options.original_python:
        parser.error("--original-python is needed: pip install MegEngine==1.13.0 'numpy<2' under Python 3.10.")
    if options.measure_in:
        folder, threads = options.measure_in
        print(json.dumps(measure(options.original_python, Path(folder), int(threads), options.rounds)))
        return
    if len(os.sched_getaffinity(0)) < max(THREADS):
        parser.error(f"{max(THREADS)} cores are needed. Got {os.sched_getaffinity(0)}: see taskset.")
    report = measure_all(options.original_python, options.rounds)
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
