"""Find what 8-bit integers bring: networks quantised after training, in OpenVINO and ONNX Runtime, and why.

    python benchmarks/int8.py [--photos MODEL DATA]... [--rounds N] [--out benchmarks/results/int8.json]
    python benchmarks/int8.py --table benchmarks/results/int8.json

Speed: networks at 224 px with new weights and batch norms calibrated on noise, and their plain twins; on one processor
core and on two, in three processes each, in which all take turns, each of 32 photos, in batches of 1, 8 or 32. What
stays in floating point is computed in bfloat16 where the processor has it, except in `rest float32`. The graphs that
are tried:

    float32, bfloat16        as exported, the first stages computed by products
    int8                     as exported: quantised once, where a feature map is made, before it is cut and joined;
                             gains on outputs; in narrow networks the first stages stay in floating point
    int8, all                of a narrow network: all convolutions, as of the others; `weightnet export --form feature`
    int8, at each input      quantised where a convolution takes it, after cutting and joining
    int8, late gain          as int8, with a depthwise layer's gain after it, on the input of the next, not before it
    int8, placed by NNCF     by `nncf.quantize`, gates and gains left out; where NNCF is installed
    onnxruntime int8         by `onnxruntime.quantization`, convolutions only; `all` with gains, sums and joints too

Accuracy: DATA has `train/` and `val/`. 256 training photos calibrate, 1,000 others decide how much of the tails is cut
off, and the validation photos are measured once, with that. `of 7 bits` and `of 8 bits` are `int8, all` with the rest
in float32 and weights that take so many each; the latter show what becomes of them on a processor without VNNI, and are
measured there alone. `bfloat16, emulated` is computed by PyTorch with all weights and maps in bfloat16, on any
processor, in the form that `weightnet export` writes. What FILE of --out had of other models is kept, of the same
model the columns that this processor does not measure, and, with --rounds 0, the speed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from inference import (
    BATCHES,
    PASSES,
    PAUSE_S,
    SIZE_PX,
    THREADS,
    child,
    has_bfloat16,
    network_of,
    plain_twin,
    quartiles_of,
    show,
)
from int8_graphs import (
    STUDIED,
    each_of_7_bits,
    each_of_8_bits,
    graph_of,
    has_vnni,
    onnxruntime_files,
    places_at_inputs,
    quantised,
    variants_of,
)

from weightnet.export.int8 import Photos, quantise

NETWORKS = ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0")
PROFILED_BATCH = 8  # of the network in which every graph is tried
CALIBRATED, CHOSEN_ON = 256, 1000  # photos
MEASURED = (
    "float32",
    "bfloat16",
    "bfloat16, emulated",
    "int8",
    "int8, at each input",
    "int8, rest float32",
    "of 7 bits",
    "of 8 bits",
)
SAME_MODEL = 0.05  # percent: processors round differently
TAILS = (0.0, 1e-5, 1e-4, 1e-3)  # shares of the values at each end that may be cut off

Run = Callable[[Any], Any]


def compiled_for(model: Any, shape: tuple[int, ...], precision: str, *, profiled: bool = False) -> Any:
    """Return a request that runs a graph on batches of one shape."""
    import openvino

    model = model.clone()
    model.reshape({"input": list(shape)})
    options = {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": profiled}
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def write_all(folder: Path) -> None:
    """Write the graphs of all networks, and a list of them: `network|graph`, its file and its precision."""
    import openvino

    listed: dict[str, tuple[str, str]] = {}
    noise = np.random.default_rng(1).standard_normal((4, 3, SIZE_PX, SIZE_PX), np.float32)
    for name in (twin for size in NETWORKS for twin in (size, plain_twin(size))):
        for variant, (model, precision) in variants_of(name, folder).items():
            file = folder / f"{name} {variant}.xml"
            openvino.save_model(model, file, compress_to_fp16=False)
            listed[f"{name}|{variant}"] = (str(file), precision)
        for variant, file in onnxruntime_files(network_of(name), noise, folder).items() if STUDIED in name else ():
            listed[f"{name}|{variant}"] = (str(file), "f32")
    (folder / "graphs.json").write_text(json.dumps(listed), encoding="utf-8")


def measure_speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of every network and graph in this process, run by run, and where they go."""
    import openvino

    listed = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))
    sessions = {key: onnxruntime_run(file) for key, (file, _) in listed.items() if "onnxruntime" in key}
    graphs = {
        key: (openvino.Core().read_model(file), precision)
        for key, (file, precision) in listed.items()
        if key not in sessions
    }
    figures: dict[str, Any] = {"ms": {}, "profiles": {}}
    for batch in BATCHES:
        x_BCHW = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
        runs = {key: sessions.get(key) or openvino_run(*graphs[key], x_BCHW.shape) for key in listed}
        figures["ms"][str(batch)] = by_turns(runs, x_BCHW, rounds)
        print(f"  batch {batch} done", file=sys.stderr, flush=True)
    x_BCHW = np.random.default_rng(0).standard_normal((PROFILED_BATCH, 3, SIZE_PX, SIZE_PX), np.float32)
    for key, (model, precision) in graphs.items():
        if STUDIED in key:
            figures["profiles"][key] = profile(model, precision, x_BCHW)
    return figures


