"""From a folded network to an ONNX graph, written node by node.

`torch.fx` follows the network's own forward; each of its steps, and each layer of `weightnet.nn.folded_layers`, is
written as a few ONNX operators. What is computed per photo are gains: the weights of all convolutions are constants.
Batch, height and width stay open.

Gates and biases per photo are (B, O) and become (B, O, 1, 1) one by one, where a feature map meets them, and a bias is
added last. An operator then never takes more of them than feature maps: OpenVINO computes it in the layout that most of
its inputs have, and would change the layout of the maps back and forth (with open sizes, 1.3 times as slow).

What runtimes differ in is written in one of two ways: by default as ONNX Runtime computes it fastest, or for OpenVINO,
which makes one pass of an operator and the sums, products and ReLUs after it (docs/static.md has the times):

* The gain of a depthwise layer is multiplied into those of the layer before it; for OpenVINO into that layer's output.
* Generated kernels (the form "matmul"): maps are (B, C, H, W), a layer is a product with a map, and a small product
  mixes its kernels. For OpenVINO maps are (B, H, W, C) from one such layer to the next, as it has them in memory
  anyway, a layer is a product of its pixels, and its kernels are sums of scaled matrices.
* A depthwise layer of many kernels is as many static ones, scaled and summed; for OpenVINO their mix, whose taps scale
  the map shifted by each.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from weightnet import __version__
from weightnet.errors import MissingDependencyError
from weightnet.nn.fold import FoldedShuffleNetV2
from weightnet.nn.folded_layers import FoldedConv, GainDepthwise, GainPointwise, MatmulPointwise
from weightnet.predict.exported import INPUT
from weightnet.predict.interface import CLASS_WEIGHTS

if TYPE_CHECKING:
    from onnx import ModelProto

# The first in which Split has a number of outputs and ReduceMean its axes as input; runtimes of 2023 know it.
_OPSET = 18
# In OpenVINO up to so many static depthwise layers are faster than one of mixed kernels.
_MOST_STATIC = 4
# A sum of so many products is one pass in OpenVINO: a pass takes at most twelve maps, gains and results.
_ONE_PASS = 4

_Value: TypeAlias = "str | list[str]"  # the name of a value of the graph, or those of several


def build_graph(
    network: FoldedShuffleNetV2, outputs: Sequence[str], *, half_weights: bool = False, openvino: bool = False
) -> "ModelProto":
    """Return a network as an ONNX model.

    Args:
        network: a folded network.
        outputs: names from `OUTPUTS`, in the order that the model gives them.
        half_weights: whether weights are kept in half precision; they are computed with in single precision all the
            same.
        openvino: whether OpenVINO is to run it, not ONNX Runtime; the numbers are the same.

    Raises: MissingDependencyError where the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting needs onnx. Got: {error}. Install it by: pip install 'weightnet[export]'"
        ) from error
    from onnx import TensorProto, helper

    computed = [name for name in outputs if name != CLASS_WEIGHTS]
    traced = _Tracer().trace(_Outputs(network, computed))
    writer = _Writer(network, half_weights=half_weights, openvino=openvino)
    names = writer.write(traced)
    writer.rename(dict(zip(names, computed, strict=True)))
    if CLASS_WEIGHTS in outputs:
        writer.op("Identity", [writer.weight("classifier.weight", network.classifier.weight)], CLASS_WEIGHTS)
    spec = network.spec
    shapes = {
        "logits": ("batch", spec.num_classes),
        "pre_logits": ("batch", spec.head_channels),
        "features": ("batch", spec.head_channels, "features_height", "features_width"),
        "class_weights": (spec.num_classes, spec.head_channels),
    }
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ("batch", spec.in_channels, "height", "width"))
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs]
    graph = helper.make_graph(writer.nodes, "weightnet", [image], results, writer.constants)
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(
        graph,
        producer_name="weightnet",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),  # so that older runtimes read it
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Outputs(nn.Module):
    """A network that gives some of what it computes of photos."""

    def __init__(self, network: FoldedShuffleNetV2, outputs: Sequence[str]) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.network.forward_features(x)
        pre_logits = self.network.forward_head(features, pre_logits=True)
        every = {"logits": self.network.classifier(pre_logits), "pre_logits": pre_logits, "features": features}
        return [every[name] for name in self.outputs]


