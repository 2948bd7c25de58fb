"""Photos of a listing in, partitions of rows out: decoded in threads while the network runs, resumed after a kill.

Partition i holds the rows of photos i * N up to (i + 1) * N of the listing: any process that knows the listing can
write any of them, and gives the same rows.
"""

import contextlib
import dataclasses
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import filelock

from weightnet.bulk.manifest import Manifest, check_place
from weightnet.bulk.sinks import FORMATS, Answer, Layout, Partition, Row, write_partition
from weightnet.bulk.sources import Listing, Photo, Report, list_photos
from weightnet.bulk.tables import import_parquet
from weightnet.errors import ImageError, UsageError, WeightNetError, nearest
from weightnet.predict.classifier import Classifier, best_classes
from weightnet.zoo.cards import card_path
from weightnet.zoo.hub import embedded_export, find_weights

RUNNERS = ("local", "ray")

Progress: TypeAlias = "Callable[[int], contextlib.AbstractContextManager[Callable[[], None]]]"


@dataclasses.dataclass(frozen=True)
class BulkConfig:
    """How a bulk run goes.

    Args:
        out: its folder, new or of the same run.
        format: "parquet", "jsonl" or "csv".
        model: as `Classifier` takes it, by name.
        engine: as `Classifier` takes it.
        device: as `Classifier` takes it.
        k: how many classes a row names.
        embeddings: whether rows hold vectors instead of classes.
        batch_size: photos that run at once.
        rows_per_file: rows of a partition; a kill costs at most as much work.
        image_column: the column of Parquet files that holds the photos.
        runner: "local", or "ray" for Ray Data.
        workers: processes of the runner "ray"; None for one on each machine of the cluster.

    Raises: UsageError for values that break these rules.
    """

    out: str
    format: str = "parquet"
    model: str = "default"
    engine: str = "auto"
    device: str = "auto"
    k: int = 5
    embeddings: bool = False
    batch_size: int = 16
    rows_per_file: int = 1000
    image_column: str = "image"
    runner: str = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("runner", RUNNERS)):
            value = getattr(self, name)
            if value not in known:
                hint = nearest(str(value), known) or "Choose one of them."
                raise UsageError(f"{name} must be one of {', '.join(known)}. Got {name}={value!r}. {hint}")
        for name in ("k", "batch_size", "rows_per_file", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1. Got {name}={value}. Use a larger number.")
        if self.workers is not None and self.runner != "ray":
            raise UsageError(f"workers must go with the runner ray. Got workers={self.workers}. Add --runner ray.")


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
    from weightnet.bulk.ray import write_partitions_on_ray

    return write_partitions_on_ray(config, listing, manifest, pending, advance)


class Worker:
    """A model that is ready, and what rows it makes.

    Args:
        config: of the run.
    """

    def __init__(self, config: BulkConfig) -> None:
        self._classifier = Classifier(
            config.model, engine=config.engine, device=config.device, batch_size=config.batch_size
        )
        self._embeddings, self._k = config.embeddings, config.k
        card = self._classifier.card
        if config.embeddings:
            self.layout = Layout(embeddings=True, width=card.network.head_channels)
        else:
            self.layout = Layout(False, min(config.k, card.network.num_classes), card.known_from)

    def rows(self, photos: Iterable[Photo]) -> Iterator[Row]:
        """Yield a row for each photo, in order; photos are read and decoded while the network runs."""
        waiting: deque[tuple[str, ImageError | None]] = deque()

        def sources() -> Iterator[str | bytes]:
            for path, source in photos:
                waiting.append((path, source if isinstance(source, ImageError) else None))
                if not isinstance(source, ImageError):
                    yield source

        for answer in self._answers(sources()):
            yield from _failed(waiting)
            yield Row(waiting.popleft()[0], answer)
        yield from _failed(waiting)

    def _answers(self, sources: Iterator[str | bytes]) -> Iterator[Answer]:
        if self._embeddings:
            for _, outcome in self._classifier.stream_pre_logits(sources):
                yield outcome
            return
        for _, outcome in self._classifier.stream_logits(sources):
            if isinstance(outcome, str):
                yield outcome
            else:
                yield best_classes(self._classifier.card, outcome, self._k)


def write_partitions(
    worker: Worker,
    listing: Listing,
    manifest: Manifest,
    partitions: Iterable[int],
    advance: Callable[[], None],
) -> Iterator[tuple[int, Partition]]:
    """Write partitions, and yield each with what is known of it.

    Each begins a stream of its own, so that its batches, and with them the last digits of its numbers, are the same
    whoever writes it and whatever went before.
    """
    for partition in partitions:
        rows = []
        for row in worker.rows(listing.photos(*manifest.rows(partition))):
            rows.append(row)
            advance()
        yield partition, write_partition(manifest.path(partition), rows, worker.layout)


def _failed(waiting: "deque[tuple[str, ImageError | None]]") -> Iterator[Row]:
    """Take the photos from the front that could not even be read."""
    while waiting and (error := waiting[0][1]) is not None:
        yield Row(waiting.popleft()[0], str(error))


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
