"""Partitions on Ray Data: each is one row of a data set of numbers, and one call of an actor that holds a model.

The actors read, decode, classify and write by the same functions as the local run; what travels through Ray is the
listing, once, and counts. A partition is written whole or not at all and by number, so one whose worker died is simply
written again. All machines must see the inputs, the model and the output folder under the same paths.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from weightnet.bulk.manifest import Manifest
from weightnet.bulk.sinks import Partition
from weightnet.bulk.sources import Listing
from weightnet.bulk.worker import BulkConfig, Worker, write_partitions
from weightnet.errors import DataError, MissingDependencyError, WeightNetError


def write_partitions_on_ray(
    config: BulkConfig, listing: Listing, manifest: Manifest, partitions: list[int], advance: Callable[[], None]
) -> Iterator[tuple[int, Partition]]:
    """Write partitions on Ray's workers, and yield each with what is known of it, in any order.

    A Ray that this process has begun, or the cluster of RAY_ADDRESS, is used; else one begins on this machine, and ends
    with the run.

    Raises:
        MissingDependencyError: Ray is not installed.
        DataError: Ray gave up; what was written stays, and a repeated run goes on from there.
        WeightNetError: what a worker raised: it does not find the model, for one.
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
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        machines = [cores for node in ray.nodes() if node["Alive"] and (cores := node["Resources"].get("CPU", 0))]
        if not machines:
            raise DataError(
                "Ray must have a machine with a processor. Got none among its nodes. Start a worker, repeat."
            )
        workers = config.workers or len(machines)
        numbers = data.from_items([{"partition": number} for number in partitions], override_num_blocks=len(partitions))
        written = numbers.map_batches(
            _Actor,
            fn_constructor_args=(os.getcwd(), config, ray.put(listing), manifest),
            compute=data.ActorPoolStrategy(size=workers),
            batch_size=1,
            num_cpus=_cores_each(machines, workers),
        )
        for row in written.iter_rows():
            done = Partition(rows=int(row["rows"]), errors=int(row["errors"]), bytes=int(row["bytes"]))
            for _ in range(done.rows):
                advance()
            yield int(row["partition"]), done
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        if begun:
            ray.shutdown()


def _cores_each(machines: list[float], workers: int) -> float:
    """Return the cores of each worker, such that all of them find room; also the threads that PyTorch uses there.

    >>> _cores_each([8.0, 8.0], 2), _cores_each([8.0, 8.0], 5), _cores_each([2.0], 4)
    (8, 2, 0.5)
    """
    cores = min(machines) / -(-workers // len(machines))
    return int(cores) if cores >= 1 else cores


def _cause(error: BaseException) -> WeightNetError:
    """Return the error of this package that a worker raised, or else one that says what Ray says."""
    chain: BaseException | None = error
    while chain is not None:
        for found in (chain, getattr(chain, "cause", None)):
            if isinstance(found, WeightNetError):
                return found
        chain = chain.__cause__
    what = " ".join(str(error).split())[-300:]
    return DataError(f"Ray must write all partitions. Got: {what}. Repeat the command to go on from here.")


class _Actor:
    """A model in a process of its own."""

    def __init__(self, folder: str, config: BulkConfig, listing: Any, manifest: Manifest) -> None:
        import ray

        os.chdir(folder)  # relative paths are the driver's: a cluster's workers begin where the cluster was begun
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
