"""A network in 8-bit integers for OpenVINO: where feature maps are rounded, to what range, and photos to tell it by.

OpenVINO computes in integers from where a map is rounded: it moves the rounding into the step before, and the scales
into those after. Weights have a scale for each output channel, feature maps one each. Gates, gains and sums stay in
floating point; so does whatever comes behind the last convolution.

Processors without VNNI sum up the products of two neighbouring inputs in 16 bits, and silently cut off what is larger:
with weights up to 127 the embedded network then names other things in half of all photos. So the scale of an output
channel is such that two neighbours' weights are at most 128 together: a file gives the same numbers everywhere.
Weights that stay in floating point are kept in half precision, as in a file for bfloat16.

A stage that is computed by products has no 1x1 weights to round, and stays in floating point. In the first stages of
narrow networks that is faster than integers, where the processor has bfloat16.

Source: docs/int8.md says why the places are these, and measures others.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from weightnet.errors import ImageError, UsageError
from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess
from weightnet.nn.fold import FoldedShuffleNetV2, FoldForm
from weightnet.nn.variants import NetworkSpec
from weightnet.predict.exported import usable_cores
from weightnet.predict.inputs import find_images

LEAST_PHOTOS, MOST_PHOTOS = 32, 256
_BATCH = 32

# Channels of the first stage, below which bfloat16 is faster there than integers: as products, and as convolutions.
_NARROW, _NARROW_PLAIN = 128, 64

# Operators that only move values or take some: a map may as well be rounded before them.
_MOVES = ("Slice", "StridedSlice", "Split", "VariadicSplit", "Concat", "MaxPool")
_SAMPLED = 11  # every 11th value is enough to tell the range
_SMALLEST = 1e-6  # of a range or a weight, where all values are zeros
_HALVED = 1024  # numbers in a constant, from which it is kept in half precision
_LARGEST = 127  # of a weight, and of two neighbours together before they are rounded: 2 x 0.5 may come to that

Graph: TypeAlias = Any  # openvino.Model
Photos: TypeAlias = npt.NDArray[Any]
Reach: TypeAlias = Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.float32]]


@dataclasses.dataclass(eq=False)
class Place:
    """Where a feature map is rounded: an output of the graph, which of its consumers get it so, and the range.

    Args:
        output: of a step of the graph.
        targets: inputs of the steps that take the rounded map.
        low: the smallest value that is kept.
        high: the largest.
    """

    output: Any
    targets: list[Any]
    low: float = 0.0
    high: float = 0.0


def read_calibration(
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], preprocess: Preprocess
) -> tuple[list[npt.NDArray[np.uint8]], int]:
    """Return photos, resized and cropped, and how many others could not be read.

    Args:
        calibration: photos, folders and patterns, as `find_images` takes them. Of more than 256 photos as many are
            taken, evenly.
        preprocess: the network's own.

    Raises: UsageError where something stands for no photo, or fewer than 32 can be read.
    """
    given = [calibration] if isinstance(calibration, str | os.PathLike) else list(calibration)
    reports: list[str] = []
    paths = list(find_images([os.fspath(path) for path in given], report=reports.append))
    if reports:
        raise UsageError(f"calibration must name photos. Got {reports[0]} Give photos, folders or quoted patterns.")
    count = min(len(paths), MOST_PHOTOS)
    paths = [paths[number * len(paths) // count] for number in range(count)]

    def crop(path: str) -> npt.NDArray[np.uint8] | str:
        try:
            return preprocess.crop_uint8(read_image(path))
        except ImageError as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor(usable_cores()) as threads:
        read = list(threads.map(crop, paths))
    crops, errors = [x for x in read if not isinstance(x, str)], [x for x in read if isinstance(x, str)]
    if len(crops) < LEAST_PHOTOS:
        unreadable = f", and {len(errors)} that cannot be read ({errors[0]})" if errors else ""
        raise UsageError(
            f"calibration must be at least {LEAST_PHOTOS} photos. Got {len(crops)}{unreadable}. "
            "Give more, of the kind that the network was trained on."
        )
    return crops, len(errors)


def int8_form(spec: NetworkSpec) -> FoldForm:
    """Return the form in which a network is faster: "feature", in which all is convolutions, but for narrow ones."""
    return "auto" if spec.stage_channels[0] < _NARROW else "feature"


def kept_stages(network: FoldedShuffleNetV2) -> list[str]:
    """Return how the names begin of what stays in floating point.

    These are the stages that are computed by products, and the first one of a narrow plain network.
    """
    narrow = not network.spec.M and network.spec.stage_channels[0] < _NARROW_PLAIN
    kept = [form == "matmul" or (narrow and stage == 0) for stage, form in enumerate(network.forms)]
    return [f"stages.{stage}." for stage in range(len(kept)) if kept[stage]]


def places_where_made(convs: Sequence[Any]) -> list[Place]:
    """Return a place behind each step that makes what convolutions take, however it is cut and joined in between."""
    places = {}
    for conv in convs:
        todo = [conv.input_value(0)]
        while todo:
            output = todo.pop()
            node = output.get_node()
            if node.get_type_name() in _MOVES:
                joined = node.inputs() if node.get_type_name() == "Concat" else [node.input(0)]
                todo += [value.get_source_output() for value in joined]
            else:
                places[node.get_friendly_name()] = Place(output, list(output.get_target_inputs()))
    return list(places.values())


def convolutions(model: Graph) -> list[Any]:
    """Return the convolutions of a graph."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in ("Convolution", "GroupConvolution")]


