"""Photos in, predictions out: one `Classifier` for a few photos or for any number of them."""

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import numpy as np

from weightnet.errors import ImageError, UsageError
from weightnet.images.decode import ImageSource, read_image
from weightnet.predict.engines import Model, open_engine
from weightnet.predict.interface import LOGITS, PRE_LOGITS, Batch, check_outputs
from weightnet.predict.metrics import softmax
from weightnet.zoo.cards import Card

MAX_BATCH_SIZE = 100_000  # beyond what any memory holds
_DECODE_THREADS = min(4, os.cpu_count() or 1)  # decoding takes less time than the network: more threads only add memory

_Prepared: TypeAlias = "Batch | str"  # what the network takes, or what is wrong with the photo
Outcome: TypeAlias = "Batch | str"  # one of the network's outputs for one photo, or what is wrong with it


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """One class of a prediction.

    Args:
        label: what the class is called.
        index: number of the class among the model's.
        probability: 0 to 1; those of all classes sum to 1.
    """

    label: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the network says about one photo, or why it says nothing.

    Args:
        path: the photo's path; None for bytes, arrays and other photos without one.
        status: "ok", or "error" for a photo that could not be classified.
        error: what is wrong with the photo; None where the status is "ok".
        top: the most probable classes, best first; equal ones by class number. Empty where the status is "error".
        known: whether the photo shows one of the model's classes at all; None where the status is "error", or the
            model's card has no limit to tell by (`Card.known_from`).

    Example:
        >>> prediction = Prediction("cat.jpg", "ok", None, (ClassScore("cat", 3, 0.9),))
        >>> prediction.to_dict()["top"]
        [{'label': 'cat', 'index': 3, 'probability': 0.9}]
    """

    path: str | None
    status: Literal["ok", "error"]
    error: str | None
    top: tuple[ClassScore, ...]
    known: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON; `known` only where it is told."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["top"] = [dataclasses.asdict(score) for score in self.top]
        if self.known is None:
            del fields["known"]
        return fields


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What the network sees in one photo, before it names a class; photos that look alike have vectors that are near.

    Args:
        path: the photo's path; None for bytes, arrays and other photos without one.
        status: "ok", or "error" for a photo that could not be embedded.
        error: what is wrong with the photo; None where the status is "ok".
        pre_logits: the pooled features, which the classifier's last layer works on; None where the status is "error".

    Shape: pre_logits (F,) float32.
    """

    path: str | None
    status: Literal["ok", "error"]
    error: str | None
    pre_logits: Batch | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON; numbers in the fewest digits that give the float32 back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.pre_logits is not None:
            fields["pre_logits"] = short_floats(self.pre_logits)
        return fields


