"""The graph of a folded network: its structure, its names and its open sizes. Its numbers are tested in test_model."""

import itertools
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from weightnet.errors import MissingDependencyError
from weightnet.export.graph import build_graph
from weightnet.nn.fold import fold
from weightnet.predict.interface import OUTPUTS

NAMES = ("plain", "r1", "r1 one block", "r2 four blocks", "r3 one block", "r9 one block")


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def kinds_of(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", NAMES)
def test_graph_has_constant_convolutions_and_no_shuffle(small, name):
    model = build_graph(fold(small(name)), OUTPUTS)
    constants = constants_of(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) >= 10
    assert all(set(node.input[1:]) <= set(constants) for node in convolutions)
    assert not {"BatchNormalization", "Gather", "Cast"} & set(kinds_of(model))
    turned = [node.name for node in model.graph.node if node.op_type == "Transpose"]
    assert all(name.endswith(".gates.turned") for name in turned)
    steps = [constants[node.input[3]] for node in model.graph.node if node.op_type == "Slice" and len(node.input) > 3]
    assert all(onnx.numpy_helper.to_array(step) == 1 for step in steps)  # a shuffle by every other channel has 2
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("name", ["plain", "r1", "r1 one block"])
def test_graph_for_static_weights_has_neither_reshapes_nor_products_of_kernels(small, name):
    kinds = set(kinds_of(build_graph(fold(small(name), form="feature"), OUTPUTS)))
    assert not {"Reshape", "MatMul", "Einsum", "Shape"} & kinds


@pytest.mark.parametrize("name", ["r2 four blocks", "r3 one block"])
def test_graph_for_openvino_turns_maps_only_where_convolutions_meet_products(small, name):
    graph = build_graph(fold(small(name)), ["logits"], openvino=True).graph
    products = [node for node in graph.node if node.op_type == "MatMul" and not node.name.startswith("mean")]
    stages, blocks = 3, sum(small(name).spec.stage_repeats)
    turned = [node for node in graph.node if node.op_type == "Transpose" and len(node.attribute[0].ints) == 4]
    # Into each block's depthwise layer and out of it; in a stage's first block also those of the projection; at the
    # network's two ends.
    assert len(products) == 2 * blocks + stages
    assert len(turned) == 2 * blocks + 2 * stages + 1


def test_graph_for_openvino_mixes_the_kernels_of_depthwise_layers_that_have_many(small):
    folded = fold(small("r9 one block"))
    graph = build_graph(folded, ["logits"], openvino=True).graph
    assert [node.name for node in graph.node if node.op_type == "Conv"] == ["first_conv", "conv_last"]
    blocks, stages = sum(folded.spec.stage_repeats), len(folded.spec.stage_repeats)
    cut = Counter(node.op_type for node in graph.node if ".from_" in node.output[0] and ".moved_" not in node.output[0])
    copies = Counter(node.op_type for node in graph.node if ".moved_" in node.output[0])
    # At stride 2, in two layers of each stage, a map becomes four parts.
    assert cut == {"Slice": 4 * 2 * stages}
    # Two maps are moved sideways, and two sums up or down; at stride 2 two parts and one sum.
    assert copies == {"Pad": 4 * (blocks - stages) + 3 * 2 * stages}
    few = build_graph(fold(small("r3 one block")), ["logits"], openvino=True).graph
    assert len([node for node in few.node if node.op_type == "Conv"]) == 2 + 3 * (blocks + stages)


def test_graph_for_openvino_multiplies_maps_and_not_gains_by_the_gain_of_a_depthwise_layer(small):
    counts = []
    for openvino in (False, True):
        graph = build_graph(fold(small("r1"), form="feature"), ["logits"], openvino=openvino).graph
        per_channel = {node.output[0] for node in graph.node if node.op_type == "Unsqueeze"}
        layers = [node for node in graph.node if node.name.startswith("stages.") and not node.name.endswith(".below")]
        products = [node for node in layers if node.op_type == "Mul"]
        counts.append((len(products), sum(per_channel.isdisjoint(node.input) for node in products)))
    blocks = 7
    # By default two gains and a bias of each block are multiplied; for OpenVINO, once, what they give.
    (products, of_gains), (fewer, no_gains) = counts
    assert (of_gains, no_gains, products - fewer) == (3 * blocks, 0, 2 * blocks)


# The last maps of 32 px are single pixels; of 67 and 75 px, most maps that are halved have odd sides.
@pytest.mark.parametrize("sides", [(32, 33), (64, 96), (67, 75)])
@pytest.mark.parametrize("name", NAMES)
def test_graph_gives_the_same_numbers_for_openvino(small, name, sides):
    x = np.random.default_rng(0).standard_normal((3, 3, *sides), np.float32)
    given = []
    for select, openvino in itertools.product((False, True), repeat=2):
        model = build_graph(fold(small(name), select=select), OUTPUTS, openvino=openvino)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        given.append(session.run(None, {"input": x}))
    for first, *others in zip(*given, strict=True):
        for other in others:
            np.testing.assert_allclose(first, other, rtol=0, atol=1e-5 * abs(first).max())


def test_graph_that_selects_joins_maps_at_the_end_of_stages_only(small):
    network = small("plain")
    stages, blocks = 3, sum(network.spec.stage_repeats)
    selections = 2 * (blocks - stages)
    kinds = kinds_of(build_graph(fold(network, select=True), ["logits"], openvino=True))
    assert (kinds["Where"], kinds["Concat"], kinds["Split"]) == (selections, stages, 0)


def test_graph_for_openvino_takes_means_over_one_axis_or_of_products_or_squares(small):
    graph = build_graph(fold(small("r1")), ["logits"], openvino=True).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    axes = Counter(tuple(constants[node.input[1]]) for node in graph.node if node.op_type == "ReduceMean")
    # Maps (B, H, W, C) of the stages of products; then two of the last stage and the network's last, of 64 and 32
    # channels. Sixteen does not divide the 8 channels of the first map and of the first stage's blocks.
    assert axes == {(1,): 4, (2, 3): 3}
    otherwise = [node.name for node in graph.node if node.name.startswith("mean") and node.op_type != "ReduceMean"]
    assert [name for name in otherwise if name.endswith(".squares")] == ["mean.squares"]
    assert [name for name in otherwise if name.endswith(".product")] == [f"mean_{block}.product" for block in (1, 2, 3)]


def test_graph_makes_all_gates_of_a_block_by_one_product(small):
    blocks = 7
    kinds = kinds_of(build_graph(fold(small("r1")), ["logits"]))
    assert (kinds["Gemm"], kinds["Sigmoid"]) == (2 * blocks + 1, blocks)


@pytest.mark.parametrize("name", NAMES)
def test_graph_combines_no_two_values_per_channel_as_maps(small, name):
    # OpenVINO would compute what they meet in their layout and not in that of the feature maps.
    graph = onnx.shape_inference.infer_shapes(build_graph(fold(small(name)), OUTPUTS)).graph
    sizes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    per_channel = {name for name, shape in sizes.items() if len(shape) == 4 and shape[2:] == [1, 1]}
    combined = [node for node in graph.node if node.op_type in ("Mul", "Add")]
    assert name == "plain" or any(per_channel & set(node.input) for node in combined)
    assert not any(node.input[0] in per_channel for node in combined)
    with_bias = {node.output[0] for node in combined if node.op_type == "Add" and node.input[1] in per_channel}
    assert not any(node.op_type == "Add" and with_bias & set(node.input) for node in combined)


@pytest.mark.parametrize("outputs", [["logits"], ["logits", "features"], list(OUTPUTS)])
def test_graph_has_the_outputs_that_were_asked_for(small, outputs):
    model = build_graph(fold(small("r1")), outputs)
    assert [value.name for value in model.graph.output] == outputs


def test_graph_keeps_the_classifiers_weights_once(small):
    sizes = [
        sum(len(tensor.raw_data) for tensor in constants_of(build_graph(fold(small("r1")), outputs)).values())
        for outputs in (["logits"], ["logits", "class_weights"])
    ]
    assert sizes[0] == sizes[1]


def test_graph_leaves_batch_height_and_width_open(small):
    model = build_graph(fold(small("r1")), OUTPUTS)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "input": ["batch", 3, "height", "width"],
        "logits": ["batch", 10],
        "pre_logits": ["batch", 32],
        "features": ["batch", 32, "features_height", "features_width"],
        "class_weights": [10, 32],
    }