def neighbours_together(weight: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Return, for each weight, how far it and its neighbour can pull a sum to one side.

    Args:
        weight: of a convolution.
        axis: of its inputs, of which 0 and 1 are neighbours, 2 and 3, and so on.

    Example:
        >>> neighbours_together(np.array([[3, 4, 5, -6, 7]], np.float32), 1)
        array([[7., 7., 6., 6., 7.]], dtype=float32)
    """
    count = weight.shape[axis]
    even = np.pad(weight, [(0, count % 2 if place == axis else 0) for place in range(weight.ndim)])
    pairs = even.reshape(*weight.shape[:axis], -1, 2, *weight.shape[axis + 1 :])
    together = np.maximum(pairs.clip(0).sum(axis + 1), -pairs.clip(None, 0).sum(axis + 1))
    return np.asarray(together.repeat(2, axis).take(range(count), axis))


def quantise(
    model: Graph,
    photos: Photos,
    *,
    kept: Sequence[str] = (),
    find: Callable[[Sequence[Any]], list[Place]] = places_where_made,
    reach: Reach = neighbours_together,
    tail: float = 0.0,
) -> Graph:
    """Return a graph with feature maps rounded at places, and the weights of convolutions as 8-bit integers.

    Args:
        model: a graph of `build_graph`, read by OpenVINO; it is not changed.
        photos: what tells the ranges, as the graph takes it.
        kept: how the names begin of convolutions that stay as they are.
        find: returns the places for some convolutions of a graph.
        reach: returns what of each weight must fit into 127 steps, of the weight and the axis of its inputs.
        tail: the share of a map's values at each end that is cut off.
    """
    model = model.clone()
    convs = [conv for conv in convolutions(model) if not conv.get_friendly_name().startswith(tuple(kept))]
    places = find(convs)
    _calibrate(model, places, photos, tail)
    for place in places:
        _round_map(place)
    for conv in convs:
        _round_weights(conv, reach)
    _halve_constants(model)
    model.validate_nodes_and_infer_types()
    return model


def _calibrate(model: Graph, places: list[Place], photos: Photos, tail: float) -> None:
    """Set the range of each place: that of its values, as the mean over batches; joined ones have the same."""
    import openvino

    measured = model.clone()
    steps = {node.get_friendly_name(): node for node in measured.get_ordered_ops()}
    measured.add_outputs(
        [steps[place.output.get_node().get_friendly_name()].output(place.output.get_index()) for place in places]
    )
    compiled = openvino.Core().compile_model(measured, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    bounds = []
    for batch in np.array_split(photos, -(-len(photos) // _BATCH)):
        results = compiled(batch)
        values = [results[number + len(model.outputs)].ravel()[::_SAMPLED] for number in range(len(places))]
        bounds.append([np.quantile(value, (tail, 1 - tail)) for value in values])
    for place, (low, high) in zip(places, np.mean(bounds, 0), strict=True):
        place.low, place.high = float(low), float(high)
    for joined in _joined_places(places):
        low, high = min(place.low for place in joined), max(place.high for place in joined)
        for place in joined:
            place.low, place.high = low, high


def _joined_places(places: list[Place]) -> list[list[Place]]:
    """Return the places in sets: those of one set meet in concatenations, which one scale spares a conversion."""
    sets: list[tuple[list[Place], set[str]]] = []
    for place in places:
        met, todo = set(), [target.get_node() for target in place.targets]
        while todo:
            node = todo.pop()
            if node.get_type_name() not in _MOVES or node.get_output_partial_shape(0).rank.get_length() != 4:
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


def _round_map(place: Place) -> None:
    """Round a map to 256 levels: from zero, or, where it has negative values, those of signed bytes."""
    from openvino import opset13

    low, high = 0.0, max(place.high, _SMALLEST)
    if place.low < 0:
        high = max(-place.low, high)
        low = -high * 128 / 127
    bounds = [opset13.constant(np.float32(bound)) for bound in (low, high, low, high)]
    rounded = opset13.fake_quantize(place.output, *bounds, 256)
    for target in place.targets:
        target.replace_source_output(rounded.output(0))


def _round_weights(conv: Any, reach: Reach) -> None:
    """Keep a convolution's weight as bytes and a scale for each output channel."""
    from openvino import opset13

    weight = _constant_of(conv.input_value(1))
    inputs = 2 if conv.get_type_name() == "GroupConvolution" else 1  # the axis of them
    largest = reach(weight, inputs).max(tuple(range(inputs, weight.ndim)), keepdims=True)
    scale = np.maximum(largest, np.float32(_SMALLEST)) / np.float32(_LARGEST)
    bytes_ = opset13.constant(np.rint(weight / scale).astype(np.int8))
    scaled = opset13.multiply(opset13.convert(bytes_, "f32"), opset13.constant(scale))
    conv.input(1).replace_source_output(scaled.output(0))


def _halve_constants(model: Graph) -> None:
    """Keep what is left of the weights in half precision, which OpenVINO does itself for graphs without roundings."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0).to_string() != "f32":
            continue
        if node.data.size < _HALVED or np.abs(node.data).max() > np.finfo(np.float16).max:
            continue
        single = opset13.convert(opset13.constant(node.data.astype(np.float16)), "f32")
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(single.output(0))


def _constant_of(output: Any) -> npt.NDArray[np.float32]:
    """Return a convolution's weight."""
    node = output.get_node()
    source = node if node.get_type_name() == "Constant" else node.input_value(0).get_node()  # a reshaped one
    return np.ascontiguousarray(source.data, np.float32).reshape(list(output.get_shape()))
