"""How good a model is on labelled photos: the figures, and what lies behind them.

Shape suffixes: N photos, C classes of the model, K of them that have a folder.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError
from weightnet.images.shard_folder import ShardFolder
from weightnet.predict import metrics
from weightnet.predict.classifier import Classifier
from weightnet.predict.labelled import LabelledPhotos
from weightnet.zoo.cards import Card


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """How good a model is on one class.

    Args:
        index: of the class, among the model's.
        label: what it is called.
        wnid: its WordNet id, if it has one.
        folders: the class folders that stand for it, or the class numbers of shards.
        images: its photos that were measured.
        top1: share of them that are right, as a fraction of 1; None without a photo.
        predicted: how many of all measured photos are taken for it, rightly or not.
    """

    index: int
    label: str
    wnid: str | None
    folders: tuple[str, ...]
    images: int
    top1: float | None
    predicted: int


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of a model on labelled photos.

    Args:
        card: the model's, with the preprocessing that was used.
        root: the folder of class folders, or of shards.
        paths: the photos that were measured, as in `LabelledPhotos`.
        labels: their classes.
        logits: what the network says of each.
        unreadable: path of each photo that could not be classified, and why; they are left out of all figures.
        figures: as `metrics.summary` gives them; where the card has a limit, also `unknown`, the share of the photos in
            which the model sees none of its classes.
        classes: the classes that have a folder, by index.
        reliability: per range of confidence, how often the model is right.
        shards: what holds the photos, where they are no files.

    Shape: paths and labels (N,), logits (N, C) float32, classes (K,).
    """

    card: Card
    root: str
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    unreadable: tuple[tuple[str, str], ...]
    figures: dict[str, float]
    classes: tuple[ClassResult, ...]
    reliability: tuple[metrics.Bin, ...]
    shards: ShardFolder | None = None

    def source(self, path: str) -> str | bytes:
        """Return a photo as `read_image` takes it: its path, or its bytes.

        Raises: ImageError where its shard cannot be read.
        """
        if self.shards is None:
            return path
        return self.shards.read(self.shards.names.index(path.removeprefix(os.path.join(self.root, ""))))

    def confusion(self) -> npt.NDArray[np.int64]:
        """Return how many photos of each class are taken for which.

        Shape: (K, C): a row for each of `classes`, a column for each class of the model.
        """
        counts_KC = np.zeros((len(self.classes), len(self.card.classes)), np.int64)
        row_of_C = np.zeros(len(self.card.classes), np.int64)
        row_of_C[[result.index for result in self.classes]] = np.arange(len(self.classes))
        np.add.at(counts_KC, (row_of_C[self.labels], self.logits.argmax(1)), 1)
        return counts_KC

    def worst_classes(self) -> list[ClassResult]:
        """Return the classes with a photo that is taken for another, the worst first; of equal ones the larger."""
        wrong = [result for result in self.classes if result.top1 is not None and result.top1 < 1]
        return sorted(wrong, key=lambda result: (result.top1, -result.images))

    def to_dict(self) -> dict[str, Any]:
        """Return all but the logits as plain data for JSON."""
        return {
            "name": self.card.name,
            "data": self.root,
            "images": len(self.paths),
            "unreadable": len(self.unreadable),
            **self.figures,
            "preprocess": self.card.preprocess.to_dict(),
            "classes": [{**dataclasses.asdict(result), "folders": list(result.folders)} for result in self.classes],
            "confusion": self.confusion().tolist(),
            "reliability": [row._asdict() for row in self.reliability],
            "unreadable_images": [{"path": path, "error": error} for path, error in self.unreadable],
        }


def evaluate(
    classifier: Classifier, photos: LabelledPhotos, *, advance: Callable[[], None] = lambda: None
) -> Evaluation:
    """Measure a model on labelled photos; of each photo, only the logits are kept in memory.

    Args:
        classifier: the model, at the size at which it is to be measured.
        photos: what `read_labelled_photos` found for its classes.
        advance: called after each photo.

    Raises:
        DataError: no photo can be classified, or a shard cannot be read any more.

    Example:
        >>> import cv2, pathlib, tempfile
        >>> from weightnet.predict.labelled import read_labelled_photos
        >>> classifier = Classifier(device="cpu")
        >>> with tempfile.TemporaryDirectory() as data:
        ...     pathlib.Path(data, "cat").mkdir()
        ...     _ = cv2.imwrite(f"{data}/cat/1.png", np.zeros((200, 200, 3), np.uint8))
        ...     evaluation = evaluate(classifier, read_labelled_photos(data, classifier.card.classes))
        >>> evaluation.confusion().shape
        (1, 112)
    """
    logits_NC = np.empty((len(photos), len(classifier.card.classes)), np.float32)
    measured: list[int] = []
    unreadable: list[tuple[str, str]] = []
    for index, (_, outcome) in enumerate(classifier.stream_logits(photos.sources())):
        if isinstance(outcome, str):
            unreadable.append((photos.paths[index], outcome))
        else:
            logits_NC[len(measured)] = outcome
            measured.append(index)
        advance()
    if not measured:
        raise DataError(
            f"{photos.root} must hold photos that can be read. Got none among {len(photos)}: {unreadable[0][1]}"
        )
    logits_NC, labels_N = logits_NC[: len(measured)], photos.labels[measured]
    probabilities_NC = metrics.softmax(logits_NC)
    figures = metrics.summary(logits_NC, labels_N)
    if (known_from := classifier.card.known_from) is not None:
        figures["unknown"] = float(np.mean(probabilities_NC.max(1) < known_from))
    return Evaluation(
        card=classifier.card,
        root=photos.root,
        paths=tuple(photos.paths[index] for index in measured),
        labels=labels_N,
        logits=logits_NC,
        unreadable=tuple(unreadable),
        figures=figures,
        classes=_class_results(classifier.card, photos, labels_N, logits_NC.argmax(1)),
        reliability=tuple(metrics.reliability(probabilities_NC, labels_N)),
        shards=photos.shards,
    )


def _class_results(
    card: Card, photos: LabelledPhotos, labels_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64]
) -> tuple[ClassResult, ...]:
    images_C, right_C, predicted_C = (
        np.bincount(indices, minlength=len(card.classes)).tolist()
        for indices in (labels_N, labels_N[predicted_N == labels_N], predicted_N)
    )
    folders: dict[int, list[str]] = {}
    for name, index in photos.folders.items():
        folders.setdefault(index, []).append(name)
    return tuple(
        ClassResult(
            index=index,
            label=card.classes[index].label,
            wnid=card.classes[index].wnid,
            folders=tuple(names),
            images=images_C[index],
            top1=right_C[index] / images_C[index] if images_C[index] else None,
            predicted=predicted_C[index],
        )
        for index, names in sorted(folders.items())
    )
