"""Photos in a column of a Parquet file: read a few at a time, exactly as many as the file says it has."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from weightnet.errors import DataError, ImageError, MissingDependencyError, UsageError

_ROWS_AT_ONCE = 32
# By default pyarrow reads a whole group of rows, a million photos for all it knows, before it gives the first.
_READ_AS_NEEDED: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 16}
_Source: TypeAlias = "str | bytes | ImageError"


@dataclasses.dataclass(frozen=True)
class ParquetPhotos:
    """The photos of a Parquet file, one a row: of a column of bytes, or of `{bytes, path}` as Hugging Face has it.

    Args:
        path: the file.
        column: the name of the column.
        count: how many rows it has.
        size: of the file, in bytes.
        mtime_ns: when it was last changed.
    """

    path: str
    column: str
    count: int
    size: int
    mtime_ns: int

    @classmethod
    def open(cls, path: str, column: str) -> "ParquetPhotos":
        """Return the photos of a file.

        Raises:
            DataError: it is no Parquet file, or cannot be read.
            UsageError: it has no such column, or one that cannot hold photos.
            MissingDependencyError: pyarrow is not installed.
        """
        parquet = import_parquet()
        try:
            status = os.stat(path)
            with parquet.ParquetFile(path) as file:
                schema, count = file.schema_arrow, file.metadata.num_rows
        except Exception as error:  # pyarrow raises many kinds
            raise DataError(
                f"A Parquet file must be readable. Got {path}: {_one_line(error)}. Copy or write it again."
            ) from None
        if column not in schema.names or not _holds_photos(schema.field(column).type):
            kinds = ", ".join(f"{name} ({schema.field(name).type})"[:80] for name in schema.names[:20])
            raise UsageError(
                f"image_column must name a column of bytes, or of bytes and path. Got {column!r} for {path}, which has "
                f"{kinds}. Name another column, or inputs without this file."
            )
        return cls(path, column, count, status.st_size, status.st_mtime_ns)

    def __len__(self) -> int:
        return self.count

    def photos(self, start: int, stop: int) -> "Iterator[tuple[str, _Source]]":
        """Yield a range of the photos, each as its name and its source: as many, whatever is wrong with the file."""
        row = start
        try:
            with import_parquet().ParquetFile(self.path, **_READ_AS_NEEDED) as file:
                begin = 0
                for group in range(file.num_row_groups):
                    end = begin + file.metadata.row_group(group).num_rows
                    count = min(stop, end) - row
                    if count > 0:
                        for source in self._group(file, group, row - begin, count):
                            yield f"{self.path}#{row}", source
                            row += 1
                    begin = end
            error = "fewer rows than there were when the file was listed"
        except Exception as problem:  # pyarrow raises many kinds
            error = _one_line(problem)
        for left in range(row, stop):
            yield f"{self.path}#{left}", _unreadable(error)

    def identity(self) -> Iterable[bytes]:
        """Return what makes these other photos when it changes."""
        return b"parquet", os.fsencode(self.path), repr((self.column, self.count, self.size, self.mtime_ns)).encode()

    def _group(self, file: Any, group: int, skip: int, count: int) -> Iterator[_Source]:
        """Yield `count` photos of a row group, after the first `skip`."""
        left, error = count, "fewer rows than the file says"
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self.column]):
                values = batch.column(0).slice(min(skip, batch.num_rows), left).to_pylist()
                skip = max(skip - batch.num_rows, 0)
                for value in values:
                    left -= 1
                    yield _source(value)
                if not left:
                    return
        except Exception as problem:  # pyarrow raises many kinds for damaged pages
            error = _one_line(problem)
        for _ in range(left):
            yield _unreadable(error)


def import_parquet() -> Any:
    """Return pyarrow's module for Parquet files.

    Raises: MissingDependencyError where it is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet files need pyarrow. Got: {error}. Install it by: pip install 'weightnet[bulk]'"
        ) from error
    return parquet


def _holds_photos(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return "bytes" in [kind.field(number).name for number in range(kind.num_fields)]
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _source(value: Any) -> _Source:
    if isinstance(value, dict):  # Hugging Face's: the bytes, or a path where the file is not embedded
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | str):
        return value
    return ImageError("a row must hold a photo. Got an empty cell. Leave the row out.")


def _unreadable(error: str) -> ImageError:
    return ImageError(f"a photo must be readable. Got: {error}. Write the file again.")


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
