"""Whether an exported file gives the network's numbers, in the runtime that will run it."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from weightnet.errors import WeightsError
from weightnet.images.transforms import Preprocess
from weightnet.nn.fold import FoldedShuffleNetV2
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.predict.exported import joined
from weightnet.predict.interface import CLASS_WEIGHTS, LOGITS, PROBABILITIES

if TYPE_CHECKING:
    from weightnet.predict.interface import Batch, Engine

# How far an output may be from the network's in double precision, as a fraction of the output's largest magnitude.
# Rounding to float32 moved the outputs of the twelve networks, with random weights and calibrated batch norms, by up
# to 2.5e-5; weights rounded to half precision by up to 6e-2 there, and by 2e-3 in a trained network. A wrong gain,
# channel or bias moves them by the order of 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-1, "bf16": 2e-1}

# The same for 8-bit integers, as a fraction of root mean squares, and the share of photos that must get the same class.
# Five trained networks were off by up to 0.16 and gave 86% (one of 100 classes) to 100% of the photos their class; the
# embedded one, with the scales of one convolution one channel off, by 2 at its beginning and by 0.34 in its middle.
# Networks of random weights, which amplify all rounding, are off by 0.2 to 0.8.
INT8_TOLERANCE = 0.3
LEAST_AGREEMENT = 0.7
CHECKED_PHOTOS = 64

BATCHES = (1, 2, 5)
LARGER_PX = (32, 64)  # by how much the height and the width of the other size are larger than the card's


def check_parity(
    network: ShuffleNetV2 | FoldedShuffleNetV2,
    engine: "Engine",
    *,
    precision: str,
    preprocess: Preprocess | None = None,
    other_size: bool = True,
) -> dict[str, float]:
    """Compare every output of an exported file with the network in double precision.

    The batches are 1, 2 and 5 photos of the card's size and, where the file takes it, 2 of another one: smooth random
    pictures, prepared as the card says.

    Args:
        network: what the file was made of.
        engine: what runs the file.
        precision: a key of `TOLERANCE`.
        preprocess: the network's own, where the file has it inside and takes pixels.
        other_size: whether the file takes photos of another size.

    Returns: the largest error of each output, as a fraction of the output's largest magnitude.

    Raises: WeightsError where one is above the tolerance, or not a number.
    """
    exact = copy.deepcopy(network).cpu().double().eval()
    crop = engine.card.preprocess.crop
    larger = (crop + LARGER_PX[0], crop + LARGER_PX[1])
    worst: dict[str, float] = {}
    for batches, size in ((BATCHES, (crop, crop)), ((2,), larger))[: 1 + other_size]:
        pixels_BCHW = _pictures((max(batches), network.spec.in_channels, *size))
        x_BCHW = _prepared(pixels_BCHW, engine.card.preprocess)
        expected = _exact_outputs(exact, x_BCHW if preprocess is None else _prepared(pixels_BCHW, preprocess))
        for batch in batches:
            for name, got in engine.run_outputs(x_BCHW[:batch], engine.outputs).items():
                error = _relative_error(got, expected[name] if name == CLASS_WEIGHTS else expected[name][:batch])
                worst[name] = float(np.maximum(worst.get(name, 0.0), error))  # keeps NaN
    allowed = TOLERANCE[precision]
    wrong = {name: error for name, error in worst.items() if not error <= allowed}
    if wrong:
        errors = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise WeightsError(
            f"An exported file must give the network's numbers within {allowed:.0e} of their magnitude. Got a "
            f"{precision} file that is off in {errors}; nothing was written. Check the weights"
            + (", or export them as fp32." if precision != "fp32" else ".")
        )
    return worst


def check_int8(
    network: ShuffleNetV2 | FoldedShuffleNetV2,
    engine: "Engine",
    crops: Sequence[npt.NDArray[np.uint8]],
    preprocess: Preprocess,
) -> tuple[dict[str, float], float]:
    """Compare every output of a file of 8-bit integers with the network in double precision, on photos.

    Rounding to 8 bits suits photos like those that set its ranges, not the pictures of `check_parity`. Up to 64 of the
    photos are run together, one of them by itself, and two with mirrored edges, so that they are of another size.

    Args:
        network: what the file was made of.
        engine: what runs the file.
        crops: the photos that calibrated it, resized and cropped.
        preprocess: the network's own.

    Returns: the root mean square error of each output, as a fraction of the output's own, in the worst of these runs;
        and the share of the photos whose most probable class is the network's.

    Raises: WeightsError where an error is above `INT8_TOLERANCE` or not a number, or the share below `LEAST_AGREEMENT`.
    """
    exact = copy.deepcopy(network).cpu().double().eval()
    count = min(len(crops), CHECKED_PHOTOS)
    chosen = [crops[number * len(crops) // count] for number in range(count)]
    larger = [np.pad(crop, ((0, LARGER_PX[0]), (0, LARGER_PX[1]), (0, 0)), mode="symmetric") for crop in chosen[:2]]
    worst: dict[str, float] = {}
    agreement = 1.0
    for photos in (chosen, chosen[:1], larger):
        expected = _exact_by_batches(exact, np.stack([preprocess.normalize(photo) for photo in photos]))
        x_BCHW = np.stack([engine.card.preprocess.normalize(photo) for photo in photos])
        got = engine.run_outputs(x_BCHW, engine.outputs)
        for name in engine.outputs:
            worst[name] = float(np.maximum(worst.get(name, 0.0), _rms_error(got[name], expected[name])))
        if photos is chosen:
            agreement = float((got[LOGITS].argmax(1) == expected[LOGITS].argmax(1)).mean())
    wrong = [f"{name} by {error:.1e}" for name, error in worst.items() if not error <= INT8_TOLERANCE]
    if wrong or agreement < LEAST_AGREEMENT:
        raise WeightsError(
            f"An int8 file must give the network's numbers within {INT8_TOLERANCE} of their root mean square, and its "
            f"class for {LEAST_AGREEMENT:.0%} of the photos. Got one that is off in {', '.join(wrong) or 'nothing'} "
            f"and agrees on {agreement:.0%}; nothing was written. Calibrate with photos such as the network was "
            "trained on, or choose bf16."
        )
    return worst, agreement


def _pictures(shape: tuple[int, ...]) -> Tensor:
    """Return smooth random pictures, in whole grey levels; colours are blue, green, red."""
    coarse = np.random.default_rng(0).uniform(0, 255, (*shape[:2], 7, 7))
    return F.interpolate(torch.from_numpy(coarse), shape[2:], mode="bicubic").clamp(0, 255).round()


def _prepared(pixels_BCHW: Tensor, preprocess: Preprocess) -> "Batch":
    """Return pictures as a network takes them."""
    channels = pixels_BCHW.shape[1]
    if preprocess.channel_order == "RGB" and channels == 3:
        pixels_BCHW = pixels_BCHW.flip(1)
    if preprocess.mean is not None and preprocess.std is not None:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
        if len(mean) != channels:  # not colour photos, of which alone a card knows the scale
            mean, std = mean.mean(), std.mean()
        pixels_BCHW = (pixels_BCHW - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    return pixels_BCHW.float().contiguous().numpy()


def _exact_by_batches(
    network: ShuffleNetV2 | FoldedShuffleNetV2, x_BCHW: "Batch"
) -> dict[str, npt.NDArray[np.float64]]:
    parts = [_exact_outputs(network, x_BCHW[at : at + 8]) for at in range(0, len(x_BCHW), 8)]
    return joined(list(parts[0]), parts)


@torch.no_grad()
def _exact_outputs(network: ShuffleNetV2 | FoldedShuffleNetV2, x_BCHW: "Batch") -> dict[str, npt.NDArray[np.float64]]:
    features = network.forward_features(torch.from_numpy(x_BCHW).double())
    pre_logits, logits = network.forward_head(features, pre_logits=True), network.forward_head(features)
    outputs = {"logits": logits, "pre_logits": pre_logits, "features": features}
    linear = network.classifier if isinstance(network, FoldedShuffleNetV2) else network.classifier[0]
    outputs |= {CLASS_WEIGHTS: cast(Tensor, linear.weight), PROBABILITIES: logits.softmax(1)}
    return {name: value.numpy() for name, value in outputs.items()}


def _relative_error(got: "Batch", expected: npt.NDArray[np.float64]) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return _fraction(np.abs(got - expected).max(), np.abs(expected).max())


def _rms_error(got: "Batch", expected: npt.NDArray[np.float64]) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return _fraction(np.sqrt(np.square(got - expected).mean()), np.sqrt(np.square(expected).mean()))


def _fraction(error: float, of: float) -> float:
    """Return an error as a fraction: none of nothing is 0, some of nothing has no bounds."""
    if error == 0:
        return 0.0
    return float(error / of) if of else float("inf")
