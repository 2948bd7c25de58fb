"""A network as a file for another runtime, proven to give the network's numbers there before it is written."""

import dataclasses
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightnet import __version__
from weightnet.errors import UsageError, WeightsError
from weightnet.export.files import PRECISIONS, PREPROCESSING, Wanted, write_files
from weightnet.export.int8 import int8_form, read_calibration
from weightnet.export.parity import INT8_TOLERANCE, LEAST_AGREEMENT, TOLERANCE, check_int8, check_parity
from weightnet.images.transforms import Preprocess
from weightnet.nn.fold import FoldedShuffleNetV2, FoldForm, fold
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.predict.engines import open_exported
from weightnet.predict.exported import EXPORTED, FIXED_SIZE
from weightnet.predict.interface import LOGITS, OUTPUTS, PROBABILITIES, Engine
from weightnet.zoo.cards import Card, card_path, card_to_share, default_classes, write_atomically, write_card
from weightnet.zoo.state import variant_name
from weightnet.zoo.weights import load


def export_model(
    model: ShuffleNetV2 | FoldedShuffleNetV2 | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    form: FoldForm = "auto",
    outputs: Sequence[str] = (LOGITS,),
    preprocessing: bool = False,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    progress: bool = True,
) -> Card:
    """Write a network, folded, as a file for another runtime, and its card beside it.

    The suffix says which: .onnx for ONNX Runtime, .xml (with .bin) for OpenVINO, .pt2 for PyTorch (`torch.export`),
    .pte for ExecuTorch with XNNPACK, .mnn for MNN. The file takes any number of photos of any size from 32 px; a .pt2
    file from 33 px, and a .pte file one photo of the card's size. Before it is written it is run in its runtime, and
    its outputs are compared with the network's in double precision. The card lies beside it as OUT.json; with it, the
    file is a model's name for `Classifier` and `weightnet predict`.

    Args:
        model: a network, folded or not, a name of `list_models()`, a run folder, or a weights file.
        out: OUT.onnx, OUT.xml, OUT.pt2, OUT.pte or OUT.mnn.
        precision: "fp32"; for .onnx, .xml and .mnn "fp16", for weights kept in half precision, in a file half as
            large: the numbers computed with them are in single precision all the same; or, for .xml, "bf16": such
            weights, and numbers computed in bfloat16 where the processor has it; or "int8": static convolutions in
            8-bit integers, of plain networks and those with one kernel for each block of inputs (r = 1).
        form: how generated 1x1 layers are computed, as in `fold`; "auto" is "feature" for .mnn, where r = 1 for .pte,
            and for int8 but of 0.5x and 1.0x networks, whose stages computed by products stay as for "bf16".
        outputs: what the file gives beside "logits": "pre_logits", the pooled features that embeddings are made of;
            "features", the last feature map; and "class_weights", the classifier's weights, a constant, by which
            features become the heat map of a class.
        preprocessing: whether an .onnx or .xml file takes photos that are only resized and cropped, (B, H, W, 3) uint8
            of blue, green and red, normalises them itself, and gives "probabilities" too. Its card says that it takes
            raw pixels.
        calibration: photos, folders and patterns as `weightnet predict` takes them, for int8: at least 32 photos, of
            which up to 256 are used. They are prepared as the card says, and tell the range of each feature map.
        progress: whether a download shows a progress bar on standard error.

    Returns: the card; its `notes["exports"]` say what was compared.

    Raises:
        UsageError: an unknown suffix, precision or output, no such folder, a card of another model in its place, a
            network that int8 is not for, or fewer than 32 photos that can be read for it.
        UnknownModelError: no model of this name.
        WeightsError: the weights cannot be read, or the file does not give the network's numbers or cannot be written.
        DownloadError: the weights cannot be fetched.
        MissingDependencyError: the runtime, or what writes its files, is not installed.

    Example:
        >>> import tempfile
        >>> from weightnet.predict.classifier import Classifier
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card = export_model("default", f"{folder}/small.onnx", outputs=["pre_logits"])
        ...     Classifier(f"{folder}/small.onnx").card == card
        True
    """
    out = Path(out)
    outputs = _check_options(out, precision, outputs)
    _check_calibration(precision, calibration)
    network, card = _network(model, progress)
    inside, own = _inside(out, card) if preprocessing else None, card.preprocess
    if inside:
        card = dataclasses.replace(card, preprocess=_without_normalising(inside))
    card, exports = _beside(out, card)
    if precision == "int8":
        _check_quantisable(network.spec, form)
    form = _form(out, form, precision, network.spec)
    folded = fold(network, form=form, select=out.suffix == ".xml")
    entry: dict[str, Any] = {"precision": precision, "outputs": list(outputs)}
    if inside:
        entry |= {"outputs": [*outputs, PROBABILITIES], "preprocessing": inside.to_dict()}
    crops: list[npt.NDArray[np.uint8]] = []
    if calibration is not None:
        crops, unreadable = read_calibration(calibration, own)
        entry["calibration"] = {"photos": len(crops), "unreadable": unreadable}
    with tempfile.TemporaryDirectory(prefix="weightnet-export-") as folder:
        photos = np.stack(crops if inside else [own.normalize(crop) for crop in crops]) if crops else None
        files = write_files(folded, Path(folder) / out.name, Wanted(outputs, precision, own.crop, inside, photos))
        card = dataclasses.replace(card, notes={**card.notes, "exports": exports | {out.suffix: entry}})
        write_card(card, card_path(files[-1]))  # from which the engine takes the precision
        engine = open_exported(files[-1])
        if crops:
            entry |= _figures_of_int8(network, engine, crops, own)
        else:
            others = out.suffix not in FIXED_SIZE
            errors = check_parity(network, engine, precision=precision, preprocess=inside, other_size=others)
            entry |= {"largest_error": _rounded(errors), "allowed_error": TOLERANCE[precision]}
        runtime = EXPORTED[out.suffix][0]
        entry |= {
            "checked_in": f"{runtime} {importlib.metadata.version(runtime)}",
            "exporter": f"weightnet {__version__}",
        }
        _publish(files, out, card)
    return card


