"""Engines: what runs a network on a batch. Each takes and gives NumPy arrays, so that callers need no framework.

Shape suffixes: B photos, C input channels, H height, W width, K classes.
"""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from weightnet.errors import MissingDependencyError, UsageError, WeightsError, nearest
from weightnet.zoo.cards import Card, card_path, read_card, read_file
from weightnet.zoo.hub import find_weights

if TYPE_CHECKING:
    import onnxruntime
    import openvino
    import torch
    from torch import nn

ENGINES = ("auto", "torch", "onnxruntime", "openvino")
EXPORTED = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}  # what runs an exported file; auto's first

INPUT, LOGITS = "input", "logits"  # the names in an exported file
MAX_EXPORTED_BYTES = 1 << 30
_KEPT_SHAPES = 4  # full batches, the last one, and some to spare

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


class ExportedEngine(Engine, Protocol):
    """An engine of exported files, which may have more outputs than the logits."""

    def run_all(self, x_BCHW: Batch, /) -> dict[str, Batch]:
        """Return every output of the file by its name."""
        ...


def open_engine(model: Model, *, engine: str = "auto", device: str = "auto") -> Engine:
    """Load a model and make it ready to run.

    Args:
        model: a name of `list_models()`, a run folder, a weights file, an exported file with its card beside it, or a
            network with a card in `.card`, of which a copy is taken.
        engine: "onnxruntime" or "openvino" for exported files, "torch" for all else; "auto" takes what fits the file.
        device: "auto" takes a GPU where there is one; "cpu", "cuda", "cuda:N" or "mps". Exported files run on the CPU.

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
        weightnet.errors.UsageError: engine must be auto, torch, onnxruntime or openvino. Got engine='tensor'. Did you \
mean torch?
    """
    if engine not in ENGINES:
        hint = nearest(engine, ENGINES) or "Leave it out for the best one here."
        known = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        raise UsageError(f"engine must be {known}. Got engine={engine!r}. {hint}")
    exported = _exported_file(model)
    fitting = EXPORTED[exported.suffix] if exported else ("torch",)
    if engine not in ("auto", *fitting):
        raise UsageError(
            "engine must be one that runs the model: onnxruntime or openvino for .onnx files, openvino for .xml files, "
            f"torch for all others. Got engine={engine!r}, model={_name(model)}. "
            "Leave it out, or write a file for it by `weightnet export`."
        )
    if exported is None:
        return TorchEngine(model, device=device)
    if device not in ("auto", "cpu"):
        raise UsageError(f"device must be auto or cpu for an exported file. Got device={device!r}. Leave it out.")
    return open_exported(exported, engine=engine)


def open_exported(path: str | os.PathLike[str], *, engine: str = "auto") -> ExportedEngine:
    """Open an exported file, as `open_engine` does; the engine, unless "auto", must be one that runs it."""
    chosen = EXPORTED[Path(path).suffix][0] if engine == "auto" else engine
    return OnnxRuntimeEngine(path) if chosen == "onnxruntime" else OpenVinoEngine(path)


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


class OnnxRuntimeEngine:
    """Runs an exported .onnx file in ONNX Runtime, on the CPU; its card must lie beside it.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise _missing("onnxruntime", "onnx", error) from error
        self.card, self._path = _card_beside(path), path
        read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is in the error that it raises; standard error is not ours
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has a dozen classes of errors, without a common base
            raise _unreadable(path, error) from error
        inputs = {value.name: _onnx_shape(value) for value in self._session.get_inputs()}
        self._outputs = {value.name: _onnx_shape(value) for value in self._session.get_outputs()}
        _check_signature(path, self.card, inputs, self._outputs)

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits.

        Shape: (B, C, H, W) float32, prepared as the card says -> (B, K) float32.
        """
        return self._run([LOGITS], x_BCHW)[LOGITS]

    def run_all(self, x_BCHW: Batch, /) -> dict[str, Batch]:
        """Return every output of the file by its name."""
        return self._run(list(self._outputs), x_BCHW)

    def _run(self, names: list[str], x_BCHW: Batch) -> dict[str, Batch]:
        try:
            return dict(zip(names, self._session.run(names, {INPUT: x_BCHW}), strict=True))
        except Exception as error:  # a file that was read may still not fit together
            raise _unreadable(self._path, error) from error


