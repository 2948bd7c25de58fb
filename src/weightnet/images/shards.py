"""Tar shards: many photos in one file, as webdataset lays them out, each read by its place without unpacking.

A member's key is its path up to the first dot of its last part; members of one key belong together:
`cats/0001.jpg` and `cats/0001.cls` are a photo and the number of its class. An index of places is made by one walk over
a shard's headers and kept, so that the next run opens at once and any photo is one read.

Source: the webdataset format, github.com/webdataset/webdataset; POSIX pax and GNU tar, by Python's tarfile.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from weightnet.errors import DataError, ImageError
from weightnet.images.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES

_INDEX_VERSION = 1
_MAX_HEADER_BYTES = 1 << 20  # long names and pax records: far above any, and no hostile one fills the memory
_MAX_LABEL_BYTES = 1 << 20
_BLOCK_BYTES = 512
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the photos of a shard are, in the order of the file.

    Args:
        keys: what each photo shares with its label.
        names: the photos' member names.
        offsets: where each photo's bytes begin in the shard.
        sizes: how many bytes they are.
        labels: the class number beside each photo, -1 where there is none; None where no photo has one.

    Shape: all of one length; offsets, sizes and labels int64.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.names)


def index_shard(path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None) -> ShardIndex:
    """Return where the photos of a tar shard are; from the kept index where there is one of this very file.

    A photo is an ordinary member that ends like an image file (`IMAGE_SUFFIXES`), unless its name begins with a dot.
    Its label is the whole number in the member `KEY.cls`; or in `KEY.json`, alone or as "cls" or "label". Other
    members are passed over, and so is a label that is no whole number of at least 0.

    Args:
        path: the shard, a tar file without compression.
        cache: folder to keep the index in; None keeps it beside the shard. Where it cannot be written, none is kept.

    Raises:
        DataError: not such a file, cut off, damaged or hostile; a photo's name twice; or a photo stored as a sparse
            file.
    """
    path = Path(path)
    kept = _kept_path(path, cache)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = [_INDEX_VERSION, status.st_size, status.st_mtime_ns]
            index = _read_kept(kept, identity)
            if index is None:
                index = _Walk(path, file, status.st_size).index()
                _keep(kept, identity, index)
            return index
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"A shard must be a readable file. Got {path}: {reason}. Check the path.") from None


def read_member(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """Return the bytes of one photo of a shard; safe to call from many threads.

    Args:
        path: the shard.
        offset: where the photo begins, as its index says.
        size: how many bytes it has.

    Raises: ImageError where it cannot be read whole, or is larger than any photo may be.
    """
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"a photo must be at most {MAX_FILE_BYTES // 10**6} MB as a file. Got {size} bytes. Save it smaller."
        )
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"a shard must be a readable file. Got: {reason}. Check the path.") from None
    if len(data) < size:
        raise ImageError(
            f"a photo must be whole. Got {len(data)} of {size} bytes: its shard was cut off. Copy the shard again."
        )
    return data


class _Headers:
    """A shard as the tar reader sees it: it reads headers alone, so anything longer is hostile."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise _damaged(self._path, f"a header of {size} bytes")
        return self._file.read(size)


