"""The page of an evaluation: whole, harmless whatever the names, and true."""

import base64
import dataclasses
import html.parser
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from weightnet.images.labels import ClassLabel
from weightnet.predict import metrics, report
from weightnet.predict.classifier import Classifier
from weightnet.predict.evaluate import ClassResult, Evaluation, evaluate
from weightnet.predict.labelled import read_labelled_photos
from weightnet.predict.report import render_report
from weightnet.predict.report_charts import escaped

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</title></style><svg onload=alert(1)>",
    "$title ${figures} &amp; {braces}",
    "plain",
)
VOID = {"meta", "br", "img"}


class Page(html.parser.HTMLParser):
    """A page's elements and texts; complains of elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def evaluation(tiny_network, tmp_path_factory) -> Evaluation:
    """Of a model with hostile labels, on files with hostile names."""
    data = tmp_path_factory.mktemp("<b>data")
    classes = tuple(ClassLabel(label, f"n0000000{index}") for index, label in enumerate(HOSTILE))
    rng = np.random.default_rng(0)
    for entry in classes:
        (data / entry.wnid).mkdir()
        for name in ("<script>x", "' onerror='x", "\n\u202e", os.fsdecode(b"\xff"), "5", "6", "7", "8"):
            small = rng.integers(0, 256, (4, 5, 3), np.uint8)
            picture = cv2.imencode(".png", cv2.resize(small, (60, 48), interpolation=2))[1].tobytes()
            (data / entry.wnid / f"{name}.png").write_bytes(picture)
    (data / "n00000000" / "<script>broken.jpg").write_text("<script>")
    classifier = Classifier(tiny_network, device="cpu")
    classifier.card = dataclasses.replace(classifier.card, classes=classes, name="<script>name")
    return evaluate(classifier, read_labelled_photos(data, classes))


def wide(classes: int, photos: int) -> Evaluation:
    """An evaluation of many classes without photos on disk."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, photos)
    logits = rng.normal(size=(photos, classes)).astype(np.float32)
    logits[np.arange(photos), labels] += 2
    names = tuple(ClassLabel(f"thing {index}") for index in range(classes))
    results = tuple(
        ClassResult(index, entry.label, None, (entry.label,), n := int((labels == index).sum()), 0.5 if n else None, 0)
        for index, entry in enumerate(names)
    )
    card = dataclasses.make_dataclass("Card", ["classes", "preprocess"])(
        names, Classifier(device="cpu").card.preprocess
    )
    bins = tuple(metrics.reliability(metrics.softmax(logits), labels))
    paths = tuple(f"gone/{index}.jpg" for index in range(photos))
    return Evaluation(card, "gone", paths, labels, logits, (), metrics.summary(logits, labels), results, bins)


def test_report_is_well_formed_and_needs_nothing_else(evaluation):
    page = Page(render_report(evaluation, model="<script>m"))
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    )
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    text = render_report(evaluation, model="m")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_escaped_text_is_safe_in_attributes_too():
    assert escaped("\"'&<>") == "&quot;&#x27;&amp;&lt;&gt;"


def test_report_shows_every_text_as_it_is(evaluation):
    page = Page(render_report(evaluation, model="<script>m"))
    assert "Evaluation of <script>m" in page.texts
    for label in HOSTILE:
        assert label in page.texts
    assert "n00000000/<script>broken.jpg" in page.texts
    assert evaluation.unreadable[0][1] in page.texts
    assert "<script>" in evaluation.unreadable[0][1]
    assert all(c.isprintable() or c == "\n" for text in page.texts for c in text)
    render_report(evaluation, model="m").encode("utf-8")


def test_heat_map_shows_every_label_as_it_is(evaluation, monkeypatch):
    monkeypatch.setattr(report, "MAX_TABLE_CLASSES", 0)
    page = Page(render_report(evaluation, model="m"))
    counts = evaluation.confusion()
    for row, column in np.argwhere(counts):
        names = f"{HOSTILE[row]} → {HOSTILE[column]}"
        assert f"{names}: {counts[row, column]} of {counts[row].sum()}" in page.texts
    for label in HOSTILE:
        short = label if len(label) <= 24 else label[:23] + "…"
        assert short in page.texts


