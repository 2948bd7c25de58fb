"""Measure a training step of the 0.5x network in each exact form, beside the plain network of the same size.

    python benchmarks/train_step.py [--threads N] [--rounds N] [--out benchmarks/results/train_step.json]
    python benchmarks/train_step.py --table benchmarks/results/train_step.json

One step is forward, loss, backward and an update by stochastic gradient descent, float32, on random photos in memory,
channels last. The per-sample form runs twice: as ports to PyTorch write it (benchmarks/port.py, channels first), and as
this package does (`reference`), whose kernels come from products instead of grouped convolutions. Freed memory is kept,
as `weightnet train` keeps it. The forms take turns, a step each, so that whatever else the machine does meets all of
them alike; figures are medians over the rounds. Before that the gradients of all forms are compared in float64, each
form runs two steps in a process of its own, for its peak memory, and `auto` runs in processes that keep freed memory or
do not.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inference import show
from port import Port

import weightnet
from weightnet.train.memory import keep_freed_memory

PLAIN, PORT, FORMS = "plain", "port", ("reference", "feature", "matmul", "auto")
ROWS = (PLAIN, PORT, *FORMS)
SETTINGS = ((64, 128), (224, 32))  # pixels, photos
CLASSES = 100
PROCESSES = 3  # for each way to treat freed memory


def network_of(form: str) -> Any:
    """Return the 0.5x network: plain, or WeightNet 1x that computes in a form or as ports do, with the same weights."""
    torch.manual_seed(0)
    network: Any = weightnet.load(
        "shufflenet_v2_x0_5.plain" if form == PLAIN else "shufflenet_v2_x0_5", num_classes=CLASSES
    )
    if form == PORT:
        port = Port(network.spec)
        port.load_state_dict(network.state_dict())
        network = port
    elif form != PLAIN:
        weightnet.set_form(network, form)  # type: ignore[arg-type]
    return network.to(memory_format=layout_of(form)).train()


def layout_of(form: str) -> torch.memory_format:
    """Return the memory layout in which a row computes."""
    return torch.contiguous_format if form == PORT else torch.channels_last


def step_of(form: str, size: int, batch: int) -> Callable[[], None]:
    """Return a function that does one training step."""
    network = network_of(form)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    photos = torch.randn(batch, 3, size, size).to(memory_format=layout_of(form))
    labels = torch.randint(CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(photos), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def largest_gradient_difference() -> float:
    """Return by how much the forms' gradients differ from the port's, relative to its largest, in float64."""
    x, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    x = x.to(memory_format=torch.channels_last)
    gradients = {}
    for form in (PORT, *FORMS):
        network = network_of(form).double()
        F.cross_entropy(network(x), labels).backward()  # type: ignore[no-untyped-call]
        gradients[form] = torch.cat([p.grad.flatten() for _, p in sorted(network.named_parameters())])
    reference = gradients[PORT]
    return max(((gradients[form] - reference).abs().max() / reference.abs().max()).item() for form in FORMS)


def peak_memory_mb(form: str, size: int, batch: int) -> float:
    """Return the peak resident memory of a process that does two steps, in MB."""
    command = [sys.executable, __file__, "--memory-of", form, str(size), str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def step_ms(size: int, batch: int, rounds: int, *, keep: bool) -> float:
    """Return the milliseconds of a step of `auto` in a process that keeps freed memory, or gives it back."""
    options = ["--threads", str(torch.get_num_threads()), "--rounds", str(rounds), "--keep" if keep else "--no-keep"]
    command = [sys.executable, __file__, *options, "--step-of", str(size), str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def freed_memory_ms(size: int, batch: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step with freed memory given back and kept: medians of processes in turn."""
    times: dict[str, list[float]] = {"given_back": [], "kept": []}
    for _ in range(PROCESSES):
        for how, measured in times.items():
            measured.append(step_ms(size, batch, rounds, keep=how == "kept"))
    return {how: round(statistics.median(measured), 1) for how, measured in times.items()}


def median_ms(step: Callable[[], None], rounds: int) -> float:
    """Return the median duration of a step, in milliseconds, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        begun_at = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun_at)
    return 1000 * statistics.median(times[2:])


def measure(size: int, batch: int, rounds: int, memory_mb: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return photos per second, their ratios and the peak memory of every form."""
    steps = {form: step_of(form, size, batch) for form in ROWS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(rounds):
        for form, step in steps.items():
            begun_at = time.perf_counter()
            step()
            seconds[form].append(time.perf_counter() - begun_at)
    rows = {}
    for form, times in seconds.items():
        quarters = statistics.quantiles(times, n=4)
        rows[form] = {
            "photos_per_s": round(batch / statistics.median(times), 1),
            "step_ms": round(1000 * statistics.median(times), 1),
            "step_ms_iqr": round(1000 * (quarters[2] - quarters[0]), 1),
            "times_port": round(statistics.median(seconds[PORT]) / statistics.median(times), 2),
            "times_reference": round(statistics.median(seconds["reference"]) / statistics.median(times), 2),
            "times_plain": round(statistics.median(seconds[PLAIN]) / statistics.median(times), 2),
            "peak_memory_mb": round(memory_mb[form]),
        }
    return rows


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as a table in Markdown, by title."""
    columns = (
        "| setting | form | photos/s | step, ms (IQR) | x port | x reference | x plain network | peak memory, MB |"
    )
    lines = [columns, "|---" * 8 + "|"]
    for setting, rows in report["rows"].items():
        for form, row in rows.items():
            time_of = f"{row['step_ms']} ({row['step_ms_iqr']})"
            ratios = f"{row['times_port']} | {row['times_reference']} | {row['times_plain']}"
            lines.append(
                f"| {setting} | {form} | {row['photos_per_s']:,.0f} | {time_of} | {ratios} | {row['peak_memory_mb']} |"
            )
    kept = ["| setting | freed memory given back, ms | kept, ms | kept to given back |", "|---" * 4 + "|"]
    for setting, ms in report["freed_memory"].items():
        kept.append(f"| {setting} | {ms['given_back']} | {ms['kept']} | {ms['kept'] / ms['given_back']:.2f} |")
    return {"steps": "\n".join(lines), "freed memory": "\n".join(kept)}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    parser.add_argument("--memory-of", nargs=3, metavar=("FORM", "SIZE", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--step-of", nargs=2, type=int, metavar=("SIZE", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    torch.set_num_threads(options.threads)
    if options.keep:
        keep_freed_memory()
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.memory_of:
        step = step_of(options.memory_of[0], *map(int, options.memory_of[1:]))
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if options.step_of:
        print(median_ms(step_of("auto", *options.step_of), options.rounds))
        return
    # Memory first, while this process is small: a child begins with the peak of its parent.
    memory_mb = {of: {form: peak_memory_mb(form, *of) for form in ROWS} for of in SETTINGS}
    freed_ms = {f"{of[0]} px, batch {of[1]}": freed_memory_ms(*of, options.rounds) for of in SETTINGS}
    rows_of = {f"{of[0]} px, batch {of[1]}": measure(*of, options.rounds, memory_mb[of]) for of in SETTINGS}
    report = {
        "command": f"python benchmarks/train_step.py --threads {options.threads} --rounds {options.rounds}",
        "processor": platform.processor() or platform.machine(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "weightnet": weightnet.__version__,
        "gradients_differ_by": largest_gradient_difference(),
        "freed_memory": freed_ms,
        "rows": rows_of,
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
