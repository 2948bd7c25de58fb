"""Batches on the fly: photos of different clients run together, a lone one at once."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from weightnet.predict.interface import Batch

Run = Callable[[Batch, Sequence[str]], dict[str, Batch]]


class _Waiting(NamedTuple):
    photo: Batch
    names: tuple[str, ...]
    outputs: "asyncio.Future[dict[str, Batch]]"


def batch_sizes(largest: int) -> list[int]:
    """Return the sizes that batches have: powers of two, since OpenVINO compiles a network for each size.

    >>> batch_sizes(8)
    [1, 2, 4, 8]
    """
    return [2**power for power in range(largest.bit_length())]


class Batcher:
    """Collects prepared photos and runs them through a network, in one thread, a batch at a time.

    Args:
        run: the network: (B, C, H, W) float32, and the names of outputs -> those, (B, ...) float32 each.
        thread: where it runs.
        batch_size: photos in a batch at most.
        wait_s: how long a photo waits for others that are announced, in seconds.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        thread: Executor,
        batch_size: int,
        wait_s: float,
        on_batch: Callable[[int], None],
    ) -> None:
        self._run = run
        self._thread = thread
        self._sizes = batch_sizes(batch_size)
        self._wait_s = wait_s
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._announced = 0
        self._changed = asyncio.Event()

    @property
    def queued(self) -> int:
        """Photos that wait for the network."""
        return len(self._waiting)

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Say that a photo is on its way (it is being decoded): others may wait for it. `outputs` comes right after."""
        self._announced += 1
        try:
            yield
        finally:
            self._announced -= 1
            self._changed.set()

    async def outputs(self, x_CHW: Batch, names: tuple[str, ...]) -> dict[str, Batch]:
        """Return outputs for a photo. Where the caller is cancelled before its batch begins, it is left out.

        Photos of one batch may want different ones: the network gives all of them for all.

        Shape: (C, H, W) float32, prepared as the card says -> (...) float32 each.
        """
        waiting = _Waiting(x_CHW, names, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._changed.set()
        return await waiting.outputs

    async def serve(self) -> None:
        """Run batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                x_BCHW = np.stack([waiting.photo for waiting in batch])
                names = list(dict.fromkeys(name for waiting in batch for name in waiting.names))
                outputs = await loop.run_in_executor(self._thread, self._run, x_BCHW, names)
            except Exception as error:  # its clients are told; the next batch may well run
                for waiting in batch:
                    if not waiting.outputs.done():
                        waiting.outputs.set_exception(error)
                continue
            for place, waiting in enumerate(batch):
                if not waiting.outputs.done():
                    waiting.outputs.set_result({name: outputs[name][place] for name in waiting.names})

    async def _next_batch(self) -> list[_Waiting]:
        while not self._waiting:
            await self._change()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while self._announced and len(self._waiting) < self._sizes[-1]:
                    await self._change()
        wanted = [waiting for waiting in self._waiting if not waiting.outputs.done()]
        size = max((size for size in self._sizes if size <= len(wanted)), default=0)
        self._waiting = deque(wanted[size:])
        return wanted[:size]

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
