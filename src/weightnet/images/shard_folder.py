"""A folder of tar shards as one sequence of photos, each with its class number beside it."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError
from weightnet.images.shards import ShardIndex, index_shard, read_member

MAX_CLASSES = 10**6  # a stray number must not fill the memory with names


@dataclasses.dataclass(frozen=True, eq=False)
class ShardFolder:
    """The photos of a folder's shards, in the order of shards and members.

    Args:
        root: the folder.
        paths: the shards, sorted.
        names: "shard.tar/member name" of each photo.
        labels: class number of each.
        places: of each photo the number of its shard, where it begins and how many bytes it has.

    Shape: labels (photos,) and places (photos, 3) int64.
    """

    root: str
    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """Return the bytes of a photo.

        Raises: ImageError where its shard cannot be read.
        """
        shard, offset, size = self.places[index].tolist()
        return read_member(self.paths[shard], offset, size)


def shards_of(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the shards that lie in a folder, sorted."""
    return sorted(path for path in Path(folder).glob("*.tar") if not path.name.startswith("."))


def read_shard_folder(root: str | os.PathLike[str]) -> ShardFolder:
    """Return the photos of a folder's shards; only the shards' headers are read, or the indices kept beside them.

    A photo's class is the whole number in the member `KEY.cls`, or "cls" in `KEY.json`.

    Raises: DataError where there is no shard or photo, a shard is damaged, or a photo has no class or one out of range.
    """
    shards = shards_of(root)
    indices = [index_shard(path) for path in shards]
    if not sum(map(len, indices)):
        raise DataError(f"{root} must hold tar shards with photos. Got {len(shards)} shards without any. Add some.")
    numbers = np.repeat(np.arange(len(shards)), [len(index) for index in indices])
    offsets, sizes = (np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes"))
    return ShardFolder(
        root=os.fspath(root),
        paths=tuple(map(os.fspath, shards)),
        names=tuple(f"{path.name}/{name}" for path, index in zip(shards, indices, strict=True) for name in index.names),
        labels=np.concatenate([_labels(path, index) for path, index in zip(shards, indices, strict=True)]),
        places=np.stack([numbers, offsets, sizes], axis=1),
    )


def _labels(path: Path, index: ShardIndex) -> npt.NDArray[np.int64]:
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
    return labels
