"""The charts of an evaluation's page, as tables and SVG.

Shape suffixes: K classes with a folder, C classes of the model.
"""

import html
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from weightnet.predict.metrics import Bin

Counts = npt.NDArray[np.int64]

_CELL = 10  # SVG units
_LABEL_CELLS = 14  # room for a row's label
_LABELLED_ROWS = 150  # beyond that they cannot be read; the cells still say what they are when pointed at
_TABLE_STRENGTH = 0.6  # keeps the numbers legible
_PLOT = 300
_HISTOGRAM = 60


def escaped(text: str) -> str:
    r"""Return text that is safe in HTML, attributes included; what cannot be printed becomes an escape.

    >>> escaped("<b>'\u202e\x00\udcff")
    '&lt;b&gt;&#x27;\\u202e\\x00\\udcff'
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return html.escape(shown, quote=True)


def confusion_table(counts_KK1: Counts, labels: Sequence[str]) -> str:
    """Return a table of counts, for few classes.

    Args:
        counts_KK1: rows are true classes, columns predicted ones, the last of them all classes without a folder.
        labels: of the K classes.

    Shape: (K, K + 1), (K,).
    """
    names = [escaped(label) for label in labels]
    others = [] if not counts_KK1[:, -1].any() else ["other classes"]
    head = "".join(f'<th scope="col">{name}</th>' for name in [*names, *others])
    rows = []
    for row, name in enumerate(names):
        total = max(1, int(counts_KK1[row].sum()))
        cells = []
        for column, count in enumerate(counts_KK1[row, : len(names) + len(others)].tolist()):
            kind = "right" if column == row else "wrong"
            share = _TABLE_STRENGTH * _strength(count / total)
            cells.append(f'<td class="{kind}" style="--share: {share:.2f}">{count or ""}</td>')
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def confusion_heat_map(counts_KK1: Counts, labels: Sequence[str]) -> str:
    """Return a picture of the counts, for many classes; args and shape are those of `confusion_table`."""
    columns = len(labels) + bool(counts_KK1[:, -1].any())
    left = _LABEL_CELLS * _CELL if len(labels) <= _LABELLED_ROWS else 0
    width, height = left + columns * _CELL, len(labels) * _CELL
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Confusion matrix: rows are true classes, columns predicted ones">'
        f'<rect class="ground" x="{left}" y="0" width="{columns * _CELL}" height="{height}"/>'
    ]
    if left:
        for row, label in enumerate(labels):
            short = label if len(label) <= 24 else label[:23] + "…"
            parts.append(
                f'<text x="{left - 3}" y="{row * _CELL + 8}" text-anchor="end" style="font-size: 8px">'
                f"{escaped(short)}</text>"
            )
    parts += _heat_map_cells(counts_KK1, labels, left)
    return f'<div class="wide">{"".join(parts)}</svg></div>'


def _heat_map_cells(counts_KK1: Counts, labels: Sequence[str], left: int) -> Iterator[str]:
    names = [*map(escaped, labels), "other classes"]
    totals = counts_KK1.sum(1).tolist()
    for row, column in np.argwhere(counts_KK1).tolist():
        count = int(counts_KK1[row, column])
        yield (
            f'<rect class="{"right" if row == column else "wrong"}" x="{left + column * _CELL}" y="{row * _CELL}" '
            f'width="{_CELL}" height="{_CELL}" fill-opacity="{_strength(count / totals[row]):.2f}">'
            f"<title>{names[row]} → {names[column]}: {count} of {totals[row]}</title></rect>"
        )


def _strength(share: float) -> float:
    """Return an opacity: few photos of many are to be seen too."""
    return 0.0 if not share else 0.1 + 0.9 * float(share) ** 0.5


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Return a chart of how often predictions are right by how sure they are, over how many of each there are."""
    most = max(1, *(row.photos for row in bins))
    width, height = _PLOT + 80, _PLOT + _HISTOGRAM + 66
    parts = [
        f'<svg viewBox="-50 -10 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Reliability diagram: accuracy by confidence">'
        f'<rect class="ground" x="0" y="0" width="{_PLOT}" height="{_PLOT}"/>'
    ]
    for row in bins:
        if row.confidence is None or row.accuracy is None:
            continue
        x, wide = row.above * _PLOT, (row.up_to - row.above) * _PLOT
        low, high = sorted((row.accuracy, row.confidence))
        tip = (
            f"<title>confidence {row.above:.0%} to {row.up_to:.0%}: {row.photos} photos, "
            f"mean confidence {row.confidence:.1%}, {row.accuracy:.1%} right</title>"
        )
        parts.append(_bar("right", x, _PLOT, wide, row.accuracy * _PLOT, tip))
        parts.append(_bar("gap", x, _PLOT - low * _PLOT, wide, (high - low) * _PLOT, tip))
        parts.append(_bar("right", x, _PLOT + 30 + _HISTOGRAM, wide, row.photos / most * _HISTOGRAM, tip))
    parts.append(f'<line class="ideal" x1="0" y1="{_PLOT}" x2="{_PLOT}" y2="0"/>')
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{share * _PLOT:.0f}" y="{_PLOT + 16}" text-anchor="middle">{share:.0%}</text>')
        parts.append(f'<text x="-6" y="{(1 - share) * _PLOT + 5:.0f}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<text x="0" y="{height - 16}">photos; most in one range: {most:,}</text></svg>')
    return "".join(parts)


def _bar(kind: str, x: float, bottom: float, width: float, height: float, tip: str) -> str:
    return (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{bottom - height:.1f}" width="{width - 1:.1f}" '
        f'height="{height:.1f}">{tip}</rect>'
    )
