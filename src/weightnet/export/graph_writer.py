"""What an ONNX graph is written with: its nodes and constants, and maps in the layouts that layers take."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


class GraphWriter:
    """Writes the nodes and constants of a graph; values are known by their names.

    Args:
        half_weights: whether weights are kept in half precision; they are computed with in single precision all the
            same.
        openvino: whether OpenVINO is to run the graph, not ONNX Runtime.

    Maps are (B, C, H, W); `last` has the names of those that are (B, H, W, C), and `channels` has the number C of each.
    """

    def __init__(self, *, half_weights: bool, openvino: bool) -> None:
        self.half_weights, self.openvino = half_weights, openvino
        self.last: set[str] = set()
        self.channels: dict[str, int] = {}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: set[str] = set()

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

    def op_once(self, kind: str, inputs: Sequence[str], name: str, attributes: dict[str, Any] | None = None) -> str:
        """Write an operator, where it is not written yet, and return its name."""
        if name not in self._known:
            self._known.add(name)
            self.op(kind, inputs, name, attributes)
        return name

    def equal_parts(self, name: str, x: str, parts: int, axis: int) -> list[str]:
        """Write the equal parts of a value and return their names."""
        outputs = [f"{name}.{part}" for part in range(parts)]
        return self.ops("Split", [x], name, outputs, {"axis": axis, "num_outputs": parts})

    def weight(self, name: str, weight: Tensor) -> str:
        """Write a weight, in half precision where that is asked for, and return its name."""
        if not self.half_weights:
            return self.constant(name, weight.float().numpy(force=True))
        from onnx import TensorProto

        stored = self.constant(f"{name}.half", weight.half().numpy(force=True))
        return self.op_once("Cast", [stored], name, {"to": TensorProto.FLOAT})

    def bias(self, name: str, bias: Tensor, *, shape: tuple[int, ...] = (-1,)) -> str:
        """Write what is added to a layer's output, in single precision, and return its name."""
        return self.constant(name, bias.float().reshape(shape).numpy(force=True))

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

    def per_channel(self, values: str) -> str:
        """Write values (B, O) as (B, O, 1, 1), to scale feature maps or be added to them, and return their name."""
        return self.op_once("Unsqueeze", [values, self.integers("spatial_axes", (2, 3))], f"{values}.per_channel")

    def row(self, values: str) -> str:
        """Write values (B, O) as (B, 1, O), one row for each photo, and return their name."""
        return self.op_once("Unsqueeze", [values, self.integers("pixels_axis", (1,))], f"{values}.row")

    def channels_first(self, x: str) -> str:
        """Write a map as (B, C, H, W), where it is not, and return its name."""
        if x not in self.last:
            return x
        return self.op_once("Transpose", [x], f"{x}.channels_first", {"perm": (0, 3, 1, 2)})

    def channels_last(self, x: str) -> str:
        """Write a map as (B, H, W, C), where it is not, and return its name.

        It goes by way of the pixels. Without them OpenVINO keeps the map as it lies and takes its axes in another
        order, which makes all operators on it several times as slow.
        """
        return x if x in self.last else self.map_of(self.pixels(x), x, self.channels[x], f"{x}.channels_last")

    def has_pixels(self, x: str) -> bool:
        """Return whether a map's pixels are at hand."""
        return x in self.last or f"{x}.pixels" in self._known

    def pixels(self, x: str) -> str:
        """Write a map as (B, H * W, C) and return its name."""
        last = x if x in self.last else self.op_once("Transpose", [x], f"{x}.turned", {"perm": (0, 2, 3, 1)})
        shape = self.integers(f"pixels_{self.channels[x]}", (0, -1, self.channels[x]))
        return self.op_once("Reshape", [last, shape], f"{x}.pixels")

    def map_of(self, pixels: str, x: str, channels: int, name: str) -> str:
        """Write pixels (B, H * W, C) as a map (B, H, W, C) of the height and width of the map x; return its name."""
        bounds = {"start": 1, "end": 3} if x in self.last else {"start": 2, "end": 4}
        size = self.op_once("Shape", [x], f"{x}.size", bounds)
        sides = [self.integers("batch", (0,)), size, self.integers(f"channels_{channels}", (channels,))]
        shape = self.op_once("Concat", sides, f"{x}.size.{channels}", {"axis": 0})
        self.last.add(name)
        return self.op("Reshape", [pixels, shape], name)
