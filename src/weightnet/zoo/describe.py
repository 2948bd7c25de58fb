"""What is known of a model without building it: its card and preprocessing. Where a card is there, without PyTorch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError
from weightnet.images.transforms import Preprocess
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.zoo.calibration import detect_pixels
from weightnet.zoo.cards import Card, card_path, default_classes, printable_name, read_card
from weightnet.zoo.hub import PUBLISHED, cached_path, find_weights
from weightnet.zoo.state import check_state, read_state, spec_from_state, variant_name

if TYPE_CHECKING:
    from weightnet.nn.shufflenet import ShuffleNetV2

Pixels = Literal["auto", "normalised", "raw"]


def preprocess_for(model: "ShuffleNetV2 | str | os.PathLike[str]") -> Preprocess:
    """Return a model's own preprocessing, from a decoded photo to its input; the hub page's where nothing is known.

    Args:
        model: a network, a name of `list_models()`, a run folder, a weights file, or an exported file. A name of the
            twelve networks means the published weights where they have been downloaded, since some want raw pixels.

    Raises: as `load`, where the model is unknown or its weights cannot be read.

    Example:
        >>> preprocess_for("shufflenet_v2_x0_5.plain").crop
        224
    """
    if not isinstance(model, str | os.PathLike):
        return Preprocess() if model.card is None else model.card.preprocess
    name = os.fspath(model)
    if name in PUBLISHED and cached_path(PUBLISHED[name].url).is_file():
        return card_for(find_weights(name)).preprocess
    return Preprocess() if name in VARIANTS else card_for(find_weights(name)).preprocess


def card_for(path: str | os.PathLike[str]) -> Card:
    """Return the card of a weights file: the one beside it, or else what its arrays tell.

    Raises: WeightsError where the card or, without one, the weights cannot be used.
    """
    beside = card_path(path)
    if beside.is_file():
        return read_card(beside)
    state = read_state(path)
    spec = spec_from_state(state)
    check_state(state, spec)
    return infer_card(Path(path).name, state, spec)


def infer_card(
    file_name: str, state: Mapping[str, npt.NDArray[np.float32]], spec: NetworkSpec, *, pixels: Pixels = "auto"
) -> Card:
    """Return the card of weights that came without one.

    Args:
        file_name: what the weights file is called.
        state: the weights, in PyTorch's layout.
        spec: their network.
        pixels: "normalised" or "raw" to say what the weights were trained on; "auto" lets the statistics in the stem's
            batch norm decide, and takes the page's normalisation where they cannot.
    """
    preprocess, decision = choose_pixels(state, pixels)
    return Card(
        name=variant_name(spec) or printable_name(Path(file_name).stem),
        network=spec,
        classes=default_classes(spec.num_classes),
        preprocess=preprocess,
        made_by={"file": printable_name(file_name)},
        notes={"pixels": decision},
    )


def choose_pixels(
    state: Mapping[str, npt.NDArray[np.float32]], pixels: Pixels
) -> tuple[Preprocess, dict[str, bool | float | str | None]]:
    """Return the page's preprocessing with or without normalisation, and how that was decided, for the card's notes.

    Raises: UsageError where `pixels` is not "auto", "normalised" or "raw".
    """
    if pixels not in ("auto", "normalised", "raw"):
        raise UsageError(f"pixels must be auto, normalised or raw. Got pixels={pixels!r}. Choose one of them.")
    found = detect_pixels(state)
    normalised = found.normalised if pixels == "auto" else pixels == "normalised"
    preprocess = Preprocess(mean=None, std=None) if normalised is False else Preprocess()
    decided_by = found.reason if pixels == "auto" else "an option of the conversion"
    return preprocess, {"normalised": normalised, "margin": round(found.margin, 3), "decided_by": decided_by}
