"""What every engine is: it takes and gives NumPy arrays, so that callers need no framework; and what all check.

Shape suffixes: B photos, C input channels, H height, W width, K classes, F features.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError
from weightnet.zoo.cards import Card

# What an engine may be asked for.
LOGITS, PRE_LOGITS, FEATURES, CLASS_WEIGHTS = OUTPUTS = ("logits", "pre_logits", "features", "class_weights")

PROBABILITIES = "probabilities"  # of a file that has the preprocessing in it

MIN_SIZE_PX = 32  # as the networks of this package have it

Batch = npt.NDArray[np.float32]


class Engine(Protocol):
    """A network that is ready to run.

    `card` is the model's card: its classes, in the order of the logits, and its preprocessing. `outputs` are the names
    of what it can give: "logits" always; of networks of this package in PyTorch, and of files exported so, further
    "pre_logits", the pooled features that embeddings are made of, "features", the last feature map, and
    "class_weights", the classifier's weights. The latter do not depend on photos; a heat map of a class is
    `einsum("f,fhw->hw", class_weights[k], features[b])`.
    """

    card: Card
    outputs: tuple[str, ...]

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits.

        Shape: (B, C, H, W) float32, prepared as the card says -> (B, K) float32.
        """
        ...

    def run_outputs(self, x_BCHW: Batch, names: Sequence[str], /) -> dict[str, Batch]:
        """Return outputs by their names, in the order of `names`.

        Shape: (B, C, H, W) float32, prepared as the card says -> logits (B, K), pre_logits (B, F),
        features (B, F, H / 32, W / 32), rounded up, class_weights (K, F), each float32.

        Raises: UsageError where the engine does not give one of them.
        """
        ...


def check_batch(x_BCHW: Batch, card: Card) -> None:
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