class _Tracer(fx.Tracer):
    """Follows a network down to the layers that the writer knows."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LAYERS

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        assert obj.node.target == "split"  # whose number of parts is known
        return iter([obj[part] for part in range(len(obj.node.args[1]))])  # type: ignore[arg-type, index]


class _Writer:
    """Writes the nodes and constants of a graph; values are known by their names.

    `last` has the names of those maps that are (B, H, W, C).
    """

    def __init__(self, network: nn.Module, *, half_weights: bool, openvino: bool) -> None:
        self.network, self.half_weights, self.openvino = network, half_weights, openvino
        self.last: set[str] = set()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: set[str] = set()

    def write(self, traced: fx.Graph) -> list[str]:
        """Write all steps and return the names of the outputs."""
        values: dict[fx.Node, Any] = {}
        for node in traced.nodes:
            args = fx.map_arg(node.args, lambda used: values[used])
            if node.op == "output":
                return list(args[0])
            values[node] = self._step(node, args)
        raise AssertionError("a trace ends with its output")

    def rename(self, names: dict[str, str]) -> None:
        """Give values other names."""
        for node in self.nodes:
            for listed in (node.input, node.output):
                listed[:] = [names.get(name, name) for name in listed]

    def op(self, kind: str, inputs: Sequence[str], name: str, attributes: dict[str, Any] | None = None) -> str:
        """Write an operator of one output and return the output's name, which is the operator's too."""
        return self.ops(kind, inputs, name, [name], attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], name: str, outputs: list[str], attributes: dict[str, Any] | None = None
    ) -> list[str]:
        """Write an operator of any number of outputs and return their names."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **(attributes or {})))
        return outputs

    def weight(self, name: str, weight: Tensor) -> str:
        """Write a weight, in half precision where that is asked for, and return its name."""
        if not self.half_weights:
            return self.constant(name, weight.float().numpy(force=True))
        from onnx import TensorProto

        if name in self._known:
            return name
        self._known.add(name)
        stored = self.constant(f"{name}.half", weight.half().numpy(force=True))
        return self.op("Cast", [stored], name, {"to": TensorProto.FLOAT})

    def bias(self, name: str, bias: Tensor, *, shape: tuple[int, ...] = (-1,)) -> str:
        """Write what is added to a layer's output, in single precision, and return its name."""
        return self.constant(name, bias.float().reshape(shape).numpy(force=True))

    def per_channel(self, values: str) -> str:
        """Write values (B, O) as (B, O, 1, 1), to scale feature maps or be added to them, and return their name."""
        name = f"{values}.per_channel"
        if name in self._known:
            return name
        self._known.add(name)
        return self.op("Unsqueeze", [values, self.integers("spatial_axes", (2, 3))], name)

    def channels_first(self, x: str) -> str:
        """Write a map as (B, C, H, W), where it is not, and return its name."""
        return self._transposed(x, "channels_first", (0, 3, 1, 2)) if x in self.last else x

    def pixels(self, x: str, channels: int) -> str:
        """Write a map as (B, H * W, C) and return its name."""
        last = x if x in self.last else self._transposed(x, "channels_last", (0, 2, 3, 1))
        return self.op("Reshape", [last, self.integers(f"pixels_{channels}", (0, -1, channels))], f"{x}.pixels")

    def _transposed(self, x: str, suffix: str, perm: tuple[int, ...]) -> str:
        name = f"{x}.{suffix}"
        if name in self._known:
            return name
        self._known.add(name)
        return self.op("Transpose", [x], name, {"perm": perm})

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Write whole numbers, such as axes, and return their name."""
        return self.constant(name, np.array(values, np.int64))

    def constant(self, name: str, array: "np.ndarray[Any, Any]") -> str:
        """Write a constant, once, and return its name."""
        from onnx import numpy_helper

        if name not in self._known:
            self._known.add(name)
            self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _step(self, node: fx.Node, args: Any) -> _Value:
        if node.op == "placeholder":
            return INPUT
        target = str(node.target).removeprefix("network.")
        if node.op == "get_attr":
            return self.bias(target, self.network.get_parameter(target), shape=(1, -1))
        if node.op == "call_module":
            layer = self.network.get_submodule(target)
            return _LAYERS[type(layer)](self, target, layer, *args)
        return _STEPS[node.target](self, node.name, *args)


def _mean(writer: _Writer, name: str, x: str, axes: tuple[int, ...]) -> str:
    assert axes == (2, 3)
    where = writer.integers("pixel_axes", (1, 2)) if x in writer.last else writer.integers("spatial_axes", (2, 3))
    return writer.op("ReduceMean", [x, where], name, {"keepdims": 0})


def _sigmoid(writer: _Writer, name: str, x: str) -> str:
    return writer.op("Sigmoid", [x], name)


def _split(writer: _Writer, name: str, x: str, sizes: list[int], axis: int) -> list[str]:
    outputs = [f"{name}.{part}" for part in range(len(sizes))]
    return writer.ops("Split", [x, writer.integers(f"{name}.sizes", sizes)], name, outputs, {"axis": axis})


def _chunk(writer: _Writer, name: str, x: str, parts: int, axis: int) -> list[str]:
    outputs = [f"{name}.{part}" for part in range(parts)]
    return writer.ops("Split", [x], name, outputs, {"axis": axis, "num_outputs": parts})


def _item(writer: _Writer, name: str, x: _Value, which: int | tuple[slice, slice]) -> str:
    if isinstance(which, int):
        return x[which]
    assert isinstance(x, str)
    axis = 3 if x in writer.last else 1
    bounds = [writer.integers(f"integer_{number}", [number]) for number in (which[1].start, which[1].stop, axis)]
    if x in writer.last:
        writer.last.add(name)
    return writer.op("Slice", [x, *bounds], name)


def _cat(writer: _Writer, name: str, xs: list[str], axis: int) -> str:
    if len(xs) == 1:
        return xs[0]
    if writer.last.issuperset(xs):
        writer.last.add(name)
        return writer.op("Concat", xs, name, {"axis": 3})
    return writer.op("Concat", [writer.channels_first(x) for x in xs], name, {"axis": axis})


def _max_pool(writer: _Writer, name: str, x: str, size: int) -> str:
    attributes = {"kernel_shape": [size, size], "strides": [2, 2], "pads": [size // 2] * 4}
    return writer.op("MaxPool", [x], name, attributes)


def _relu(writer: _Writer, name: str, x: str) -> str:
    return writer.op("Relu", [x], name)


def _linear(writer: _Writer, name: str, layer: nn.Linear, x: str) -> str:
    inputs = [x, writer.weight(f"{name}.weight", layer.weight), writer.bias(f"{name}.bias", layer.bias)]
    return writer.op("Gemm", inputs, name, {"transB": 1})


def _conv(writer: _Writer, name: str, layer: FoldedConv, x: str) -> str:
    inputs = [writer.channels_first(x), writer.weight(f"{name}.weight", layer.weight)]
    if layer.bias is not None:
        inputs.append(writer.bias(f"{name}.bias", layer.bias))
    attributes = {
        "kernel_shape": list(layer.weight.shape[2:]),
        "strides": [layer.stride] * 2,
        "pads": [layer.padding] * 4,
        "group": layer.groups,
    }
    return writer.op("Conv", inputs, name, attributes)


def _gain_pointwise(
    writer: _Writer, name: str, layer: GainPointwise, xs: list[str], gains: list[str], bias: str, factor: str = ""
) -> str:
    inputs = [x for x in xs for _ in range(layer.mixed)]
    if factor and not writer.openvino:
        (*gains, bias), factor = _multiplied(writer, name, [*gains, bias], factor), ""
    y = _scaled_sum(writer, f"{name}.linear", layer.convs, inputs, gains, bias)
    if not factor:
        return _relu(writer, name, y)
    return writer.op("Mul", [_relu(writer, f"{name}.relu", y), writer.per_channel(factor)], name)


def _multiplied(writer: _Writer, name: str, values: list[str], factor: str) -> list[str]:
    """Write values per channel times a factor per channel."""
    return [writer.op("Mul", [value, factor], f"{name}.{value}.multiplied") for value in values]


def _gain_depthwise(writer: _Writer, name: str, layer: GainDepthwise, x: str, gains: list[str]) -> str:
    if x in writer.last and len(gains) > _MOST_STATIC:
        return _shifted_sum(writer, name, layer, x, gains)
    bias = writer.bias(f"{name}.bias", layer.bias, shape=(1, -1))
    return _scaled_sum(writer, name, layer.convs, [x] * len(gains), gains, bias)


def _scaled_sum(writer: _Writer, name: str, convs: nn.ModuleList, xs: list[str], gains: list[str], bias: str) -> str:
    """Convolve, scale and sum, the bias last."""
    y = ""
    for number, (conv, x, gain) in enumerate(zip(convs, xs, gains, strict=True)):
        assert isinstance(conv, FoldedConv)
        inputs = [_conv(writer, f"{name}.convs.{number}", conv, x), writer.per_channel(gain)]
        scaled = writer.op("Mul", inputs, f"{name}.scaled.{number}")
        y = writer.op("Add", [scaled, y], f"{name}.sum.{number}") if y else scaled
    return writer.op("Add", [y, writer.per_channel(bias)], name)


def _shifted_sum(writer: _Writer, name: str, layer: GainDepthwise, x: str, gains: list[str]) -> str:
    """Mix the kernels, of T taps, then sum the map (B, H, W, C) shifted by each tap times that tap's weights."""
    convs = [conv for conv in layer.convs if isinstance(conv, FoldedConv)]
    padding, stride, size = convs[0].padding, convs[0].stride, convs[0].weight.shape[2]
    bank_PTC = torch.stack([conv.weight.flatten(1).T for conv in convs])
    pixel_axes = writer.integers("pixel_axes", (1, 2))
    gates_B11C = [writer.op("Unsqueeze", [gain, pixel_axes], f"{gain}.{name}.pixel") for gain in gains]
    kernel_B1TC = _mixed(writer, f"{name}.mixed", gates_B11C, f"{name}.bank", bank_PTC)
    taps_B11C = _chunk(writer, f"{name}.taps", kernel_B1TC, size * size, 2)
    pads = writer.integers(f"pads_{padding}", (0, padding, padding, 0) * 2)
    padded = writer.op("Pad", [x, pads], f"{name}.padded")
    factors = []
    for number, tap_B11C in enumerate(taps_B11C):
        # The last shift ends where the padded map does, those before it as many pixels earlier.
        starts = divmod(number, size)
        ends = [start + 1 - size or np.iinfo(np.int64).max for start in starts]
        bounds = [writer.integers(f"bounds_{values}", values) for values in (starts, ends, (1, 2), (stride, stride))]
        inside = starts == (padding, padding) and stride == 1
        shifted = x if inside else writer.op("Slice", [padded, *bounds], f"{name}.shifted.{number}")
        factors.append((shifted, tap_B11C))
    y = _products_summed(writer, name, factors)
    writer.last.add(name)
    return writer.op("Add", [y, writer.bias(f"{name}.bias", layer.bias)], name)


