"""`weightnet models`: the page's two tables, published beside exact, and the models inside the package."""

import dataclasses
import fnmatch
import json as json_format
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weightnet.cli.output import Switch, figures, open_results, printable
from weightnet.errors import UnknownModelError, nearest
from weightnet.nn.variants import VARIANTS, NetworkSpec

if TYPE_CHECKING:
    from weightnet.zoo.cards import Card

SIZES = ("x0_5", "x1_0", "x1_5", "x2_0")
TABLES = {
    "The page's first table: ShuffleNetV2, and with WeightNet 1x": dict.fromkeys(SIZES, ""),
    "The page's second table: with WeightNet 8x and 4x": dict.fromkeys(SIZES, ".wn4x") | {"x0_5": ".wn8x"},
}
HEADINGS = (
    ("", "parameters", "", "", "multiply-adds", "", "", "top-1 error"),
    ("name", "exact", "page's way", "printed", "exact", "page's way", "printed", "published"),
)
LEGEND = """\
exact       parameters: every trainable number. Multiply-adds: of convolutions and fully connected layers, generating
            ones included, for one 224 x 224 photo.
page's way  parameters: without batch norms and the biases of generating layers. Multiply-adds: plus one add for each
            input of the final pool. All but one round to what the page prints; shufflenet_v2_x2_0 has 561M, not 562M.
published   on ImageNet's validation photos, as the page prints it; not measured here."""


def models(pattern: Annotated[str, Parameter(name="PATTERN")] = "*", /, *, json: Switch = False) -> int:
    """List the networks and the models inside the package.

    The two tables of the original's page, each number exactly and as it is published, and what was measured of the
    models inside the package.

    Args:
        pattern: Which names, with the wildcards `*`, `?` and `[...]`, in quotes.
        json: Write a JSON array: `{"name", "params", "macs", "page": {"params", "flops", "top1_error"}}`, exact numbers
            beside the page's own texts; models inside the package have no texts of the page, but `"measured"`.
    """
    from weightnet.zoo.cards import card_path, embedded_models, read_card

    embedded = {name: read_card(card_path(file)) for name, file in embedded_models().items()}
    names = [name for name in (*VARIANTS, *embedded) if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        hint = nearest(pattern, (*VARIANTS, *embedded)) or "Leave it out to see all."
        raise UnknownModelError(f"PATTERN must match the name of a model. Got {pattern!r}. {hint}")
    results = open_results()
    if json:
        rows = [_network_row(name) if name in VARIANTS else _embedded_row(name, embedded[name]) for name in names]
        results.write("[\n" + ",\n".join(map(json_format.dumps, rows)) + "\n]\n")
    else:
        results.write("\n\n".join(_tables(names, embedded)) + "\n")
    return 0


def _network_row(name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    totals = variant.totals
    return {"name": name, "params": totals.params, "macs": totals.macs, "page": dataclasses.asdict(variant.printed)}


def _embedded_row(name: str, card: "Card") -> dict[str, Any]:
    params, macs = _totals(card.network)
    page = dict.fromkeys(("params", "flops", "top1_error"))
    return {"name": name, "params": params, "macs": macs, "page": page, "measured": dict(card.measured)}


def _totals(spec: NetworkSpec) -> tuple[int, int] | tuple[None, None]:
    """Return parameters and multiply-adds of a network that differs from one of the twelve in its classifier only."""
    for variant in VARIANTS.values():
        known = variant.spec
        if dataclasses.replace(spec, num_classes=known.num_classes, dropout=known.dropout) == known:
            more = spec.num_classes - known.num_classes
            totals = variant.totals
            return totals.params + more * (spec.head_channels + 1), totals.macs + more * spec.head_channels
    return None, None


def _tables(names: Sequence[str], embedded: "dict[str, Card]") -> list[str]:
    parts = []
    for title, endings in TABLES.items():
        pairs = [(f"shufflenet_v2_{size}.plain", f"shufflenet_v2_{size}{ending}") for size, ending in endings.items()]
        rows = [_cells(name) for pair in pairs for name in pair if name in names]
        if rows:
            parts.append(f"{title}\n\n{_aligned([*HEADINGS, *rows])}")
    if parts:
        parts.append(LEGEND)
    known = [(name, card) for name, card in embedded.items() if name in names]
    if known:
        lines = "\n".join(printable(f"{name}: {_measured(card)}") for name, card in known)
        parts.append(f"Inside the package, ready to use; measured here\n\n{lines}")
    return parts


def _cells(name: str) -> tuple[str, ...]:
    totals, printed = VARIANTS[name].totals, VARIANTS[name].printed
    return (
        name,
        f"{totals.params:,}",
        f"{totals.page_params / 1e6:.2f}M",
        printed.params,
        f"{totals.macs:,}",
        f"{totals.page_flops / 1e6:.2f}M",
        printed.flops,
        f"{printed.top1_error}%",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _measured(card: "Card") -> str:
    crop = card.preprocess.crop
    return f"{len(card.classes)} classes, {crop} x {crop} px; {figures(card.measured) or 'nothing measured'}"
