"""A run over very many photos: its folder, held and fit to go on with, and whoever writes its partitions."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import filelock

from weightnet.bulk.manifest import Manifest, check_place
from weightnet.bulk.ray import write_partitions_on_ray
from weightnet.bulk.sinks import Partition
from weightnet.bulk.sources import Listing, Report, list_photos
from weightnet.bulk.tables import import_parquet
from weightnet.bulk.worker import BulkConfig, Worker, write_partitions
from weightnet.errors import UsageError, WeightNetError
from weightnet.zoo.cards import card_path
from weightnet.zoo.hub import embedded_export, find_weights

Progress: TypeAlias = "Callable[[int], contextlib.AbstractContextManager[Callable[[], None]]]"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of a run.

    Args:
        images: how many photos there are, and rows.
        ok: how many were classified.
        errors: how many were not; their rows say why.
        partitions: how many files there are.
        resumed: how many of them were there before.
    """

    images: int
    ok: int
    errors: int
    partitions: int
    resumed: int


@contextlib.contextmanager
def _no_progress(left: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def classify_many(
    inputs: Iterable[str],
    config: BulkConfig,
    *,
    report: Report,
    progress: Progress = _no_progress,
    stdin: BinaryIO | None = None,
) -> Summary:
    """Write a row for each photo, or go on where an earlier run of the same inputs and options was killed.

    Args:
        inputs: as `list_photos` takes them.
        config: how the run goes.
        report: called with a message for what cannot be listed.
        progress: called with the number of photos that are left; gives what is called for each that is done.
        stdin: what the input `-` is read from.

    Raises:
        UsageError: nothing to classify; or a folder that holds other files, or a run of other inputs or options.
        UnknownModelError, WeightsError, DownloadError, MissingDependencyError: as `Classifier`.
        OSError: the folder cannot be written; repeat the call when it can.
    """
    if config.format == "parquet":
        import_parquet()
    weights = _fingerprint(config.model)
    folder = Path(config.out)
    with _hold(folder):
        listing = list_photos(
            inputs,
            cache=str(_index_folder(folder)),
            report=report,
            image_column=config.image_column,
            left_out=config.out,
            stdin=stdin,
        )
        if not len(listing):
            raise UsageError(
                "IN must name at least one photo. Got none. Give folders, patterns, lists, shards or tables."
            )
        manifest = Manifest(
            folder,
            _identity(config, listing, weights),
            total=len(listing),
            rows_per_file=config.rows_per_file,
            format=config.format,
        )
        pending = manifest.pending()
        left = sum(stop - start for start, stop in map(manifest.rows, pending))
        with progress(left) as advance:
            for partition, written in _run(listing, manifest, pending, config, advance) if pending else ():
                manifest.record(partition, written)
        errors = sum(written.errors for written in manifest.done.values())
        return Summary(
            len(listing), len(listing) - errors, errors, manifest.count, resumed=manifest.count - len(pending)
        )


def _run(
    listing: Listing, manifest: Manifest, pending: list[int], config: BulkConfig, advance: Callable[[], None]
) -> Iterator[tuple[int, Partition]]:
    if config.runner == "local":
        return write_partitions(Worker(config), listing, manifest, pending, advance)
    return write_partitions_on_ray(config, listing, manifest, pending, advance)


def _fingerprint(model: str) -> str:
    """Return a text that changes when a model does: its weights, and the card beside them."""
    weights = find_weights(model)
    digest = hashlib.sha256()
    beside = weights.with_suffix(".bin") if weights.suffix == ".xml" else embedded_export(model)
    for path in (weights, beside, card_path(weights)):
        if path is not None and path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _identity(config: BulkConfig, listing: Listing, weights: str) -> dict[str, Any]:
    """Return everything that changes the rows; where and how fast they are made does not."""
    return {
        "images": len(listing),
        "inputs sha256": listing.digest(),
        "model sha256": weights,
        "engine": config.engine,
        "columns": "pre_logits" if config.embeddings else f"top {config.k}",
        "format": config.format,
        "rows per file": config.rows_per_file,
    }


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Hold the folder, made where it is missing, within the block; what a kill left half written goes.

    A run that is refused before its first partition takes back all that it made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"The output folder must be a folder. Got {folder}, a file. Name another.") from error
    check_place(folder)
    before = set(folder.iterdir())
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UsageError(
            f"The output folder must be of one run at a time. Got {folder}, in which another works. Wait for it."
        ) from error
    try:
        for rest in folder.glob(".*.part"):
            rest.unlink(missing_ok=True)
        yield
    except WeightNetError:
        if not any(folder.glob("part-*")):
            _take_back(set(folder.iterdir()) - before, made)
        raise
    finally:
        lock.release()


def _take_back(files: Iterable[Path], folders: Iterable[Path]) -> None:
    for path in files:
        with contextlib.suppress(OSError):  # what cannot go stays: the error that is on its way says more
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for place in folders:
        with contextlib.suppress(OSError):
            place.rmdir()


def _index_folder(folder: Path) -> Path:
    index = folder / ".index"
    index.mkdir(exist_ok=True)
    return index
