"""Put a finished run into the package: half-precision weights to train on, the exported model, and a card for both.

    python scripts/embed_model.py default runs/everyday112 data/everyday112 \\
        --command "python scripts/build_everyday112.py --pets PetImages ... --out data/everyday112" \\
        --command "weightnet train --config configs/everyday112.yaml --data data/everyday112 --out runs/everyday112"
    python scripts/embed_model.py imagenette runs/imagenette data/imagenette --photos Imagenette \\
        --knows "10 of ImageNet's classes: tench, English springer, cassette player, ..." \\
        --command "weightnet train --config configs/imagenette.yaml --data data/imagenette --out runs/imagenette"

The figures are those of the weights as they ship, measured by `weightnet.Classifier` on the validation photos. DATA is
a folder of photos by class, or Everyday-112 as `scripts/build_everyday112.py` makes it, whose tables say more. What the
model does not know is still to be set then, by `scripts/set_known.py`.

Of Everyday-112, `top1` and its like are strict: one class is right for each photo. A photo of Imagenette's English
springer or Caltech-101's dalmatian shows what the class dog shows too, and one of Caltech-101's wild cat may show a
house cat: the figures called lenient take either name of such a pair for the other.

With `--calibrate` logits are scaled by the factor with which probabilities fit every second validation photo best: what
is taken for the best class stays the same, and how sure the model is becomes true. The classifier has the factor in its
weights; loss and calibration error are then those of the other photos.

With `--even-out SHARE` the classifier's biases make up for a share of how unevenly training drew the classes: each is
lowered by SHARE times the logarithm of its class's share of the draws (Menon et al., "Long-tail learning via logit
adjustment", ICLR 2021). Small classes are then named more readily, large ones less; it comes before the scaling.

Kernels and matrices become float16; arrays of one axis (biases, batch norms) stay float32, since batch variances span
more powers of ten than float16 has. The exported model has these weights, folded, in float32, or in float16 where its
file would be too large.
"""

import argparse
import csv
import dataclasses
import hashlib
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from weightnet import Classifier
from weightnet.errors import DataError, UsageError, WeightNetError
from weightnet.export.model import export_model
from weightnet.images.labels import ClassLabel
from weightnet.predict import metrics
from weightnet.predict.interface import OUTPUTS
from weightnet.predict.labelled import read_labelled_photos
from weightnet.zoo.cards import EMBEDDED, Card, read_card, write_atomically, write_card
from weightnet.zoo.state import read_state

PHOTO_TABLE = "photos.csv"  # which Everyday-112 alone has
CLASS_TABLE = Path(__file__).with_name("everyday112_classes.csv")
EVERYDAY_112 = "112 everyday things: cat, dog, 100 categories of Caltech-101 and the 10 of Imagenette"
SOURCES = {"pets": "cats and dogs", "caltech": "Caltech-101", "imagenette": "Imagenette"}
LENIENT_PAIRS = (("dog", "English springer"), ("dog", "dalmatian"), ("cat", "wild cat"))
MAX_FILE_BYTES = 4_000_000  # of the weights, and of the exported model
CLASSIFIER = ("classifier.0.weight", "classifier.0.bias")
FACTORS = np.geomspace(0.1, 10, 401)  # of logits, that are tried

Logits = npt.NDArray[np.float64]
Probabilities = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Photos:
    """The validation photos: what they are called, where they are, their class, and the collection they come from.

    Without collections, `sources` is None.
    """

    name: str
    paths: list[Path]
    labels: Classes
    sources: npt.NDArray[np.str_] | None = None

    def every_second(self, start: int) -> "Photos":
        """Return every second photo, from the first (0) or the second one (1) on."""
        sources = None if self.sources is None else self.sources[start::2]
        return Photos(self.name, self.paths[start::2], self.labels[start::2], sources)


