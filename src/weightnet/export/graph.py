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
  mixes its kernels, or a sum where each block of inputs has one. For OpenVINO maps are (B, H, W, C) from one such
  layer to the next, as it has them in memory anyway, a layer is a product of its pixels, and its kernels are sums of
  scaled matrices.
* A block's input is joined of slices; for OpenVINO, where `fold` made it so, it is selected from two maps.
* A mean is taken over the pixels; for OpenVINO over them as one axis, of a product with ones, or of means of squares.
* A depthwise layer of many kernels is as many static ones, scaled and summed; for OpenVINO their mix, whose taps scale
  the map moved by each. (`weightnet.export.graph_openvino` has these and the means.)
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from weightnet import __version__
from weightnet.errors import MissingDependencyError
from weightnet.export.graph_openvino import mean_of_map, product_with_pixels, sum_of_moved
from weightnet.export.graph_writer import GraphWriter
from weightnet.nn.fold import FoldedShuffleNetV2
from weightnet.nn.folded_layers import ChannelSelect, FoldedConv, GainDepthwise, GainPointwise, MatmulPointwise
from weightnet.predict.exported import INPUT
from weightnet.predict.interface import CLASS_WEIGHTS, MIN_SIZE_PX

if TYPE_CHECKING:
    from onnx import ModelProto

# The first in which Split has a number of outputs and ReduceMean its axes as input; runtimes of 2023 know it.
_OPSET = 18
# In OpenVINO up to so many static depthwise layers are as fast as one of mixed kernels.
_MOST_STATIC = 3

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
    writer = GraphWriter(half_weights=half_weights, openvino=openvino)
    names = _write_steps(writer, network, _traced(_Outputs(network, computed)))
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


def _traced(outputs: _Outputs) -> fx.Graph:
    """Return the steps of a network, which know the shapes of what they give, of one photo."""
    graph = _Tracer().trace(outputs)
    spec, weight = outputs.network.spec, outputs.network.classifier.weight
    with torch.no_grad():
        ShapeProp(fx.GraphModule(outputs, graph)).propagate(weight.new_zeros(1, spec.in_channels, *[MIN_SIZE_PX] * 2))
    return graph


def _write_steps(writer: GraphWriter, network: nn.Module, traced: fx.Graph) -> list[str]:
    """Write all steps of a traced network and return the names of the outputs."""
    values: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args = fx.map_arg(node.args, lambda used: values[used])
        if node.op == "output":
            return list(args[0])
        values[node] = value = _written_step(writer, network, node, args)
        if isinstance(value, str) and len(shape := node.meta["tensor_meta"].shape) == 4:
            writer.channels[value] = shape[1]
    raise AssertionError("a trace ends with its output")


def _written_step(writer: GraphWriter, network: nn.Module, node: fx.Node, args: Any) -> _Value:
    if node.op == "placeholder":
        return INPUT
    target = str(node.target).removeprefix("network.")
    if node.op == "get_attr":
        return writer.bias(target, network.get_parameter(target), shape=(1, -1))
    if node.op == "call_module":
        layer = network.get_submodule(target)
        return _LAYERS[type(layer)](writer, target, layer, *args)
    return _STEPS[node.target](writer, node.name, *args)


def _mean(writer: GraphWriter, name: str, x: str, axes: tuple[int, ...]) -> str:
    assert axes == (2, 3)
    if writer.openvino:
        return mean_of_map(writer, name, x)
    return writer.op("ReduceMean", [x, writer.integers("spatial_axes", (2, 3))], name, {"keepdims": 0})


def _sigmoid(writer: GraphWriter, name: str, x: str) -> str:
    return writer.op("Sigmoid", [x], name)


def _split(writer: GraphWriter, name: str, x: str, sizes: list[int], axis: int) -> list[str]:
    outputs = [f"{name}.{part}" for part in range(len(sizes))]
    return writer.ops("Split", [x, writer.integers(f"{name}.sizes", sizes)], name, outputs, {"axis": axis})


