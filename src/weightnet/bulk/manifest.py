"""What a bulk run has done: a file beside its partitions, by which it goes on after a kill."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from weightnet import __version__
from weightnet.bulk.sinks import Partition
from weightnet.errors import UsageError
from weightnet.zoo.cards import write_atomically

FILE = "_run.json"  # readers of Parquet folders pass over names that begin so


def check_place(folder: Path) -> None:
    """Raise UsageError where a folder holds other files than those of a run."""
    if not (folder / FILE).exists() and any(not found.name.startswith(".") for found in folder.iterdir()):
        raise UsageError(
            f"The output folder must be new, empty, or of an earlier run. Got {folder}, which holds other files. "
            "Name another."
        )


class Manifest:
    """The record of a run: what it is over, and which of its partitions are whole.

    A partition counts once it is recorded here, after its file was written: a kill in between has it written again,
    with the same rows.

    Args:
        folder: of the run.
        identity: everything that changes the rows: what the run is over, by which model, with which options.
        total: how many photos there are.
        rows_per_file: rows of each partition but the last.
        format: of the partitions' files.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, total: int, rows_per_file: int, format: str) -> None:
        self.folder = folder
        self.total = total
        self.rows_per_file = rows_per_file
        self.count = -(-total // rows_per_file)
        self.done: dict[int, Partition] = {}
        self._format = format
        self._identity = identity
        if (folder / FILE).exists():
            self._read()
        else:
            self._write()

    def path(self, partition: int) -> Path:
        """Return where a partition lies."""
        return self.folder / f"part-{partition:05d}.{self._format}"

    def rows(self, partition: int) -> tuple[int, int]:
        """Return the numbers of the photos of a partition: its first, and the one after its last."""
        start = partition * self.rows_per_file
        return start, min(start + self.rows_per_file, self.total)

    def pending(self) -> list[int]:
        """Return the partitions that are still to be written."""
        return [partition for partition in range(self.count) if not self._is_whole(partition)]

    def record(self, partition: int, written: Partition) -> None:
        """Count a partition that was written."""
        self.done[partition] = written
        self._write()

    def _is_whole(self, partition: int) -> bool:
        recorded = self.done.get(partition)
        try:
            return recorded is not None and self.path(partition).stat().st_size == recorded.bytes
        except FileNotFoundError:
            return False

    def _read(self) -> None:
        try:
            fields = json.loads((self.folder / FILE).read_bytes())
            identity = fields["identity"]
            done = {int(number): Partition(*written) for number, written in fields["done"].items()}
            changed = [name for name in self._identity if identity[name] != self._identity[name]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"The output folder must hold a whole {FILE}. Got {self.folder}: {error!r}. Name another folder."
            ) from error
        if changed:
            was = ", ".join(f"{name}: {identity[name]}, now {self._identity[name]}" for name in changed)
            raise UsageError(
                f"A run must go on as it began, by the same model over the same photos. Got other values in "
                f"{self.folder} ({was}). Repeat its command, or name another folder."
            )
        self.done = done

    def _write(self) -> None:
        fields = {
            "weightnet": __version__,
            "identity": self._identity,
            "done": {str(number): dataclasses.astuple(written) for number, written in sorted(self.done.items())},
        }
        write_atomically(self.folder / FILE, (json.dumps(fields) + "\n").encode())  # indented it takes 20 times as long
