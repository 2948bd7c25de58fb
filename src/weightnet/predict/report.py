"""An evaluation as one HTML page that needs nothing else: no scripts, no other files, no hosts.

Names of files, folders and classes are strangers' data: every text goes through `escaped`, and a content security
policy forbids the page everything but its own styles and pictures.
"""

import base64
import importlib.resources
import itertools
import os
import string
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from weightnet import __version__
from weightnet.errors import ImageError
from weightnet.images.decode import read_image
from weightnet.predict.evaluate import ClassResult, Evaluation
from weightnet.predict.metrics import softmax
from weightnet.predict.report_charts import confusion_heat_map, confusion_table, escaped, reliability_diagram

WORST_CLASSES = 12
PHOTOS_PER_CLASS = 6
CONFUSED_PAIRS = 20
NAMED_UNREADABLE = 200
MAX_TABLE_CLASSES = 20  # a table of numbers up to here, a heat map beyond
_UNFOLDED_CLASSES = 30  # a longer table of classes is folded up
_THUMBNAIL_PX = 112
_JPEG_QUALITY = 80


def render_report(evaluation: Evaluation, *, model: str) -> str:
    """Return an evaluation as an HTML page, for people.

    It shows the figures, a reliability diagram, the confusion matrix, the most confused pairs, the worst classes with
    their most wrong photos (read again from where they lie), and all classes.

    Args:
        evaluation: what was measured.
        model: what the page is to call the model.
    """
    preprocess = evaluation.card.preprocess
    subtitle = (
        f"on {len(evaluation.paths):,} photos of {len(evaluation.classes):,} classes in {evaluation.root}; "
        f"short edge {preprocess.resize} px, {preprocess.interpolation}; "
        f"centre {preprocess.crop} x {preprocess.crop} px; weightnet {__version__}"
    )
    template = importlib.resources.files("weightnet.predict") / "report.html"
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=escaped(f"Evaluation of {model}"),
        subtitle=escaped(subtitle),
        figures=_figures(evaluation),
        reliability=reliability_diagram(evaluation.reliability)
        + '<p class="faint">Bars: how often predictions of this confidence are right. Outlined: the distance from what '
        "the model claims; the calibration error is its mean over photos.</p>",
        confusion=_confusion(evaluation),
        worst="".join(_worst_classes(evaluation)) or "<p>No photo is wrong.</p>",
        classes=_class_table(evaluation),
        unreadable=_unreadable(evaluation),
    )


def _figures(evaluation: Evaluation) -> str:
    figures = evaluation.figures
    known = len(evaluation.card.classes)
    rows = [
        ("photos", f"{len(evaluation.paths):,}"),
        ("left out, could not be classified", f"{len(evaluation.unreadable):,}"),
        ("classes with photos, of the model's", f"{len(evaluation.classes):,} of {known:,}"),
        ("top-1", f"{figures['top1']:.2%}"),
        ("top-5", f"{figures['top5']:.2%}"),
        ("top-1, each class counting alike", f"{figures['class_averaged_top1']:.2%}"),
        ("cross-entropy, nats", f"{figures['loss']:.4f}"),
        ("calibration error (ECE, 15 ranges)", f"{figures['ece']:.4f}"),
    ]
    if "unknown" in figures:
        rows.append(("taken for none of the model's classes", f"{figures['unknown']:.2%}"))
    return _table((), ((escaped(name), value) for name, value in rows), numbers=(1,))


def _confusion(evaluation: Evaluation) -> str:
    counts_KC = evaluation.confusion()
    shown = [result.index for result in evaluation.classes]
    labels = [result.label for result in evaluation.classes]
    elsewhere_K = counts_KC.sum(1) - counts_KC[:, shown].sum(1)
    counts_KK1 = np.column_stack([counts_KC[:, shown], elsewhere_K])
    draw = confusion_table if len(labels) <= MAX_TABLE_CLASSES else confusion_heat_map
    return (
        '<p class="faint">Rows are true classes, columns what the model says, in the same order. '
        "The stronger the colour, the larger the share of the row.</p>"
        f"{draw(counts_KK1, labels)}<h3>Most often confused</h3>{_pairs(evaluation, counts_KC)}"
    )