class _Walk:
    """One pass over the headers of a shard."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self._path = path
        self._file = file
        self._file_bytes = file_bytes
        self._photos: dict[str, tuple[int, int]] = {}  # name to place
        self._labels: dict[str, int] = {}  # key to class number

    def index(self) -> ShardIndex:
        self._refuse_compression()
        try:
            headers = cast("BinaryIO", _Headers(self._file, self._path))
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                begin = -1
                while (member := tar.next()) is not None:
                    if not begin < member.offset:  # a negative size would lead back
                        raise _damaged(self._path, "a member of impossible size")
                    begin = member.offset
                    self._take(member)
                    tar.members = []  # type: ignore[attr-defined]  # it would hold them all
                end = tar.offset
        except (tarfile.TarError, RecursionError, OverflowError) as error:
            raise _damaged(self._path, str(error)) from None
        self._check_end(end)
        keys = tuple(_key(name) for name in self._photos)
        labels = np.array([self._labels.get(key, -1) for key in keys], np.int64) if self._labels else None
        places = np.array(list(self._photos.values()), np.int64).reshape(-1, 2)
        return ShardIndex(keys, tuple(self._photos), places[:, 0].copy(), places[:, 1].copy(), labels)

    def _take(self, member: tarfile.TarInfo) -> None:
        name, place = member.name, (member.offset_data, member.size)
        stem, suffix = os.path.splitext(os.path.basename(name))
        if stem.startswith("."):
            return
        if member.islnk():  # the same file again, under another name
            if member.linkname not in self._photos:
                return
            place = self._photos[member.linkname]
        elif not member.isreg():
            return
        if min(place) < 0 or sum(place) > self._file_bytes:
            raise _damaged(self._path, f"the member {name!r} of impossible size {place[1]}")
        if suffix.lower() in IMAGE_SUFFIXES:
            if name in self._photos:
                raise DataError(
                    f"A shard must name each photo once. Got {name!r} twice in {self._path}. Pack it again."
                )
            if member.sparse is not None:
                raise DataError(
                    f"A photo must not be stored as a sparse file. Got {name!r} in {self._path}. "
                    "Pack the shard again without --sparse."
                )
            self._photos[name] = place
        elif suffix in (".cls", ".json"):
            self._take_label(_key(name), suffix, place)

    def _take_label(self, key: str, suffix: str, place: tuple[int, int]) -> None:
        if suffix == ".json" and key in self._labels:  # .cls says nothing else than the label: it counts more
            return
        if place[1] > _MAX_LABEL_BYTES:
            return
        data = os.pread(self._file.fileno(), place[1], place[0])
        label: object = None
        with contextlib.suppress(ValueError, RecursionError):
            label = int(data) if suffix == ".cls" else json.loads(data)
        if isinstance(label, dict):
            label = label.get("cls", label.get("label"))
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**63:
            self._labels[key] = label

    def _refuse_compression(self) -> None:
        start = self._file.read(6)
        self._file.seek(0)
        for signature, name in _COMPRESSED.items():
            if start.startswith(signature):
                raise DataError(
                    f"A shard must be a tar file without compression. Got {self._path}, compressed by {name}. Unpack "
                    f"it to a .tar: photos are compressed already."
                )

    def _check_end(self, end: int) -> None:
        """Check that the walk ended at the archive's end mark; the reader ends at anything that is no header too."""
        self._file.seek(end)
        mark = self._file.read(_BLOCK_BYTES)
        if len(mark) < _BLOCK_BYTES:
            raise _damaged(self._path, "no mark of its end: it is cut off")
        if any(mark):
            raise _damaged(self._path, f"a damaged header at byte {end}")
        while rest := self._file.read(_MAX_HEADER_BYTES):
            if any(rest.strip(b"\0")):
                raise _damaged(self._path, "more data after its end, as where two archives were joined")


def _key(name: str) -> str:
    match = _KEY.fullmatch(name)
    return match[1] if match else name


def _kept_path(path: Path, cache: str | os.PathLike[str] | None) -> Path:
    if cache is None:
        return path.with_name(f".{path.name}.index.json")
    place = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return Path(cache, f"{path.name}.{place}.index.json")


def _read_kept(kept: Path, identity: list[int]) -> ShardIndex | None:
    """Return a kept index; None where there is none, or it is of another file, or not one of ours."""
    try:
        fields = json.loads(kept.read_bytes())
        if fields["shard"] != identity:
            return None
        names = tuple(str(name) for name in fields["names"])
        offsets, sizes = np.array(fields["offsets"], np.int64), np.array(fields["sizes"], np.int64)
        labels = None if fields["labels"] is None else np.array(fields["labels"], np.int64)
        columns = [offsets, sizes] if labels is None else [offsets, sizes, labels]
        if any(column.shape != (len(names),) for column in columns):
            return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return ShardIndex(tuple(map(_key, names)), names, offsets, sizes, labels)


def _keep(kept: Path, identity: list[int], index: ShardIndex) -> None:
    fields = {
        "shard": identity,
        "names": index.names,
        "offsets": index.offsets.tolist(),
        "sizes": index.sizes.tolist(),
        "labels": None if index.labels is None else index.labels.tolist(),
    }
    temporary = kept.with_name(f"{kept.name}.{secrets.token_hex(4)}.part")
    with contextlib.suppress(OSError):  # a folder that is not ours: the next run walks the shard again
        try:
            temporary.write_text(json.dumps(fields), encoding="utf-8")
            os.replace(temporary, kept)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"A shard must be a whole, undamaged tar file. Got {path}: {problem}. Copy or pack it again.")
