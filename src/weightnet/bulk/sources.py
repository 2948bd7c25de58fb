"""What a bulk run is over: the photos of folders, patterns, lists, tar shards and Parquet files, in one fixed order.

A listing numbers them from 0 and gives any range of them. It holds their paths, not their content: about the length of
a path and 8 bytes for each photo that is a file, and nothing for each in a shard or a Parquet file.
"""

import bisect
import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from weightnet.bulk.manifest import FILE as MANIFEST
from weightnet.bulk.tables import ParquetPhotos
from weightnet.errors import DataError, ImageError, UsageError
from weightnet.images.decode import IMAGE_SUFFIXES
from weightnet.images.shards import ShardIndex, index_shard, read_member
from weightnet.predict.inputs import find_images, stands_for_many

STDIN = "-"
_SHARD = re.compile(r"\.tar(\.\w+)?$|\.tgz$", re.IGNORECASE)  # compressed ones too, so that they are refused by name
Report: TypeAlias = Callable[[str], None]


class Photo(NamedTuple):
    """One photo of a listing.

    Args:
        path: what its row calls it: its path, `SHARD/MEMBER`, or `FILE#ROW`.
        source: where it is: a path, its bytes, or why it cannot be had.
    """

    path: str
    source: str | bytes | ImageError


class Files:
    """Photos that are files of their own: all their paths in one text."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def add(self, path: str) -> None:
        """Add a path."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def photos(self, start: int, stop: int) -> Iterator[Photo]:
        """Yield a range of the photos."""
        for begin, end in itertools.pairwise(self._ends[start : stop + 1]):
            path = os.fsdecode(bytes(self._text[begin:end]))
            yield Photo(path, path)

    def identity(self) -> Iterable[bytes]:
        """Return what makes these other photos when it changes: their paths."""
        return b"files", self._ends.tobytes(), bytes(self._text)


@dataclasses.dataclass(frozen=True)
class ShardPhotos:
    """The photos of a tar shard.

    Args:
        path: the shard.
        cache: the folder in which its index is kept.
        count: how many photos it has.
        size: of the file, in bytes.
        mtime_ns: when it was last changed.
    """

    path: str
    cache: str
    count: int
    size: int
    mtime_ns: int

    def __len__(self) -> int:
        return self.count

    def photos(self, start: int, stop: int) -> Iterator[Photo]:
        """Yield a range of the photos."""
        try:
            index = _index(self.path, self.cache, _stamp(self.path))
            places = zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True)
            found = list(itertools.islice(places, start, stop))
        except DataError as error:  # it went away, or changed, since it was listed
            found = []
            missing = ImageError(str(error))
        else:
            missing = ImageError(
                "a photo must stay where it was listed. Got a changed shard. Run again in a new folder."
            )
        for name, offset, size in found:
            try:
                source: bytes | ImageError = read_member(self.path, offset, size)
            except ImageError as error:
                source = error
            yield Photo(f"{self.path}/{name}", source)
        for number in range(start + len(found), stop):
            yield Photo(f"{self.path}#{number}", missing)

    def identity(self) -> Iterable[bytes]:
        """Return what makes these other photos when it changes."""
        return b"shard", os.fsencode(self.path), repr((self.count, self.size, self.mtime_ns)).encode()