def _matmul_pointwise(
    writer: _Writer, name: str, layer: MatmulPointwise, xs: list[str], gates: list[str], bias: str, factor: str = ""
) -> str:
    (x,) = xs
    if factor:
        *gates, bias = _multiplied(writer, name, [*gates, bias], factor)
    write = _product_with_pixels if writer.openvino else _product_with_maps
    return write(writer, name, list(layer.banks), x, gates, bias)


def _product_with_maps(
    writer: _Writer, name: str, banks: list[nn.Parameter], x: str, gates: list[str], bias: str
) -> str:
    """Write kernels (B, O, G * I) times a map (B, G * I, pixels)."""
    kernels, outputs = [], 0
    for group, (bank_OPI, gate) in enumerate(zip(banks, gates, strict=True)):
        outputs, mixed, inputs = bank_OPI.shape
        bank = writer.weight(f"{name}.banks.{group}", bank_OPI)
        rows = writer.integers(f"shape_{outputs}_1_{mixed}", (0, outputs, 1, mixed))
        gate = writer.op("Reshape", [gate, rows], f"{name}.gates.{group}")
        kernel = writer.op("MatMul", [gate, bank], f"{name}.mixed.{group}")
        flat = writer.integers(f"shape_{outputs}_{inputs}", (0, outputs, inputs))
        kernels.append(writer.op("Reshape", [kernel, flat], f"{name}.kernel.{group}"))
    kernel = _cat(writer, f"{name}.kernel", kernels, 2)
    pixels = writer.op("Reshape", [x, writer.integers("shape_pixels", (0, 0, -1))], f"{name}.pixels")
    y = writer.op("MatMul", [kernel, pixels], f"{name}.product")
    size = writer.op("Shape", [x], f"{name}.size", {"start": 2})
    shape = writer.op("Concat", [writer.integers(f"shape_{outputs}", (0, outputs)), size], f"{name}.shape", {"axis": 0})
    y = writer.op("Reshape", [y, shape], f"{name}.map")
    return _relu(writer, name, writer.op("Add", [y, writer.per_channel(bias)], f"{name}.linear"))


