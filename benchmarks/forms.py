"""Measure both forms of generated 1x1 layers in the folded network, in ONNX Runtime and OpenVINO on one core.

    python benchmarks/forms.py [--rounds N] [--out benchmarks/results/forms.json]
    python benchmarks/forms.py --table benchmarks/results/forms.json

WeightNet networks of r = 1 and 4 at 224 px, one photo and eight, with products (the form "matmul") in none of the three
stages, in the first, in two and in all; in the table what `fold` chooses is bold. These four take turns: figures are
medians, in milliseconds. Networks are those of `inference.py`.
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
from inference import FILES, SIZE_PX, child, commit, machine, network_of, show

NETWORKS = (
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "shufflenet_v2_x1_0.wn4x",
    "shufflenet_v2_x0_5.wn8x",
)
STAGES, ENGINES, BATCHES = 3, ("onnxruntime", "openvino"), (1, 8)

Run = Callable[[np.ndarray[Any, Any]], Any]


def forms_of(products: int) -> list[Literal["feature", "matmul"]]:
    """Return the stages' forms, the first few being products."""
    return ["matmul" if stage < products else "feature" for stage in range(STAGES)]


def measure(rounds: int) -> dict[str, Any]:
    """Return the median of each network, number of stages, engine and batch, and what each network is folded into."""
    import weightnet
    from weightnet.nn.fold import FoldedShuffleNetV2
    from weightnet.predict.engines import open_engine

    times: dict[str, list[float]] = {}
    chosen = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            network = network_of(name)
            chosen[name] = weightnet.fold(network).forms
            folded = [FoldedShuffleNetV2(network, forms=forms_of(n)).float().eval() for n in range(STAGES + 1)]
            for engine in ENGINES:
                runs = []
                for products, one in enumerate(folded):
                    file = Path(folder) / f"{name}_{products}{FILES[engine]}"
                    weightnet.export_model(one, file)
                    runs.append(open_engine(file).run)
                for batch in BATCHES:
                    for products, ms in enumerate(in_turns(runs, batch, rounds)):
                        times[f"{name}|{products}|{engine}|{batch}"] = ms
    return {"ms": {key: round(statistics.median(ms), 3) for key, ms in times.items()}, "chosen": chosen}


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
    """Return the figures as a table in Markdown, by its title."""
    lines = ["| network | engine | photos | none | 1st | 1st and 2nd | all |", "|---" * 7 + "|"]
    for name, engine, batch in itertools.product(NETWORKS, ENGINES, BATCHES):
        cells = []
        for products in range(STAGES + 1):
            ms = f"{report['ms'][f'{name}|{products}|{engine}|{batch}']:.3g}"
            cells.append(f"**{ms}**" if forms_of(products) == report["chosen"][name] else ms)
        lines.append(f"| `{name}` | {engine} | {batch} | {' | '.join(cells)} |")
    return {"stages by products": "\n".join(lines)}


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