def test_report_states_the_figures(evaluation):
    text = Page(render_report(evaluation, model="m")).text
    figures = evaluation.figures
    assert 0.05 < figures["top1"] < 0.95
    for expected in (
        f"top-1 {figures['top1']:.2%}",
        f"top-5 {figures['top5']:.2%}",
        f"top-1, each class counting alike {figures['class_averaged_top1']:.2%}",
        f"cross-entropy, nats {figures['loss']:.4f}",
        f"calibration error (ECE, 15 ranges) {figures['ece']:.4f}",
        "photos 40 left out, could not be classified 1",
        "on 40 photos of 5 classes in ",
        "short edge 40 px, area; centre 32 x 32 px",
    ):
        assert expected in text
    assert "taken for none" not in text
    told = dataclasses.replace(evaluation, figures={**figures, "unknown": 0.125})
    assert "taken for none of the model's classes 12.50%" in Page(render_report(told, model="m")).text


def test_report_shows_the_photos_that_are_most_wrong(evaluation):
    text = render_report(evaluation, model="m")
    worst = min(evaluation.classes, key=lambda result: (result.top1, -result.images))
    mine = evaluation.labels == worst.index
    probabilities = metrics.softmax(evaluation.logits[mine])
    wrong = np.flatnonzero(probabilities.argmax(1) != worst.index)
    order = wrong[np.argsort(probabilities[wrong, worst.index], kind="stable")][: report.PHOTOS_PER_CLASS]
    paths = np.array(evaluation.paths, object)[mine][order]
    names = [escaped(os.path.relpath(path, evaluation.root)) for path in paths]
    section = text.split("<h2>Worst classes</h2>")[1].split("<h3>")[1]
    assert re.findall(r"<br>(.*?)</figcaption>", section) == names
    (first, *_) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', section)
    thumbnail = cv2.imdecode(np.frombuffer(base64.b64decode(first), np.uint8), cv2.IMREAD_COLOR)
    seen = evaluation.card.preprocess.crop_uint8(cv2.imread(paths[0]))
    expected = cv2.resize(seen, thumbnail.shape[:2], interpolation=cv2.INTER_AREA)
    assert np.abs(thumbnail.astype(int) - expected).mean() < 8  # JPEG


def test_report_shows_wrong_photos_alone(evaluation, monkeypatch):
    monkeypatch.setattr(report, "PHOTOS_PER_CLASS", 100)
    text = render_report(evaluation, model="m").split("<h2>Worst classes</h2>")[1].split("<h2>")[0]
    wrong = [result.images - round(result.images * result.top1) for result in evaluation.classes]
    assert [part.count("<figure>") for part in text.split("<h3>")[1:]] == sorted(wrong, reverse=True)