class Classifier:
    """Classifies photos by one model, which is loaded once.

    Args:
        model: a name of `list_models()`, a run folder, a weights file, an exported file with its card beside it, or a
            network with a card in `.card`, of which a copy is taken.
        engine: what runs the network: "onnxruntime" or "openvino" for models inside the package and .onnx files,
            "openvino" for .xml, "executorch" for .pte, "mnn" for .mnn, "torch" for .pt2 files and all that is not
            exported; "auto" takes the first of them that fits.
        device: "auto" or "cpu"; in PyTorch also "cuda", "cuda:N" or "mps", and "auto" takes a GPU where there is one.
        batch_size: photos that run at once, 1 to 100,000. More are faster on a GPU and take more memory; where that is
            too little, classifying raises UsageError.
        resize: short edge of the photos before the crop, in pixels; None takes the card's.
        crop: edge of the square that the network sees, in pixels, at most `resize`; None takes the card's.

    Raises:
        UsageError: an unknown engine or device, an impossible batch size or size, or a network that does not take
            colour photos.
        UnknownModelError: no model of this name.
        WeightsError, DownloadError: the weights cannot be read or fetched.
        MissingDependencyError: the engine's package is not installed.

    Example:
        >>> from weightnet.nn.shufflenet import ShuffleNetV2
        >>> from weightnet.nn.variants import NetworkSpec
        >>> from weightnet.images.labels import ClassLabel
        >>> from weightnet.zoo.cards import Card
        >>> spec = NetworkSpec((16, 32, 64), stem_channels=8, head_channels=32, num_classes=2)
        >>> network = ShuffleNetV2(spec)
        >>> network.card = Card("two", spec, (ClassLabel("cat"), ClassLabel("dog")))
        >>> classify = Classifier(network)
        >>> classify(np.zeros((300, 400, 3), np.uint8))[0].status
        'ok'
        >>> classify(b"not a photo", k=1)[0].status
        'error'
    """

    def __init__(
        self,
        model: Model = "default",
        *,
        engine: str = "auto",
        device: str = "auto",
        batch_size: int = 16,
        resize: int | None = None,
        crop: int | None = None,
    ) -> None:
        _check_count("batch_size", batch_size)
        if batch_size > MAX_BATCH_SIZE:
            raise UsageError(
                f"batch_size must be at most {MAX_BATCH_SIZE:,}. Got batch_size={batch_size}. Use a smaller number."
            )
        self.batch_size = batch_size
        self._engine = open_engine(model, engine=engine, device=device)
        self.card = self._engine.card
        sizes = {name: size for name, size in (("resize", resize), ("crop", crop)) if size is not None}
        if sizes:
            preprocess = dataclasses.replace(self.card.preprocess, **sizes)  # type: ignore[arg-type]
            self.card = dataclasses.replace(self.card, preprocess=preprocess)
        if self.card.network.in_channels != 3:
            raise UsageError(
                "A network must take 3 channels to classify photos. "
                f"Got in_channels={self.card.network.in_channels}. Call the network itself instead."
            )

    def __call__(self, images: "ImageSource | Iterable[ImageSource]", *, k: int = 5) -> list[Prediction]:
        """Classify photos and return one prediction for each, in their order.

        Args:
            images: paths, the bytes of image files, binary file objects, PIL images, or arrays (H, W, 3) of uint8 in
                the order blue, green, red; one alone gives a list of one.
            k: how many classes to name, at least 1; more than there are names all.

        Raises:
            UsageError: k is below 1. A photo that cannot be read raises nothing: its prediction says so.
        """
        return list(self.stream(images, k=k))

    def stream(self, images: "ImageSource | Iterable[ImageSource]", *, k: int = 5) -> Iterator[Prediction]:
        """Classify any number of photos, one after the other, in bounded memory.

        Photos are taken from `images` as they are needed, up to two batches ahead of the predictions. Paths and bytes
        are decoded in threads; file objects, PIL images and arrays as they are taken, so that the source may close or
        change them when the next is asked for.

        Args and errors are those of a call.
        """
        _check_count("k", k)
        return (self._prediction(path, outcome, k) for path, outcome in self.stream_logits(images))

    def stream_logits(self, images: "ImageSource | Iterable[ImageSource]") -> "Iterator[tuple[str | None, Outcome]]":
        """Yield each photo's path and its logits, or what is wrong with it; otherwise as `stream` does.

        Shape: logits (K,) float32, all finite, in the order of the card's classes.
        """
        return self._stream_output(images, LOGITS)

    def stream_pre_logits(
        self, images: "ImageSource | Iterable[ImageSource]"
    ) -> "Iterator[tuple[str | None, Outcome]]":
        """Yield each photo's path and its pooled features, or what is wrong with it; otherwise as `stream` does.

        Shape: pre-logits (F,) float32, all finite.

        Raises: UsageError where the model does not give them.
        """
        return self._stream_output(images, PRE_LOGITS)

    def embed(self, images: "ImageSource | Iterable[ImageSource]") -> Iterator[Embedding]:
        """Yield a feature vector for each photo; photos are taken and read as `stream` does.

        Raises: UsageError where the model does not give its features.
        """
        return (
            Embedding(path, "error", vector, None) if isinstance(vector, str) else Embedding(path, "ok", None, vector)
            for path, vector in self.stream_pre_logits(images)
        )

    def _stream_output(
        self, images: "ImageSource | Iterable[ImageSource]", output: str
    ) -> "Iterator[tuple[str | None, Outcome]]":
        check_outputs([output], self._engine.outputs)
        alone = isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read")
        if alone or not isinstance(images, Iterable) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]  # type: ignore[list-item]
        return self._stream(iter(images), output)  # type: ignore[arg-type]

    def _stream(self, images: Iterator[ImageSource], output: str) -> "Iterator[tuple[str | None, Outcome]]":
        ahead: deque[tuple[str | None, Future[_Prepared] | _Prepared]] = deque()
        with ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="weightnet-decode") as threads:
            try:
                while True:
                    for image in itertools.islice(images, 2 * self.batch_size - len(ahead)):
                        ahead.append((_path(image), self._begin(image, threads)))
                    if not ahead:
                        return
                    batch = [ahead.popleft() for _ in range(min(self.batch_size, len(ahead)))]
                    yield from self._classify(batch, output)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, image: ImageSource, threads: ThreadPoolExecutor) -> "Future[_Prepared] | _Prepared":
        if isinstance(image, str | os.PathLike | bytes):
            return threads.submit(self._prepare, image)
        return self._prepare(image)

    def _prepare(self, image: ImageSource) -> _Prepared:
        try:
            return self.card.preprocess(read_image(image))
        except ImageError as error:
            return str(error)
        except MemoryError:
            return "a photo must fit into memory while it is decoded. Got too little memory. Scale it down."
        except Exception as error:  # file objects and PIL's plug-ins raise anything; no photo may harm its neighbours
            return f"a photo must be readable. Got {type(error).__name__}: {error}. Check the file."

    def _classify(
        self, batch: list[tuple[str | None, "Future[_Prepared] | _Prepared"]], output: str
    ) -> "Iterator[tuple[str | None, Outcome]]":
        prepared = [(path, item.result() if isinstance(item, Future) else item) for path, item in batch]
        inputs = [x_CHW for _, x_CHW in prepared if not isinstance(x_CHW, str)]
        try:
            outputs = iter(self._engine.run_outputs(np.stack(inputs), [output])[output] if inputs else ())
        except MemoryError as error:
            raise UsageError(
                "batch_size must be such that a batch fits into memory. "
                f"Got batch_size={self.batch_size}: {error}. Use a smaller number."
            ) from error
        for path, item in prepared:
            yield path, item if isinstance(item, str) else _finite(next(outputs))

    def _prediction(self, path: str | None, outcome: Outcome, k: int) -> Prediction:
        if isinstance(outcome, str):
            return Prediction(path, "error", outcome, ())
        return make_prediction(self.card, path, outcome, k)


