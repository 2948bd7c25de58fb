"""Put a finished run on Everyday-112 into the package: half-precision weights, and a card of what they can.

    python scripts/embed_default.py runs/everyday112 data/everyday112 \\
        --command "python scripts/build_everyday112.py --pets PetImages ... --out data/everyday112" \\
        --command "weightnet train --config configs/everyday112.yaml --data data/everyday112 --out runs/everyday112"

The figures are those of the file as it ships, measured by `weightnet.Classifier` on the original validation photos
(`scripts/build_everyday112.py` makes the folder). `top1` and its like are strict: one class is right for each photo.
A photo of Imagenette's English springer or Caltech-101's dalmatian shows what the class dog shows too, and one of
Caltech-101's wild cat may show a house cat: the figures called lenient take either name of such a pair for the other.

Kernels and matrices become float16; arrays of one axis (biases, batch norms) stay float32, since batch variances span
more powers of ten than float16 has.
"""

import argparse
import csv
import dataclasses
import hashlib
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from weightnet import Classifier
from weightnet.errors import DataError, UsageError, WeightNetError
from weightnet.images.labels import ClassLabel
from weightnet.predict import metrics
from weightnet.zoo.cards import EMBEDDED, Card, read_card, write_atomically, write_card
from weightnet.zoo.state import read_state

CLASS_TABLE = Path(__file__).with_name("everyday112_classes.csv")
SOURCES = {"pets": "cats and dogs", "caltech": "Caltech-101", "imagenette": "Imagenette"}
LENIENT_PAIRS = (("dog", "English springer"), ("dog", "dalmatian"), ("cat", "wild cat"))
MAX_WEIGHTS_BYTES = 4_000_000

Probabilities = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Photos:
    """The validation photos: where they are, their class and the collection they come from."""

    paths: list[Path]
    labels: Classes
    sources: npt.NDArray[np.str_]


def read_photos(data: Path) -> tuple[Photos, list[ClassLabel]]:
    """Return the validation photos and the classes of a folder that `build_everyday112.py` made.

    Raises:
        DataError: a table is missing or its classes are not those of the table beside this script.
    """
    try:
        rows = [row for row in _rows(data / "photos.csv") if row["split"] == "val"]
        table = _rows(data / "classes.csv")
    except (OSError, KeyError) as error:
        raise DataError(f"DATA must be a folder made by build_everyday112.py. Got {data}: {error}. Make it.") from error
    if table != _rows(CLASS_TABLE):
        raise DataError(f"DATA must have the classes of {CLASS_TABLE.name}. Got others in {data}. Make it again.")
    index_of = {row["folder"]: index for index, row in enumerate(table)}
    photos = Photos(
        [data / "val" / row["folder"] / row["file"] for row in rows],
        np.array([index_of[row["folder"]] for row in rows]),
        np.array([row["source"] for row in rows]),
    )
    return photos, [_class_label(row) for row in table]


def half_precision(state: dict[str, npt.NDArray[np.float32]]) -> bytes:
    """Return weights as they ship, in safetensors.

    Raises:
        UsageError: a value is too large for float16, or the file for the package.
    """
    largest = max(float(np.abs(array).max()) for array in state.values() if array.ndim > 1)
    if largest > float(np.finfo(np.float16).max):
        raise UsageError(f"Weights must fit into float16. Got one of {largest}. Train with a lower learning rate.")
    arrays: dict[str, npt.NDArray[Any]] = {n: a.astype(np.float16) if a.ndim > 1 else a for n, a in state.items()}
    weights = save(arrays)
    if len(weights) > MAX_WEIGHTS_BYTES:
        raise UsageError(f"Weights in the package must be under {MAX_WEIGHTS_BYTES} bytes. Got {len(weights)}.")
    return weights


def classify(weights: bytes, card: Card, photos: Photos) -> Probabilities:
    """Return the probabilities (N, C) that the file as it ships gives, by the public classifier.

    Raises:
        DataError: a photo cannot be read.
    """
    probabilities_NC = np.empty((len(photos.paths), len(card.classes)))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.safetensors")
        model.write_bytes(weights)
        write_card(card, model.with_suffix(".json"))
        rows = Classifier(model).stream(photos.paths, k=len(card.classes))
        for index, row in enumerate(rows):
            if row.status != "ok":
                raise DataError(f"Every validation photo must be readable. Got {row.path}: {row.error}")
            for score in row.top:
                probabilities_NC[index, score.index] = score.probability
    return probabilities_NC


