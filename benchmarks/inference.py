"""Measure every network in every engine: WeightNet as ports compute it, in its static form, and its plain twin.

    python benchmarks/inference.py [--rounds N] [--out benchmarks/results/inference.json]
    python benchmarks/inference.py --table benchmarks/results/inference.json

Twelve networks at 224 px, batches of 1, 8 and 32, on one processor core and on two, with new weights and batch norms
calibrated on noise. Engines: PyTorch with a kernel for each sample, as ports write it (`per-sample`,
benchmarks/port.py), and with the folded network (`torch`); ONNX Runtime and OpenVINO with the file exported for each;
OpenVINO in bfloat16 likewise, where the processor has it. The three networks of a width, one of them plain, have a
process, which is held to so many cores; all at once would drive each other's weights out of the caches. Within one
batch size all engines of these take turns: a pause in which the threads of the engine before go to sleep, a run that
wakes its own, and the run that counts. When all widths had their turn they begin again, three times in all, in new
processes: the speed of a shared machine changes within minutes, and no network should have the good or the bad ones.
Figures are medians and quartiles over all rounds, in milliseconds a batch, and ratios are of these medians. The peak is
that of a matrix product of 1,024 x 1,024, the best of all processes; OpenVINO's float32 is held against it.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SIZE_PX = 224
BATCHES = (1, 8, 32)
THREADS = (1, 2)
PASSES = 3  # over all widths
PAUSE_S = 0.05  # some engines' threads wait in loops for a while after a run
ENGINES = ("per-sample", "torch", "onnxruntime", "openvino", "openvino bf16")
FILES = {"onnxruntime": ".onnx", "openvino": ".xml", "openvino bf16": "_bf16.xml"}  # what is behind the network's name
MEMORY_NETWORK, MEMORY_BATCH = "shufflenet_v2_x1_0", 32

Run = Callable[[], Any]


def network_of(name: str) -> Any:
    """Return a network with new weights and calibrated batch norms."""
    import torch

    import weightnet

    torch.manual_seed(0)
    network = weightnet.load(name).train()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None  # a plain average
    with torch.no_grad():
        network(torch.randn(16, 3, 128, 128))
    return network.eval()


def networks() -> list[str]:
    """Return the names of the twelve networks."""
    from weightnet.nn.variants import VARIANTS

    return list(VARIANTS)


def has_bfloat16() -> bool:
    """Return whether OpenVINO computes in bfloat16 here."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def export(network: Any, name: str, folder: Path) -> None:
    """Write a network's files for all engines."""
    import weightnet

    for engine, suffix in FILES.items():
        low = engine == "openvino bf16"
        if not low or has_bfloat16():
            weightnet.export_model(network, folder / f"{name}{suffix}", precision="bf16" if low else "fp32")


def export_all(folder: Path) -> None:
    """Write every network's files."""
    for name in networks():
        export(network_of(name), name, folder)


def prepared(engine: str, name: str, folder: Path, batch: int) -> Run | None:
    """Return a function that runs a network once on a batch; None where the engine is not for it."""
    import numpy as np

    from weightnet.predict.engines import open_engine

    x_BCHW = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
    if engine in ("per-sample", "torch"):
        return prepared_in_torch(engine, name, x_BCHW)
    file = folder / f"{name}{FILES[engine]}"
    if not file.exists():
        return None
    opened = open_engine(file)
    return lambda: opened.run(x_BCHW)


def prepared_in_torch(engine: str, name: str, x_BCHW: Any) -> Run | None:
    """The same in PyTorch: channels first as ports have it, channels last for the folded network."""
    import torch
    from port import Port

    import weightnet

    if engine == "per-sample" and name == plain_twin(name):
        return None
    network, layout = network_of(name), torch.contiguous_format
    if engine == "per-sample":
        port = Port(network.spec)
        port.load_state_dict(network.state_dict())
        network = port.eval()
    else:
        network, layout = weightnet.fold(network), torch.channels_last
    network, photos = network.to(memory_format=layout), torch.from_numpy(x_BCHW).contiguous(memory_format=layout)

    def run() -> Any:
        with torch.inference_mode():
            return network(photos)

    return run