@functools.lru_cache(maxsize=1)  # a shard's partitions come one after the other
def _index(path: str, cache: str, stamp: tuple[int, int] | None) -> ShardIndex:
    """Return a shard's index; `stamp` tells one state of the file from another."""
    return index_shard(path, cache=cache)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # `index_shard` says so
        return None
    return status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A shard or Parquet file that cannot be read: one photo that cannot be had, so that its row says so."""

    path: str
    error: str

    def __len__(self) -> int:
        return 1

    def photos(self, start: int, stop: int) -> Iterator[Photo]:
        """Yield a range of the one photo."""
        for _ in range(start, stop):
            yield Photo(self.path, ImageError(self.error))

    def identity(self) -> Iterable[bytes]:
        """Return what makes this another photo when it changes."""
        return b"unreadable", os.fsencode(self.path)


Part: TypeAlias = "Files | ShardPhotos | ParquetPhotos | Unreadable"


class Listing:
    """Numbered photos.

    Args:
        parts: where they are, in order.
    """

    def __init__(self, parts: list[Part]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def photos(self, start: int, stop: int) -> Iterator[Photo]:
        """Yield the photos from number `start` up to, not with, number `stop`; their content as it is needed."""
        first = bisect.bisect_right(self._starts, start) - 1
        for part, begin in zip(self._parts[first:], self._starts[first:], strict=False):
            if begin >= stop:
                return
            for path, source in part.photos(max(start - begin, 0), min(stop - begin, len(part))):
                yield Photo(path, source)

    def digest(self) -> str:
        """Return a text that changes when the photos do: their paths, and the shards' and tables' sizes and times."""
        digest = hashlib.sha256()
        for part in self._parts:
            for piece in part.identity():
                digest.update(len(piece).to_bytes(8, "big"))
                digest.update(piece)
        return digest.hexdigest()


def list_photos(
    inputs: Iterable[str],
    *,
    cache: str,
    report: Report,
    image_column: str = "image",
    left_out: str | None = None,
    stdin: BinaryIO | None = None,
) -> Listing:
    """Return the photos that inputs stand for, in a fixed order.

    - A folder: its photos, tar shards and Parquet files and those of its subfolders, by name; not what runs wrote.
    - A pattern with `*`, `?`, `[...]` or `**`: the files that it matches.
    - `LIST.txt`, or `-` for standard input: the files that it names, one on each line.
    - `SHARD.tar`: the photos in a tar file; `TABLE.parquet`: those of a column of a Parquet file.
    - Anything else: that file.

    Args:
        inputs: as the user wrote them.
        cache: folder in which the indices of shards are kept.
        report: called with a message for what cannot be listed, and for an input without a photo.
        image_column: the column of Parquet files that holds the photos.
        left_out: a folder whose files no folder or pattern stands for: the run's own.
        stdin: what `-` is read from.

    Raises:
        UsageError: a list that cannot be read, or a Parquet file without that column.
        MissingDependencyError: a Parquet file is among them, and pyarrow is not installed.
    """
    lister = _Lister(cache, report, image_column, left_out)
    for text in inputs:
        if text == STDIN and stdin is not None:
            lister.add_list(stdin)
        elif os.path.isdir(text):
            lister.add_folder(text)
        elif stands_for_many(text):
            for path in find_images([text], report=report):
                lister.add_found(path)
        elif text.lower().endswith(".txt"):
            try:
                with open(text, "rb") as file:
                    lister.add_list(file)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise UsageError(
                    f"A list of photos must be a readable file. Got {text}: {reason}. Check the path."
                ) from error
        else:
            lister.add(text)
    return Listing(lister.parts)


class _Lister:
    """Collects the parts of a listing."""

    def __init__(self, cache: str, report: Report, image_column: str, left_out: str | None) -> None:
        self.parts: list[Part] = []
        self._cache = cache
        self._report = report
        self._image_column = image_column
        self._left_out = os.path.join(os.path.realpath(left_out), "") if left_out is not None else None

    def add(self, path: str) -> None:
        """Add the photos of one file."""
        is_shard, is_table = _SHARD.search(path), path.lower().endswith(".parquet")
        if is_shard or is_table:
            try:
                self.parts.append(self._shard(path) if is_shard else ParquetPhotos.open(path, self._image_column))
            except DataError as error:
                self._report(f"{path}: {error}")
                self.parts.append(Unreadable(path, str(error)))
            return
        if not self.parts or not isinstance(self.parts[-1], Files):
            self.parts.append(Files())
        self.parts[-1].add(path)  # type: ignore[union-attr]

    def add_found(self, path: str) -> None:
        """Add the photos of one file that a folder or pattern led to, unless it is what a run wrote."""
        is_own = self._left_out is not None and os.path.realpath(path).startswith(self._left_out)
        if not is_own and not os.path.exists(os.path.join(os.path.dirname(path), MANIFEST)):
            self.add(path)

    def add_list(self, file: BinaryIO) -> None:
        """Add the files that a list names."""
        for number, line in enumerate(file):
            name = line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")
            if name:
                self.add(os.fsdecode(name))

    def add_folder(self, folder: str) -> None:
        """Add the photos in a folder and its subfolders."""
        everything = os.path.join(glob.escape(folder), "**")

        def report(message: str) -> None:
            if not message.startswith(f"{everything}: "):  # that it is empty is said below
                self._report(message)

        before = len(self.parts), len(self.parts[-1]) if self.parts else 0
        for path in find_images([everything], report=report):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                self.add(path)
            elif suffix in (".tar", ".parquet"):
                self.add_found(path)
        if before == (len(self.parts), len(self.parts[-1]) if self.parts else 0):
            self._report(f"{folder}: no photo is in this folder.")

    def _shard(self, path: str) -> ShardPhotos:
        count = len(index_shard(path, cache=self._cache))
        status = Path(path).stat()
        return ShardPhotos(path, self._cache, count, status.st_size, status.st_mtime_ns)