class OpenVinoEngine:
    """Runs an exported .xml or .onnx file in OpenVINO, on the CPU, in single precision; its card must lie beside it.

    The network is compiled for each shape of batch that comes, and the last few are kept: fixed shapes run 1.4 to 1.7
    times as fast as open ones, and compiling takes half a second.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import openvino
        except ImportError as error:
            raise _missing("openvino", "openvino", error) from error
        self.card, self._path = _card_beside(path), path
        self._core, self._model = openvino.Core(), read_openvino(path)
        inputs = {value.get_any_name(): _openvino_shape(value) for value in self._model.inputs}
        outputs = {value.get_any_name(): _openvino_shape(value) for value in self._model.outputs}
        _check_signature(path, self.card, inputs, outputs)
        self._compiled: dict[tuple[int, ...], openvino.CompiledModel] = {}

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits.

        Shape: (B, C, H, W) float32, prepared as the card says -> (B, K) float32.
        """
        if not len(x_BCHW):  # which it does not take
            return np.empty((0, self.card.network.num_classes), np.float32)
        return self.run_all(x_BCHW)[LOGITS]

    def run_all(self, x_BCHW: Batch, /) -> dict[str, Batch]:
        """Return every output of the file by its name."""
        try:
            results = self._compile(x_BCHW.shape)(x_BCHW)
        except RuntimeError as error:  # a file that was read may still not fit together
            raise _unreadable(self._path, error) from error
        return {value.get_any_name(): array for value, array in results.items()}

    def _compile(self, shape: tuple[int, ...]) -> "openvino.CompiledModel":
        compiled = self._compiled.pop(shape, None)
        if compiled is None:
            self._model.reshape({INPUT: list(shape)})
            # Where the processor has bfloat16, OpenVINO would compute in it unless told otherwise.
            compiled = self._core.compile_model(self._model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            if len(self._compiled) == _KEPT_SHAPES:
                del self._compiled[next(iter(self._compiled))]  # the one that was not used for longest
        self._compiled[shape] = compiled
        return compiled


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


def read_openvino(path: str | os.PathLike[str]) -> "openvino.Model":
    """Read an .xml file, beside which its .bin file lies, or an .onnx file.

    Raises: WeightsError where it cannot be read; MissingDependencyError where OpenVINO is not installed.
    """
    try:
        from openvino.frontend import FrontEndManager
    except ImportError as error:
        raise _missing("openvino", "openvino", error) from error
    read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
    try:
        # Unlike Core.read_model, this does not try the readers of all other formats on what it cannot read.
        reader = FrontEndManager().load_by_framework({".onnx": "onnx", ".xml": "ir"}[Path(path).suffix])
        return reader.convert(reader.load(os.fspath(path)))
    except Exception as error:  # its classes of errors have no common base either
        raise _unreadable(path, error) from error


def _exported_file(model: Model) -> Path | None:
    """Return the exported file that a model's name means, None where it means something else."""
    if not isinstance(model, str | os.PathLike) or Path(model).suffix not in EXPORTED:
        return None
    path = find_weights(model)
    return path if path.suffix in EXPORTED else None


def _name(model: Model) -> str:
    return repr(os.fspath(model)) if isinstance(model, str | os.PathLike) else f"a {type(model).__name__}"


def _card_beside(path: str | os.PathLike[str]) -> Card:
    beside = card_path(path)
    if not beside.is_file():
        raise WeightsError(
            f"An exported file must have its card beside it. Got {path} without {beside.name}. "
            "Copy the card there, or export the model again by `weightnet export`."
        )
    return read_card(beside)


def _missing(package: str, extra: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"Running this file needs {package}. Got: {error}. Install it by: pip install 'weightnet[{extra}]'"
    )


def _unreadable(path: str | os.PathLike[str], error: Exception) -> WeightsError:
    what = " ".join(str(error).split())[:300]  # runtimes write pages, with places in their own source
    return WeightsError(
        f"An exported file must be one that its runtime runs. Got {path}: {what}. Export the model again."
    )


_Shape: TypeAlias = "list[int | None] | None"  # each axis's size, None for an open one; None where not of float32


def _onnx_shape(value: "onnxruntime.NodeArg") -> _Shape:
    if value.type != "tensor(float)":
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def _openvino_shape(value: "openvino.Output") -> _Shape:
    shape = value.get_partial_shape()
    if value.get_element_type().to_string() != "f32" or shape.rank.is_dynamic:
        return None
    return [None if axis.is_dynamic else axis.get_length() for axis in shape]


def _check_signature(
    path: str | os.PathLike[str], card: Card, inputs: dict[str, _Shape], outputs: dict[str, _Shape]
) -> None:
    """Check that a file takes any number of the photos, and gives the logits, that its card speaks of."""
    channels, crop, classes = card.network.in_channels, card.preprocess.crop, card.network.num_classes
    sizes = [(None,), (channels,), (None, crop), (None, crop)]
    photo = inputs.get(INPUT) or ()
    fits = len(inputs) == 1 and len(photo) == 4 and all(map(lambda got, may: got in may, photo, sizes))
    if not fits or outputs.get(LOGITS) != [None, classes]:
        raise WeightsError(
            f"An exported file must take ({INPUT}: any x {channels} x {crop} x {crop}) and give ({LOGITS}: any x "
            f"{classes}), as its card says. Got {path}, which takes ({_listed(inputs)}), gives ({_listed(outputs)}). "
            "Put its own card beside it, or export the model again by `weightnet export`."
        )


def _listed(values: dict[str, _Shape]) -> str:
    def text(shape: _Shape) -> str:
        return "other numbers" if shape is None else " x ".join("any" if size is None else str(size) for size in shape)

    return ", ".join(f"{name}: {text(shape)}" for name, shape in values.items())[:300]