def measure(folder: Path, rounds: int, plain: str) -> dict[str, Any]:
    """Return the milliseconds of a plain network and those of its width, every round's, by batch and engine."""
    times: dict[str, dict[str, list[float]]] = {}
    for batch in BATCHES:
        runs = {
            f"{name}|{engine}": run
            for name in networks()
            if plain_twin(name) == plain
            for engine in ENGINES
            if (run := prepared(engine, name, folder, batch))
        }
        for run in runs.values():
            run()
            run()
        milliseconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                time.sleep(PAUSE_S)
                run()
                begun_at = time.perf_counter()
                run()
                milliseconds[key].append(1e3 * (time.perf_counter() - begun_at))
        times[str(batch)] = milliseconds
        print(f"  {plain}: batch {batch} done", file=sys.stderr, flush=True)
    return {"peak_gflops": peak_gflops(), "ms": times}


def peak_gflops() -> dict[str, float]:
    """Return the speed of a large matrix product, the best of 20, in float32 and bfloat16."""
    import torch

    peaks = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(1024, 1024).to(dtype)
        best = float("inf")
        for _ in range(20):
            begun_at = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - begun_at)
        peaks[name] = round(2 * 1024**3 / best / 1e9, 1)
    return peaks


def peak_memory_mb(folder: Path, engine: str) -> float | None:
    """Return the most memory that this process needed to run one network on a large batch; None where it cannot."""
    run = prepared(engine, MEMORY_NETWORK, folder, MEMORY_BATCH)
    if run is None:
        return None
    for _ in range(3):
        run()
    # getrusage would give that of the process which started this one, where it was larger.
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return round(int(peak_kib) * 1024 / 1e6)


def child(script: str, arguments: Sequence[str], threads: int) -> Any:
    """Return what a script prints as JSON in a process that is held to some cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as tables in Markdown, by title."""
    return {
        "against the plain network": against_plain(report),
        "against the per-sample form": against_per_sample(report),
        "memory": memory_table(report),
        "on one core": engine_table(report, "1"),
        "on two cores": engine_table(report, "2"),
    }


def memory_table(report: dict[str, Any]) -> str:
    """Return the most memory that a process needed in each engine."""
    megabytes = report["peak_memory_mb"]
    return "\n".join(
        [
            f"| {' | '.join(ENGINES)} |",
            "|---" * len(ENGINES) + "|",
            f"| {' | '.join(f'{megabytes[engine]} MB' if megabytes[engine] else '-' for engine in ENGINES)} |",
        ]
    )


