"""What the commands write: messages on standard error, results on standard output, in the form that was asked for."""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TextIO, cast

from cyclopts import Parameter

from weightnet.errors import UsageError

if TYPE_CHECKING:
    from weightnet.predict.classifier import Embedding, Prediction

PROGRESS_AFTER_S = 2.0
BAR_WIDTH = 20
UNKNOWN = "nothing I know; nearest:"  # before the classes of a photo that shows none of the model's

Form = Literal["text", "json", "jsonl", "csv"]
Switch = Annotated[bool, Parameter(negative="", show_default=False)]  # a flag that is either given or not


def say(message: str) -> None:
    """Write a message to standard error; where that is closed or full, there is nobody to tell."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()


def printable(text: str) -> str:
    r"""Return text that is safe on a terminal: control characters and undecodable bytes as escapes, lines kept.

    >>> printable("a\tb\x1b[31m\udcff")
    'a\\tb\\x1b[31m\\xff'
    """
    return "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text)


def figures(measured: Mapping[str, Any]) -> str:
    """Return measured figures on one line.

    >>> figures({"photos": 60, "top1": 2 / 3, "by source": {"pets": 0.5}})
    'photos 60, top1 0.6667, by source (pets 0.5000)'
    """
    return ", ".join(f"{name} {_figure(value)}" for name, value in measured.items())


def _figure(value: object) -> str:
    if isinstance(value, Mapping):
        return f"({figures(value)})"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def printable_path(path: str) -> str:
    r"""Return a path on one line, otherwise as `printable` does.

    >>> printable_path("two\nlines.jpg")
    'two\\nlines.jpg'
    """
    return printable(path).replace("\n", "\\n")


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class Results:
    """Standard output: takes any text, and shows it at once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()

    def write(self, text: str) -> None:
        """Write text; an error says what could not be written."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


def open_results(*, errors: str = "backslashreplace", encoding: str | None = None) -> Results:
    """Return standard output.

    Args:
        errors: what becomes of characters that its encoding lacks.
        encoding: the encoding; None keeps the one it has.

    Raises: UsageError where it is closed.
    """
    if sys.stdout is None:
        raise UsageError("Standard output must be open. Got a closed one. Send it to a file or /dev/null.")
    if hasattr(sys.stdout, "reconfigure"):  # not where a caller replaced it
        sys.stdout.reconfigure(errors=errors, encoding=encoding or sys.stdout.encoding)
    return Results(sys.stdout)


def silence_results() -> None:
    """Send what is still to be written to standard output nowhere, so that Python does not fail on it at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


class RowWriter(Protocol):
    """Writes predictions or embeddings as they come."""

    def write(self, row: "Prediction | Embedding") -> None:
        """Write one row."""
        ...

    def close(self) -> None:
        """Write what comes after the last row."""
        ...


def open_rows(form: Form, *, columns: int, embeddings: bool = False, known: bool = False) -> RowWriter:
    """Return a writer of rows to standard output; each is there as soon as it is written.

    Args:
        form: "text" for people, "json" for one array, "jsonl" for one object per line, "csv" for a table.
        columns: how many classes, or numbers of an embedding, a row of the table has room for.
        embeddings: whether the rows are embeddings; not as text.
        known: whether the table has a column for what the model does not know.

    Raises: UsageError where standard output is closed.
    """
    if form == "csv":
        results = open_results(encoding="utf-8", errors="surrogateescape")
        return _CsvRows(results, columns, embeddings=embeddings, known=known)
    results = open_results()
    if form == "text":
        return _TerminalRows(results) if results.is_terminal else _TextRows(results)
    return _JsonRows(results, array=form == "json")


class _JsonRows:
    """One object per line; as an array, with brackets and commas around them. All in ASCII, whatever the locale."""

    def __init__(self, results: Results, *, array: bool) -> None:
        self._results = results
        self._array = array
        self._before = "[\n" if array else ""

    def write(self, row: "Prediction | Embedding") -> None:
        self._results.write(self._before + json.dumps(row.to_dict()) + ("" if self._array else "\n"))
        self._before = ",\n" if self._array else ""

    def close(self) -> None:
        if self._array:
            self._results.write("\n]\n")


