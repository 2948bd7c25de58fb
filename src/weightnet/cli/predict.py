"""`weightnet predict`: photos in, a row for each out."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, BinaryIO

from cyclopts import Parameter

from weightnet.cli.output import Form, Switch, open_rows, printable_path, progress, say
from weightnet.errors import UsageError

if TYPE_CHECKING:
    from weightnet.zoo.cards import Card

STDIN = "\0-"  # a lone dash on the command line; no path has a null character
IMAGENET_MODEL = "shufflenet_v2_x1_0"


def predict(
    *paths: Annotated[str, Parameter(name="PATH")],
    k: Annotated[int, Parameter(name="-k")] = 5,
    model: str = "default",
    engine: str = "auto",
    device: str = "auto",
    batch_size: int = 16,
    embeddings: Switch = False,
    json: Switch = False,
    jsonl: Switch = False,
    csv: Switch = False,
) -> int:
    """Classify photos and write one row for each, in their order, as they come.

    Results go to standard output; progress and messages go to standard error.

    Exit codes: 0 where all photos were classified; 1 where one could not be (its row says why, and the rows of all
    others are there); 2 for wrong usage, an unknown model, or where nothing matched.

    Args:
        paths: Photos; folders (all photos in them and their subfolders, hidden ones left out); quoted patterns
            (`"*.jpg"`, `"photos/**/cat*"`); or `-` for a photo on standard input. Put `--` before names that begin with
            a dash.
        k: How many classes to name, the most probable first.
        model: A name of `weightnet models`, a run folder, a weights file, or its address; or a file of
            `weightnet export`.
        engine: What runs the network: onnxruntime or openvino for a model inside the package and an .onnx file,
            openvino for .xml, executorch for .pte, mnn for .mnn, torch for .pt2 and all that is not exported; auto
            takes the first that fits.
        device: auto or cpu; with torch cuda, cuda:N or mps too, and auto takes a GPU where there is one.
        batch_size: Photos that run at once.
        embeddings: Write what the network sees in a photo (`pre_logits`: numbers, near for photos that look alike)
            instead of `top`; with `--json`, `--jsonl` or `--csv`.
        json: Write one JSON array, with an object for each photo:
            `{"path", "status": "ok" | "error", "error", "top": [{"label", "index", "probability"}]}`. Models that can
            tell add `"known"`: false for a photo of none of their classes.
        jsonl: Write the same objects, one a line.
        csv: Write a table, a row for each photo: path, status, error, known (of models that can tell), then label1,
            index1, probability1, label2, and so on.
    """
    form = _form(json=json, jsonl=jsonl, csv=csv)
    if embeddings and form == "text":
        raise UsageError("Embeddings must have a form for programs. Got none. Add --json, --jsonl or --csv.")
    if STDIN in paths or "-" in paths:
        check_stdin("a photo")
    reports: list[str] = []

    def report(message: str) -> None:
        reports.append(message)
        say(f"weightnet: {printable_path(message)}")

    photos = _photos(paths, report)
    first = next(photos, None)
    if first is None:
        got = ", ".join(map(repr, paths)) or "nothing"
        raise UsageError(f"PATH must name at least one photo. Got {got}. Give photos, folders or quoted patterns.")

    from weightnet.predict.classifier import Classifier
    from weightnet.predict.inputs import stands_for_many

    classifier = Classifier(model, engine=engine, device=device, batch_size=batch_size)
    if model == "default" and form == "text":
        say(_scope(classifier.card))
    every = itertools.chain([first], photos)
    answers = classifier.embed(every) if embeddings else classifier.stream(every, k=k)
    width = classifier.card.network.head_channels if embeddings else min(k, len(classifier.card.classes))
    tells = not embeddings and classifier.card.known_from is not None
    rows = open_rows(form, columns=width, embeddings=embeddings, known=tells)
    done = failed = 0
    with progress(None if any(map(stands_for_many, paths)) else len(paths)) as advance:
        for answer in answers:
            rows.write(answer if answer.path is not None else dataclasses.replace(answer, path="-"))
            done += 1
            failed += answer.status == "error"
            advance()
    rows.close()
    if failed:
        say(f"weightnet: {failed} of {done} photos could not be classified; their rows say why.")
    return 1 if failed or reports else 0


def _form(*, json: bool, jsonl: bool, csv: bool) -> Form:
    wanted: dict[Form, bool] = {"json": json, "jsonl": jsonl, "csv": csv}
    chosen = [form for form, given in wanted.items() if given]
    if len(chosen) > 1:
        raise UsageError(f"The output must have one form. Got --{' and --'.join(chosen)}. Leave all but one out.")
    return chosen[0] if chosen else "text"


def _photos(paths: tuple[str, ...], report: Callable[[str], None]) -> "Iterator[str | BinaryIO]":
    from weightnet.predict.inputs import find_images

    for path in paths:
        if path in ("-", STDIN):
            yield sys.stdin.buffer
        else:
            yield from find_images([path], report=report)


def check_stdin(what: str) -> None:
    """Raise UsageError where standard input, from which something is to be read, is closed."""
    if sys.stdin is None:
        raise UsageError(f"Standard input must be open to read {what} from it. Got a closed one. Pipe {what} in.")


def _scope(card: "Card") -> str:
    """Return one line on what the embedded default knows, and on what knows more."""
    labels = [entry.label for entry in card.classes]
    examples = ", ".join(labels[:: max(1, len(labels) // 4)][:4])
    return (
        f"The default model knows {len(labels)} things ({examples}, ...). "
        f"For ImageNet's 1,000 classes: --model {IMAGENET_MODEL} (downloads the original's weights once)."
    )
