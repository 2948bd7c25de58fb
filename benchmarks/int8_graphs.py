"""Other networks in 8-bit integers for `int8.py` to compare with: quantised at each input, or where NNCF does it.

Or with other weights: of all of 8 bits, whatever the processor, or of 7.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from weightnet.export.int8 import Photos, Place


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


def each_of_8_bits(weight: Any, axis: int) -> Any:
    """Let each weight have all of its 8 bits."""
    return np.abs(weight)


def each_of_7_bits(weight: Any, axis: int) -> Any:
    """Let each weight have 7 bits, of which two fit into 8."""
    return 2 * np.abs(weight)
