"""Class names: what a model's outputs are called, and the 1,000 of ImageNet in their usual order."""

import csv
import dataclasses
import functools
import importlib.resources
import os
from typing import Any

from weightnet.errors import DataError


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """A class that a model can name.

    Args:
        label: the name that people read, unique among a model's classes.
        wnid: WordNet id of the thing, like "n01440764"; None where WordNet has none.
        imagenet_index: its index among the 1,000 classes of ImageNet, from 0; None where it is none of them.

    >>> ClassLabel("tench", wnid="n01440764", imagenet_index=0).label
    'tench'
    """

    label: str
    wnid: str | None = None
    imagenet_index: int | None = None

    def is_same(self, other: "ClassLabel") -> bool:
        """Say whether both are one thing: by WordNet id where both have one, else by label.

        >>> ClassLabel("tench", wnid="n01440764").is_same(ClassLabel("Tinca tinca", wnid="n01440764"))
        True
        """
        if self.wnid and other.wnid:
            return self.wnid == other.wnid
        return self.label == other.label


@functools.cache
def imagenet_classes() -> tuple[ClassLabel, ...]:
    """Return the 1,000 classes of ImageNet (ILSVRC 2012) in the order of a network's outputs.

    Labels are the first names that WordNet gives, made unique where two classes share one.

    Source: `imagenet_classes.csv`, made by `scripts/make_imagenet_labels.py` from the lists of timm (Apache-2.0).

    >>> imagenet_classes()[281]
    ClassLabel(label='tabby', wnid='n02123045', imagenet_index=281)
    """
    table = importlib.resources.files("weightnet.images") / "imagenet_classes.csv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    return tuple(ClassLabel(row["label"], row["wnid"], index) for index, row in enumerate(rows))


def read_class_table(path: str | os.PathLike[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the rows of a table of classes in CSV; what it needs to have is the caller's to check.

    Raises:
        DataError: it is no such table.
        OSError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} must be a table in CSV and UTF-8. Got: {error}. Save it so, or remove it.") from error
