"""The graphs of networks that `int8.py` measures: as they are exported, in floating point and in 8-bit integers.

And others to compare with: quantised at each input, or where NNCF does it; or with other weights: of all of 8 bits,
whatever the processor, or of 7.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inference import SIZE_PX, has_bfloat16, network_of, plain_twin

from weightnet.export.int8 import Photos, Place, int8_form, kept_stages, quantise
from weightnet.nn.fold import FoldForm

STUDIED = "shufflenet_v2_x1_0"  # the network in which every graph is tried


def variants_of(name: str, folder: Path) -> dict[str, tuple[Any, str]]:
    """Return a network's graphs, and in what precision their floating point is computed."""
    noise = np.random.default_rng(1).standard_normal((8, 3, SIZE_PX, SIZE_PX), np.float32)
    network = network_of(name)
    exported, _ = graph_of(network, folder, "auto")
    model, _ = graph_of(network, folder)
    low = "bf16" if has_bfloat16() else "f32"
    int8, whole = quantised(network, noise, folder), quantise(model, noise)
    variants = {"float32": (exported, "f32"), "bfloat16": (exported, low), "int8": (int8, low)}
    narrow = bool(kept_of(network))
    if narrow:
        variants["int8, all"] = (whole, low)
    if plain_twin(STUDIED) != plain_twin(name):
        return variants
    variants["int8, rest float32"] = (int8, "f32")
    if narrow:
        variants["int8, all, rest float32"] = (whole, "f32")
    variants["int8, at each input"] = (quantise(model, noise, find=places_at_inputs), low)
    if name == STUDIED:
        late, _ = graph_of(network, folder, late_gain=True)
        variants["int8, late gain"] = (quantise(late, noise), low)
    by_nncf = placed_by_nncf(model, noise)
    return variants if by_nncf is None else {**variants, "int8, placed by NNCF": (by_nncf, low)}


def graph_of(
    network: Any, folder: Path, form: FoldForm = "feature", *, openvino: bool = True, late_gain: bool = False
) -> tuple[Any, Path]:
    """Return the graph of a network's folded form, for OpenVINO or ONNX Runtime, and its file."""
    from openvino import Core

    import weightnet
    from weightnet.export.graph import build_graph
    from weightnet.nn.folded_layers import GainDepthwise

    folded = weightnet.fold(network, form=form, select=openvino)
    for stage in folded.stages if late_gain else ():
        for block in stage.blocks:  # type: ignore[union-attr]
            block.early_gain = False
            block.conv2 = GainDepthwise(block.conv2.weight, block.conv2.bias, stride=block.conv2.stride)
    file = folder / f"graph_{len(list(folder.iterdir()))}.onnx"
    file.write_bytes(build_graph(folded, ["logits"], openvino=openvino).SerializeToString())
    return Core().read_model(file), file


def quantised(network: Any, photos: Photos, folder: Path, tail: float = 0.0) -> Any:
    """Return the graph that is exported in 8-bit integers."""
    model, _ = graph_of(network, folder, int8_form(network.spec))
    return quantise(model, photos, kept=kept_of(network), tail=tail)


def kept_of(network: Any) -> list[str]:
    """Return how the names begin of what that graph keeps in floating point."""
    import weightnet

    return kept_stages(weightnet.fold(network, form=int8_form(network.spec)))


def places_at_inputs(convs: Sequence[Any]) -> list[Place]:
    """Return a place before each convolution; those that take the same share it."""
    outputs: dict[tuple[str, int], tuple[Any, list[Any]]] = {}
    for conv in convs:
        output = conv.input_value(0)
        key = (output.get_node().get_friendly_name(), output.get_index())
        outputs.setdefault(key, (output, []))[1].append(conv.input(0))
    return [Place(output, targets) for output, targets in outputs.values()]


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


def onnxruntime_files(network: Any, photos: Photos, folder: Path) -> dict[str, Path]:
    """Return the files of a network for ONNX Runtime, in float32 and quantised by its own tool."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": photo[None]} for photo in photos])

        def get_next(self) -> Any:
            return next(self.batches, None)

    _, file = graph_of(network, folder, openvino=False)
    prepared = file.with_stem(f"{file.stem}_prepared")
    quantization.quant_pre_process(file, prepared, skip_symbolic_shape=True)
    files = {"onnxruntime float32": prepared}
    everything = ["Conv", "Mul", "Add", "Concat", "Split", "Slice", "MaxPool", "Relu"]
    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    for variant, operators in (("onnxruntime int8", ["Conv"]), ("onnxruntime int8, all", everything)):
        files[variant] = file.with_stem(f"{file.stem} {variant}")
        kinds["op_types_to_quantize"] = operators
        quantization.quantize_static(prepared, files[variant], Reader(), per_channel=True, **kinds)
    return files


def has_vnni() -> bool:
    """Return whether the processor sums up products of 8-bit integers in 32 bits."""
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def each_of_8_bits(weight: Any, axis: int) -> Any:
    """Let each weight have all of its 8 bits."""
    return np.abs(weight)


def each_of_7_bits(weight: Any, axis: int) -> Any:
    """Let each weight have 7 bits, of which two fit into 8."""
    return 2 * np.abs(weight)
