"""Labelled photos: a folder with one folder of photos per class, matched to a model's classes by name, never by order.

Or a folder of tar shards: row i of `classes.csv` names their class i; without it numbers are the model's own.

A class folder is matched by the first of these that fits:

1. WordNet id: the folder's name is one (`n02084071`) or begins with one (`n02085620-Chihuahua`).
2. Label: the folder's name (or what follows its WordNet id) is a label of the model. Where none is exactly the same,
   upper and lower case count alike, and so do spaces, underscores and hyphens: `Grand_Piano` is "grand piano".
3. ImageNet's label: a folder named by a WordNet id of ImageNet stands for that label, for classes without a WordNet id.

Where `classes.csv` (columns `folder`, and `label`, `wnid` or both) has a row for the folder, the row's WordNet id and
label take the place of the folder's name. Several folders may stand for one class.
"""

import dataclasses
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError, ImageError, nearest
from weightnet.images.labels import ClassLabel, imagenet_classes, read_class_table
from weightnet.images.shard_folder import ShardFolder, read_shard_folder, shards_of
from weightnet.predict.inputs import find_images

SPLITS = ("train", "val", "valid", "validation", "test")
TABLE = "classes.csv"
_WNID = re.compile(r"(n\d{8})(?:[-_ ]+(.*))?", re.DOTALL)
_SEPARATORS = re.compile(r"[\s_-]+")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPhotos:
    """Photos and the classes that they show.

    Args:
        root: the folder that holds the class folders, or the shards.
        paths: where each photo lies, by class folder; of shards "SHARD.tar/MEMBER", in their order.
        labels: the class of each, as its index among the model's.
        folders: name of each class folder, or number of each class of the shards, and its class index.
        shards: what holds the photos, where they are no files.

    Shape: N photos: paths and labels (N,).
    """

    root: str
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    folders: Mapping[str, int]
    shards: ShardFolder | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def sources(self) -> Iterator[str | bytes]:
        """Yield all photos as `read_image` takes them: their paths, or their bytes.

        Raises: DataError where a shard cannot be read.
        """
        for index, path in enumerate(self.paths):
            try:
                yield path if self.shards is None else self.shards.read(index)
            except ImageError as error:
                raise DataError(
                    f"Photos must stay where they are while they are measured. Got {path}: {error}"
                ) from error


def read_labelled_photos(data: str | os.PathLike[str], classes: Sequence[ClassLabel]) -> LabelledPhotos:
    """Return the photos of a folder that holds one folder per class, or tar shards; only names and headers are read.

    A class folder stands for all photos in it and its subfolders, as in `weightnet predict`; names that begin with a
    dot are passed over, links are followed. Classes without a folder are fine. Shards are as `weightnet train` takes
    them; a folder that holds class folders too is not of shards.

    Args:
        data: the folder of class folders or shards, or a data folder with `train/` and `val/`, which stands for its
            `val/`. `classes.csv` is looked for in it, and for a folder that is called like a split (`val`) beside it
            too.
        classes: the model's.

    Raises:
        DataError: there are neither, a folder or class number fits no class, a folder holds no photo, a shard is
            damaged or has a photo without a class number, or `classes.csv` is no such table.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as data:
        ...     pathlib.Path(data, "Grand_Piano").mkdir()
        ...     pathlib.Path(data, "Grand_Piano", "1.jpg").touch()
        ...     photos = read_labelled_photos(data, [ClassLabel("cat"), ClassLabel("grand piano")])
        >>> len(photos), photos.labels.tolist(), dict(photos.folders)
        (1, [1], {'Grand_Piano': 1})
    """
    try:
        root, table = _locate(os.fspath(data))
        names = _subfolders(root)
        if not names and shards_of(root):
            return _read_shards(root, table, classes)
        rows = _read_table(table) if table else {}
    except OSError as error:
        raise DataError(f"A data folder must be readable. Got: {error}. Check the path and its rights.") from error
    if not names:
        raise DataError(
            f"A data folder must hold one folder of photos per class, or tar shards. Got none in {root}. "
            "Put the photos of each class into a folder that is named by its label or WordNet id."
        )
    folders = _matched(root, names, rows, _Matcher(classes))
    paths: list[str] = []
    counts: list[int] = []
    for name in names:
        found = _photos(os.path.join(root, name))
        paths += found
        counts.append(len(found))
    labels = np.repeat(np.array(list(folders.values()), np.int64), counts)
    return LabelledPhotos(root, tuple(paths), labels, folders)


def _read_shards(root: str, table: str | None, classes: Sequence[ClassLabel]) -> LabelledPhotos:
    shards = read_shard_folder(root)
    numbers = np.unique(shards.labels).tolist()
    names = classes if table is None else _read_numbered_table(table)
    if numbers[-1] >= len(names):
        place = f"the {len(names)} rows of {table}" if table else f"the model's {len(names)} classes, without {TABLE}"
        raise DataError(
            f"A class number of the shards must be one of {place}, counted from 0. Got {numbers[-1]} in {root}. "
            f"Mend the shards' labels, or name their classes in {TABLE} (label or wnid, a row for each)."
        )
    folders = {str(number): number for number in numbers}
    if table:
        rows = {str(number): names[number] for number in numbers}
        folders = _matched(root, rows, rows, _Matcher(classes), numbered=True)
    index_of = np.zeros(numbers[-1] + 1, np.int64)
    index_of[numbers] = list(folders.values())
    paths = tuple(os.path.join(root, name) for name in shards.names)
    return LabelledPhotos(root, paths, index_of[shards.labels], folders, shards)