def _pairs(evaluation: Evaluation, counts_KC: npt.NDArray[np.int64]) -> str:
    wrong_KC = counts_KC.copy()
    for row, result in enumerate(evaluation.classes):
        wrong_KC[row, result.index] = 0
    order = np.argsort(-wrong_KC, axis=None, kind="stable")[:CONFUSED_PAIRS]
    rows = []
    for row, column in zip(*(indices.tolist() for indices in np.unravel_index(order, wrong_KC.shape)), strict=True):
        if count := int(wrong_KC[row, column]):
            result = evaluation.classes[row]
            label = evaluation.card.classes[column].label
            share = f"{count / result.images:.1%} of {result.images:,}"
            rows.append((escaped(result.label), escaped(label), f"{count:,}", share))
    if not rows:
        return "<p>None.</p>"
    return _table(("class", "taken for", "photos", "share of the class"), rows, numbers=(2, 3))


def _worst_classes(evaluation: Evaluation) -> Iterator[str]:
    for result in evaluation.worst_classes()[:WORST_CLASSES]:
        right = round((result.top1 or 0) * result.images)
        yield f"<h3>{escaped(result.label)}: {right:,} of {result.images:,} right ({result.top1:.1%})</h3>"
        photos = itertools.islice(_wrong_photos(evaluation, result), PHOTOS_PER_CLASS)
        yield f'<div class="photos">{"".join(photos)}</div>'


def _wrong_photos(evaluation: Evaluation, result: ClassResult) -> Iterator[str]:
    """Yield the photos of a class to which the model gives it the least probability."""
    of_class = np.flatnonzero(evaluation.labels == result.index)
    probabilities_NC = softmax(evaluation.logits[of_class])
    predicted_N = evaluation.logits[of_class].argmax(1)
    for row in np.argsort(probabilities_NC[:, result.index], kind="stable"):
        if predicted_N[row] == result.index:
            continue
        path = evaluation.paths[of_class[row]]
        said = evaluation.card.classes[predicted_N[row]].label
        sure, own = probabilities_NC[row, predicted_N[row]], probabilities_NC[row, result.index]
        name = escaped(os.path.relpath(path, evaluation.root))
        yield (
            f"<figure>{_thumbnail(evaluation, path)}<figcaption>{escaped(said)} {sure:.0%}, "
            f"{escaped(result.label)} {own:.0%}<br>{name}</figcaption></figure>"
        )


def _thumbnail(evaluation: Evaluation, path: str) -> str:
    """Return what the network saw of a photo, as a picture inside the page."""
    import cv2

    try:
        crop_HW3 = evaluation.card.preprocess.crop_uint8(read_image(evaluation.source(path)))
    except ImageError:  # moved or changed since it was measured
        return '<span class="missing"></span>'
    small = cv2.resize(crop_HW3, (_THUMBNAIL_PX, _THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode("ascii")}">'


def _class_table(evaluation: Evaluation) -> str:
    rows = []
    for result in sorted(evaluation.classes, key=lambda result: (result.top1 is None, result.top1 or 0.0)):
        bar = "" if result.top1 is None else f'<span class="bar"><span style="width: {result.top1:.1%}"></span></span>'
        share = "" if result.top1 is None else f"{result.top1:.1%}"
        folders = ", ".join(map(escaped, result.folders))
        counts = (f"{result.images:,}", f"{result.predicted:,}")
        rows.append((escaped(result.label), escaped(result.wnid or ""), folders, *counts, share, bar))
    head = ("class", "WordNet id", "folder", "photos", "predicted", "right", "")
    table = _table(head, rows, numbers=(3, 4, 5))
    if len(rows) <= _UNFOLDED_CLASSES:
        return table
    return f"<details><summary>{len(rows):,} classes, worst first</summary>{table}</details>"


def _unreadable(evaluation: Evaluation) -> str:
    if not evaluation.unreadable:
        return ""
    rows = [
        (escaped(os.path.relpath(path, evaluation.root)), escaped(error))
        for path, error in evaluation.unreadable[:NAMED_UNREADABLE]
    ]
    more = len(evaluation.unreadable) - len(rows)
    rest = f'<p class="faint">and {more:,} more</p>' if more else ""
    return f"<section><h2>Photos left out</h2>{_table(('photo', 'why'), rows)}{rest}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML already; `numbers` are the columns to align right."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = [' class="number"' if index in numbers else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"

    header = f"<thead>{line(head, 'th')}</thead>" if head else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{header}<tbody>{body}</tbody></table></div>'
