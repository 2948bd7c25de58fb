"""What engines of exported files have in common. None of this needs PyTorch.

The engines have modules of their own: `exported_onnxruntime`, `_openvino`, `_torch`, `_executorch` and `_mnn`.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from weightnet.errors import MissingDependencyError, WeightsError
from weightnet.predict.interface import (
    CLASS_WEIGHTS,
    FEATURES,
    LOGITS,
    OUTPUTS,
    PRE_LOGITS,
    PROBABILITIES,
    Batch,
    Engine,
)
from weightnet.zoo.cards import Card, card_path, read_card

# What runs an exported file; auto's first.
EXPORTED = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
    ".pte": ("executorch",),
    ".mnn": ("mnn",),
}

FIXED_SIZE = (".pte",)  # whose photos are of the card's size

INPUT = "input"  # as exported files call it
MAX_EXPORTED_BYTES = 1 << 30
PIECE = 8  # photos that a core takes at once, at most: their maps should stay in its caches


def usable_cores() -> int:
    """Return how many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(photos: npt.NDArray[Any], largest: int = PIECE) -> list[npt.NDArray[Any]]:
    """Split a batch over the cores: into the largest pieces where each core gets one, else evenly into usual ones."""
    share = -(-len(photos) // usable_cores())
    size = largest if share >= largest else min(PIECE, share)
    return [photos[at : at + size] for at in range(0, len(photos), size)]


def joined(names: Sequence[str], pieces: Sequence[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of a batch that was run in pieces."""
    return {
        name: pieces[0][name] if name == CLASS_WEIGHTS else np.concatenate([piece[name] for piece in pieces])
        for name in names
    }


def run_none(engine: Engine, x_BCHW: Batch, names: Sequence[str]) -> dict[str, Batch]:
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


def raw_pixels(x_BCHW: Batch) -> npt.NDArray[np.uint8]:
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


def check_trial(path: str | os.PathLike[str], card: Card, given: dict[str, Batch]) -> tuple[str, ...]:
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


def _listed(values: dict[str, Shape]) -> str:
    def text(shape: Shape) -> str:
        return "other numbers" if shape is None else " x ".join("any" if size is None else str(size) for size in shape)

    return ", ".join(f"{name}: {text(shape)}" for name, shape in values.items())[:300]