def test_report_shows_counts_in_a_table_for_few_classes(evaluation):
    text = render_report(evaluation, model="m")
    (table,) = re.findall(r'<table class="confusion">.*?</table>', text)
    rows = [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
    assert [[int(cell or 0) for cell in row] for row in rows] == evaluation.confusion().tolist()


@pytest.mark.parametrize(("classes", "labelled"), [(112, True), (200, False)])
def test_report_draws_many_classes(classes, labelled):
    evaluation = wide(classes, 600)
    page = Page(render_report(evaluation, model="m"))
    cells = [text for text in page.texts if re.fullmatch(r"thing \d+ → thing \d+: \d+ of \d+", text)]
    assert len(cells) == np.count_nonzero(evaluation.confusion())
    assert sum(int(re.search(r": (\d+) of", text)[1]) for text in cells) == 600
    svg = render_report(evaluation, model="m").split("Confusion matrix")[1].split("</svg>")[0]
    assert ('text-anchor="end"' in svg) is labelled
    assert f"{classes} classes, worst first" in page.text


def test_report_names_the_most_confused_pairs():
    evaluation = wide(30, 500)
    confusion = evaluation.confusion()
    np.fill_diagonal(confusion, 0)
    text = Page(render_report(evaluation, model="m")).text
    row, column = np.unravel_index(confusion.argmax(), confusion.shape)
    shown = text.split("class taken for photos share of the class ")[1]
    assert shown.startswith(f"thing {row} thing {column} {confusion.max()} ")


def test_report_gathers_classes_without_a_folder(evaluation):
    kept = evaluation.classes[:2]
    mine = np.isin(evaluation.labels, [0, 1])
    fewer = dataclasses.replace(
        evaluation,
        classes=kept,
        labels=evaluation.labels[mine],
        logits=evaluation.logits[mine],
        paths=tuple(np.array(evaluation.paths, object)[mine]),
    )
    assert fewer.confusion()[:, 2:].sum() > 0
    text = render_report(fewer, model="m")
    rows = re.findall(r'<table class="confusion">.*?</table>', text)[0].split("<tr>")[2:]
    last = [int(re.findall(r"<td[^>]*>(\d*)</td>", row)[-1] or 0) for row in rows]
    assert last == fewer.confusion()[:, 2:].sum(1).tolist()
    assert "other classes" in text


def test_report_of_a_model_that_is_always_right(evaluation):
    logits = np.eye(5, dtype=np.float32)[evaluation.labels] * 9
    classes = tuple(dataclasses.replace(result, top1=1.0) for result in evaluation.classes)
    text = Page(render_report(dataclasses.replace(evaluation, logits=logits, classes=classes), model="m")).text
    assert "Worst classes No photo is wrong." in text
    assert "Most often confused None." in text


def test_report_survives_photos_that_are_gone(evaluation, monkeypatch, tmp_path):
    moved = dataclasses.replace(evaluation, paths=tuple(str(tmp_path / Path(p).name) for p in evaluation.paths))
    text = render_report(moved, model="m")
    assert '<span class="missing"></span>' in text
    assert "data:image" not in text


def test_report_has_a_class_without_a_readable_photo(evaluation):
    empty, also = (dataclasses.replace(result, images=0, top1=None) for result in evaluation.classes[:2])
    kept = evaluation.labels > 1
    fewer = dataclasses.replace(
        evaluation,
        classes=(empty, also, *evaluation.classes[2:]),
        labels=evaluation.labels[kept],
        logits=evaluation.logits[kept],
        paths=tuple(np.array(evaluation.paths, object)[kept]),
    )
    text = render_report(fewer, model="m")
    Page(text)
    assert text.count('class="bar"') == 3


def test_report_names_only_some_of_many_unreadable_photos(evaluation):
    unreadable = tuple((f"{evaluation.root}/{number}.jpg", "why") for number in range(report.NAMED_UNREADABLE + 7))
    text = render_report(dataclasses.replace(evaluation, unreadable=unreadable), model="m")
    assert text.count("<td>why</td>") == report.NAMED_UNREADABLE
    assert "and 7 more" in text


def test_reliability_diagram_draws_every_range(evaluation):
    svg = render_report(evaluation, model="m").split("Reliability diagram")[1].split("</svg>")[0]
    used = [row for row in evaluation.reliability if row.photos]
    tips = re.findall(r"<title>confidence (\d+)% to (\d+)%: (\d+) photos, mean confidence", svg)
    assert len(tips) == 3 * len(used)
    assert [int(photos) for _, _, photos in tips[::3]] == [row.photos for row in used]
    heights = [float(h) for h in re.findall(r'<rect class="right"[^>]* height="([\d.]+)"', svg)[::2]]
    assert heights == pytest.approx([row.accuracy * 300 for row in used], abs=0.06)
    gaps = re.findall(r'<rect class="gap"[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', svg)
    bottoms = [float(y) + float(height) for y, height in gaps]
    assert bottoms == pytest.approx([300 - 300 * min(row.accuracy, row.confidence) for row in used], abs=0.11)
    assert [float(height) for _, height in gaps] == pytest.approx(
        [300 * abs(row.accuracy - row.confidence) for row in used], abs=0.06
    )
