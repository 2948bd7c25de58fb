"""Rows out: a partition is one file, written whole or not at all, as Parquet, JSON lines or CSV.

A row has `path`, `status` ("ok" or "error"), `error` and `top`, the classes as parallel lists `labels`, `indices` and
`probabilities`, best first; or, of an embedding run, `pre_logits` instead of `top`. Of a model that can tell, there is
`known` beside `top`: whether the photo shows one of its classes at all.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from weightnet.bulk.tables import import_parquet
from weightnet.predict.classifier import ClassScore, is_known, short_floats, table_columns
from weightnet.predict.interface import Batch
from weightnet.zoo.cards import write_atomically

FORMATS = ("parquet", "jsonl", "csv")

Answer: TypeAlias = "str | tuple[ClassScore, ...] | Batch"  # what is wrong with the photo, its classes, or its vector


class Row(NamedTuple):
    """One photo's row.

    Args:
        path: what the listing calls the photo.
        answer: its best classes, its vector, or what is wrong with it.
    """

    path: str
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the rows of a run hold.

    Args:
        embeddings: whether it is vectors, not classes.
        width: numbers in a vector, or classes in a row.
        known_from: as the model's card has it; None where rows do not say whether the photo shows a known class.
    """

    embeddings: bool
    width: int
    known_from: float | None = None

    def known(self, answer: Answer) -> bool | None:
        """Return whether the photo shows a known class, where that can be told."""
        return is_known(answer, self.known_from) if isinstance(answer, tuple) else None


@dataclasses.dataclass(frozen=True)
class Partition:
    """What is known of a partition that was written.

    Args:
        rows: how many it has.
        errors: how many of them are photos that could not be classified.
        bytes: the size of its file.
    """

    rows: int
    errors: int
    bytes: int


def write_partition(path: Path, rows: Sequence[Row], layout: Layout) -> Partition:
    """Write a partition; the suffix of its path says how.

    Raises: OSError where it cannot be written; MissingDependencyError where pyarrow is needed and not installed.
    """
    data = _ENCODERS[path.suffix[1:]](rows, layout)
    write_atomically(path, data)
    return Partition(len(rows), sum(isinstance(row.answer, str) for row in rows), len(data))


def _parquet(rows: Sequence[Row], layout: Layout) -> bytes:
    parquet = import_parquet()
    import pyarrow as pa

    errors = [row.answer if isinstance(row.answer, str) else None for row in rows]
    columns: dict[str, Any] = {
        "path": pa.array([_as_text(row.path) for row in rows], pa.string()),
        "status": pa.array(["ok" if error is None else "error" for error in errors], pa.string()),
        "error": pa.array([None if error is None else _as_text(error) for error in errors], pa.string()),
    }
    if layout.embeddings:
        vectors = [row.answer if isinstance(row.answer, np.ndarray) else None for row in rows]
        columns["pre_logits"] = pa.array(vectors, pa.list_(pa.float32()))
    else:
        lists = [("labels", pa.string()), ("indices", pa.int32()), ("probabilities", pa.float64())]
        kind = pa.struct([(name, pa.list_(of)) for name, of in lists])
        columns["top"] = pa.array([_parallel(row.answer) for row in rows], kind)
    if layout.known_from is not None:
        columns["known"] = pa.array([layout.known(row.answer) for row in rows], pa.bool_())
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _jsonl(rows: Iterable[Row], layout: Layout) -> bytes:
    """One object per line, in ASCII, as `weightnet predict --jsonl` writes its."""
    text = io.StringIO()
    for path, answer in rows:
        error = answer if isinstance(answer, str) else None
        fields: dict[str, Any] = {"path": path, "status": "ok" if error is None else "error", "error": error}
        if layout.embeddings:
            fields["pre_logits"] = short_floats(answer) if isinstance(answer, np.ndarray) else None
        else:
            fields["top"] = _parallel(answer)
        if (known := layout.known(answer)) is not None:
            fields["known"] = known
        text.write(json.dumps(fields) + "\n")
    return text.getvalue().encode("ascii")


def _csv(rows: Iterable[Row], layout: Layout) -> bytes:
    """A table with the columns of `weightnet predict --csv`: in UTF-8, paths byte for byte."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\r\n")  # both characters, so that it quotes cells with either
    columns = table_columns(layout.width, embeddings=layout.embeddings, known=layout.known_from is not None)
    table.writerow(columns)
    for path, answer in rows:
        error = answer if isinstance(answer, str) else None
        cells: list[Any] = [path, "ok" if error is None else "error", error]
        if layout.known_from is not None:
            known = layout.known(answer)
            cells.append(None if known is None else json.dumps(known))
        if isinstance(answer, np.ndarray):
            cells += short_floats(answer)
        elif not isinstance(answer, str):
            cells += [cell for score in answer for cell in (score.label, score.index, score.probability)]
        table.writerow(cells + [None] * (len(columns) - len(cells)))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _parallel(answer: Answer) -> dict[str, list[Any]]:
    scores: tuple[ClassScore, ...] = answer if isinstance(answer, tuple) else ()
    return {
        "labels": [score.label for score in scores],
        "indices": [score.index for score in scores],
        "probabilities": [score.probability for score in scores],
    }


def _as_text(path: str) -> str:
    """Return text that UTF-8 can say: bytes of a file name that are none as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


_ENCODERS: dict[str, Callable[[Sequence[Row], Layout], bytes]] = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv}