def _read_numbered_table(table: str) -> list[ClassLabel]:
    """Return what classes.csv says of each class number of shards."""
    columns, rows = read_class_table(table)
    if not {"label", "wnid"} & set(columns):
        raise DataError(
            f"{table} must have the column label (or wnid), and a row for each class. Got columns={columns[:5]}. "
            "Name them in its first line."
        )
    return [ClassLabel(row.get("label") or "", row.get("wnid") or None) for row in rows]


def _locate(data: str) -> tuple[str, str | None]:
    """Return the folder of class folders and the table that names their classes, if there is one."""
    if not os.path.isdir(data):
        raise DataError(f"A data folder must be a folder. Got {data!r}. Give one that holds a folder per class.")
    split = os.path.join(data, "val")
    holds_splits = os.path.isdir(split) and (os.path.isdir(os.path.join(data, "train")) or _subfolders(data) == ["val"])
    root = split if holds_splits else data
    places = [root]
    if holds_splits:
        places.append(data)
    elif os.path.basename(os.path.abspath(data)) in SPLITS:
        places.append(os.path.join(data, os.pardir))
    tables = (os.path.join(place, TABLE) for place in places)
    return root, next(filter(os.path.isfile, tables), None)


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path))


def _read_table(path: str) -> dict[str, ClassLabel]:
    """Return what classes.csv says of each folder; an empty label where it gives the WordNet id alone."""
    columns, rows = read_class_table(path)
    if "folder" not in columns or not {"label", "wnid"} & set(columns):
        raise DataError(
            f"{path} must have the columns folder and label (or wnid), between commas. Got columns={columns[:5]}. "
            "Name them in its first line."
        )
    table: dict[str, ClassLabel] = {}
    for row in rows:
        folder, entry = row["folder"] or "", ClassLabel(row.get("label") or "", row.get("wnid") or None)
        if table.setdefault(folder, entry) != entry:
            raise DataError(f"{path} must have one row for each folder. Got two that differ for {folder!r}. Mend it.")
    return table


class _Matcher:
    """Finds a model's class by what a folder is called."""

    def __init__(self, classes: Sequence[ClassLabel]) -> None:
        self.labels = [entry.label for entry in classes]
        self._wnids = [entry.wnid for entry in classes]
        self._by_wnid: defaultdict[str, list[int]] = defaultdict(list)
        self._by_key: defaultdict[str, list[int]] = defaultdict(list)
        for index, entry in enumerate(classes):
            if entry.wnid:
                self._by_wnid[entry.wnid].append(index)
            self._by_key[_key(entry.label)].append(index)
        self._imagenet = {entry.wnid: entry.label for entry in imagenet_classes()}

    def candidates(self, name: str, row: ClassLabel | None) -> list[int]:
        """Return the classes that a folder may stand for: one where it is clear."""
        wnid, label = (row.wnid, row.label) if row else _wnid_and_label(name)
        if wnid and (found := self._by_wnid.get(wnid)):
            return [index for index in found if index in self._labelled(label)] or found
        if label:
            return self._labelled(label)
        return [index for index in self._labelled(self._imagenet.get(wnid, "")) if not self._wnids[index]]

    def hint(self, name: str, row: ClassLabel | None) -> str:
        """Return what helps with a folder that stands for no class, or for several."""
        if found := self.candidates(name, row):
            return f"It may be {' or '.join(repr(self.labels[index]) for index in found[:3])}."
        wnid, label = (row.wnid, row.label) if row else _wnid_and_label(name)
        called = self._imagenet.get(wnid, "")
        known = f"{wnid} is {called!r} in ImageNet." if called else ""
        said = f"{TABLE} says {label or wnid!r}." if row else ""
        return " ".join(filter(None, [said, known, nearest(label or called, self.labels)]))

    def _labelled(self, label: str) -> list[int]:
        alike = self._by_key.get(_key(label), []) if label else []
        return [index for index in alike if self.labels[index] == label] or alike


def _wnid_and_label(name: str) -> tuple[str | None, str]:
    match = _WNID.fullmatch(name)
    return (match[1], match[2] or "") if match else (None, name)


def _key(label: str) -> str:
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", label).casefold()).strip()


def _matched(
    root: str, names: Iterable[str], rows: Mapping[str, ClassLabel], matcher: _Matcher, *, numbered: bool = False
) -> dict[str, int]:
    """Return the class of each class folder, or of each class number of shards."""
    folders: dict[str, int] = {}
    wrong: list[str] = []
    for name in names:
        found = matcher.candidates(name, rows.get(name))
        if len(found) == 1:
            folders[name] = found[0]
        else:
            wrong.append(name)
    if not wrong:
        return folders
    hints = [(name, matcher.hint(name, rows.get(name))) for name in wrong[:3]]
    got = ", ".join(f"{name!r}{f' ({hint})' if hint else ''}" for name, hint in hints)
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    if numbered:
        raise DataError(
            f"Every class number of the shards must stand for one class of the model, by its row in {TABLE}. "
            f"Got {got}{more} in {root}. Mend that table, or leave such photos out."
        )
    raise DataError(
        "Every class folder must be called like one class of the model, by its WordNet id or its label. "
        f"Got {got}{more} in {root}. Rename or move such folders, or say what they are in {TABLE} (folder,label)."
    )


def _photos(folder: str) -> list[str]:
    reports: list[str] = []
    found = list(find_images([folder], report=reports.append))
    if not found and len(reports) == 1:
        raise DataError(f"Every class folder must hold photos. Got none in {folder}. Add some or move it away.")
    if reports:
        raise DataError(f"Every class folder must be readable. Got {reports[0]} Check its rights.")
    return found
