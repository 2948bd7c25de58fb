"""A data folder: `train/` and `val/`, each with one folder per class, of photos or of folders of them.

Class names are the folder names, or the rows of an optional `classes.csv` beside the two (columns folder, label, wnid,
imagenet_index), whose order is then that of the classes. Names that begin with a dot are passed over.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError
from weightnet.images.decode import IMAGE_SUFFIXES
from weightnet.images.labels import ClassLabel, imagenet_classes, read_class_table

MAX_LABEL_LENGTH = 200  # what a model card takes


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoFolder:
    """The photos of one split.

    Args:
        root: the folder of the split.
        files: "class folder/name" of each photo, sorted by class, then by name; a name may lead through folders.
        labels: class index of each.
        classes: one entry per class index.
    """

    root: str
    files: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[ClassLabel, ...]

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> str | bytes:
        """Return a photo as `read_image` takes it: its path.

        Raises: ImageError where it lies in a file with others and cannot be read there.
        """
        return os.path.join(self.root, self.files[index])

    def name(self, index: int) -> str:
        """Return "split/class folder/name" of a photo."""
        return f"{os.path.basename(self.root)}/{self.files[index]}"

    def digest(self) -> str:
        """Return a hash of the photos' names and classes, the same wherever the folder lies."""
        names = os.fsencode("\0".join(self.files))
        return hashlib.sha256(names + self.labels.tobytes()).hexdigest()


def read_folders(root: str | Path) -> tuple[PhotoFolder, PhotoFolder]:
    """Return the training and validation photos of a data folder.

    Only names are read: whether a photo can be decoded shows when it is needed.

    Raises: DataError where a split or class is missing or empty, the two splits have different classes, or
        `classes.csv` does not fit them.
    """
    root = Path(root)
    try:
        names = {split: _class_folders(root, split) for split in ("train", "val")}
        if names["train"] != names["val"]:
            odd = sorted(set(names["train"]) ^ set(names["val"]))
            raise DataError(
                f"train/ and val/ must hold the same classes. Got {_few(odd)} in one of them only. Add or remove them."
            )
        folders, classes = _class_labels(root, names["train"])
        train, val = (_read_split(root / split, folders, classes) for split in ("train", "val"))
    except OSError as error:
        raise DataError(f"A data folder must be readable. Got: {error}. Check its rights.") from error
    return train, val


def _class_folders(root: Path, split: str) -> list[str]:
    if not (root / split).is_dir():
        raise DataError(f"A data folder must hold train/ and val/. Got data={root} without {split}/. Add it.")
    with os.scandir(root / split) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if len(names) < 2:
        raise DataError(
            f"{root / split} must hold one folder of photos for each of at least two classes. Got {len(names)}. "
            "Add them."
        )
    return names


def _class_labels(root: Path, names: list[str]) -> tuple[list[str], tuple[ClassLabel, ...]]:
    """Return folders and labels in class order: that of classes.csv, or else sorted by folder."""
    table = root / "classes.csv"
    if table.exists():
        folders, classes = _read_class_table(table, names)
    else:
        known = {label.wnid: label for label in imagenet_classes()}
        folders, classes = names, [known.get(name) or ClassLabel(name) for name in names]
    check_labels(root, classes)
    return folders, tuple(classes)


def check_labels(root: Path, classes: Sequence[ClassLabel]) -> None:
    """Raise DataError where a card could not hold the classes' names."""
    labels = [entry.label for entry in classes]
    bad = [label for label in labels if not label.isprintable() or not 0 < len(label) <= MAX_LABEL_LENGTH]
    repeated = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if bad or repeated:
        raise DataError(
            f"Class names must be 1 to {MAX_LABEL_LENGTH} printable characters, and no two the same. "
            f"Got {_few(bad or repeated)} in {root}. Rename the folders or mend classes.csv."
        )


def _read_class_table(table: Path, names: list[str]) -> tuple[list[str], list[ClassLabel]]:
    rows = read_table(table, ("folder", "label"))
    folders = [row["folder"] or "" for row in rows]
    if sorted(folders) != names:
        odd = sorted({name for name in {*folders, *names} if folders.count(name) != names.count(name)})
        raise DataError(
            f"{table} must have one row for each class folder. "
            f"Got missing, unknown or repeated rows: {_few(odd)}. Mend the file or remove it."
        )
    return folders, [label_of_row(table, row) for row in rows]


def read_table(table: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of a table of classes.

    Raises: DataError where it is not a table, or lacks a column that is needed.
    """
    columns, rows = read_class_table(table)
    if not set(needed) <= set(columns):
        raise DataError(
            f"{table} must have the columns {' and '.join(needed)}, between commas. Got columns={_few(columns)}. "
            "Name them in its first line."
        )
    return rows


def label_of_row(table: Path, row: dict[str, Any]) -> ClassLabel:
    """Return the class of a row; DataError where its number or WordNet id is none."""
    wnid, index = row.get("wnid") or None, row.get("imagenet_index") or None
    name = row.get("folder") or row["label"]
    if index is not None and not (index.isascii() and index.isdigit() and len(index) <= 3):
        raise DataError(
            f"imagenet_index must be empty or a number from 0 to 999. Got {index!r} for {name} in {table}. Mend it."
        )
    if wnid is not None and not (wnid.isprintable() and len(wnid) <= MAX_LABEL_LENGTH):
        raise DataError(f"wnid must be empty or like n02084071. Got {wnid!r} for {name} in {table}. Mend it.")
    return ClassLabel(row["label"] or "", wnid, None if index is None else int(index))


def _read_split(split: Path, folders: list[str], classes: tuple[ClassLabel, ...]) -> PhotoFolder:
    files: list[str] = []
    counts: list[int] = []
    for folder in folders:
        found = _photos_below(split / folder)
        if not found:
            raise DataError(
                f"Every class folder must hold photos. Got none in {split / folder}. Add some or remove it."
            )
        files += [f"{folder}/{name}" for name in found]
        counts.append(len(found))
    return PhotoFolder(os.fspath(split), tuple(files), np.repeat(np.arange(len(folders)), counts), classes)


def _photos_below(folder: Path) -> list[str]:
    """Return the paths of the photos in a folder and in those within it, from the folder on, sorted."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    walked: set[tuple[int, int]] = set()  # links are followed; those that lead back end
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in walked:
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.relpath(os.path.join(where, name), folder) for name in names if _is_photo(name)]
    return sorted(found)


def _is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _few(names: list[str]) -> str:
    return repr(names[:5])[1:-1] + (f" and {len(names) - 5} more" if len(names) > 5 else "")
