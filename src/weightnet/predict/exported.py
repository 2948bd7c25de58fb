"""Engines of exported files: ONNX Runtime, and what all have in common. None of this needs PyTorch.

The others have modules of their own: `exported_openvino`, `_torch`, `_executorch` and `_mnn`.

Shape suffixes: as in `weightnet.predict.engines`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from weightnet.errors import MissingDependencyError, UsageError, WeightsError
from weightnet.zoo.cards import Card, card_path, read_card, read_file

if TYPE_CHECKING:
    import onnxruntime

    from weightnet.predict.engines import Batch, Engine

# What runs an exported file; auto's first.
EXPORTED = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
    ".pte": ("executorch",),
    ".mnn": ("mnn",),
}

FIXED_SIZE = (".pte",)  # whose photos are of the card's size

# The names in an exported file, and those of what every engine may be asked for.
INPUT = "input"
LOGITS, PRE_LOGITS, FEATURES, CLASS_WEIGHTS = OUTPUTS = ("logits", "pre_logits", "features", "class_weights")

PROBABILITIES = "probabilities"  # of a file that has the preprocessing in it

MIN_SIZE_PX = 32  # as the networks of this package have it
MAX_EXPORTED_BYTES = 1 << 30
PIECE = 8  # the most photos that a core takes at once


def open_exported(path: str | os.PathLike[str], *, engine: str = "auto") -> "Engine":
    """Open an exported file, as `open_engine` does; the engine, unless "auto", must be one that runs it."""
    chosen = EXPORTED[Path(path).suffix][0] if engine == "auto" else engine
    if chosen == "onnxruntime":
        return OnnxRuntimeEngine(path)
    if chosen == "openvino":
        from weightnet.predict.exported_openvino import OpenVinoEngine

        return OpenVinoEngine(path)
    if chosen == "torch":
        from weightnet.predict.exported_torch import TorchExportEngine

        return TorchExportEngine(path)
    if chosen == "executorch":
        from weightnet.predict.exported_executorch import ExecuTorchEngine

        return ExecuTorchEngine(path)
    from weightnet.predict.exported_mnn import MnnEngine

    return MnnEngine(path)


class OnnxRuntimeEngine:
    """Runs an exported .onnx file in ONNX Runtime, on the CPU; its card must lie beside it.

    Batches are run in pieces of a few photos, side by side on the processor's cores: each core then works by itself, on
    feature maps that stay in its cache. A single photo is run on one core: a second one gained nothing.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_runtime("onnxruntime", "onnxruntime", error) from error
        self.card, self._path = card_beside(path), path
        read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is in the error that it raises; standard error is not ours
        options.intra_op_num_threads = 1
        self._cores = ThreadPoolExecutor(usable_cores())
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # which prints, to try the same again
            )
        except Exception as error:  # it has a dozen classes of errors, without a common base
            raise unreadable(path, error) from error
        self._takes_pixels = takes_pixels(self.card, path)
        kind = "tensor(uint8)" if self._takes_pixels else "tensor(float)"
        inputs = {value.name: _onnx_shape(value, kind) for value in self._session.get_inputs()}
        outputs = {value.name: _onnx_shape(value) for value in self._session.get_outputs()}
        self.outputs = check_signature(path, self.card, inputs, outputs)

    def run(self, x_BCHW: "Batch", /) -> "Batch":
        """Return logits, as `Engine.run`."""
        return self.run_outputs(x_BCHW, [LOGITS])[LOGITS]

    def run_outputs(self, x_BCHW: "Batch", names: Sequence[str], /) -> "dict[str, Batch]":
        """Return some of the file's outputs, as `Engine.run_outputs`."""
        check_outputs(names, self.outputs)
        check_batch(x_BCHW, self.card)
        if not len(x_BCHW):  # which it does not reshape
            return run_none(self, x_BCHW, names)
        pieces = in_pieces(raw_pixels(x_BCHW) if self._takes_pixels else x_BCHW)

        def run(piece: "npt.NDArray[Any]") -> "dict[str, Batch]":
            return dict(zip(names, self._session.run(list(names), {INPUT: piece}), strict=True))

        try:
            return joined(names, [run(x) for x in pieces] if len(pieces) == 1 else list(self._cores.map(run, pieces)))
        except Exception as error:  # a file that was read may still not fit together
            raise unreadable(self._path, error) from error


