"""Normalisation and probabilities inside an ONNX graph, which then takes photos that are resized and cropped alone."""

from typing import TYPE_CHECKING

import numpy as np

from weightnet.images.transforms import Preprocess
from weightnet.predict.exported import INPUT
from weightnet.predict.interface import LOGITS, PROBABILITIES

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def add_preprocessing(model: "ModelProto", preprocess: Preprocess) -> None:
    """Let a network's graph take pixels instead of what the network takes, and give probabilities too.

    The operations are those of `Preprocess.normalize`, one by one, so that the network sees the same numbers. They are
    not folded into the first convolution: it pads with zeros of what is normalised, which no pixel stands for.

    Args:
        model: an ONNX model of `build_graph`; it is changed.
        preprocess: the network's own.

    Shape: `input` becomes (B, H, W, 3) uint8, blue, green, red; `probabilities` are (B, classes).
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    graph = model.graph
    for node in graph.node:
        node.input[:] = ["input.normalised" if name == INPUT else name for name in node.input]
    nodes = [
        helper.make_node("Cast", [INPUT], ["input.float"], "input.float", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["input.float"], ["input.planes"], "input.planes", perm=[0, 3, 1, 2]),
    ]
    if preprocess.channel_order == "RGB":
        graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0], np.int64), "input.order"))
        nodes.append(_applied("Gather", nodes[-1], "input.order"))
        nodes[-1].attribute.append(helper.make_attribute("axis", 1))
    if preprocess.mean is not None and preprocess.std is not None:
        for kind, name, values in (("Sub", "input.mean", preprocess.mean), ("Div", "input.std", preprocess.std)):
            array = np.array(values, np.float32).reshape(1, 3, 1, 1)
            graph.initializer.append(numpy_helper.from_array(array, name))
            nodes.append(_applied(kind, nodes[-1], name))
    nodes[-1].output[0] = "input.normalised"
    nodes += [*graph.node, helper.make_node("Softmax", [LOGITS], [PROBABILITIES], PROBABILITIES, axis=1)]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    sizes = ("batch", "height", "width", 3)
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, sizes))
    (classes,) = (value.type.tensor_type.shape.dim[1].dim_value for value in graph.output if value.name == LOGITS)
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ("batch", classes)))
    checker.check_model(model, full_check=True)


def _applied(kind: str, before: "NodeProto", constant: str) -> "NodeProto":
    """Return a node that applies a constant to the result of the one before."""
    from onnx import helper

    name = f"{constant}.applied"
    return helper.make_node(kind, [before.output[0], constant], [name], name)
