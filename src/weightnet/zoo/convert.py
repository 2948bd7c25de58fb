"""Weights from any format this package reads to safetensors with a card, or back to what the original reads."""

import dataclasses
import hashlib
import os
from pathlib import Path

from safetensors.numpy import save
from torch import nn

from weightnet import __version__
from weightnet.errors import UsageError, WeightsError
from weightnet.nn.shufflenet import outline
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo.cards import (
    Card,
    card_in_place,
    card_path,
    printable_name,
    read_card,
    read_file,
    sharing_card,
    write_atomically,
    write_card,
)
from weightnet.zoo.describe import Pixels, choose_pixels, infer_card
from weightnet.zoo.hub import find_weights
from weightnet.zoo.megengine import has_old_statistics, read_megengine, to_megengine_layout, write_megengine
from weightnet.zoo.state import MAX_WEIGHTS_BYTES, State, check_state, is_pickle, read_state, spec_from_state

MEGENGINE_SUFFIXES = (".pkl", ".model")
OLD_STATISTICS = "old_statistics"  # a card's note: the file that it came from had running statistics of (1, C, 1, 1)


def convert(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, pixels: Pixels = "auto", progress: bool = True
) -> Card:
    """Write weights in another format: safetensors with a card, or the original framework's.

    Args:
        source: anything that `weightnet.load` takes weights from.
        out: OUT.safetensors, beside which the card is written as OUT.json; or OUT.pkl or OUT.model, a MegEngine state
            dict, without a card, that the original reads.
        pixels: for the card, what the weights were trained on: "normalised" or "raw" pixels; "auto" keeps what the
            source's card says, or else lets the statistics in the stem's batch norm decide.
        progress: whether a download shows a progress bar on standard error.

    Returns: the card.

    Raises:
        UsageError: the output's suffix is none of these, its folder is missing, it is the source itself, or its card
            would take the place of another file's.
        WeightsError: the source cannot be read, or the output cannot be written.

    Example:
        >>> import tempfile, weightnet, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     network = weightnet.load("shufflenet_v2_x0_5", num_classes=3)
        ...     torch.save(network.state_dict(), f"{folder}/mine.pt")
        ...     convert(f"{folder}/mine.pt", f"{folder}/mine.safetensors").name
        'shufflenet_v2_x0_5'
    """
    out = Path(out)
    path = find_weights(source, progress=progress)
    _check_output(path, out, pixels)
    state = read_state(path)
    spec, card = _described(path, state, pixels)
    data = read_file(path, max_bytes=MAX_WEIGHTS_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    converted = {"file": printable_name(path.name), "sha256": sha256, "converter": f"weightnet {__version__}"}
    # The hash of the trained file, which its run notes, is not that of the new one.
    notes = {name: value for name, value in card.notes.items() if name != "weights_sha256"}
    if is_pickle(data) and has_old_statistics(read_megengine(data)):
        notes[OLD_STATISTICS] = True
    card = dataclasses.replace(card, made_by={**card.made_by, "converted_from": converted}, notes=notes)
    if out.suffix in MEGENGINE_SUFFIXES:
        # The state is sorted by name, as the original writes it: a file that came from there becomes the same bytes.
        old = notes.get(OLD_STATISTICS) is True
        write_megengine(to_megengine_layout(state, groups=_groups(spec), old_statistics=old), out)
        return card
    if card_path(out) != card_path(path):
        card = _shared(out, card)
    try:
        write_atomically(out, save(state))
        write_card(card, card_path(out))
    except OSError as error:
        raise WeightsError(f"The output must be writable. Got out={out}: {error}. Choose another place.") from error
    return card


def _check_output(source: Path, out: Path, pixels: Pixels) -> None:
    if out.suffix not in (".safetensors", *MEGENGINE_SUFFIXES):
        raise UsageError(
            f"The output's suffix must be .safetensors, {' or '.join(MEGENGINE_SUFFIXES)}. Got out={out}. "
            "Use .safetensors for this package, the others for the original framework."
        )
    if out.suffix in MEGENGINE_SUFFIXES and pixels != "auto":
        raise UsageError(
            f"pixels must be auto for {out.suffix}, which has no card to say them. Got pixels={pixels!r}. Leave it out."
        )
    if not out.parent.is_dir():
        raise UsageError(f"The output's folder must exist. Got out={out}. Make the folder {out.parent} first.")
    if out.is_dir():
        raise UsageError(f"The output must be a file. Got the folder out={out}. Add a file name.")
    if out.exists() and out.samefile(source):
        raise UsageError(f"The output must be another file than the source. Got out={out}. Choose another name.")
    if out.suffix not in MEGENGINE_SUFFIXES:
        card_in_place(out)  # what lies there and is no card is not overwritten


def _shared(out: Path, card: Card) -> Card:
    """Return the card to write, which keeps what is said of exported files that have it too.

    Raises: UsageError where these would get other classes or preprocessing by it.
    """
    there, others = card_in_place(out), sharing_card(out)
    if there is None or not others:
        return card
    if any(getattr(there, name) != getattr(card, name) for name in ("network", "classes", "preprocess", "known_from")):
        raise UsageError(
            f"The card's place must be free. Got out={out}, while {card_path(out).name} is the card of another model, "
            f"{min(others)}. Choose another name."
        )
    exports = {name: note for name, note in there.notes.items() if name == "exports"}
    return dataclasses.replace(card, notes={**card.notes, **exports})


def _described(path: Path, state: State, pixels: Pixels) -> tuple[NetworkSpec, Card]:
    """Return the network of a state and its card, whose preprocessing follows `pixels`."""
    card = read_card(card_path(path)) if card_path(path).is_file() else None
    spec = card.network if card else spec_from_state(state)
    try:
        check_state(state, spec)
    except WeightsError as error:
        raise WeightsError(f"The weights {path} cannot be converted. {error}") from error
    if card is None:
        return spec, infer_card(path.name, state, spec, pixels=pixels)
    if pixels != "auto":
        chosen, decision = choose_pixels(state, pixels)
        preprocess = dataclasses.replace(card.preprocess, mean=chosen.mean, std=chosen.std)
        card = dataclasses.replace(card, preprocess=preprocess, notes={**card.notes, "pixels": decision})
    return spec, card


def _groups(spec: NetworkSpec) -> dict[str, int]:
    """Return the groups of every grouped convolution, by the name of its weight."""
    modules = outline(spec).named_modules()
    convolutions = {name: module for name, module in modules if isinstance(module, nn.Conv2d)}
    return {f"{name}.weight": module.groups for name, module in convolutions.items() if module.groups > 1}