def _check_options(out: Path, precision: str, outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs that the file will give, in order."""
    if out.suffix not in EXPORTED:
        raise UsageError(
            f"The output's suffix must be one of {', '.join(EXPORTED)}. Got out={out}. Use .onnx for ONNX Runtime, "
            ".xml for OpenVINO, .pt2 for PyTorch, .pte for ExecuTorch, .mnn for MNN."
        )
    if not out.parent.is_dir():
        raise UsageError(f"The output's folder must exist. Got out={out}. Make the folder {out.parent} first.")
    if out.is_dir():
        raise UsageError(f"The output must be a file. Got the folder out={out}. Add a file name.")
    if precision not in PRECISIONS[out.suffix]:
        raise UsageError(
            f"precision must be {' or '.join(PRECISIONS[out.suffix])} for {out.suffix}. "
            f"Got precision={precision!r}, out={out}. Choose another, or write another kind of file."
        )
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or isinstance(outputs, str):
        raise UsageError(f"outputs must be names from {', '.join(OUTPUTS)}. Got outputs={outputs!r}. Choose of them.")
    return tuple(name for name in OUTPUTS if name == LOGITS or name in outputs)


def _form(out: Path, form: FoldForm, precision: str, spec: NetworkSpec) -> FoldForm:
    """Return the form that a file is written in.

    MNN 3.6 takes wrong memory for a batched product. Kernels that are made for each photo cannot be rounded beforehand
    for int8, where they pay in narrow networks alone (docs/int8.md). XNNPACK packs weights beforehand, which products
    do not have: where r = 1 they gain nothing there.
    """
    if out.suffix == ".mnn" and form == "matmul":
        raise UsageError(f"form must be auto or feature for .mnn. Got form='matmul', out={out}. Leave it out.")
    if form != "auto":
        return form
    if precision == "int8":
        return int8_form(spec)
    static = out.suffix == ".mnn" or (out.suffix == ".pte" and spec.M == spec.G)
    return "feature" if static else form


def _check_calibration(precision: str, calibration: object) -> None:
    if precision == "int8" and calibration is None:
        raise UsageError(
            "calibration must be given for int8. Got none. Give photos, folders or patterns, of photos such as the "
            "network was trained on."
        )
    if precision != "int8" and calibration is not None:
        raise UsageError(
            f"calibration must go with precision='int8'. Got precision={precision!r}. Leave it out, or choose int8."
        )


def _check_quantisable(spec: NetworkSpec, form: FoldForm) -> None:
    if spec.in_channels != 3:
        raise UsageError(
            "A network must take 3 channels to be calibrated on photos. "
            f"Got in_channels={spec.in_channels}. Choose another precision."
        )
    if spec.M > spec.G or (spec.M and form == "matmul"):
        raise UsageError(
            "For int8 a network must be plain, or have one kernel for each block of inputs (r = 1), in form auto or "
            "feature: others mix the weights of their 1x1 layers anew for each photo, so there are none to round "
            "beforehand. "
            f"Got M={spec.M}, G={spec.G}, form={form}. Choose bf16."
        )


def _figures_of_int8(
    network: ShuffleNetV2 | FoldedShuffleNetV2,
    engine: Engine,
    crops: Sequence[npt.NDArray[np.uint8]],
    preprocess: Preprocess,
) -> dict[str, Any]:
    """Return what the comparison of a file of 8-bit integers says, for the card."""
    errors, agreement = check_int8(network, engine, crops, preprocess)
    return {
        "largest_error": _rounded(errors),
        "allowed_error": INT8_TOLERANCE,
        "top1_agreement": round(agreement, 4),
        "least_top1_agreement": LEAST_AGREEMENT,
    }


def _rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{error:.2g}") for name, error in errors.items()}


def _network(
    model: ShuffleNetV2 | FoldedShuffleNetV2 | str | os.PathLike[str], progress: bool
) -> tuple[ShuffleNetV2 | FoldedShuffleNetV2, Card]:
    if isinstance(model, str | os.PathLike):
        network = load(model, pretrained=True, progress=progress)
        return network, network.card
    if not isinstance(model, ShuffleNetV2 | FoldedShuffleNetV2):
        raise UsageError(
            f"model must be a network of this package or a model's name. Got model={type(model).__name__}. "
            "Use torch.onnx.export for others."
        )
    spec = model.spec
    card = model.card or Card(variant_name(spec) or "network", spec, default_classes(spec.num_classes))
    return model, card


def _inside(out: Path, card: Card) -> Preprocess:
    """Return the preprocessing that goes into a file."""
    if out.suffix not in PREPROCESSING:
        raise UsageError(
            f"A file with the preprocessing inside must be {' or '.join(PREPROCESSING)}. Got out={out}. "
            "Choose one of them, or leave the preprocessing out."
        )
    if card.network.in_channels != 3:
        raise UsageError(
            "A network must take 3 channels to have the preprocessing inside. "
            f"Got in_channels={card.network.in_channels}. Leave the preprocessing out."
        )
    return card.preprocess


def _without_normalising(preprocess: Preprocess) -> Preprocess:
    return dataclasses.replace(preprocess, channel_order="BGR", mean=None, std=None)


def _beside(out: Path, card: Card) -> tuple[Card, dict[str, Any]]:
    """Return the card and what it says of other files of the same name, whose card lies in the same place."""
    weights = out.with_suffix(".bin")
    if out.suffix == ".xml" and weights.exists() and not out.exists():
        raise UsageError(f"The place of OpenVINO's weights must be free. Got {weights} there. Choose another name.")
    plain = dataclasses.replace(card, notes={name: note for name, note in card.notes.items() if name != "exports"})
    there = card_to_share(out, plain)
    exports = there.notes.get("exports") if there else None
    return plain, dict(exports) if isinstance(exports, dict) else {}


def _publish(files: Sequence[Path], out: Path, card: Card) -> None:
    """Put the files in their place, each whole or not at all."""
    try:
        if len(files) > 1:
            out.unlink(missing_ok=True)  # an interruption must not leave the old .xml with the new .bin
        for file in files:
            write_atomically(out.with_suffix(file.suffix), file.read_bytes())
        write_card(card, card_path(out))
    except OSError as error:
        raise WeightsError(f"The output must be writable. Got out={out}: {error}. Choose another place.") from error
