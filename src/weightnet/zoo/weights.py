"""Networks with their weights: `load`."""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from weightnet.errors import UsageError, WeightsError, WeightsWarning
from weightnet.nn.shufflenet import ShuffleNetV2, outline
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.zoo.cards import card_path, numbered_classes, read_card
from weightnet.zoo.describe import infer_card
from weightnet.zoo.hub import find_weights
from weightnet.zoo.state import check_state, read_state, spec_from_state


def load(
    name: str | os.PathLike[str],
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    in_channels: int = 3,
    progress: bool = True,
) -> ShuffleNetV2:
    """Build a network of the zoo, with new or with trained weights.

    Args:
        name: a name of `list_models()`, a run folder, or a weights file (safetensors, MegEngine, or PyTorch; what it is
            decides its content). All but the twelve names of networks have weights, which are loaded always.
        pretrained: for one of the twelve names: False for new weights, True for the published ones, or a path, an
            address or another model's name to take weights from. They must fit exactly.
        num_classes: classes; None for as many as the weights have, 1000 for new ones. Where it is not the weights' own
            number, the classifier is new, and a `WeightsWarning` says so.
        in_channels: channels of the input. Where it is not the weights' own number, the first convolution is adapted,
            and a `WeightsWarning` says so: for one channel the kernels are summed, for others repeated and scaled.
        progress: whether a download shows a progress bar on standard error.

    Returns:
        The network: in evaluation mode and with its card as `.card` when it has trained weights, otherwise in training
        mode and without a card.

    Raises:
        UnknownModelError: nothing has this name; the message gives the nearest.
        UsageError: arguments do not fit together, or nobody published weights for this network.
        WeightsError: the weights are damaged, hostile, of an unknown format, or not of this network.
        DownloadError: the weights could not be downloaded whole; the message says where to put them by hand.

    Example:
        >>> network = load("shufflenet_v2_x0_5", num_classes=10)
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Source: names and sizes from the MegEngine hub page of WeightNet; the stem is adapted as timm does it.
    """
    name = os.fspath(name)
    if name not in VARIANTS:
        if not isinstance(pretrained, bool):
            raise UsageError(
                f"pretrained must be left out where the model has weights already. Got model={name!r}, "
                f"pretrained={os.fspath(pretrained)!r}. Give the path alone, or one of the twelve names with it."
            )
        network = _load_file(find_weights(name, progress=progress), None)
    elif pretrained is False:
        spec = VARIANTS[name].spec
        num_classes = spec.num_classes if num_classes is None else num_classes
        return ShuffleNetV2(dataclasses.replace(spec, num_classes=num_classes, in_channels=in_channels))
    else:
        source = name if pretrained is True else pretrained
        network = _load_file(find_weights(source, progress=progress), VARIANTS[name].spec)
    if in_channels != network.spec.in_channels:
        _adapt_stem(network, in_channels)
    if num_classes is not None and num_classes != network.num_classes:
        _new_classifier(network, num_classes)
    return network.eval()


def _load_file(path: Path, variant: NetworkSpec | None) -> ShuffleNetV2:
    """Build the network of a weights file; `variant` is the one that it must be, whatever its classes and channels."""
    state = read_state(path)
    card = read_card(card_path(path)) if card_path(path).is_file() else None
    try:
        if variant is not None:
            spec = dataclasses.replace(variant, **_own_sizes(state))
        else:
            spec = card.network if card else spec_from_state(state)
        check_state(state, spec)
        if card is None:
            card = infer_card(path.name, state, spec)
        elif dataclasses.replace(card.network, dropout=spec.dropout) != spec:
            raise WeightsError(f"A card must describe the network of its weights. Got {card.network}, not {spec}.")
    except WeightsError as error:
        raise WeightsError(f"The weights {path} cannot be loaded. {error}") from error
    network = _network(spec, state)
    network.card = dataclasses.replace(card, network=spec)
    decision = card.notes.get("pixels")
    if card.preprocess.mean is None and isinstance(decision, dict):
        _warn(
            f"The weights {path.name} want raw 0..255 pixels, not the page's normalised ones "
            f"(decided by {decision.get('decided_by')}). Use weightnet.preprocess_for(network)."
        )
    return network


def _own_sizes(state: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return the classes and input channels that the weights have; where they are odd, the strict check says so."""
    sizes: dict[str, Any] = {}
    classifier, stem = state.get("classifier.0.weight"), state.get("first_conv.0.weight")
    if classifier is not None and classifier.ndim == 2 and classifier.shape[0]:
        sizes["num_classes"] = classifier.shape[0]
    if stem is not None and stem.ndim == 4 and stem.shape[1]:
        sizes["in_channels"] = stem.shape[1]
    return sizes


def _network(spec: NetworkSpec, state: Mapping[str, npt.NDArray[np.float32]]) -> ShuffleNetV2:
    """Build a network around weights that fit, without drawing random ones first."""
    network = outline(spec)
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    tensors: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in state.items()}
    network.load_state_dict({**tensors, **counters}, strict=True, assign=True)
    return network


def _adapt_stem(network: ShuffleNetV2, in_channels: int) -> None:
    spec = dataclasses.replace(network.spec, in_channels=in_channels)  # refuses impossible numbers
    old, stem = network.spec.in_channels, network.first_conv[0]
    assert isinstance(stem, nn.Conv2d)
    with torch.no_grad():
        if in_channels == 1:
            weight = stem.weight.sum(1, keepdim=True)
        else:
            weight = stem.weight.repeat(1, math.ceil(in_channels / old), 1, 1)[:, :in_channels] * (old / in_channels)
    stem.weight = nn.Parameter(weight.contiguous())
    stem.in_channels = in_channels
    network.spec = spec
    network.card = dataclasses.replace(network.card, network=spec, measured={}, known_from=None)
    _warn(
        f"The first convolution was adapted from {old} to {in_channels} input channels. "
        f"Pass in_channels={old} to keep it, or train the network."
    )


def _new_classifier(network: ShuffleNetV2, num_classes: int) -> None:
    card, old = network.card, network.num_classes
    network.reset_classifier(num_classes)
    classes = numbered_classes(num_classes)
    network.card = dataclasses.replace(card, network=network.spec, classes=classes, measured={}, known_from=None)
    _warn(
        f"The classifier is new and untrained: {num_classes} classes, where the weights have {old}. "
        f"Train the network, or pass num_classes={old} to keep the classifier."
    )


def _warn(message: str) -> None:
    warnings.warn(message, WeightsWarning, stacklevel=4)