class _CsvRows:
    """path, status, error, then label1, index1, probability1, label2, ...; in UTF-8, paths byte for byte.

    Of embeddings pre_logits1, pre_logits2, ...; of models that can tell, known before the first label.
    """

    def __init__(self, results: Results, columns: int, *, embeddings: bool, known: bool) -> None:
        from weightnet.predict.classifier import table_columns

        self._results = results
        self._row = io.StringIO()
        self._table = csv.writer(self._row, lineterminator="\r\n")  # both, so that it quotes cells with either
        self._path = printable_path if results.is_terminal else str
        names = table_columns(columns, embeddings=embeddings, known=known)
        self._columns, self._known = len(names), known
        self._write(names)

    def write(self, row: "Prediction | Embedding") -> None:
        fields = row.to_dict()
        cells: list[Any] = [self._path(row.path or ""), row.status, row.error]
        if self._known:
            cells.append(json.dumps(fields["known"]) if "known" in fields else None)
        for score in fields.get("top", ()):
            cells += score.values()
        cells += fields.get("pre_logits") or ()
        self._write(cells + [None] * (self._columns - len(cells)))

    def close(self) -> None:
        """Write nothing: a table has no end."""

    def _write(self, cells: list[Any]) -> None:
        self._row.seek(0)
        self._row.truncate()
        self._table.writerow(cells)
        self._results.write(self._row.getvalue().removesuffix("\r\n") + "\n")


class _TextRows:
    """For people, without colours: the path, then one line for each class."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def write(self, row: "Prediction | Embedding") -> None:
        prediction = cast("Prediction", row)
        lines = [printable_path(prediction.path or "")]
        if prediction.error is not None:
            lines.append(f"  error: {printable_path(prediction.error)}")
        if prediction.known is False:
            lines.append(f"  {UNKNOWN}")
        lines += [f"  {score.probability:7.2%}  {score.label}" for score in prediction.top]
        self._results.write("\n".join(lines) + "\n")

    def close(self) -> None:
        """Write nothing: the rows are all."""


class _TerminalRows:
    """For people at a terminal: the same with bars and colours."""

    def __init__(self, results: Results) -> None:
        from rich.console import Console

        self._console = Console(file=results.stream, highlight=False, emoji=False, markup=False)

    def write(self, row: "Prediction | Embedding") -> None:
        prediction = cast("Prediction", row)
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self._console.print(Text(printable_path(prediction.path or ""), style="bold"), soft_wrap=True)
        if prediction.error is not None:
            self._console.print(Text(f"  error: {printable_path(prediction.error)}", style="red"), soft_wrap=True)
            return
        if prediction.known is False:
            self._console.print(Text(f"  {UNKNOWN}", style="yellow"))
        table = Table.grid(padding=(0, 2))
        for score in prediction.top:
            bar = ProgressBar(total=1.0, completed=score.probability, width=BAR_WIDTH)
            table.add_row(f"  {score.probability:7.2%}", bar, Text(score.label))
        self._console.print(table)

    def close(self) -> None:
        """Write nothing: the rows are all."""


@contextmanager
def progress(total: int | None, *, rows: bool = True) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error while the work is long; call what this gives once for each photo.

    There is none where standard error is no terminal, nor where the rows themselves are seen to come on one.

    Args:
        total: how many photos there are; None where it is not known.
        rows: whether a row is written to standard output for each photo.
    """
    if not sys.stderr or not sys.stderr.isatty() or (rows and sys.stdout and sys.stdout.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("photos"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    task = bar.add_task("photos", total=total)
    begun = time.monotonic()

    def advance() -> None:
        bar.advance(task)
        if not bar.live.is_started and time.monotonic() - begun > PROGRESS_AFTER_S:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
