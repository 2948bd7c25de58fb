"""Tar shards to train on: `train/*.tar` and `val/*.tar`, as webdataset lays them out, each photo with its class number.

Shards are indexed once, by where each photo begins; photos are then read one by one in any order. The order of an
epoch is so the same function of seed and epoch as with folders, each photo comes once, and that for any number of
workers and processes.
"""

import dataclasses
from pathlib import Path

from weightnet.errors import DataError
from weightnet.images.labels import ClassLabel
from weightnet.images.shard_folder import ShardFolder, read_shard_folder, shards_of
from weightnet.train.folders import PhotoFolder, check_labels, label_of_row, read_folders, read_table
from weightnet.zoo.cards import default_classes


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoShards(PhotoFolder):
    """The photos of one split, in shards; `files` are their names there."""

    shards: ShardFolder

    def source(self, index: int) -> bytes:
        """Return a photo as `read_image` takes it: its bytes.

        Raises: ImageError where its shard cannot be read.
        """
        return self.shards.read(index)


def read_photos(root: str | Path) -> tuple[PhotoFolder, PhotoFolder]:
    """Return the training and validation photos of a data folder, of shards where `train/` holds any.

    Raises: DataError as `read_folders` and `read_shards`.
    """
    return read_shards(root) if shards_of(Path(root) / "train") else read_folders(root)


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
    splits = [read_shard_folder(root / split) for split in ("train", "val")]
    train_labels = splits[0].labels
    classes = _classes(root, int(train_labels.max()) + 1)
    empty = sorted(set(range(len(classes))) - set(train_labels.tolist()))
    if len(classes) < 2 or empty:
        raise DataError(
            "Shards must hold training photos of at least two classes, and of each one. "
            f"Got {len(classes)} classes, without photos: {empty[:5]}. Add some, or mend classes.csv."
        )
    train, val = (PhotoShards(shards.root, shards.names, shards.labels, classes, shards) for shards in splits)
    if val.labels.max() >= len(classes):
        raise DataError(
            f"A validation photo's class must be one of the {len(classes)} in training, counted from 0. "
            f"Got {val.labels.max()} in {val.root}. Mend the shards' labels."
        )
    return train, val


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
