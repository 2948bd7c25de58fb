"""The models that are served, from loading to draining: photos decoded in threads, networks run in one more."""

import asyncio
import dataclasses
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from weightnet.errors import ImageError, UsageError
from weightnet.images.decode import read_image
from weightnet.images.formats import read_header
from weightnet.predict.classifier import Prediction, make_prediction
from weightnet.predict.engines import open_engine
from weightnet.predict.heatmap import Heatmap, make_heatmap
from weightnet.predict.interface import CLASS_WEIGHTS, FEATURES, LOGITS, Batch, Engine
from weightnet.serve.batcher import Batcher, batch_sizes
from weightnet.serve.body import find_photo
from weightnet.serve.limits import Admission, Limits, RefusedError

DECODE_THREADS = min(4, os.cpu_count() or 1)


WantedMap: TypeAlias = "Literal['top'] | int | None"  # the most probable class's heat map, a class's own, or none


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that is loaded, and what collects its photos. Without `class_weights` it gives no heat maps."""

    name: str
    engine: Engine
    batcher: Batcher
    class_weights: Batch | None  # (K, F)


class Prepared(NamedTuple):
    """A photo as the network takes it, with its name, if it has one, and its own size."""

    path: str | None
    input: Batch  # (C, H, W)
    height_px: int
    width_px: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client gets for a photo."""

    prediction: Prediction
    heatmap: Heatmap | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row of `predict --json`, with the heat map where one was asked for."""
        more = {} if self.heatmap is None else {"heatmap": self.heatmap.to_dict()}
        return {**self.prediction.to_dict(), **more}


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
            raise RefusedError(
                404,
                f"model must be one that is served: {', '.join(self.names)}. Got model={name!r}. "
                "Name one of these, or leave it out.",
            )
        return self.models[self.names[0] if name is None else name]

    def check_map(self, model: ServedModel, wanted: WantedMap) -> None:
        """Refuse a heat map that cannot be had: RefusedError, with status 422."""
        if wanted is None:
            return
        if model.class_weights is None:
            raise RefusedError(
                422,
                f"heatmap must be false for this model, whose file gives only {', '.join(model.engine.outputs)}. "
                f"Got heatmap={'true' if wanted == 'top' else wanted}. Leave it out, or export the model again with "
                f"--outputs {FEATURES} {CLASS_WEIGHTS}.",
            )
        classes = len(model.engine.card.classes)
        if wanted != "top" and wanted >= classes:
            raise RefusedError(
                422,
                f"heatmap must be the number of a class, 0 to {classes - 1}, or true. Got heatmap={str(wanted)[:100]}. "
                "Take an index of an answer's top.",
            )

    async def classify(
        self, model: ServedModel, body: bytes, content_type: str, *, k: int, wanted_map: WantedMap
    ) -> Answer:
        """Return the answer for the photo in a request's body; ImageError says what is wrong with it."""
        with model.batcher.announced():
            photo = await self._prepare(model.engine, body, content_type)
        outputs = await model.batcher.outputs(photo.input, (LOGITS,) if wanted_map is None else (LOGITS, FEATURES))
        if not np.isfinite(outputs[LOGITS]).all():
            raise RefusedError(500, "The network's output must be finite. Got NaN or infinity: its weights are bad.")
        card = model.engine.card
        prediction = make_prediction(card, photo.path, outputs[LOGITS], k)
        if wanted_map is None or model.class_weights is None:
            return Answer(prediction, None)
        index = prediction.top[0].index if wanted_map == "top" else wanted_map
        heatmap = make_heatmap(
            outputs[FEATURES],
            model.class_weights[index],
            index=index,
            preprocess=card.preprocess,
            height_px=photo.height_px,
            width_px=photo.width_px,
        )
        return Answer(prediction, heatmap)

    async def _prepare(self, engine: Engine, body: bytes, content_type: str) -> Prepared:
        """Decode in a thread. A thread cannot be stopped: it stays taken until it is done, whoever went away."""
        await self._free_decoders.acquire()
        work = asyncio.get_running_loop().run_in_executor(
            self._decoders, prepare, engine, body, content_type, self.limits
        )

        def release(done: "asyncio.Future[Prepared]") -> None:
            self._free_decoders.release()
            if not done.cancelled():
                done.exception()  # seen here, should nobody wait any longer

        work.add_done_callback(release)
        return await asyncio.shield(work)

    async def _load_all(self) -> None:
        loop = asyncio.get_running_loop()
        for name in self.names:
            engine, class_weights_KF = await loop.run_in_executor(self._network_thread, self._load, name)
            batcher = Batcher(
                engine.run_outputs,
                thread=self._network_thread,
                batch_size=self.limits.batch_size,
                wait_s=self.limits.batch_wait_ms / 1000,
                on_batch=lambda size: self.on_batch(size),
            )
            self.models[name] = ServedModel(name, engine, batcher, class_weights_KF)
            self._keep(batcher.serve())
        if self.state == "loading":
            self.state = "ready"
            self.on_ready()

    def _load(self, name: str) -> tuple[Engine, Batch | None]:
        """Open a model and run it once in each size of batch, so that the first clients need not wait for that.

        Returns its classifier's weights too, where they and the feature map are to be had.
        """
        engine = open_engine(name, engine=self._engine, device=self._device)
        card = engine.card
        if card.network.in_channels != 3:
            raise UsageError(
                f"A network must take 3 channels to classify photos. Got model={name!r}, "
                f"in_channels={card.network.in_channels}. Serve another one."
            )
        gives_maps = {FEATURES, CLASS_WEIGHTS} <= set(engine.outputs)
        names, outputs = [LOGITS, FEATURES, CLASS_WEIGHTS] if gives_maps else [LOGITS], {}
        for size in batch_sizes(self.limits.batch_size):
            x_BCHW = np.zeros((size, 3, card.preprocess.crop, card.preprocess.crop), np.float32)
            outputs = engine.run_outputs(x_BCHW, names)
        return engine, outputs.get(CLASS_WEIGHTS)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)

    def _note_failure(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self.failure = failure
            self.on_failure()


def prepare(engine: Engine, body: bytes, content_type: str, limits: Limits) -> Prepared:
    """Return the photo in a request's body as the network takes it.

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
        pixels = read_image(photo)
        return Prepared(path, engine.card.preprocess(pixels), *pixels.shape[:2])
    except ImageError:
        raise
    except Exception as error:  # a decoder that is short of memory, or worse: the photo's fault, for all we know
        raise ImageError(
            f"a photo must be readable. Got {type(error).__name__}. Scale it down or export it again."
        ) from error
