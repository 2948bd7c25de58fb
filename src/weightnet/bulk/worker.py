"""Photos of a listing in, partitions of rows out: decoded in threads while the network runs.

Partition i holds the rows of photos i * N up to (i + 1) * N of the listing: any process that knows the listing can
write any of them, and gives the same rows.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from weightnet.bulk.manifest import Manifest
from weightnet.bulk.sinks import FORMATS, Answer, Layout, Partition, Row, write_partition
from weightnet.bulk.sources import Listing, Photo
from weightnet.errors import ImageError, UsageError, nearest
from weightnet.predict.classifier import Classifier, best_classes

RUNNERS = ("local", "ray")


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