def _product_with_pixels(
    writer: _Writer, name: str, banks: list[nn.Parameter], x: str, gates: list[str], bias: str
) -> str:
    """Write a map's pixels (B, pixels, G * I) times kernels (B, G * I, O); what comes out has its channels last."""
    kernels, outputs, inputs = [], 0, 0
    for group, (bank_OPI, gate) in enumerate(zip(banks, gates, strict=True)):
        outputs, mixed, width = bank_OPI.shape
        inputs += width
        rows = writer.integers(f"rows_{outputs}_{mixed}", (0, outputs, mixed))
        gate = writer.op("Reshape", [gate, rows], f"{name}.gates.{group}")
        gate = writer.op("Transpose", [gate], f"{name}.rows.{group}", {"perm": (0, 2, 1)})
        gates_B1O = _chunk(writer, f"{name}.scales.{group}", gate, mixed, 1)  # one after the other, unlike columns
        column = writer.integers(f"column_{outputs}", (0, outputs, 1))
        gates_BO1 = [writer.op("Reshape", [gate_B1O, column], f"{gate_B1O}.column") for gate_B1O in gates_B1O]
        bank_POI = bank_OPI.transpose(0, 1)
        kernels.append(_mixed(writer, f"{name}.mixed.{group}", gates_BO1, f"{name}.banks.{group}", bank_POI))
    kernel = _cat(writer, f"{name}.kernel", kernels, 2)
    kernel = writer.op("Transpose", [kernel], f"{name}.columns", {"perm": (0, 2, 1)})
    y = writer.op("MatMul", [writer.pixels(x, inputs), kernel], f"{name}.product")
    bias = writer.op("Unsqueeze", [bias, writer.integers("pixels_axis", (1,))], f"{bias}.{name}.per_pixel")
    y = _relu(writer, f"{name}.relu", writer.op("Add", [y, bias], f"{name}.linear"))
    bounds = {"start": 1, "end": 3} if x in writer.last else {"start": 2, "end": 4}
    size = [writer.integers("batch", (0,)), writer.op("Shape", [x], f"{name}.size", bounds)]
    shape = writer.op(
        "Concat", [*size, writer.integers(f"channels_{outputs}", (outputs,))], f"{name}.shape", {"axis": 0}
    )
    writer.last.add(name)
    return writer.op("Reshape", [y, shape], name)