def _item(writer: GraphWriter, name: str, x: _Value, which: int | tuple[slice, slice]) -> str:
    if isinstance(which, int):
        return x[which]
    assert isinstance(x, str)
    axis = 3 if x in writer.last else 1
    bounds = [writer.integers(f"integer_{number}", [number]) for number in (which[1].start, which[1].stop, axis)]
    if x in writer.last:
        writer.last.add(name)
    return writer.op("Slice", [x, *bounds], name)


def _cat(writer: GraphWriter, name: str, xs: list[str], axis: int) -> str:
    if len(xs) == 1:
        return xs[0]
    if writer.last.issuperset(xs):
        writer.last.add(name)
        return writer.op("Concat", xs, name, {"axis": 3})
    return writer.op("Concat", [writer.channels_first(x) for x in xs], name, {"axis": axis})


def _max_pool(writer: GraphWriter, name: str, x: str, size: int) -> str:
    attributes = {"kernel_shape": [size, size], "strides": [2, 2], "pads": [size // 2] * 4}
    return writer.op("MaxPool", [x], name, attributes)


def _relu(writer: GraphWriter, name: str, x: str) -> str:
    return writer.op("Relu", [x], name)


def _linear(writer: GraphWriter, name: str, layer: nn.Linear, x: str) -> str:
    inputs = [x, writer.weight(f"{name}.weight", layer.weight), writer.bias(f"{name}.bias", layer.bias)]
    return writer.op("Gemm", inputs, name, {"transB": 1})


def _conv(writer: GraphWriter, name: str, layer: FoldedConv, x: str) -> str:
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
    writer: GraphWriter, name: str, layer: GainPointwise, xs: list[str], gains: list[str], bias: str, factor: str = ""
) -> str:
    inputs = [x for x in xs for _ in range(layer.mixed)]
    if factor and not writer.openvino:
        (*gains, bias), factor = _multiplied(writer, name, [*gains, bias], factor), ""
    y = _scaled_sum(writer, f"{name}.linear", layer.convs, inputs, gains, bias)
    if not factor:
        return _relu(writer, name, y)
    return writer.op("Mul", [_relu(writer, f"{name}.relu", y), writer.per_channel(factor)], name)


def _multiplied(writer: GraphWriter, name: str, values: list[str], factor: str) -> list[str]:
    """Write values per channel times a factor per channel."""
    return [writer.op("Mul", [value, factor], f"{name}.{value}.multiplied") for value in values]


def _gain_depthwise(writer: GraphWriter, name: str, layer: GainDepthwise, x: str, gains: list[str]) -> str:
    if writer.has_pixels(x) and len(gains) > _MOST_STATIC:
        return sum_of_moved(writer, name, layer, x, gains)
    bias = writer.bias(f"{name}.bias", layer.bias, shape=(1, -1))
    return _scaled_sum(writer, name, layer.convs, [x] * len(gains), gains, bias)


def _scaled_sum(
    writer: GraphWriter, name: str, convs: nn.ModuleList, xs: list[str], gains: list[str], bias: str
) -> str:
    """Convolve, scale and sum, the bias last."""
    y = ""
    for number, (conv, x, gain) in enumerate(zip(convs, xs, gains, strict=True)):
        assert isinstance(conv, FoldedConv)
        inputs = [_conv(writer, f"{name}.convs.{number}", conv, x), writer.per_channel(gain)]
        scaled = writer.op("Mul", inputs, f"{name}.scaled.{number}")
        y = writer.op("Add", [scaled, y], f"{name}.sum.{number}") if y else scaled
    return writer.op("Add", [y, writer.per_channel(bias)], name)


def _matmul_pointwise(
    writer: GraphWriter, name: str, layer: MatmulPointwise, xs: list[str], gates: list[str], bias: str, factor: str = ""
) -> str:
    (x,) = xs
    if factor:
        *gates, bias = _multiplied(writer, name, [*gates, bias], factor)
    write = product_with_pixels if writer.openvino else _product_with_maps
    return write(writer, name, layer, x, gates, bias)


def _product_with_maps(
    writer: GraphWriter, name: str, layer: MatmulPointwise, x: str, gates: list[str], bias: str
) -> str:
    """Write kernels (B, O, G * I) times a map (B, G * I, pixels)."""
    pairs = enumerate(zip(layer.banks, gates, strict=True))
    kernels = [_kernel(writer, f"{name}.kernels.{group}", bank_OPI, gate) for group, (bank_OPI, gate) in pairs]
    kernel = _sum(writer, f"{name}.kernel", kernels) if layer.summed else _cat(writer, f"{name}.kernel", kernels, 2)
    pixels = writer.op("Reshape", [x, writer.integers("shape_pixels", (0, 0, -1))], f"{name}.pixels")
    y = writer.op("MatMul", [kernel, pixels], f"{name}.product")
    size = writer.op("Shape", [x], f"{name}.size", {"start": 2})
    outputs = layer.banks[0].shape[0]
    shape = writer.op("Concat", [writer.integers(f"shape_{outputs}", (0, outputs)), size], f"{name}.shape", {"axis": 0})
    y = writer.op("Reshape", [y, shape], f"{name}.map")
    return _relu(writer, name, writer.op("Add", [y, writer.per_channel(bias)], f"{name}.linear"))


def _kernel(writer: GraphWriter, name: str, bank_OPI: Tensor, gate: str) -> str:
    """Write kernels (B, O, I): the sum of a bank's, times their gates (B, P * O)."""
    outputs, mixed, inputs = bank_OPI.shape
    if mixed == 1:
        column = writer.op("Unsqueeze", [gate, writer.integers("column_axis", (2,))], f"{name}.gates")
        return writer.op("Mul", [column, writer.weight(f"{name}.bank", bank_OPI[:, 0])], name)
    apart = writer.integers(f"shape_{mixed}_{outputs}_1", (0, mixed, outputs, 1))
    gate = writer.op("Reshape", [gate, apart], f"{name}.gates")
    gate = writer.op("Transpose", [gate], f"{name}.gates.turned", {"perm": (0, 2, 3, 1)})
    kernel = writer.op("MatMul", [gate, writer.weight(f"{name}.bank", bank_OPI)], f"{name}.mixed")
    flat = writer.integers(f"shape_{outputs}_{inputs}", (0, outputs, inputs))
    return writer.op("Reshape", [kernel, flat], name)


def _sum(writer: GraphWriter, name: str, values: list[str]) -> str:
    total, *others = values
    for number, value in enumerate(others):
        total = writer.op("Add", [total, value], f"{name}.sum.{number}")
    return total


def _channel_select(writer: GraphWriter, name: str, layer: ChannelSelect, x: str, y: str) -> str:
    last = writer.last.issuperset((x, y))
    if last:
        writer.last.add(name)
    else:
        x, y = writer.channels_first(x), writer.channels_first(y)
    # With fewer axes OpenVINO changes the layout of the maps.
    mask = layer.mask.reshape((1, 1, 1, -1) if last else (1, -1, 1, 1)).numpy(force=True)
    return writer.op("Where", [writer.constant(f"{name}.mask", mask), x, y], name)


# What each step and each layer becomes; their arguments are those of the traced call.
_STEPS: dict[Any, Callable[..., _Value]] = {
    "chunk": GraphWriter.equal_parts,
    "mean": _mean,
    "sigmoid": _sigmoid,
    "split": _split,
    operator.getitem: _item,
    torch.cat: _cat,
    F.max_pool2d: _max_pool,
    F.relu: _relu,
}
_LAYERS: dict[type[nn.Module], Callable[..., str]] = {
    ChannelSelect: _channel_select,
    FoldedConv: _conv,
    GainDepthwise: _gain_depthwise,
    GainPointwise: _gain_pointwise,
    MatmulPointwise: _matmul_pointwise,
    nn.Linear: _linear,
}
