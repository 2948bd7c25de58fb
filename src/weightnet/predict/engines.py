"""Engines: what runs a network on a batch. Each takes and gives NumPy arrays, so that callers need no framework.

Shape suffixes: B photos, C input channels, H height, W width, K classes.
"""

import copy
import os
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError, nearest
from weightnet.zoo.cards import Card

if TYPE_CHECKING:
    import torch
    from torch import nn

ENGINES = ("auto", "torch")

Batch = npt.NDArray[np.float32]
Model: TypeAlias = "str | os.PathLike[str] | nn.Module"


class Engine(Protocol):
    """A network that is ready to run.

    `card` is the model's card: its classes, in the order of the logits, and its preprocessing.
    """

    card: Card

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits.

        Shape: (B, C, H, W) float32, prepared as the card says -> (B, K) float32.
        """
        ...


def open_engine(model: Model, *, engine: str = "auto", device: str = "auto") -> Engine:
    """Load a model and make it ready to run.

    Args:
        model: a name of `list_models()`, a run folder, a weights file, or a network with a card in `.card`, of which a
            copy is taken.
        engine: "auto" or "torch".
        device: "auto" takes a GPU where there is one; "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        UsageError: an unknown engine, a device that this machine or engine does not have, or a network without a card.
        UnknownModelError: no model of this name.
        WeightsError, DownloadError: the weights cannot be read or fetched.

    Example:
        >>> open_engine("default", engine="tensor")
        Traceback (most recent call last):
        weightnet.errors.UsageError: engine must be auto or torch. Got engine='tensor'. Did you mean torch?
    """
    if engine not in ENGINES:
        hint = nearest(engine, ENGINES) or "Leave it out for the best one here."
        raise UsageError(f"engine must be {' or '.join(ENGINES)}. Got engine={engine!r}. {hint}")
    return TorchEngine(model, device=device)


class TorchEngine:
    """Runs a network in PyTorch; `open_engine` says what its arguments are."""

    def __init__(self, model: Model, *, device: str = "auto") -> None:
        from torch import channels_last

        self.device = _torch_device(device)
        network, self.card = _network(model)
        network = network.to(self.device)
        # Faster than the default order, on a CPU too.
        self._network = network.to(memory_format=channels_last)  # type: ignore[call-overload]

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits.

        Shape: (B, C, H, W) float32, prepared as the card says -> (B, K) float32.
        """
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(x_BCHW).to(self.device, memory_format=torch.channels_last)
            logits: Batch = self._network(x).float().cpu().numpy()
        return logits


def _network(model: Model) -> "tuple[nn.Module, Card]":
    if isinstance(model, str | os.PathLike):
        from weightnet.zoo.weights import load

        network = load(os.fspath(model), pretrained=True)
        return network, network.card
    card = getattr(model, "card", None)
    if not isinstance(card, Card):
        raise UsageError(
            f"A network must have its model card in .card to classify photos. Got {type(model).__name__} without one. "
            "Load it by weightnet.load, or set network.card = Card(...)."
        )
    return copy.deepcopy(model).eval(), card


def _torch_device(device: str) -> "torch.device":
    import torch

    usable = ["cpu"]
    if torch.cuda.is_available():
        usable = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *usable]
    if torch.backends.mps.is_available():
        usable = ["mps", *usable]
    if device == "auto":
        return torch.device(usable[0])
    if device not in usable:
        raise UsageError(
            f"device must be one that this PyTorch can use here: auto, {', '.join(usable)}. Got device={device!r}. "
            "Leave it out to let the machine decide."
        )
    return torch.device(device)
