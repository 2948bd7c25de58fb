"""Measure where the time of a network goes, by kind of operator, in ONNX Runtime and OpenVINO on one core.

    python benchmarks/operators.py [--out benchmarks/results/operators.json]
    python benchmarks/operators.py --table benchmarks/results/operators.json

The 1.0x WeightNet network and its plain twin at 224 px, in batches of 1 and 4, with the engines' own profilers; and in
OpenVINO three WeightNet networks in batches of 8, in float32 and, where the processor has it, in bfloat16. Of nine runs
the fastest one counts; figures are milliseconds a batch. Networks and files are those of `inference.py`.
"""

import argparse
import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from inference import FILES, SIZE_PX, child, commit, export, has_bfloat16, machine, network_of, plain_twin, show

NETWORK = "shufflenet_v2_x1_0"
BATCHES = (1, 4)
IN_LOW_PRECISION, LOW_PRECISION_BATCH = ("shufflenet_v2_x0_5", NETWORK, "shufflenet_v2_x0_5.wn8x"), 8
RUNS = 9

# What operators do, so that both engines' names for it fall together; what is not listed is "other".
KINDS = {
    "convolutions": ("Conv", "Convolution", "GroupConvolution"),
    "gains and sums": ("Mul", "Multiply", "Add", "Relu", "Eltwise", "Subgraph"),
    "changes of layout": ("ReorderInput", "ReorderOutput", "Reorder", "Transpose"),
    "splits and concatenations": ("Split", "VariadicSplit", "Slice", "Concat"),
    "gates": ("Gemm", "FusedGemm", "FullyConnected", "ReduceMean", "Unsqueeze"),
    "products with generated kernels": ("MatMul",),
}

Times = dict[str, float]  # milliseconds by operator


def in_onnxruntime(model: Path, x_BCHW: np.ndarray[Any, Any]) -> list[Times]:
    """Return the operators' times of each run in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(model.with_suffix(""))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {"input": x_BCHW})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run"]
    times: list[Times] = [collections.defaultdict(float) for _ in runs]
    for event in events:
        if event["name"].endswith("_kernel_time"):
            run = next(number for number, (start, stop) in enumerate(runs) if start <= event["ts"] < stop)
            times[run][event["args"]["op_name"]] += event["dur"] / 1e3
    return times


def in_openvino(model: Path, x_BCHW: np.ndarray[Any, Any], precision: str = "f32") -> list[Times]:
    """Return the operators' times of each run in OpenVINO."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    core = openvino.Core()
    graph = core.read_model(model)
    graph.reshape(list(x_BCHW.shape))  # as Classifier does: other operators than for open shapes
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    times: list[Times] = [collections.defaultdict(float) for _ in range(RUNS)]
    for run in times:
        request.infer({0: x_BCHW})
        for operator in request.get_profiling_info():
            run[operator.node_type] += 1e3 * operator.real_time.total_seconds()
    return times


def by_kind(runs: list[Times]) -> Times:
    """Return the times of the fastest run by kind of operator."""
    fastest = min(runs, key=lambda run: sum(run.values()))
    kinds = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    times: Times = collections.defaultdict(float)
    for operator, ms in fastest.items():
        times[kinds.get(operator, "other")] += ms
    return {kind: round(times[kind], 2) for kind in (*KINDS, "other")}


def measure() -> dict[str, dict[str, Times]]:
    """Return the times by engine, network and batch."""
    import weightnet

    report: dict[str, dict[str, Times]] = {"onnxruntime": {}, "openvino": {}, "precisions": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in (plain_twin(NETWORK), NETWORK):
            export(network_of(name), name, Path(folder))
            for batch in BATCHES:
                x_BCHW = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
                for engine, run in (("onnxruntime", in_onnxruntime), ("openvino", in_openvino)):
                    times = run(Path(folder) / f"{name}{FILES[engine]}", x_BCHW)
                    report[engine][f"{name}|{batch}"] = by_kind(times)
        x_BCHW = np.random.default_rng(0).standard_normal((LOW_PRECISION_BATCH, 3, SIZE_PX, SIZE_PX), np.float32)
        for name in IN_LOW_PRECISION:
            model = Path(folder) / f"{name}{FILES['openvino']}"
            weightnet.export_model(network_of(name), model)
            for precision in ("f32", "bf16") if has_bfloat16() else ("f32",):
                report["precisions"][f"{name}|{precision}"] = by_kind(in_openvino(model, x_BCHW, precision))
    return report


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the times as tables in Markdown, by title."""
    engines, precisions = report["engines"], report["precisions"]
    rows = [[engine, *row.split("|"), times] for engine, of in engines.items() for row, times in of.items()]
    low = [[*row.split("|"), times] for row, times in precisions.items()]
    return {
        "by kind of operator": kinds_table(["engine", "network", "batch"], rows),
        "in float32 and bfloat16": kinds_table(["network", "precision"], low),
    }


def kinds_table(titles: list[str], rows: list[Any]) -> str:
    """Return rows of names and times as a table in Markdown; kinds of operators that take no time are left out."""
    kinds = [kind for kind in (*KINDS, "other") if any(times[kind] for *_, times in rows)]
    lines = [f"| {' | '.join([*titles, *kinds])} |", "|---" * (len(titles) + len(kinds)) + "|"]
    for *names, times in rows:
        cells = [f"`{name}`" if "shufflenet" in name else name for name in names]
        lines.append(f"| {' | '.join([*cells, *(f'{times[kind]:.3g}' for kind in kinds)])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # what the process is started with
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure()))
        return
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    measured_on, measured = machine(), child(__file__, ["--child"], 1)
    report = {
        "command": "python benchmarks/operators.py",
        "commit": commit(),
        "machine": measured_on,
        "runs": RUNS,
        "precisions": measured.pop("precisions"),
        "engines": measured,
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