def read_everyday112(data: Path) -> tuple[Photos, list[ClassLabel]]:
    """Return the validation photos and the classes of a folder that `build_everyday112.py` made.

    Raises:
        DataError: a table is missing or its classes are not those of the table beside this script.
    """
    try:
        rows = [row for row in _rows(data / PHOTO_TABLE) if row["split"] == "val"]
        table = _rows(data / "classes.csv")
    except (OSError, KeyError) as error:
        raise DataError(f"DATA must be a folder made by build_everyday112.py. Got {data}: {error}. Make it.") from error
    if table != _rows(CLASS_TABLE):
        raise DataError(f"DATA must have the classes of {CLASS_TABLE.name}. Got others in {data}. Make it again.")
    index_of = {row["folder"]: index for index, row in enumerate(table)}
    photos = Photos(
        "Everyday-112",
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
    if len(weights) > MAX_FILE_BYTES:
        raise UsageError(f"Weights in the package must be under {MAX_FILE_BYTES} bytes. Got {len(weights)}.")
    return weights


def classify(weights: bytes, card: Card, photos: Photos) -> Logits:
    """Return the logits (N, C) that the file as it ships gives, by the public classifier.

    Raises:
        DataError: a photo cannot be read.
    """
    logits_NC = np.empty((len(photos.paths), len(card.classes)))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.safetensors")
        model.write_bytes(weights)
        write_card(card, model.with_suffix(".json"))
        for index, (path, outcome) in enumerate(Classifier(model).stream_logits(photos.paths)):
            if isinstance(outcome, str):
                raise DataError(f"Every validation photo must be readable. Got {path}: {outcome}")
            logits_NC[index] = outcome
    return logits_NC


def calibrated(
    state: dict[str, npt.NDArray[np.float32]], card: Card, photos: Photos
) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
    """Return weights whose probabilities fit these photos best, and the factor by which logits are scaled for it."""
    logits_NC = classify(half_precision(state), card, photos)
    losses = [metrics.cross_entropy(logits_NC * factor, photos.labels) for factor in FACTORS]
    factor = float(FACTORS[np.argmin(losses)])
    return state | {name: state[name] * np.float32(factor) for name in CLASSIFIER}, factor


def evened_out(
    state: dict[str, npt.NDArray[np.float32]], data: Path, *, balance: float, share: float
) -> dict[str, npt.NDArray[np.float32]]:
    """Return weights that make up for a share of how unevenly the photos of Everyday-112 were drawn in training.

    Raises:
        DataError: DATA does not say how many training photos each class has.
    """
    try:
        counts = Counter(row["folder"] for row in _rows(data / PHOTO_TABLE) if row["split"] == "train")
        drawn_C = np.array([counts[row["folder"]] for row in _rows(data / "classes.csv")], np.float64) ** (1 - balance)
    except (OSError, KeyError) as error:
        raise DataError(f"DATA must be a folder made by build_everyday112.py. Got {data}: {error}. Make it.") from error
    if not drawn_C.all():
        raise DataError(
            f"DATA must have training photos of every class. Got {data}, with classes without. Make it again."
        )
    bias = CLASSIFIER[1]
    return state | {bias: (state[bias] - share * np.log(drawn_C / drawn_C.sum())).astype(np.float32)}


def measure(logits_NC: Logits, photos: Photos, classes: list[ClassLabel]) -> dict[str, Any]:
    """Return the figures of the card: fractions of 1, the loss in nats."""
    probabilities_NC = metrics.softmax(logits_NC)
    labels_N, best_N = photos.labels, probabilities_NC.argmax(axis=1)
    figures: dict[str, Any] = {
        "photos": len(labels_N),
        "top1": metrics.topk_accuracy(probabilities_NC, labels_N),
        "top5": metrics.topk_accuracy(probabilities_NC, labels_N, 5),
        "class_averaged_top1": metrics.class_averaged_accuracy(best_N, labels_N, len(classes)),
        "loss": metrics.cross_entropy(logits_NC, labels_N),
        "ece": metrics.expected_calibration_error(probabilities_NC, labels_N),
    }
    if photos.sources is not None:
        figures |= _figures_by_source(probabilities_NC, labels_N, photos.sources, classes)
    return {**figures, "on": f"the validation photos of {photos.name}, none of which was trained on"}


def _figures_by_source(
    probabilities_NC: Probabilities, labels_N: Classes, sources_N: npt.NDArray[np.str_], classes: list[ClassLabel]
) -> dict[str, Any]:
    best_N, friends_CC = probabilities_NC.argmax(axis=1), _lenient(classes)
    lenient_N = np.where(friends_CC[best_N, labels_N], labels_N, best_N)
    sources = {}
    for source, title in SOURCES.items():
        of_N = sources_N == source
        sources[title] = {
            "photos": int(of_N.sum()),
            "top1": float(np.mean(best_N[of_N] == labels_N[of_N])),
            "top5": metrics.topk_accuracy(probabilities_NC[of_N], labels_N[of_N], 5),
            "lenient_top1": float(np.mean(lenient_N[of_N] == labels_N[of_N])),
        }
    return {
        "lenient_top1": float(np.mean(lenient_N == labels_N)),
        "lenient_class_averaged_top1": metrics.class_averaged_accuracy(lenient_N, labels_N, len(classes)),
        "sources": sources,
    }


def described(run: Card, name: str, knows: str, tried: str, commands: list[str]) -> Card:
    """Return the card of the embedded model, as yet without figures.

    Raises: UsageError where the run is not finished, is without terms, or a text names a folder of this machine.
    """
    if not run.measured or run.made_by.get("steps") != run.measured.get("step"):
        raise UsageError(f"RUN must be finished. Got the run {run.name} without figures of its weights. Resume it.")
    if not run.terms:
        raise UsageError(f"RUN must state the terms of its data. Got the run {run.name} without terms. Set `terms`.")
    config = {option: value for option, value in run.made_by["config"].items() if option not in ("data", "out")}
    for text in [*commands, *(str(value) for option, value in config.items() if option != "terms")]:
        if re.search(r"""(^|[\s='"])[/~]""", text):
            raise UsageError(f"A card must name no folder of one machine. Got {text!r}. Give paths in the repository.")
    made_by = {**run.made_by, "commands": commands, "config": config}
    del made_by["command"]
    notes = {"knows": knows, "precision": "float16; arrays of one axis in float32"} | (
        {"tried": tried} if tried else {}
    )
    return dataclasses.replace(run, name=name, measured={}, made_by=made_by, notes=notes)


def embed(
    run: Path,
    data: Path,
    *,
    name: str,
    photos_name: str,
    knows: str,
    tried: str,
    even_out: float,
    calibrate: bool,
    commands: list[str],
    out: Path,
) -> Card:
    """Write the weights, the exported model and the card of the embedded model and return the card.

    Raises:
        DataError: the validation photos are not all there.
        UsageError: the run cannot be embedded.
        WeightsError: the run cannot be read.
    """
    card = described(read_card(run / "weights.json"), name, knows, tried, commands)
    notes = dict(card.notes)
    if (data / PHOTO_TABLE).exists():
        photos, classes = read_everyday112(data)
        if list(card.classes) != classes:
            raise UsageError(f"RUN must know the classes of DATA. Got the run {run} with others. Train it on DATA.")
        pairs = ", ".join(f"{one} and {other}" for one, other in LENIENT_PAIRS)
        notes["lenient"] = f"figures called lenient take either name of these pairs for the other: {pairs}"
    else:
        found = read_labelled_photos(data, card.classes)
        photos = Photos(photos_name, [Path(path) for path in found.paths], found.labels)
    state = read_state(run / "weights.safetensors")
    if even_out:
        state = evened_out(state, data, balance=card.made_by["config"]["balance"], share=even_out)
        notes["evened_out"] = f"logits are lowered by {even_out:g} times the logarithm of a class's share of the draws"
    if calibrate:
        state, factor = calibrated(state, card, photos.every_second(0))
        notes["calibration"] = (
            f"logits are scaled by {factor:.3g}, which fits every second validation photo best; loss and ece are those "
            "of the others"
        )
    weights = half_precision(state)
    logits_NC = classify(weights, card, photos)
    figures = measure(logits_NC, photos, list(card.classes))
    if calibrate:
        others = measure(logits_NC[1::2], photos.every_second(1), list(card.classes))
        figures |= {figure: others[figure] for figure in ("loss", "ece")}
    notes["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    card = dataclasses.replace(card, measured=_rounded(figures), notes=notes)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.safetensors", weights)
    write_card(card, out / f"{name}.json")
    return export(out / f"{name}.safetensors")


def export(weights: Path) -> Card:
    """Write the exported model beside its weights and return the card of both.

    Raises: UsageError where the file is too large for the package.
    """
    exported = weights.with_suffix(".onnx")
    for precision in ("fp32", "fp16"):
        card = export_model(weights, exported, precision=precision, outputs=OUTPUTS)
        if exported.stat().st_size <= MAX_FILE_BYTES:
            return card
    size = exported.stat().st_size
    exported.unlink()
    raise UsageError(f"An exported model in the package must be under {MAX_FILE_BYTES} bytes. Got {size}.")


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
    parser = argparse.ArgumentParser(description="Put a finished run into the package.")
    parser.add_argument("name", metavar="NAME", help="what the embedded model is called")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the finished run")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a folder of photos per class")
    parser.add_argument("--photos", default="Everyday-112", help="what the photos are called (default: %(default)s)")
    parser.add_argument("--knows", default=EVERYDAY_112, help="what the model knows (default: %(default)s)")
    parser.add_argument("--tried", default="", help="what else was tried and what it gave, for the card")
    parser.add_argument(
        "--even-out", type=float, default=0.0, metavar="SHARE", help="name small classes more readily (0 to 1)"
    )
    parser.add_argument("--calibrate", action="store_true", help="scale logits so that probabilities come true")
    parser.add_argument(
        "--command", action="append", required=True, help="a command that made DATA or RUN, for the card; repeat it"
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of the result (default: in the package)")
    arguments = parser.parse_args(argv)
    own = ["python", "scripts/embed_model.py", arguments.name, str(arguments.run), str(arguments.data)]
    for option in ("photos", "knows", "tried"):
        if getattr(arguments, option) != parser.get_default(option):
            own += [f"--{option}", getattr(arguments, option)]
    own += ["--even-out", f"{arguments.even_out:g}"] if arguments.even_out else []
    own += ["--calibrate"] if arguments.calibrate else []
    try:
        card = embed(
            arguments.run,
            arguments.data,
            name=arguments.name,
            photos_name=arguments.photos,
            knows=arguments.knows,
            tried=arguments.tried,
            even_out=arguments.even_out,
            calibrate=arguments.calibrate,
            commands=[*arguments.command, shlex.join(own)],
            out=arguments.out,
        )
    except (WeightNetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for suffix in (".safetensors", ".onnx"):
        path = arguments.out / f"{arguments.name}{suffix}"
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    for name, value in card.measured.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
