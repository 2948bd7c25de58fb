"""Write into the README and the pages of docs/ what the program says: network tables, figures, what a command prints.

    python scripts/update_pages.py

Each stands between a line `<!-- from the program: NAME -->` and the next empty line; the tests compare.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightnet.cli import main
from weightnet.nn.variants import VARIANTS
from weightnet.zoo.cards import card_path, embedded_models, read_card
from weightnet.zoo.state import variant_name

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks"
STUDY = ROOT / "studies" / "tiny100"
TABLE_PAGES = [ROOT / "docs" / name for name in ("benchmark.md", "int8.md", "static.md", "study.md", "training.md")]
sys.path += [str(BENCHMARKS), str(STUDY)]  # whose scripts are no package

FIGURES = {
    "photos": "validation photos",
    "top1": "top-1",
    "top5": "top-5",
    "class_averaged_top1": "top-1, each class counting alike",
    "loss": "cross-entropy, nats",
    "ece": "calibration error",
}


def network_table(endings: Mapping[str, str]) -> str:
    """Return one of the page's tables, published beside exact; `endings` gives the second network of each size."""
    lines = [
        "| model | name here | #Params, published | parameters, exact, ours | FLOPs, published "
        "| multiply-adds, exact, ours | top-1 error, published |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, ending in endings.items():
        for name in (f"shufflenet_v2_{size}.plain", f"shufflenet_v2_{size}{ending}"):
            variant = VARIANTS[name]
            exact, printed = variant.totals, variant.printed
            lines.append(
                f"| {variant.title} | `{name}` | {printed.params} | {exact.params:,} | {printed.flops} "
                f"| {exact.macs:,} | {printed.top1_error}% |"
            )
    return "\n".join(lines)


def model_table(name: str) -> str:
    """Return what an embedded model's card says."""
    weights = embedded_models()[name]
    card = read_card(card_path(weights))
    preprocess = card.preprocess
    resizing = "antialiased" if preprocess.interpolation == "area" else "bilinear"
    rows = {
        "network": f"`{variant_name(card.network)}`",
        "classes": str(len(card.classes)),
        "input": f"short edge {preprocess.resize} px, {resizing}; centre {preprocess.crop} x {preprocess.crop}",
        "files": " and ".join(
            f"{path.stat().st_size / 1e6:.1f} MB {what}"
            for path, what in ((weights, "of weights"), (weights.with_suffix(".onnx"), "exported"))
        ),
        **figure_rows(card.measured),
        "terms": card.terms,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def figure_rows(measured: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures to show, as text: those of the whole, then the top-1 accuracy on each source of the photos.

    >>> figure_rows({"photos": 6051, "top1": 0.7, "sources": {"pets": {"photos": 900, "top1": 0.81}}})
    {'validation photos': '6,051', 'top-1': '70.0%', 'top-1, pets': '81.0% of 900'}
    """
    rows = {text: _figure(name, measured[name]) for name, text in FIGURES.items() if name in measured}
    for source, figures in measured.get("sources", {}).items():
        rows[f"top-1, {source}"] = f"{_figure('top1', figures['top1'])} of {_figure('photos', figures['photos'])}"
    if known := measured.get("known"):
        rows["photos of other things called unknown"] = f"{known['caught']:.1%} of {known['unknown_photos']:,}"
        rows["validation photos called unknown"] = (
            f"{known['lost']:.1%}; {known['lost_right']:.1%} of those named rightly"
        )
    return rows


def _figure(name: str, value: float) -> str:
    if name == "photos":
        return f"{value:,}"
    return f"{value:.2f}" if name in ("loss", "ece") else f"{value:.1%}"


def default_output() -> str:
    """Return what the README's first command prints, from the repository's root."""
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as written:
        code = main(["predict", "examples/cat.png"])
    assert code == 0, f"weightnet predict gave exit code {code}"
    return f"```text\n{written.getvalue().rstrip()}\n```"


def table(results: str, title: str) -> str:
    """Return a table that the study, or a script of benchmarks/, makes of results: those of its name, or NAME_avx2."""
    file = STUDY / "results.json" if results == "study" else BENCHMARKS / "results" / f"{results}.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    made: str = importlib.import_module(results.removesuffix("_avx2")).tables(report)[title]
    return made


PARTS: dict[str, Callable[[], str]] = {
    "first table": lambda: network_table({"x0_5": "", "x1_0": "", "x1_5": "", "x2_0": ""}),
    "second table": lambda: network_table({"x0_5": ".wn8x", "x1_0": ".wn4x", "x1_5": ".wn4x", "x2_0": ".wn4x"}),
    **{name: functools.partial(model_table, name) for name in embedded_models()},
    "weightnet predict examples/cat.png": default_output,
}


def part_pattern(name: str) -> re.Pattern[str]:
    """Return the pattern whose second group is a part's text."""
    return re.compile(rf"(<!-- from the program: {re.escape(name)} -->\n)(.*?)(?=\n\n)", re.DOTALL)


def table_parts(path: Path) -> dict[str, Callable[[], str]]:
    """Return the parts of a page of docs/, whose names are "RESULTS, title of a table"."""
    names = re.findall("<!-- from the program: (.*) -->", path.read_text(encoding="utf-8"))
    return {name: functools.partial(table, *name.split(", ", 1)) for name in names}


def update(path: Path, parts: Mapping[str, Callable[[], str]]) -> None:
    """Write a page's parts anew."""
    page = path.read_text(encoding="utf-8")
    for name, make in parts.items():
        text = make()
        page, found = part_pattern(name).subn(lambda match, text=text: match[1] + text, page)  # type: ignore[misc]
        assert found == 1, f"{path} must have one part {name!r}"
    path.write_text(page, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    update(README, PARTS)
    for page in TABLE_PAGES:
        update(page, table_parts(page))
