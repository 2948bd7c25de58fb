"""Whether a checkpoint wants normalised or raw pixels, read off the statistics that it carries itself.

The hub page normalises pixels; the original's scripts feed them raw, 0..255. A stem's batch norm has kept the variance
of what its convolution gave on the training photos. The same variance follows from the convolution's weights and the
covariance of the 3x3 patches of photos, once for raw pixels and once for normalised ones. The two predictions differ by
2 ln 57 = 8.1 in the logarithm in every channel, and the right one is nearly always less than 1 off. (The means tell
little: raw pixels have a large one, but a filter that ignores brightness removes it.)

Source: megvii-model/WeightNet, whose scripts dropped the page's normalisation on 2020-08-07; the patch statistics are
made by `scripts/make_patch_statistics.py`.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from weightnet.images.transforms import MEAN_BGR, STD_BGR

STEM = "first_conv"
LIMIT_NATS = 2.0  # the hypotheses lie 8.1 apart; pixels scaled to 0..1, 3.0 from normalised ones, must fit neither
MIN_VARIANCE = 1e-12  # channels that weight decay has put to sleep say nothing
MIN_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class PixelFit:
    """How well a stem's batch norm statistics fit one kind of pixels; averages over its channels.

    Args:
        variance_error: absolute difference of the log variances, kept against predicted, in nats. This decides.
        mean_error: absolute difference of the means, in standard deviations of the channel. For the record only: a
            filter that ignores brightness has the same mean either way.
    """

    variance_error: float
    mean_error: float


@dataclasses.dataclass(frozen=True)
class PixelDecision:
    """What pixels a checkpoint was trained on, and how sure that is.

    Args:
        normalised: True for the page's normalisation, False for raw 0..255, None where the checkpoint does not tell.
        margin: how much smaller the winner's variance error is than the loser's, in nats; 8.1 at most.
        reason: one sentence for people.
        fit_normalised: how well normalised pixels fit; None where nothing could be compared.
        fit_raw: the same for raw pixels.
    """

    normalised: bool | None
    margin: float
    reason: str
    fit_normalised: PixelFit | None = None
    fit_raw: PixelFit | None = None


def detect_pixels(state: Mapping[str, npt.NDArray[np.floating]]) -> PixelDecision:
    """Decide from the stem's weights and batch norm statistics whether a network takes normalised or raw pixels.

    Args:
        state: name -> array in PyTorch's layout; only the entries of `first_conv` are looked at.

    Returns:
        The decision; undecided (`normalised=None`, margin 0) where the stem is missing, was never trained, does not
        take three colours, or fits neither. The caller then keeps the page's preprocessing.

    >>> weight = np.linspace(0.1, 0.8, 8 * 27).reshape(8, 3, 3, 3)  # brightness filters
    >>> sums = weight.sum(axis=(1, 2, 3))
    >>> state = {"first_conv.0.weight": weight, "first_conv.1.running_mean": 114 * sums}
    >>> detect_pixels(state | {"first_conv.1.running_var": (57 * sums) ** 2}).normalised
    False
    """
    weight = state.get(f"{STEM}.0.weight")
    mean, variance = state.get(f"{STEM}.1.running_mean"), state.get(f"{STEM}.1.running_var")
    if weight is None or mean is None or variance is None:
        return _undecided("it has no stem with batch norm statistics")
    if weight.shape[1:] != (3, 3, 3) or not mean.shape == variance.shape == weight.shape[:1]:
        return _undecided("its stem is not a 3x3 convolution of three colours")
    if np.all(variance == 1) and not np.any(mean):
        return _undecided("its batch norm statistics were never updated")
    filters = weight.reshape(len(weight), 27).astype(np.float64)
    shift = mean.astype(np.float64) - state.get(f"{STEM}.0.bias", np.zeros(len(weight)))
    patch_mean, patch_covariance = _patch_statistics()
    offset, scale = np.repeat(MEAN_BGR, 9), np.repeat(STD_BGR, 9)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is left out
        fit_raw = _fit(filters, shift, variance, patch_mean, patch_covariance)
        fit_normalised = _fit(
            filters, shift, variance, (patch_mean - offset) / scale, patch_covariance / np.outer(scale, scale)
        )
    if fit_normalised is None or fit_raw is None:
        return _undecided("too few channels of its stem have usable statistics")
    return _decide(fit_normalised, fit_raw)


def _decide(fit_normalised: PixelFit, fit_raw: PixelFit) -> PixelDecision:
    if min(fit_normalised.variance_error, fit_raw.variance_error) > LIMIT_NATS:
        return dataclasses.replace(
            _undecided("its stem fits neither kind"), fit_normalised=fit_normalised, fit_raw=fit_raw
        )
    lead = fit_raw.variance_error - fit_normalised.variance_error
    pixels = "normalised pixels" if lead > 0 else "raw pixels (0..255)"
    reason = f"{pixels}: the stem's batch norm statistics fit them {abs(lead):.1f} nats better (of 8.1 at most)"
    return PixelDecision(lead > 0, abs(lead), reason, fit_normalised, fit_raw)


def _undecided(why: str) -> PixelDecision:
    return PixelDecision(None, 0.0, f"the checkpoint does not tell its pixels: {why}")


def _fit(
    filters: npt.NDArray[np.float64],
    mean: npt.NDArray[np.float64],
    variance: npt.NDArray[np.floating],
    patch_mean: npt.NDArray[np.float64],
    patch_covariance: npt.NDArray[np.float64],
) -> PixelFit | None:
    """Compare what a batch norm kept with what the filters give on patches; None when too few channels can be."""
    kept = variance.astype(np.float64)
    predicted = np.einsum("oi,ij,oj->o", filters, patch_covariance, filters)
    usable = np.isfinite(kept) & np.isfinite(predicted) & np.isfinite(mean)
    usable &= (kept > MIN_VARIANCE) & (predicted > MIN_VARIANCE)
    if usable.sum() < max(MIN_CHANNELS, len(filters) / 2):
        return None
    deviation = np.sqrt(kept[usable])
    return PixelFit(
        variance_error=float(np.abs(np.log(kept[usable] / predicted[usable])).mean()),
        mean_error=float((np.abs(filters @ patch_mean - mean)[usable] / deviation).mean()),
    )


@functools.cache
def _patch_statistics() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean (27,) and covariance (27, 27) of the patches of photos, in grey levels and a convolution weight's order."""
    text = importlib.resources.files("weightnet.zoo").joinpath("patch_statistics.json").read_text("utf-8")
    statistics = json.loads(text)
    return np.array(statistics["mean"]), np.array(statistics["covariance"])