def usable_cores() -> int:
    """Return how many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(photos: "npt.NDArray[Any]") -> "list[npt.NDArray[Any]]":
    """Split a batch evenly over the cores, into no more photos at once than suit one."""
    size = min(PIECE, -(-len(photos) // usable_cores()))
    return [photos[at : at + size] for at in range(0, len(photos), size)]


def joined(names: Sequence[str], pieces: "Sequence[dict[str, npt.NDArray[Any]]]") -> "dict[str, npt.NDArray[Any]]":
    """Return the outputs of a batch that was run in pieces."""
    return {
        name: pieces[0][name] if name == CLASS_WEIGHTS else np.concatenate([piece[name] for piece in pieces])
        for name in names
    }


def run_none(engine: "Engine", x_BCHW: "Batch", names: Sequence[str]) -> "dict[str, Batch]":
    """Return outputs of a batch of no photos, in a runtime that does not take one."""
    one = engine.run_outputs(np.zeros((1, *x_BCHW.shape[1:]), np.float32), names)
    return {name: array if name == CLASS_WEIGHTS else array[:0] for name, array in one.items()}


def card_beside(path: str | os.PathLike[str]) -> Card:
    beside = card_path(path)
    if not beside.is_file():
        raise WeightsError(
            f"An exported file must have its card beside it. Got {path} without {beside.name}. "
            "Copy the card there, or export the model again by `weightnet export`."
        )
    return read_card(beside)


def exported_as(card: Card, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return how a file was exported, as its card says: its precision, its outputs; empty where it says nothing."""
    exports = card.notes.get("exports")
    entry = exports.get(Path(path).suffix) if isinstance(exports, dict) else None
    return entry if isinstance(entry, dict) else {}


def takes_pixels(card: Card, path: str | os.PathLike[str]) -> bool:
    """Return whether a file takes photos (B, H, W, 3) of uint8, blue, green, red, as its card says."""
    return exported_as(card, path).get("preprocessing") is not None


def raw_pixels(x_BCHW: "Batch") -> "npt.NDArray[np.uint8]":
    """Return raw pixels as such a file takes them."""
    return np.ascontiguousarray(np.moveaxis(np.rint(x_BCHW).astype(np.uint8), 1, 3))


def missing_runtime(package: str, requirement: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"Running this file needs {package}. Got: {error}. Install it by: pip install {requirement}"
    )


def unreadable(path: str | os.PathLike[str], error: Exception) -> WeightsError:
    what = " ".join(str(error).split())[:300]  # runtimes write pages, with places in their own source
    return WeightsError(
        f"An exported file must be one that its runtime runs. Got {path}: {what}. Export the model again."
    )


Shape: TypeAlias = "list[int | None] | None"  # each axis's size, None for an open one; None where of another type