def engine_table(report: dict[str, Any], threads: str) -> str:
    """Return all medians on so many cores, in milliseconds a batch, and their ratios to the plain twin's."""
    measured = report["threads"][threads]
    lines = [f"| network | batch | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 2) + "|"]
    for name in report["networks"]:
        for batch in map(str, BATCHES):
            cells = [cell(measured, name, engine, batch) for engine in ENGINES]
            lines.append(f"| `{name}` | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_plain(report: dict[str, Any]) -> str:
    """Return the ratios of every WeightNet network's time to its plain twin's, both in OpenVINO, float32."""
    points = [(threads, batch) for threads in report["threads"] for batch in map(str, BATCHES)]
    titles = [f"{threads} core{'s' * (threads != '1')}, batch {batch}" for threads, batch in points]
    lines = [f"| network | {' | '.join(titles)} |", "|---" * (len(points) + 1) + "|"]
    for name in report["networks"]:
        if name != plain_twin(name):
            ratios = [ratio_to_plain(report["threads"][threads], name, batch) for threads, batch in points]
            lines.append(f"| `{name}` | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def ratio_to_plain(measured: dict[str, Any], name: str, batch: str) -> float:
    """Return how many times the plain twin's time a network takes in OpenVINO."""
    ms, base = (median(measured, which, "openvino", batch) for which in (name, plain_twin(name)))
    assert ms is not None
    assert base is not None
    return ms / base


def cell(measured: dict[str, Any], name: str, engine: str, batch: str) -> str:
    """Return one figure, and its ratio to the plain twin's in the same engine."""
    ms = median(measured, name, engine, batch)
    if ms is None:
        return ""
    base = median(measured, plain_twin(name), engine, batch)
    text = f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"
    return text if base is None or name == plain_twin(name) else f"{text} ({ms / base:.2f})"


def median(measured: dict[str, Any], name: str, engine: str, batch: str) -> float | None:
    """Return a median in milliseconds, None where it was not measured."""
    quartiles = measured["ms_quartiles"][batch].get(f"{name}|{engine}")
    return None if quartiles is None else quartiles[1]


def plain_twin(name: str) -> str:
    """Return the name of the plain network of the same widths."""
    return f"{name.split('.')[0]}.plain"


def against_per_sample(report: dict[str, Any]) -> str:
    """Return how many times as fast as the per-sample form a network is, and which part of the peak it reaches."""
    lines = [
        "| network | cores | batch | times as fast as per-sample | in bfloat16 | bfloat16 to float32 | of the peak |"
    ]
    lines.append("|---" * 7 + "|")
    for name, macs in report["networks"].items():
        for threads, measured in report["threads"].items():
            for batch in map(str, BATCHES) if not name.endswith(".plain") else ():
                ms = {engine: median(measured, name, engine, batch) for engine in ENGINES}
                ported, single, low = ms["per-sample"], ms["openvino"], ms["openvino bf16"]
                exact = [ms[engine] for engine in ("torch", "onnxruntime", "openvino")]
                assert ported is not None
                assert single is not None
                fastest = min(time_ms for time_ms in exact if time_ms is not None)
                share = 2 * macs * int(batch) / (single * 1e6) / measured["peak_gflops"]["float32"]
                in_low = [f"{ported / low:.1f}", f"{single / low:.2f}"] if low else ["", ""]
                cells = [f"`{name}`", threads, batch, f"{ported / fastest:.1f}", *in_low, f"{100 * share:.0f}%"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(titled: dict[str, str]) -> None:
    """Print tables under their titles."""
    for title, table in titled.items():
        print(f"{title}\n\n{table}\n")


def main() -> None:
    """Measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in each of three processes (default: 5)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a report, and measure nothing")
    parser.add_argument("--times-in", nargs=2, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--memory-in", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.times_in:
        print(json.dumps(measure(Path(options.times_in[0]), options.rounds, options.times_in[1])))
    elif options.memory_in:
        print(json.dumps(peak_memory_mb(Path(options.memory_in[0]), options.memory_in[1])))
    elif options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
    else:
        report = measure_all(options.rounds)
        show(tables(report))
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure_widths(folder: str, rounds: int, threads: int) -> dict[str, Any]:
    """Return the milliseconds of all networks on so many cores, and the peak."""
    arguments = ["--rounds", str(rounds), "--times-in", folder]
    widths = [name for name in networks() if name == plain_twin(name)]
    parts = [child(__file__, [*arguments, plain], threads) for _ in range(PASSES) for plain in widths]
    peaks = [part["peak_gflops"] for part in parts]
    peak = {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]}
    return {"peak_gflops": peak, "ms_quartiles": quartiles_of([part["ms"] for part in parts])}


def quartiles_of(parts: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> dict[str, dict[str, list[float]]]:
    """Return the quartiles of what was measured in several processes, by batch and by what was run."""
    quartiles: dict[str, dict[str, list[float]]] = {}
    for batch in map(str, BATCHES):
        every: dict[str, list[float]] = {}
        for part in parts:
            for key, ms in part[batch].items():
                every.setdefault(key, []).extend(ms)
        quartiles[batch] = {key: [round(q, 3) for q in statistics.quantiles(ms)] for key, ms in every.items()}
    return quartiles


def commit() -> str:
    """Return the commit that is measured."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def machine() -> dict[str, Any]:
    """Return what is measured on, and how busy it was before."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    processor = name[1] if name else platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}


def measure_all(rounds: int) -> dict[str, Any]:
    """Return the whole report."""
    import onnxruntime
    import openvino
    import torch

    import weightnet
    from weightnet.nn.variants import VARIANTS

    measured_on = machine()
    with tempfile.TemporaryDirectory() as folder:
        export_all(Path(folder))
        threads = {str(count): measure_widths(folder, rounds, count) for count in THREADS}
        memory = {engine: child(__file__, ["--memory-in", folder, engine], 1) for engine in ENGINES}
    return {
        "command": f"python benchmarks/inference.py --rounds {rounds}",
        "size_px": SIZE_PX,
        "commit": commit(),
        "machine": measured_on,
        "bfloat16": has_bfloat16(),
        "versions": {
            "weightnet": weightnet.__version__,
            "torch": str(torch.__version__),
            "onnxruntime": onnxruntime.__version__,
            "openvino": openvino.__version__,
        },
        "networks": {name: VARIANTS[name].totals.macs for name in networks()},
        "peak_memory_mb": {"network": MEMORY_NETWORK, "batch": MEMORY_BATCH, **memory},
        "threads": threads,
    }


if __name__ == "__main__":
    main()