def measure(probabilities_NC: Probabilities, photos: Photos, classes: list[ClassLabel]) -> dict[str, Any]:
    """Return the figures of the card: fractions of 1, the loss in nats."""
    labels_N, best_N = photos.labels, probabilities_NC.argmax(axis=1)
    friends_CC = _lenient(classes)
    lenient_N = np.where(friends_CC[best_N, labels_N], labels_N, best_N)
    sources = {}
    for source, title in SOURCES.items():
        of_N = photos.sources == source
        sources[title] = {
            "photos": int(of_N.sum()),
            "top1": float(np.mean(best_N[of_N] == labels_N[of_N])),
            "top5": metrics.topk_accuracy(probabilities_NC[of_N], labels_N[of_N], 5),
            "lenient_top1": float(np.mean(lenient_N[of_N] == labels_N[of_N])),
        }
    logits_NC = np.log(np.maximum(probabilities_NC, np.finfo(np.float64).tiny))
    return {
        "photos": len(labels_N),
        "top1": metrics.topk_accuracy(probabilities_NC, labels_N),
        "top5": metrics.topk_accuracy(probabilities_NC, labels_N, 5),
        "class_averaged_top1": metrics.class_averaged_accuracy(best_N, labels_N, len(classes)),
        "loss": metrics.cross_entropy(logits_NC, labels_N),
        "ece": metrics.expected_calibration_error(probabilities_NC, labels_N),
        "lenient_top1": float(np.mean(lenient_N == labels_N)),
        "lenient_class_averaged_top1": metrics.class_averaged_accuracy(lenient_N, labels_N, len(classes)),
        "sources": sources,
        "on": "the validation photos of Everyday-112, none of which was trained on",
    }


def described(run: Card, name: str, classes: list[ClassLabel], commands: list[str]) -> Card:
    """Return the card of the embedded model, as yet without figures.

    Raises:
        UsageError: the run is not finished, not on these classes, without terms, or a text names a folder of this
            machine.
    """
    if not run.measured or run.made_by.get("steps") != run.measured.get("step"):
        raise UsageError(f"RUN must be finished. Got the run {run.name} without figures of its weights. Resume it.")
    if list(run.classes) != classes:
        raise UsageError(f"RUN must know the classes of DATA. Got the run {run.name} with others. Train it on DATA.")
    if not run.terms:
        raise UsageError(f"RUN must state the terms of its data. Got the run {run.name} without terms. Set `terms`.")
    config = {option: value for option, value in run.made_by["config"].items() if option not in ("data", "out")}
    for text in [*commands, *(str(value) for option, value in config.items() if option != "terms")]:
        if re.search(r"""(^|[\s='"])[/~]""", text):
            raise UsageError(f"A card must name no folder of one machine. Got {text!r}. Give paths in the repository.")
    made_by = {**run.made_by, "commands": commands, "config": config}
    del made_by["command"]
    pairs = ", ".join(f"{one} and {other}" for one, other in LENIENT_PAIRS)
    notes = {
        "knows": "112 everyday things: cat, dog, 100 categories of Caltech-101 and the 10 of Imagenette",
        "lenient": f"figures called lenient take either name of these pairs for the other: {pairs}",
        "precision": "float16; arrays of one axis in float32",
    }
    return dataclasses.replace(run, name=name, classes=tuple(classes), measured={}, made_by=made_by, notes=notes)


def embed(run: Path, data: Path, *, name: str, commands: list[str], out: Path) -> Card:
    """Write the weights and the card of the embedded model and return the card.

    Raises:
        DataError: the validation photos are not all there.
        UsageError: the run cannot be embedded.
        WeightsError: the run cannot be read.
    """
    photos, classes = read_photos(data)
    card = described(read_card(run / "weights.json"), name, classes, commands)
    weights = half_precision(read_state(run / "weights.safetensors"))
    figures = measure(classify(weights, card, photos), photos, classes)
    notes = {**card.notes, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    card = dataclasses.replace(card, measured=_rounded(figures), notes=notes)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.safetensors", weights)
    write_card(card, out / f"{name}.json")
    return card


def _lenient(classes: list[ClassLabel]) -> npt.NDArray[np.bool_]:
    """Return which class may be called which: themselves and the pairs."""
    index_of = {entry.label: index for index, entry in enumerate(classes)}
    friends_CC = np.eye(len(classes), dtype=np.bool_)
    for one, other in LENIENT_PAIRS:
        pair = index_of[one], index_of[other]
        friends_CC[pair] = friends_CC[pair[::-1]] = True
    return friends_CC


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    return {name: _rounded(value) if isinstance(value, dict) else value for name, value in rounded.items()}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _class_label(row: dict[str, str]) -> ClassLabel:
    index = row["imagenet_index"]
    return ClassLabel(row["label"], row["wnid"] or None, int(index) if index else None)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Put a finished run on Everyday-112 into the package.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the finished run")
    parser.add_argument("data", type=Path, metavar="DATA", help="Everyday-112, as build_everyday112.py makes it")
    parser.add_argument("--name", default="default", help="name of the embedded model (default: %(default)s)")
    parser.add_argument(
        "--command", action="append", required=True, help="a command that made DATA or RUN, for the card; repeat it"
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of the result (default: in the package)")
    arguments = parser.parse_args(argv)
    own = shlex.join(["python", "scripts/embed_default.py", str(arguments.run), str(arguments.data)])
    commands = [*arguments.command, own if arguments.name == "default" else f"{own} --name {arguments.name}"]
    try:
        card = embed(arguments.run, arguments.data, name=arguments.name, commands=commands, out=arguments.out)
    except (WeightNetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    size = (arguments.out / f"{arguments.name}.safetensors").stat().st_size
    print(f"{arguments.name}: {size / 1e6:.2f} MB")
    for name, value in card.measured.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