def _mixed(writer: _Writer, name: str, gates: Sequence[str], bank: str, matrices: Tensor) -> str:
    """Write the sum of a bank's matrices, each times its gates: those of each photo as a row or as a column."""
    weights = [writer.weight(f"{bank}.{number}", matrix) for number, matrix in enumerate(matrices.unbind(0))]
    return _products_summed(writer, name, list(zip(gates, weights, strict=True)))


def _products_summed(writer: _Writer, name: str, factors: Sequence[tuple[str, str]]) -> str:
    """Write a sum of products, in pieces that are one pass each."""
    total = ""
    for first in range(0, len(factors), _ONE_PASS):
        piece = ""
        for number, pair in enumerate(factors[first : first + _ONE_PASS], first):
            product = writer.op("Mul", pair, f"{name}.scaled.{number}")
            piece = writer.op("Add", [piece, product], f"{name}.sum.{number}") if piece else product
        total = writer.op("Add", [total, piece], f"{name}.{first}") if total else piece
    return total


# What each step and each layer becomes; their arguments are those of the traced call.
_STEPS: dict[Any, Callable[..., _Value]] = {
    "chunk": _chunk,
    "mean": _mean,
    "sigmoid": _sigmoid,
    "split": _split,
    operator.getitem: _item,
    torch.cat: _cat,
    F.max_pool2d: _max_pool,
    F.relu: _relu,
}
_LAYERS: dict[type[nn.Module], Callable[..., str]] = {
    FoldedConv: _conv,
    GainDepthwise: _gain_depthwise,
    GainPointwise: _gain_pointwise,
    MatmulPointwise: _matmul_pointwise,
    nn.Linear: _linear,
}