def openvino_run(model: Any, precision: str, shape: tuple[int, ...]) -> Run:
    """Return a function that runs a graph in OpenVINO."""
    request = compiled_for(model, shape, precision)
    return lambda x_BCHW: request.infer([x_BCHW])


def onnxruntime_run(file: str) -> Run:
    """Return a function that runs a file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the next one's turn is the next one's
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x_BCHW: session.run(None, {"input": x_BCHW})


def by_turns(runs: dict[str, Run], x_BCHW: Photos, rounds: int) -> dict[str, list[float]]:
    """Return what each run takes, in milliseconds; a turn has runs of 32 photos."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    repeats = max(BATCHES) // len(x_BCHW)  # one of a single photo varies by a fifth
    for number in range(rounds + 1):
        for key, run in runs.items():
            time.sleep(PAUSE_S)
            run(x_BCHW)  # wakes its threads
            begun_at = time.perf_counter()
            for _ in range(repeats):
                run(x_BCHW)
            if number > 0:  # the first warms up
                times[key].append(1e3 * (time.perf_counter() - begun_at) / repeats)
    return times


def times_as_fast(parts: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """Return how many times as fast as bfloat16 each run was, the median over rounds: a machine has slow minutes."""
    ratios: dict[str, dict[str, float]] = {}
    for batch, times in parts[0].items():
        ratios[batch] = {}
        for key in times:
            base = f"{key.split('|')[0]}|bfloat16"
            pairs = [pair for part in parts for pair in zip(part[batch][base], part[batch][key], strict=True)]
            ratios[batch][key] = round(statistics.median(of_base / ms for of_base, ms in pairs), 3)
    return ratios


def profile(model: Any, precision: str, x_BCHW: Photos) -> dict[str, list[float]]:
    """Return how many steps of each kind a graph has in OpenVINO, and the milliseconds that they take together."""
    request = compiled_for(model, x_BCHW.shape, precision, profiled=True)
    steps: dict[str, tuple[str, list[float]]] = {}
    for _ in range(12):
        request.infer([x_BCHW])
        for step in request.get_profiling_info():
            if step.real_time.total_seconds():
                kind = f"{step.node_type} {step.exec_type.rsplit('_', 1)[-1]}"
                steps.setdefault(step.node_name, (kind, []))[1].append(1e3 * step.real_time.total_seconds())
    kinds: dict[str, list[float]] = {}
    for kind, ms in steps.values():
        count, total = kinds.get(kind, [0, 0.0])
        kinds[kind] = [count + 1, round(total + statistics.median(ms), 4)]
    return dict(sorted(kinds.items(), key=lambda item: -item[1][1]))


def measure_accuracy(model_name: str, data: Path) -> dict[str, Any]:
    """Return the share of validation photos that a model gets right, in percent, before and after quantisation."""
    import weightnet

    network = weightnet.load(model_name, pretrained=True).eval()
    photos, labels = photos_of(network.card, data / "train", CALIBRATED + CHOSEN_ON)
    calibration, chosen_on = photos[:CALIBRATED], (photos[CALIBRATED:], labels[CALIBRATED:])
    low = "bf16" if has_bfloat16() else "f32"
    with tempfile.TemporaryDirectory() as folder:
        model, _ = graph_of(network, Path(folder))
        exported, _ = graph_of(network, Path(folder), "auto")
        graphs = {tail: quantised(network, calibration, Path(folder), tail) for tail in TAILS}
    choice = {tail: top1(graph, low, *chosen_on) for tail, graph in graphs.items()}
    tail = max(TAILS, key=lambda tail: choice[tail])
    photos, labels = photos_of(network.card, data / "val", None)
    variants = {"float32": (exported, "f32"), "int8, rest float32": (graphs[tail], "f32")}
    for bits, reach in {7: each_of_7_bits, 8: each_of_8_bits}.items():
        if bits == 7 or not has_vnni():
            variants[f"of {bits} bits"] = (quantise(model, calibration, reach=reach, tail=tail), "f32")
    if has_bfloat16():
        at_inputs = quantise(model, calibration, find=places_at_inputs, tail=tail)
        variants |= {"bfloat16": (exported, low), "int8": (graphs[tail], low), "int8, at each input": (at_inputs, low)}
    return {
        "photos": len(labels),
        "tail": tail,
        "train_top1_by_tail": {"float32": top1(model, "f32", *chosen_on), **{str(t): choice[t] for t in TAILS}},
        "top1": {variant: top1(graph, precision, photos, labels) for variant, (graph, precision) in variants.items()}
        | {"bfloat16, emulated": top1_emulated(network, photos, labels)},
    }


def photos_of(card: Any, data: Path, count: int | None) -> tuple[Photos, Any]:
    """Return photos of a folder, prepared, and their labels: all, or some that are drawn."""
    from weightnet.images.decode import read_image
    from weightnet.predict.labelled import read_labelled_photos

    found = read_labelled_photos(data, card.classes)
    drawn = np.random.default_rng(0).permutation(len(found))[:count]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        photos = list(threads.map(lambda number: card.preprocess(read_image(found.paths[number])), drawn))
    return np.stack(photos), found.labels[drawn]


def top1(model: Any, precision: str, photos: Photos, labels: Any) -> float:
    """Return the share of photos that a graph gets right, in percent."""
    batch, right = 32, 0
    request = compiled_for(model, (batch, *photos.shape[1:]), precision)
    for start in range(0, len(photos), batch):
        x_BCHW = photos[start : start + batch]
        padded = np.concatenate([x_BCHW, np.zeros((batch - len(x_BCHW), *x_BCHW.shape[1:]), np.float32)])
        logits = next(iter(request.infer([padded]).values()))[: len(x_BCHW)]
        right += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return round(100 * right / len(labels), 2)


def top1_emulated(network: Any, photos: Photos, labels: Any) -> float:
    """The same for a network in PyTorch, all weights and maps in bfloat16."""
    import torch

    import weightnet

    folded: Any = weightnet.fold(network).bfloat16()
    folded = folded.to(memory_format=torch.channels_last)
    right = 0
    with torch.inference_mode():
        batches = zip(*(torch.split(torch.from_numpy(array), 32) for array in (photos, labels)), strict=True)
        for x_BCHW, of_batch in batches:
            x_BCHW = x_BCHW.bfloat16().contiguous(memory_format=torch.channels_last)
            right += int((folded(x_BCHW).argmax(1) == of_batch).sum())
    return round(100 * right / len(labels), 2)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as tables in Markdown, by title."""
    return {
        "accuracy": accuracy_table(report["accuracy"]),
        "speed on one core": speed_table(report["threads"]["1"]),
        "speed on two cores": speed_table(report["threads"]["2"]),
        "profiles": profile_table(report["threads"]["1"]["profiles"]),
    }


def accuracy_table(accuracy: dict[str, Any]) -> str:
    """Return the share of validation photos that each model gets right, in percent."""
    variants = [name for name in MEASURED if any(name in figures["top1"] for figures in accuracy.values())]
    lines = [f"| {' | '.join(['model', 'photos', *variants])} |", "|---" * (2 + len(variants)) + "|"]
    for model, figures in accuracy.items():
        shares = [figures["top1"].get(name) for name in variants]
        cells = [f"`{model}`", f"{figures['photos']:,}", *("" if share is None else f"{share:.2f}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(measured: dict[str, Any]) -> str:
    """Return medians in milliseconds a batch, and how many times as fast as bfloat16 in OpenVINO they are."""
    quartiles, ratios = measured["ms_quartiles"], measured["times_as_fast"]
    columns = ["network", "graph", *(f"batch {batch}" for batch in quartiles)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key in next(iter(quartiles.values())):
        cells = [f"{quartiles[batch][key][1]:.3g} ({ratios[batch][key]:.2f})" for batch in quartiles]
        lines.append(f"| `{key.split('|')[0]}` | {key.split('|')[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(profiles: dict[str, Any]) -> str:
    """Return the milliseconds that each graph spends in steps of a kind, and how many steps they are."""
    kinds = ("Convolution", "GroupConvolution", "Subgraph", "FullyConnected", "ReduceMean", "Reorder")
    columns = ["network", "graph", *kinds, "Split and Concat", "other"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key, steps in profiles.items():
        sums = {column: [0.0, 0.0] for column in columns[2:]}
        for step, (count, ms) in steps.items():
            kind = step.split()[0]
            column = kind if kind in kinds else "Split and Concat" if kind.endswith(("Split", "Concat")) else "other"
            sums[column] = [sums[column][0] + count, sums[column][1] + ms]
        cells = [f"{ms:.2f} ({count:.0f})" for count, ms in sums.values()]
        lines.append(f"| `{key.split('|')[0]}` | {key.split('|')[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and write the figures."""
    import openvino

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", nargs=2, action="append", default=[], metavar=("MODEL", "DATA"))
    parser.add_argument("--rounds", type=int, default=4, help="turns of each graph in each of three processes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a report, and measure nothing")
    parser.add_argument("--measure-in", type=Path, help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.measure_in:
        print(json.dumps(measure_speed(options.measure_in, options.rounds)))
        return
    if len(os.sched_getaffinity(0)) < max(THREADS):
        parser.error(f"{max(THREADS)} cores are needed. Got {os.sched_getaffinity(0)}: see taskset.")
    if not (options.rounds or (options.out and options.out.exists())):
        parser.error("--rounds 0 keeps the speed in the file of --out. Got none. Measure it first.")
    accuracy = {Path(model).name: measure_accuracy(model, Path(data)) for model, data in options.photos}
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    for name, figures in accuracy.items():
        before = kept.get("accuracy", {}).get(name, {}).get("top1", {})
        if before and abs(before["float32"] - figures["top1"]["float32"]) <= SAME_MODEL:
            figures["top1"] = before | figures["top1"]
    accuracy = kept.get("accuracy", {}) | accuracy
    if not options.rounds:
        report = kept | {"accuracy": accuracy}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        arguments = ["--rounds", str(options.rounds), "--measure-in", folder]
        passes = [{count: child(__file__, arguments, count) for count in THREADS} for _ in range(PASSES)]
    threads = {
        str(count): {
            "ms_quartiles": quartiles_of([parts[count]["ms"] for parts in passes]),
            "times_as_fast": times_as_fast([parts[count]["ms"] for parts in passes]),
            "profiles": passes[0][count]["profiles"],
        }
        for count in THREADS
    }
    report = {
        "command": f"python benchmarks/int8.py --rounds {options.rounds}",
        "size_px": SIZE_PX,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "bfloat16": has_bfloat16(),
        "openvino": openvino.__version__,
        "accuracy": accuracy,
        "threads": threads,
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
