"""Measure both forms of generated 1x1 layers in the folded network, in ONNX Runtime and OpenVINO on one core.

    python benchmarks/forms.py [--rounds N] [--out benchmarks/results/forms.json]
    python benchmarks/forms.py --table benchmarks/results/forms.json

WeightNet networks with r = 1, 2 and 4 at 224 px, one photo and four. All take
turns, one run each a round: figures are medians, in milliseconds. Networks are those of `inference.py`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from inference import FILES, SIZE_PX, child, commit, machine, network_of, show

NETWORKS = ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_0.wn4x", "shufflenet_v2_x0_5.wn8x")
FORMS, ENGINES, BATCHES = ("feature", "matmul"), ("onnxruntime", "openvino"), (1, 4)


def measure(rounds: int) -> dict[str, float]:
    """Return the median of each network, form, engine and batch."""
    import weightnet
    from weightnet.predict.engines import open_engine

    times: dict[str, list[float]] = {}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            network = network_of(name)
            for form in FORMS:
                for engine in ENGINES:
                    file = Path(folder) / f"{name}_{form}{FILES[engine]}"
                    weightnet.export_model(network, file, form=form)  # type: ignore[arg-type]
                    runs[f"{name}|{form}|{engine}"] = open_engine(file).run
        for batch in BATCHES:
            photos = np.random.default_rng(0).standard_normal((batch, 3, SIZE_PX, SIZE_PX), np.float32)
            for turn in range(rounds + 1):
                for key, run in runs.items():
                    begun_at = time.perf_counter()
                    run(photos)
                    if turn:  # the first one warms up
                        times.setdefault(f"{key}|{batch}", []).append(1e3 * (time.perf_counter() - begun_at))
    return {key: round(statistics.median(ms), 3) for key, ms in times.items()}


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the figures as a table in Markdown, by its title."""
    columns = [(engine, batch, form) for engine in ENGINES for batch in BATCHES for form in FORMS]
    titles = [f"{engine}, {batch}, {form}" for engine, batch, form in columns]
    lines = [f"| network | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name in NETWORKS:
        cells = [f"{report['ms'][f'{name}|{form}|{engine}|{batch}']:.3g}" for engine, batch, form in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return {"both forms": "\n".join(lines)}


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
        "ms": child(__file__, ["--child", "--rounds", str(options.rounds)], 1),
    }
    show(tables(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
