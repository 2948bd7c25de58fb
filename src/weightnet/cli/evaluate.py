"""`weightnet evaluate`: how good a model is on labelled photos."""

import json as json_format
import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weightnet.cli.output import Switch, open_results, printable, printable_path, progress, say
from weightnet.errors import UsageError

if TYPE_CHECKING:
    from weightnet.predict.evaluate import Evaluation

NAMED_UNREADABLE = 5
WORST_CLASSES = 5


def evaluate(
    model: Annotated[str, Parameter(name="MODEL")],
    data: Annotated[str, Parameter(name="DATA_DIR")],
    /,
    *,
    engine: str = "auto",
    device: str = "auto",
    batch_size: int = 16,
    resize: int | None = None,
    crop: int | None = None,
    report: str | None = None,
    json: Switch = False,
) -> int:
    """Measure a model on a folder of labelled photos.

    Exit codes: 0 where all photos were measured; 1 where one could not be (it is named, and left out of the figures) or
    a folder fits no class; 2 for wrong usage or an unknown model.

    Args:
        model: A name of `weightnet models`, a run folder, a weights file, or its address; or a file of
            `weightnet export`.
        data: A folder with one folder of photos per class, or with train/ and val/, of which val/ is taken. Folders
            are matched to the model's classes by WordNet id, then by label, or as a classes.csv says
            (columns folder, label, wnid); one that fits none is an error. Classes without a folder are fine.
            Or a folder of tar shards, as webdataset writes them: row i of classes.csv names their class i; without it,
            numbers are the model's own.
        engine: What runs the network: onnxruntime or openvino for a model inside the package and an .onnx file,
            openvino for .xml, executorch for .pte, mnn for .mnn, torch for .pt2 and all that is not exported; auto
            takes the first that fits.
        device: auto or cpu; with torch cuda, cuda:N or mps too, and auto takes a GPU where there is one.
        batch_size: Photos that run at once.
        resize: Short edge before the crop, in pixels; left out: the model's own.
        crop: Height and width of what the network sees, in pixels; left out: the model's own.
        report: Write a page for people: figures, calibration, confusion matrix, worst classes with their photos.
        json: Write one JSON object: `{"images", "unreadable", "top1", "top5", "class_averaged_top1", "loss", "ece",
            "unknown", "classes", "confusion", ...}`, fractions of 1; `unknown`, the share in which the model sees none
            of its classes, only of models that can tell.
    """
    _check_report(report)
    results = open_results()

    from weightnet.predict.classifier import Classifier
    from weightnet.predict.evaluate import evaluate as measure
    from weightnet.predict.labelled import read_labelled_photos

    classifier = Classifier(model, engine=engine, device=device, batch_size=batch_size, resize=resize, crop=crop)
    photos = read_labelled_photos(data, classifier.card.classes)
    with progress(len(photos), rows=False) as advance:
        evaluation = measure(classifier, photos, advance=advance)
    text = _json({"model": model, **evaluation.to_dict()}) if json else printable(_gist(model, evaluation))
    results.write(text + "\n")
    if report:
        _write_report(report, evaluation, model)
    return _say_unreadable(evaluation)


def _check_report(path: str | None) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    if not path.lower().endswith((".html", ".htm")):
        raise UsageError(f"The report's suffix must be .html. Got report={path!r}. Add it.")
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UsageError(f"The report must be a file in a folder that exists. Got report={path!r}. Make the folder.")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"The report's folder must be writable. Got report={path!r}. Give another one.")


def _write_report(path: str, evaluation: "Evaluation", model: str) -> None:
    from weightnet.predict.report import render_report
    from weightnet.zoo.cards import write_atomically

    write_atomically(path, render_report(evaluation, model=model).encode("utf-8"))
    say(f"weightnet: the report is {printable_path(path)}")


def _json(fields: dict[str, Any]) -> str:
    """Return JSON in ASCII with one field a line: short enough to be looked at, however large the matrix."""
    lines = (f"{json_format.dumps(name)}: {json_format.dumps(value)}" for name, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _gist(model: str, evaluation: "Evaluation") -> str:
    figures, size = evaluation.figures, evaluation.card.preprocess
    worst = [f"{result.label} {result.top1:.0%}" for result in evaluation.worst_classes()[:WORST_CLASSES]]
    lines = [
        f"{printable_path(model)} on {printable_path(evaluation.root)}",
        f"  photos             {len(evaluation.paths):,}, left out {len(evaluation.unreadable):,}",
        f"  classes            {len(evaluation.classes):,} of the model's {len(evaluation.card.classes):,}",
        f"  input              short edge {size.resize}, crop {size.crop}, {size.interpolation}",
        f"  top-1              {figures['top1']:.2%}",
        f"  top-5              {figures['top5']:.2%}",
        f"  top-1 by class     {figures['class_averaged_top1']:.2%}",
        f"  cross-entropy      {figures['loss']:.4f}",
        f"  calibration error  {figures['ece']:.4f}",
        *([f"  called unknown     {figures['unknown']:.2%}"] if "unknown" in figures else []),
        f"  worst classes      {', '.join(worst) or 'none'}",
    ]
    return "\n".join(lines)


def _say_unreadable(evaluation: "Evaluation") -> int:
    """Name the photos that were left out, and return the exit code."""
    left_out = evaluation.unreadable
    for path, error in left_out[:NAMED_UNREADABLE]:
        say(f"weightnet: {printable_path(f'{path}: {error}')}")
    if left_out:
        total = len(left_out) + len(evaluation.paths)
        say(f"weightnet: {len(left_out):,} of {total:,} photos could not be classified and are left out.")
    return 1 if left_out else 0
