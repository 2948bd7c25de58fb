"""Engines: what runs a network on a batch; here the one that fits is chosen, and that of PyTorch.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from weightnet.errors import UsageError, nearest, needs_torch
from weightnet.predict.exported import EXPORTED
from weightnet.predict.interface import (
    CLASS_WEIGHTS,
    FEATURES,
    LOGITS,
    OUTPUTS,
    PRE_LOGITS,
    Batch,
    Engine,
    check_batch,
    check_outputs,
)
from weightnet.zoo.cards import Card
from weightnet.zoo.hub import PUBLISHED, embedded_export, find_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

ENGINES = ("auto", "torch", "onnxruntime", "openvino", "executorch", "mnn")

Model: TypeAlias = "str | os.PathLike[str] | nn.Module"


def open_engine(model: Model, *, engine: str = "auto", device: str = "auto") -> Engine:
    """Load a model and make it ready to run.

    Args:
        model: a name of `list_models()`, a run folder, a weights file, an exported file with its card beside it, or a
            network with a card in `.card`, of which a copy is taken.
        engine: "onnxruntime" or "openvino" for the models inside the package and .onnx files, "openvino" for .xml,
            "executorch" for .pte, "mnn" for .mnn, "torch" for .pt2 files and all that is not exported; "auto" takes the
            first of them that fits.
        device: "auto" or "cpu"; in PyTorch also "cuda", "cuda:N" or "mps", and "auto" takes a GPU where there is one.

    Raises:
        UsageError: an unknown engine, one that does not run this model, a device that this machine or engine does not
            have, or a network without a card.
        UnknownModelError: no model of this name.
        WeightsError, DownloadError: the weights cannot be read or fetched; that a file's graph does not fit together
            may show only when it is run.
        MissingDependencyError: the engine's package is not installed.

    Example:
        >>> open_engine("default", engine="tensor")
        Traceback (most recent call last):
        weightnet.errors.UsageError: engine must be auto, torch, onnxruntime, openvino, executorch or mnn. Got \
engine='tensor'. Did you mean torch?
    """
    if engine not in ENGINES:
        hint = nearest(engine, ENGINES) or "Leave it out for the best one here."
        known = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        raise UsageError(f"engine must be {known}. Got engine={engine!r}. {hint}")
    exported, fitting = _ways(model)
    if engine not in ("auto", *fitting):
        raise UsageError(
            "engine must be one that runs the model: onnxruntime or openvino for models inside the package and .onnx "
            "files, openvino for .xml, executorch for .pte, mnn for .mnn, torch for .pt2 files and what is not "
            f"exported. Got engine={engine!r}, model={_name(model)}. Leave it out, or write a file for it by "
            "`weightnet export`."
        )
    if engine == "auto":
        engine = fitting[0] if device in ("auto", "cpu") or "torch" not in fitting else "torch"
    if exported is None or (engine == "torch" and exported.suffix != ".pt2"):
        return TorchEngine(model, device=device)
    if device not in ("auto", "cpu"):
        place = "a .pt2 file" if engine == "torch" else engine
        raise UsageError(f"device must be auto or cpu in {place}. Got device={device!r}. Leave it out.")
    return open_exported(exported, engine=engine)


def open_exported(path: str | os.PathLike[str], *, engine: str = "auto") -> Engine:
    """Open an exported file, as `open_engine` does; the engine, unless "auto", must be one that runs it."""
    chosen = EXPORTED[Path(path).suffix][0] if engine == "auto" else engine
    if chosen == "onnxruntime":
        from weightnet.predict.exported_onnxruntime import OnnxRuntimeEngine

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


class TorchEngine:
    """Runs a network in PyTorch, networks of this package folded; `open_engine` says what its arguments are."""

    def __init__(self, model: Model, *, device: str = "auto") -> None:
        if isinstance(model, str | os.PathLike) and "://" not in os.fspath(model) and model not in PUBLISHED:
            find_weights(model)  # so that a wrong name is called that, and not what lacks PyTorch
        with needs_torch(f"The model {_name(model)}"):
            from torch import channels_last

            from weightnet.nn.fold import FoldedShuffleNetV2, fold
            from weightnet.nn.shufflenet import ShuffleNetV2

        self.device = _torch_device(device)
        network, self.card = _network(model)
        self.outputs: tuple[str, ...] = (LOGITS,)
        if isinstance(network, ShuffleNetV2 | FoldedShuffleNetV2):
            network, self.outputs = fold(network), OUTPUTS
        network = network.to(self.device)
        # Faster than the default order, on a CPU too.
        self._network: Any = network.to(memory_format=channels_last)  # type: ignore[call-overload]

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits, as `Engine.run`."""
        return self.run_outputs(x_BCHW, [LOGITS])[LOGITS]

    def run_outputs(self, x_BCHW: Batch, names: Sequence[str], /) -> dict[str, Batch]:
        """Return some outputs, as `Engine.run_outputs`."""
        import torch

        check_outputs(names, self.outputs)
        check_batch(x_BCHW, self.card)
        with torch.inference_mode(), _memory_error():
            x = torch.from_numpy(x_BCHW).to(self.device, memory_format=torch.channels_last)
            if set(names) <= {LOGITS}:
                given = {LOGITS: self._network(x)}
            else:
                features = self._network.forward_features(x)
                pooled = self._network.forward_head(features, pre_logits=True)
                weights = self._network.classifier.weight
                logits = self._network.classifier(pooled)
                given = {LOGITS: logits, PRE_LOGITS: pooled, FEATURES: features, CLASS_WEIGHTS: weights}
            return {name: given[name].float().cpu().contiguous().numpy() for name in names}


@contextmanager
def _memory_error() -> Iterator[None]:
    """Raise MemoryError, as NumPy does, where PyTorch says in its own way that a GPU has too little memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


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


def _ways(model: Model) -> tuple[Path | None, tuple[str, ...]]:
    """Return the exported file that a model's name means, None where it means another, and what runs the model."""
    if not isinstance(model, str | os.PathLike):
        return None, ("torch",)
    embedded = embedded_export(os.fspath(model))
    if embedded:
        return embedded, (*EXPORTED[embedded.suffix], "torch")
    path = find_weights(model) if Path(model).suffix in EXPORTED else None
    if path is None or path.suffix not in EXPORTED:  # a run folder may be called anything
        return None, ("torch",)
    return path, EXPORTED[path.suffix]


def _name(model: Model) -> str:
    return repr(os.fspath(model)) if isinstance(model, str | os.PathLike) else f"a {type(model).__name__}"
