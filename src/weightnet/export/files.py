"""From a folded network to the file of each runtime."""

import copy
import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from weightnet.errors import UsageError, WeightsError
from weightnet.export.graph import build_graph
from weightnet.export.int8 import kept_stages, quantise
from weightnet.export.preprocessing import add_preprocessing
from weightnet.images.transforms import Preprocess
from weightnet.nn.fold import FoldedShuffleNetV2
from weightnet.predict.exported import missing_runtime
from weightnet.predict.exported_openvino import read_openvino
from weightnet.predict.interface import CLASS_WEIGHTS, FEATURES, LOGITS, MIN_SIZE_PX, PRE_LOGITS

# The precisions of each kind of file.
PRECISIONS = {
    ".onnx": ("fp32", "fp16"),
    ".xml": ("fp32", "fp16", "bf16", "int8"),
    ".pt2": ("fp32",),
    ".pte": ("fp32",),
    ".mnn": ("fp32", "fp16"),
}

PREPROCESSING = (".onnx", ".xml")  # what may have it inside

_PIXEL_AXES = "pixel_axes"  # the name of a constant

# Not by MNN's own command, which installs a package of its maker to report each use of it.
_CONVERT_MNN = "import sys, _tools; _tools.mnnconvert(sys.argv)"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a file is to hold.

    Args:
        outputs: names from `OUTPUTS`, in the order that the file gives them.
        precision: one of its suffix's `PRECISIONS`.
        crop: edge of the photos, in pixels, of which a file of fixed size takes one.
        preprocess: the network's own, where it goes into the file; of `PREPROCESSING` alone.
        photos: by which int8 is calibrated, as the file takes them.
    """

    outputs: Sequence[str]
    precision: str
    crop: int
    preprocess: Preprocess | None = None
    photos: npt.NDArray[Any] | None = None


def write_files(network: FoldedShuffleNetV2, path: Path, wanted: Wanted) -> list[Path]:
    """Write a network as the kind of file that the path's suffix says.

    Args:
        network: a folded network.
        path: where; others are written beside it.
        wanted: what the file is to hold.

    Returns: the paths of the file, last the one by which it is opened.

    Raises:
        MissingDependencyError: what writes such a file is not installed.
        UsageError: this kind of file takes no photos of the size.
        WeightsError: the network cannot be written so.
    """
    return _WRITERS[path.suffix](network, path, wanted)


def _write_onnx(network: FoldedShuffleNetV2, path: Path, wanted: Wanted, *, openvino: bool = False) -> list[Path]:
    half = wanted.precision == "fp16"
    model = build_graph(network, wanted.outputs, half_weights=half, openvino=openvino)
    if wanted.preprocess:
        add_preprocessing(model, wanted.preprocess)
    path.write_bytes(model.SerializeToString())
    return [path]


def _write_openvino(network: FoldedShuffleNetV2, path: Path, wanted: Wanted) -> list[Path]:
    single = dataclasses.replace(wanted, precision="fp32")
    (graph,) = _write_onnx(network, path.with_suffix(".onnx"), single, openvino=True)
    converted = read_openvino(graph)
    if wanted.photos is not None:
        converted = quantise(converted, wanted.photos, kept=kept_stages(network))

    import openvino

    openvino.save_model(converted, path, compress_to_fp16=wanted.precision in ("fp16", "bf16"))
    return [path.with_suffix(".bin"), path]


def _write_torch(network: FoldedShuffleNetV2, path: Path, wanted: Wanted) -> list[Path]:
    if wanted.crop <= MIN_SIZE_PX:  # PyTorch takes a last map of one pixel for another network
        raise UsageError(
            f"The crop must be over {MIN_SIZE_PX} px for .pt2. Got crop={wanted.crop}. Write an .onnx file."
        )
    torch.export.save(_program(network, wanted, is_open=True), path)
    return [path]


def _write_executorch(network: FoldedShuffleNetV2, path: Path, wanted: Wanted) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of what will change in PyTorch
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        except ImportError as error:
            raise missing_runtime("executorch", "'weightnet[executorch]'", error) from error
        # Its own split fails on what XNNPACK computes, whose pixels lie in another order; its slices do not.
        table = torch.export.default_decompositions()
        table[torch.ops.aten.split_with_sizes.default] = _split_by_slices
        table[torch.ops.aten.alias.default] = lambda x: x  # for the same reason
        program = _program(network, wanted, is_open=False).run_decompositions(table)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    return [path]


def _write_mnn(network: FoldedShuffleNetV2, path: Path, wanted: Wanted) -> list[Path]:
    if not find_spec("MNN"):
        raise missing_runtime("MNN", "'weightnet[mnn]'", ModuleNotFoundError("No module named 'MNN'"))
    graph = path.with_suffix(".onnx")
    graph.write_bytes(_with_convolutions(build_graph(network, wanted.outputs)).SerializeToString())
    # In a process of its own: it writes to standard output, where it also says what is wrong, and returns all the same.
    words = ["-f", "ONNX", "--modelFile", os.fspath(graph), "--MNNModel", os.fspath(path), "--bizCode", "weightnet"]
    words += ["--fp16"] * (wanted.precision == "fp16")
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CONVERT_MNN, *words], capture_output=True, text=True, check=False
    )
    if not path.is_file():
        what = " ".join((done.stdout + done.stderr).split())[-300:]
        raise WeightsError(f"A network must be one that MNN takes. Got: {what}. Write an .onnx file.")
    return [path]


def _with_convolutions(model: Any) -> Any:
    """Turn fully connected layers into 1x1 convolutions of one pixel.

    What MNN 3.6 makes of the former are such convolutions too, but while other processes keep the cores busy the
    weights that it writes of the last one are mostly wrong.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        (x, weight, bias), (y,) = node.input, node.output
        kernel = numpy_helper.to_array(constants[weight])[:, :, None, None]
        model.graph.initializer.append(numpy_helper.from_array(kernel, f"{weight}.kernel"))
        nodes += [
            helper.make_node("Unsqueeze", [x, _PIXEL_AXES], [f"{y}.map"], f"{y}.map"),
            helper.make_node("Conv", [f"{y}.map", f"{weight}.kernel", bias], [f"{y}.pixel"], f"{y}.pixel"),
            helper.make_node("Squeeze", [f"{y}.pixel", _PIXEL_AXES], [y], y),
        ]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    model.graph.ClearField("node")
    model.graph.ClearField("initializer")
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.array([2, 3], np.int64), _PIXEL_AXES)])
    return model


