"""Partitions on Ray Data: each is one row of a data set of numbers, and one call of an actor that holds a model.

The actors read, decode, classify and write by the same functions as the local run; what travels through Ray is the
listing, once, and counts. A partition is written whole or not at all and by number, so one whose worker died is simply
written again. All machines must see the inputs, the model and the output folder under the same paths.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from weightnet.bulk.manifest import Manifest
from weightnet.bulk.pipeline import BulkConfig, Worker, write_partitions
from weightnet.bulk.sinks import Partition
from weightnet.bulk.sources import Listing
from weightnet.errors import MissingDependencyError


def write_partitions_on_ray(
    config: BulkConfig, listing: Listing, manifest: Manifest, partitions: list[int], advance: Callable[[], None]
) -> Iterator[tuple[int, Partition]]:
    """Write partitions on Ray's workers, and yield each with what is known of it, in any order.

    A Ray that this process has begun, or the cluster of RAY_ADDRESS, is used; else one begins on this machine, and ends
    with the run.

    Raises: MissingDependencyError where Ray is not installed.
    """
    try:
        import ray
        from ray import data
    except ImportError as error:
        raise MissingDependencyError(
            f"The runner ray needs Ray Data. Got: {error}. Install it by: pip install 'weightnet[ray]'"
        ) from error
    begun = not ray.is_initialized()
    if begun:
        ray.init(logging_level="warning", log_to_driver=False, include_dashboard=False)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        workers = config.workers or sum(cores > 0 for cores in nodes) or 1
        numbers = data.from_items([{"partition": number} for number in partitions], override_num_blocks=len(partitions))
        written = numbers.map_batches(
            _Actor,
            fn_constructor_args=(config, ray.put(listing), manifest),
            compute=data.ActorPoolStrategy(size=workers),
            batch_size=1,
            num_cpus=max(1, int(sum(nodes) // workers) - 1),
            scheduling_strategy="SPREAD",
        )
        for row in written.iter_rows():
            done = Partition(rows=int(row["rows"]), errors=int(row["errors"]), bytes=int(row["bytes"]))
            for _ in range(done.rows):
                advance()
            yield int(row["partition"]), done
    finally:
        if begun:
            ray.shutdown()


class _Actor:
    """A model in a process of its own."""

    def __init__(self, config: BulkConfig, listing: Any, manifest: Manifest) -> None:
        import ray

        self._worker, self._listing, self._manifest = Worker(config), ray.get(listing), manifest

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the partitions of a batch."""
        numbers = batch["partition"].tolist()
        done = [written for _, written in write_partitions(self._worker, self._listing, self._manifest, numbers, _pass)]
        return {
            "partition": np.array(numbers),
            "rows": np.array([written.rows for written in done]),
            "errors": np.array([written.errors for written in done]),
            "bytes": np.array([written.bytes for written in done]),
        }


def _pass() -> None:
    """Count nothing: the driver counts whole partitions."""