def make_prediction(card: Card, path: str | None, logits_K: Batch, k: int) -> Prediction:
    """Return what a photo's logits say.

    Args:
        card: of the model that gave the logits.
        path: of the photo, if it has one.
        logits_K: one for each of the card's classes.
        k: how many classes to name; more than there are give all.
    """
    top = best_classes(card, logits_K, k)
    return Prediction(path, "ok", None, top, is_known(top, card.known_from))


def is_known(top: Sequence[ClassScore], known_from: float | None) -> bool | None:
    """Return whether a photo shows one of a model's classes at all, by the probability of the best.

    Args:
        top: the photo's most probable classes, best first.
        known_from: the least probability that counts, as the model's card has it; None gives None.

    Example:
        >>> is_known([ClassScore("cat", 3, 0.2)], 0.25)
        False

    Source: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks", ICLR 2017.
    """
    return None if known_from is None else top[0].probability >= known_from


def best_classes(card: Card, logits_K: Batch, k: int) -> tuple[ClassScore, ...]:
    """Return the k most probable classes of a photo, best first; equal ones by class number.

    Args:
        card: of the model that gave the logits.
        logits_K: one for each of the card's classes.
        k: how many classes; more than there are give all.
    """
    probabilities_K = softmax(logits_K[None])[0]
    best = np.argsort(-logits_K, kind="stable")[:k]
    return tuple(ClassScore(card.classes[i].label, int(i), float(probabilities_K[i])) for i in best)


def short_floats(vector: Batch) -> list[float]:
    """Return float32 numbers as Python's, in the fewest digits that give them back.

    >>> short_floats(np.array([0.1, 1e-9], np.float32))
    [0.1, 1e-09]
    """
    return [float(str(number)) for number in vector]


def table_columns(width: int, *, embeddings: bool, known: bool) -> list[str]:
    """Return the columns of a table of predictions or embeddings.

    Args:
        width: how many classes, or numbers of an embedding, a row has room for.
        embeddings: whether the rows are embeddings.
        known: whether there is a column for what the model does not know.

    Example:
        >>> table_columns(1, embeddings=False, known=True)
        ['path', 'status', 'error', 'known', 'label1', 'index1', 'probability1']
    """
    each = ("pre_logits",) if embeddings else ("label", "index", "probability")
    ranked = [f"{name}{rank}" for rank in range(1, width + 1) for name in each]
    return ["path", "status", "error", *(["known"] if known else []), *ranked]


def _finite(output: Batch) -> Outcome:
    if np.isfinite(output).all():
        return output
    return (
        "the network's output must be finite. Got NaN or infinity for this photo. "
        "The weights are damaged or do not fit their preprocessing: get them again."
    )


def _path(image: ImageSource) -> str | None:
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1. Got {name}={value!r}. Use a larger number.")
