"""The models that are served, from loading to draining: photos decoded in threads, networks run in one more."""

import asyncio
import dataclasses
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from weightnet.errors import ImageError, UsageError
from weightnet.images.decode import read_image
from weightnet.images.formats import read_header
from weightnet.predict.classifier import Prediction, best_classes
from weightnet.predict.engines import Batch, Engine, open_engine
from weightnet.serve.batcher import Batcher, batch_sizes
from weightnet.serve.body import find_photo
from weightnet.serve.limits import Admission, Limits, RefusedError

DECODE_THREADS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that is loaded, and what collects its photos."""

    name: str
    engine: Engine
    batcher: Batcher


class Service:
    """Loads models and classifies photos by them. All methods belong to one event loop.

    Args:
        names: models as `Classifier` takes them by name; the first answers requests that name none.
        engine: what runs the networks, as `Classifier` has it.
        device: where they run, as `Classifier` has it.
        limits: what the service takes on.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        engine: str,
        device: str,
        limits: Limits,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.names = list(dict.fromkeys(names))
        self.limits = limits
        self.admission = Admission(limits)
        self.models: dict[str, ServedModel] = {}
        self.failure: BaseException | None = None
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self.on_batch = on_batch
        self._engine, self._device = engine, device
        self._decoders = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="weightnet-decode")
        self._free_decoders = asyncio.Semaphore(DECODE_THREADS)
        self._network_thread = ThreadPoolExecutor(1, thread_name_prefix="weightnet-network")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to load the models; `on_ready` is called when all are, `on_failure` when one cannot be."""
        self._keep(self._load_all())

    async def stop(self) -> None:
        """End all that runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._network_thread.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Refuse new photos from now on."""
        self.state = "draining"

    def model(self, name: str | None) -> ServedModel:
        """Return a model by its name, the first for None.

        Raises: RefusedError: 503 while loading or draining, 404 for a model that is not served.
        """
        if self.state != "ready":
            raise RefusedError(503, f"The service is {self.state}. Try again in a second.")
        if name is not None and name not in self.models:
            raise RefusedError(404, f"model must be one that is served: {', '.join(self.names)}. Got model={name!r}.")
        return self.models[self.names[0] if name is None else name]

    async def classify(self, model: ServedModel, body: bytes, content_type: str, k: int) -> Prediction:
        """Return the prediction for the photo in a request's body; ImageError says what is wrong with it."""
        with model.batcher.announced():
            path, x_CHW = await self._prepare(model.engine, body, content_type)
        logits_K = await model.batcher.logits(x_CHW)
        if not np.isfinite(logits_K).all():
            raise RefusedError(500, "The network's output must be finite. Got NaN or infinity: its weights are bad.")
        return Prediction(path, "ok", None, best_classes(model.engine.card, logits_K, k))

    async def _prepare(self, engine: Engine, body: bytes, content_type: str) -> tuple[str | None, Batch]:
        """Decode in a thread. A thread cannot be stopped: it stays taken until it is done, whoever went away."""
        await self._free_decoders.acquire()
        work = asyncio.get_running_loop().run_in_executor(
            self._decoders, prepare, engine, body, content_type, self.limits
        )

        def release(done: "asyncio.Future[tuple[str | None, Batch]]") -> None:
            self._free_decoders.release()
            if not done.cancelled():
                done.exception()  # seen here, should nobody wait any longer

        work.add_done_callback(release)
        return await asyncio.shield(work)

    async def _load_all(self) -> None:
        loop = asyncio.get_running_loop()
        for name in self.names:
            engine = await loop.run_in_executor(self._network_thread, self._load, name)
            batcher = Batcher(
                engine.run,
                thread=self._network_thread,
                batch_size=self.limits.batch_size,
                wait_s=self.limits.batch_wait_ms / 1000,
                on_batch=lambda size: self.on_batch(size),
            )
            self.models[name] = ServedModel(name, engine, batcher)
            self._keep(batcher.serve())
        if self.state == "loading":
            self.state = "ready"
            self.on_ready()

    def _load(self, name: str) -> Engine:
        """Open a model and run it once in each size of batch, so that the first clients need not wait for that."""
        engine = open_engine(name, engine=self._engine, device=self._device)
        card = engine.card
        if card.network.in_channels != 3:
            raise UsageError(
                f"A network must take 3 channels to classify photos. Got model={name!r}, "
                f"in_channels={card.network.in_channels}. Serve another one."
            )
        for size in batch_sizes(self.limits.batch_size):
            engine.run(np.zeros((size, 3, card.preprocess.crop, card.preprocess.crop), np.float32))
        return engine

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)

    def _note_failure(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self.failure = failure
            self.on_failure()


def prepare(engine: Engine, body: bytes, content_type: str, limits: Limits) -> tuple[str | None, Batch]:
    """Return the name of the photo in a request's body, and the photo as the network takes it.

    Raises: ImageError says what is wrong with it.
    """
    path, photo = find_photo(body, content_type)
    if photo:
        header = read_header(photo)
        if header.width_px * header.height_px > limits.max_megapixels * 10**6:
            raise ImageError(
                f"a photo must have at most {limits.max_megapixels} million pixels. "
                f"Got {header.width_px} x {header.height_px} pixels. Scale it down."
            )
    try:
        return path, engine.card.preprocess(read_image(photo))
    except ImageError:
        raise
    except Exception as error:  # a decoder that is short of memory, or worse: the photo's fault, for all we know
        raise ImageError(
            f"a photo must be readable. Got {type(error).__name__}. Scale it down or export it again."
        ) from error
