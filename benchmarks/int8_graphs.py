"""Networks in 8-bit integers for `int8.py`: where an OpenVINO graph is quantised, and in what range.

OpenVINO computes in integers between such places: it moves the rounding into the steps before and after. Weights have a
scale for each output channel, feature maps one scale each. Gates, gains and sums stay in floating point.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

MOVES = ("Slice", "StridedSlice", "Split", "VariadicSplit", "Concat")  # operators that only move values

Photos = Any  # (N, 3, H, W) float32


@dataclasses.dataclass(eq=False)
class Place:
    """Where a feature map is quantised: an output of the graph, which of its consumers get it so, and the range."""

    output: Any
    targets: list[Any]
    low: float = 0.0
    high: float = 0.0


def places_where_made(model: Any) -> list[Place]:
    """Return a place behind each step that makes what convolutions take, however it is cut and joined in between."""
    places = {}
    for conv in convolutions(model):
        todo = [conv.input_value(0)]
        while todo:
            output = todo.pop()
            node = output.get_node()
            if node.get_type_name() in MOVES:
                joined = node.inputs() if node.get_type_name() == "Concat" else [node.input(0)]
                todo += [value.get_source_output() for value in joined]
            else:
                places[node.get_friendly_name()] = Place(output, list(output.get_target_inputs()))
    return list(places.values())


def places_at_inputs(model: Any) -> list[Place]:
    """Return a place before each convolution; those that take the same share it."""
    outputs: dict[tuple[str, int], tuple[Any, list[Any]]] = {}
    for conv in convolutions(model):
        output = conv.input_value(0)
        key = (output.get_node().get_friendly_name(), output.get_index())
        outputs.setdefault(key, (output, []))[1].append(conv.input(0))
    return [Place(output, targets) for output, targets in outputs.values()]


def convolutions(model: Any) -> list[Any]:
    """Return the convolutions of a graph."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in ("Convolution", "GroupConvolution")]


def calibrate(model: Any, places: list[Place], photos: Photos, tail: float) -> None:
    """Set the range of each place: of the middle of its values, as the mean over batches; joined ones have the same."""
    import openvino

    measured = model.clone()
    outputs = {node.get_friendly_name(): node for node in measured.get_ordered_ops()}
    measured.add_outputs(
        [outputs[p.output.get_node().get_friendly_name()].output(p.output.get_index()) for p in places]
    )
    compiled = openvino.Core().compile_model(measured, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    bounds = []
    for start in range(0, len(photos), 32):
        results = compiled(photos[start : start + 32])
        # Every 11th value is enough to tell where the tails begin.
        values = [results[number + len(model.outputs)].ravel()[::11] for number in range(len(places))]
        bounds.append([np.quantile(value, (tail, 1 - tail)) for value in values])
    for place, (low, high) in zip(places, np.mean(bounds, 0), strict=True):
        place.low, place.high = float(low), float(high)
    for joined in joined_places(places):
        low, high = min(place.low for place in joined), max(place.high for place in joined)
        for place in joined:
            place.low, place.high = low, high


def joined_places(places: list[Place]) -> list[list[Place]]:
    """Return the places in sets: those of one set meet in concatenations, which one scale spares a conversion."""
    sets: list[tuple[list[Place], set[str]]] = []
    for place in places:
        met, todo = set(), [target.get_node() for target in place.targets]
        while todo:
            node = todo.pop()
            if node.get_type_name() not in MOVES or node.get_output_partial_shape(0).rank.get_length() != 4:
                continue
            if node.get_type_name() == "Concat":
                met.add(node.get_friendly_name())
            todo += [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
        together, rest = [place], []
        for members, names in sets:
            if names & met:
                together, met = together + members, met | names
            else:
                rest.append((members, names))
        sets = [*rest, (together, met)]
    return [members for members, _ in sets]


def quantised(model: Any, find: Callable[[Any], list[Place]], photos: Photos, *, tail: float = 1e-5) -> Any:
    """Return a graph with feature maps quantised at places and all convolutions' weights per output channel."""
    from openvino import opset13

    model = model.clone()
    places = find(model)
    calibrate(model, places, photos, tail)
    for place in places:
        low, high = (place.low, place.high) if place.low < 0 else (0.0, place.high)
        if low < 0:
            high = max(-low, high)
            low = -high * 128 / 127
        node = fake_quantize(opset13, place.output, np.float32(low), np.float32(high), 256)
        for target in place.targets:
            target.replace_source_output(node.output(0))
    for conv in convolutions(model):
        weight = constant_of(conv.input_value(1))
        axes = tuple(range(2 if conv.get_type_name() == "GroupConvolution" else 1, weight.ndim))
        largest = np.maximum(np.abs(weight).max(axes, keepdims=True), 1e-9)
        node = fake_quantize(opset13, opset13.constant(weight), -largest, largest, 255)
        conv.input(1).replace_source_output(node.output(0))
    model.validate_nodes_and_infer_types()
    return model


def fake_quantize(opset: Any, value: Any, low: Any, high: Any, levels: int) -> Any:
    """Return a step that rounds values to so many levels; the engine then computes with the levels' numbers."""
    bounds = [opset.constant(bound) for bound in (low, high, low, high)]
    return opset.fake_quantize(value, *bounds, levels)


def constant_of(output: Any) -> Any:
    """Return a convolution's weight."""
    node = output.get_node()
    source = node if node.get_type_name() == "Constant" else node.input_value(0).get_node()  # a reshaped one
    return np.ascontiguousarray(source.data, np.float32).reshape(list(output.get_shape()))


def placed_by_nncf(model: Any, photos: Photos) -> Any | None:
    """Return the graph that NNCF quantises, None where it is not installed."""
    try:
        import nncf  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    left_out = [n.get_friendly_name() for n in model.get_ordered_ops() if n.get_type_name() in ("MatMul", "Multiply")]
    scope = nncf.IgnoredScope(names=left_out, validate=False)
    data = nncf.Dataset([photo[None] for photo in photos])
    return nncf.quantize(model.clone(), data, subset_size=len(photos), ignored_scope=scope)
