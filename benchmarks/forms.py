"""Measure both forms of generated 1x1 layers in the folded network, in ONNX Runtime and OpenVINO on one core.

    python benchmarks/forms.py [--rounds N] [--out benchmarks/results/forms.json]
    python benchmarks/forms.py --table benchmarks/results/forms.json

WeightNet networks of r = 1, 4 and 8 at 224 px, one photo and eight, with products (the form "matmul") in none of the
three stages, in the first, in two and in all; in the table what `fold` chooses is bold. Then, in OpenVINO, what it
chooses with the blocks' inputs joined of slices and selected from two maps, beside plain networks. What is compared
takes turns: figures are medians, in milliseconds. Networks are those of `inference.py`.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from inference import FILES, SIZE_PX, child, commit, machine, network_of, plain_twin, show

NETWORKS = (
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "shufflenet_v2_x1_0.wn4x",
    "shufflenet_v2_x0_5.wn8x",
)
STAGES, ENGINES, BATCHES = 3, ("onnxruntime", "openvino"), (1, 8)
SELECTING = (*sorted({plain_twin(name) for name in NETWORKS}), *NETWORKS)

Run = Callable[[np.ndarray[Any, Any]], Any]


def forms_of(products: int) -> list[Literal["feature", "matmul"]]:
    """Return the stages' forms, the first few being products."""
    return ["matmul" if stage < products else "feature" for stage in range(STAGES)]


def measure(rounds: int) -> dict[str, Any]:
    """Return the median of each network, way, engine and batch, and what each network is folded into."""
    import weightnet
    from weightnet.nn.fold import FoldedShuffleNetV2

    times: dict[str, float] = {}
    chosen = {}
    for name in NETWORKS:
        network = network_of(name)
        chosen[name] = weightnet.fold(network).forms
        for engine in ENGINES:
            folded = {
                str(products): FoldedShuffleNetV2(network, forms=forms_of(products), select=engine == "openvino")
                for products in range(STAGES + 1)
            }
            times |= medians(name, {way: one.float().eval() for way, one in folded.items()}, engine, rounds)
    for name in SELECTING:
        network = network_of(name)
        both = {way: weightnet.fold(network, select=way == "selected") for way in ("joined", "selected")}
        times |= medians(name, both, "openvino", rounds)
    return {"ms": times, "chosen": chosen}


def medians(name: str, folded: dict[str, Any], engine: str, rounds: int) -> dict[str, float]:
    """Return the median of each way that a network is folded, with each batch, in turns."""
    import weightnet
    from weightnet.predict.engines import open_engine

    times = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}{FILES[engine]}" for way in folded}
        for way, file in files.items():
            weightnet.export_model(folded[way], file)
        runs = [open_engine(file).run for file in files.values()]
        for batch in BATCHES:
            for way, ms in zip(folded, in_turns(runs, batch, rounds), strict=True):
                times[f"{name}|{way}|{engine}|{batch}"] = round(statistics.median(ms), 3)
    return times


def in_turns(runs: Sequence[Run], batch: int, rounds: int) -> list[list[float]]:
    """Return the milliseconds of each, which run one after the other: once unmeasured, to have its weights at hand."""
    photos = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, ms in zip(runs, times, strict=True):
            run(photos)
            begun_at = time.perf_counter()
            run(photos)
            if turn:  # the first one warms up
                ms.append(1e3 * (time.perf_counter() - begun_at))
    return times


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as tables in Markdown, by their titles."""
    lines = ["| network | engine | photos | none | 1st | 1st and 2nd | all |", "|---" * 7 + "|"]
    for name, engine, batch in itertools.product(NETWORKS, ENGINES, BATCHES):
        cells = []
        for products in range(STAGES + 1):
            ms = f"{report['ms'][f'{name}|{products}|{engine}|{batch}']:.3g}"
            cells.append(f"**{ms}**" if forms_of(products) == report["chosen"][name] else ms)
        lines.append(f"| `{name}` | {engine} | {batch} | {' | '.join(cells)} |")
    selecting = ["| network | photos | joined | selected | ratio |", "|---" * 5 + "|"]
    for name, batch in itertools.product(SELECTING, BATCHES):
        joined, selected = (report["ms"][f"{name}|{way}|openvino|{batch}"] for way in ("joined", "selected"))
        selecting.append(f"| `{name}` | {batch} | {joined:.3g} | {selected:.3g} | {selected / joined:.2f} |")
    return {"stages by products": "\n".join(lines), "inputs joined and selected": "\n".join(selecting)}


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # what the process is started with
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.rounds)))
        return
    if options.table:
        show(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    report = {
        "command": f"python benchmarks/forms.py --rounds {options.rounds}",
        "commit": commit(),
        "machine": machine(),
        **child(__file__, ["--child", "--rounds", str(options.rounds)], 1),
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