def _onnx_shape(value: "onnxruntime.NodeArg", kind: str = "tensor(float)") -> Shape:
    if value.type != kind:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def check_signature(
    path: str | os.PathLike[str], card: Card, inputs: dict[str, Shape], outputs: dict[str, Shape]
) -> tuple[str, ...]:
    """Check that a file takes any number of the photos, and gives the logits, that its card speaks of.

    Returns the names of its outputs, those alone that this package knows.
    """
    channels, crop, classes = card.network.in_channels, card.preprocess.crop, card.network.num_classes
    sizes = [(None,), (channels,), (None, crop), (None, crop)]
    if takes_pixels(card, path):
        sizes.append(sizes.pop(1))
    photo = inputs.get(INPUT) or ()
    fits = len(inputs) == 1 and len(photo) == 4 and all(map(lambda got, may: got in may, photo, sizes))
    if not fits or outputs.get(LOGITS) != [None, classes]:
        wanted = " x ".join(str(may[-1] or "any") for may in sizes)
        raise WeightsError(
            f"An exported file must take ({INPUT}: {wanted}) and give ({LOGITS}: any x "
            f"{classes}), as its card says. Got {path}, which takes ({_listed(inputs)}), gives ({_listed(outputs)}). "
            "Put its own card beside it, or export the model again by `weightnet export`."
        )
    width = card.network.head_channels
    others: dict[str, Shape] = {PRE_LOGITS: [None, width], FEATURES: [None, width, None, None]}
    others |= {CLASS_WEIGHTS: [classes, width], PROBABILITIES: [None, classes]}
    wrong = {name: outputs[name] for name, shape in others.items() if name in outputs and outputs[name] != shape}
    if wrong:
        raise WeightsError(
            f"An exported file's further outputs must be ({_listed({name: others[name] for name in wrong})}), as its "
            f"card says. Got {path}, which gives ({_listed(wrong)}). Export the model again by `weightnet export`."
        )
    return tuple(name for name in (*OUTPUTS, PROBABILITIES) if name in outputs)


def check_trial(path: str | os.PathLike[str], card: Card, given: "dict[str, Batch]") -> tuple[str, ...]:
    """Check what a file gave for one photo of the card's size, where the file itself does not say what it takes.

    Returns the names of its outputs.

    Raises: WeightsError where they are not those that its card speaks of.
    """
    channels, crop = card.network.in_channels, card.preprocess.crop
    shapes: dict[str, Shape] = {name: [None, *array.shape[1:]] for name, array in given.items()}
    if CLASS_WEIGHTS in given:
        shapes[CLASS_WEIGHTS] = list(given[CLASS_WEIGHTS].shape)
    if FEATURES in given and given[FEATURES].ndim == 4:
        shapes[FEATURES] = [None, given[FEATURES].shape[1], None, None]
    return check_signature(path, card, {INPUT: [None, channels, crop, crop]}, shapes)


def check_batch(x_BCHW: "Batch", card: Card) -> None:
    """Check that a batch is one that the networks take: whatever runs them would take more, and answer nonsense.

    Raises: UsageError where it has other channels or is too small.
    """
    channels = card.network.in_channels
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or min(x_BCHW.shape[2:]) < MIN_SIZE_PX:
        raise UsageError(
            f"The input must be a batch of shape (B, {channels}, H, W) with H and W of at least {MIN_SIZE_PX} px. "
            f"Got shape={x_BCHW.shape}. Resize or reshape it."
        )


def check_outputs(names: Sequence[str], given: Sequence[str]) -> None:
    """Check that a model gives the outputs that are asked for.

    Args:
        names: what is asked for.
        given: what the model gives.

    Raises: UsageError where it does not give one; the message says how to export it so that it does.

    Example:
        >>> check_outputs(["features"], ["logits"])
        Traceback (most recent call last):
        weightnet.errors.UsageError: An output must be one that the model gives (logits). Got output='features'. \
Export the model again with `--outputs features`.
    """
    for name in names:
        if name in given:
            continue
        advice = f"Export the model again with `--outputs {name}`." if name in OUTPUTS else "Choose one of them."
        raise UsageError(
            f"An output must be one that the model gives ({', '.join(given)}). Got output={name!r}. {advice}"
        )


def _listed(values: dict[str, Shape]) -> str:
    def text(shape: Shape) -> str:
        return "other numbers" if shape is None else " x ".join("any" if size is None else str(size) for size in shape)

    return ", ".join(f"{name}: {text(shape)}" for name, shape in values.items())[:300]