class _Outputs(nn.Module):
    """A network that gives some of what it computes of photos, by name."""

    class_weights: Tensor

    def __init__(self, network: FoldedShuffleNetV2, outputs: Sequence[str]) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs
        if CLASS_WEIGHTS in outputs:
            # ExecuTorch fails on a constant that is an output, and on one that two layers use.
            self.register_buffer(CLASS_WEIGHTS, network.classifier.weight.detach().clone())

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        features = self.network.forward_features(input)
        pre_logits = self.network.forward_head(features, pre_logits=True)
        every = {LOGITS: self.network.classifier(pre_logits), PRE_LOGITS: pre_logits, FEATURES: features}
        if CLASS_WEIGHTS in self.outputs:
            every[CLASS_WEIGHTS] = self.class_weights + 0 * pre_logits[:1]
        return {name: every[name] for name in self.outputs}


def _program(network: FoldedShuffleNetV2, wanted: Wanted, *, is_open: bool) -> torch.export.ExportedProgram:
    """Return what `torch.export` makes of a network: for photos of any number and size, or one of the crop's size."""
    axis = torch.export.Dim.AUTO
    sizes = {"input": {0: axis, 2: axis, 3: axis}} if is_open else None
    photos = torch.zeros(2 if is_open else 1, network.spec.in_channels, wanted.crop, wanted.crop)  # one would stay one
    module = _Outputs(copy.deepcopy(network).cpu().float(), wanted.outputs)
    return torch.export.export(module, (photos,), dynamic_shapes=sizes)


def _split_by_slices(x: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return [
        torch.ops.aten.slice.Tensor(x, axis, start, start + size) for start, size in zip(starts, sizes, strict=True)
    ]


_WRITERS: dict[str, Callable[[FoldedShuffleNetV2, Path, Wanted], list[Path]]] = {
    ".onnx": _write_onnx,
    ".xml": _write_openvino,
    ".pt2": _write_torch,
    ".pte": _write_executorch,
    ".mnn": _write_mnn,
}
