"""Tar shards to train on: `train/*.tar` and `val/*.tar`, as webdataset lays them out, each photo with its class number.

Shards are indexed once, by where each photo begins; photos are then read one by one in any order. The order of an
epoch is so the same function of seed and epoch as with folders, each photo comes once, and that for any number of
workers and processes.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError
from weightnet.images.labels import ClassLabel
from weightnet.images.shards import ShardIndex, index_shard, read_member
from weightnet.train.folders import PhotoFolder, check_labels, label_of_row, read_folders, read_table
from weightnet.zoo.cards import default_classes

MAX_CLASSES = 10**6  # a stray number must not fill the memory with names


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoShards(PhotoFolder):
    """The photos of one split, in shards; `files` are "shard.tar/member name", in the order of shards and members.

    Args:
        shards: the shards' paths, sorted.
        places: of each photo the number of its shard, where it begins and how many bytes it has.

    Shape: places (photos, 3) int64.
    """

    shards: tuple[str, ...]
    places: npt.NDArray[np.int64]

    def source(self, index: int) -> bytes:
        """Return a photo as `read_image` takes it: its bytes.

        Raises: ImageError where its shard cannot be read.
        """
        shard, offset, size = self.places[index].tolist()
        return read_member(self.shards[shard], offset, size)


def read_photos(root: str | Path) -> tuple[PhotoFolder, PhotoFolder]:
    """Return the training and validation photos of a data folder, of shards where `train/` holds any.

    Raises: DataError as `read_folders` and `read_shards`.
    """
    return read_shards(root) if _shards_of(Path(root) / "train") else read_folders(root)


def read_shards(root: str | Path) -> tuple[PhotoShards, PhotoShards]:
    """Return the training and validation photos of a folder whose `train/` and `val/` hold tar shards.

    A photo's class is the whole number in the member `KEY.cls`, or "cls" in `KEY.json`. Row i of `classes.csv` (columns
    label, wnid, imagenet_index) names class i; without it 1,000 classes are ImageNet's, and others are numbered.

    Raises: DataError where a split has no shard or photo, a shard is damaged, a photo has no class or one out of range,
        a class has no training photo, or `classes.csv` does not fit them.

    Example:
        >>> train, val = read_shards("shards")  # doctest: +SKIP
        >>> len(train), train.name(0)  # doctest: +SKIP
        (1281167, 'train/imagenet-train-000000.tar/n03788365/17158.jpg')

    Source: the webdataset format, github.com/webdataset/webdataset.
    """
    root = Path(root)
    splits = {split: _index_split(root / split) for split in ("train", "val")}
    train_labels = _labels(*splits["train"])
    classes = _classes(root, int(train_labels.max()) + 1)
    empty = sorted(set(range(len(classes))) - set(train_labels.tolist()))
    if len(classes) < 2 or empty:
        raise DataError(
            "Shards must hold training photos of at least two classes, and of each one. "
            f"Got {len(classes)} classes, without photos: {empty[:5]}. Add some, or mend classes.csv."
        )
    train, val = (_photos(root / split, *splits[split], classes) for split in ("train", "val"))
    if val.labels.max() >= len(classes):
        raise DataError(
            f"A validation photo's class must be one of the {len(classes)} in training, counted from 0. "
            f"Got {val.labels.max()} in {val.root}. Mend the shards' labels."
        )
    return train, val


def _shards_of(split: Path) -> list[Path]:
    return sorted(path for path in split.glob("*.tar") if not path.name.startswith("."))


def _index_split(split: Path) -> tuple[list[Path], list[ShardIndex]]:
    shards = _shards_of(split)
    indices = [index_shard(path) for path in shards]
    if not sum(map(len, indices)):
        raise DataError(f"{split} must hold tar shards with photos. Got {len(shards)} shards without any. Add some.")
    return shards, indices


def _labels(shards: list[Path], indices: list[ShardIndex]) -> npt.NDArray[np.int64]:
    for path, index in zip(shards, indices, strict=True):
        labels = np.full(len(index), -1) if index.labels is None else index.labels
        if (labels < 0).any():
            name = index.names[int(np.argmax(labels < 0))]
            raise DataError(
                "Every photo of a shard must have its class number beside it, as KEY.cls. "
                f"Got {name} in {path} without one. Add it, or leave the photo out."
            )
        if (labels > MAX_CLASSES).any():
            raise DataError(
                f"A class number must be at most {MAX_CLASSES}. Got {labels.max()} in {path}. Number classes from 0."
            )
    return np.concatenate([index.labels for index in indices if index.labels is not None])


def _classes(root: Path, num_classes: int) -> tuple[ClassLabel, ...]:
    table = root / "classes.csv"
    if not table.exists():
        return default_classes(num_classes)
    try:
        rows = read_table(table, ("label",))
    except OSError as error:
        raise DataError(f"{table} must be readable. Got: {error}. Check its rights.") from error
    classes = [label_of_row(table, row) for row in rows]
    if len(classes) < num_classes:
        raise DataError(
            f"{table} must have one row for each class. Got {len(classes)} rows and the class number "
            f"{num_classes - 1}. Add rows, or mend the shards' labels."
        )
    check_labels(root, classes)
    return tuple(classes)


def _photos(split: Path, shards: list[Path], indices: list[ShardIndex], classes: tuple[ClassLabel, ...]) -> PhotoShards:
    files = tuple(f"{path.name}/{name}" for path, index in zip(shards, indices, strict=True) for name in index.names)
    numbers = np.repeat(np.arange(len(shards)), [len(index) for index in indices])
    offsets, sizes = (np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes"))
    places = np.stack([numbers, offsets, sizes], axis=1)
    paths = tuple(map(os.fspath, shards))
    return PhotoShards(os.fspath(split), files, _labels(shards, indices), classes, paths, places)