def test_graph_is_of_a_version_that_runtimes_of_2023_read(small):
    model = build_graph(fold(small("plain")), ["logits"])
    assert ([(entry.domain, entry.version) for entry in model.opset_import], model.ir_version) == ([("", 18)], 8)


def test_graph_keeps_weights_in_half_precision_and_biases_in_single(small):
    folded = fold(small("r3 one block"))
    full, half = (build_graph(folded, ["logits"], half_weights=half) for half in (False, True))
    kinds = {True: onnx.TensorProto.FLOAT16, False: onnx.TensorProto.FLOAT}
    for name, tensor in constants_of(half).items():
        if tensor.data_type != onnx.TensorProto.INT64:
            assert tensor.data_type == kinds[name.endswith(".half")], name
            assert name.endswith(".half") == ("bias" not in name), name
    sizes = [sum(len(tensor.raw_data) for tensor in constants_of(model).values()) for model in (half, full)]
    assert sizes[0] < 0.56 * sizes[1]


def test_graph_of_the_same_network_is_the_same_bytes(small):
    first, second = (build_graph(fold(small("r2 four blocks")), OUTPUTS).SerializeToString() for _ in range(2))
    assert first == second


def test_graph_says_how_to_install_onnx(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'weightnet\[export\]'"):
        build_graph(fold(small("r1")), ["logits"])
