"""Layers of generated kernels, and means, as OpenVINO computes them fastest: sums of products, and of moved maps.

Legend: as in `weightnet.nn.functional`; T is a kernel's taps.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weightnet.export.graph_writer import GraphWriter
from weightnet.nn.folded_layers import FoldedConv, GainDepthwise, MatmulPointwise

# A sum of so many products is one pass in OpenVINO: a pass takes at most twelve maps, gains and results.
_ONE_PASS = 4
# OpenVINO's ReduceMean takes so many channels at once, and those left over one by one, up to four times as long.
_MEANS_AT_ONCE = 16
# Maps of photos of 224 px are made of whole squares of so many pixels a side.
_SQUARE = 7


def product_with_pixels(
    writer: GraphWriter, name: str, layer: MatmulPointwise, x: str, gates: list[str], bias: str
) -> str:
    """Write a map's pixels (B, H * W, G * I) times kernels (B, G * I, O), and a ReLU, as a map (B, H, W, O)."""
    outputs = layer.banks[0].shape[0]
    gates_B11O = [_rows(writer, f"{name}.gates.{group}", gate, layer.mixed) for group, gate in enumerate(gates)]
    banks_PIO = [bank_OPI.permute(1, 2, 0) for bank_OPI in layer.banks]
    if layer.summed:
        gates_B11O, banks_PIO = [list(itertools.chain(*gates_B11O))], [torch.cat(banks_PIO)]
    kernels = [
        _mixed(writer, f"{name}.mixed.{group}", of_bank, f"{name}.banks.{group}", bank_PIO)
        for group, (of_bank, bank_PIO) in enumerate(zip(gates_B11O, banks_PIO, strict=True))
    ]
    kernel = kernels[0] if len(kernels) == 1 else writer.op("Concat", kernels, f"{name}.joined", {"axis": 2})
    kernel = writer.op("Squeeze", [kernel, writer.integers("pixels_axis", (1,))], f"{name}.kernel")
    y = writer.op("MatMul", [writer.pixels(x), kernel], f"{name}.product")
    y = writer.op("Relu", [writer.op("Add", [y, writer.row(bias)], f"{name}.linear")], f"{name}.relu")
    return writer.map_of(y, x, outputs, name)


def mean_of_map(writer: GraphWriter, name: str, x: str) -> str:
    """Write the means (B, C) of a map; over pixels as one axis, where it has them so, in less time than over two."""
    by_pixels = x in writer.last
    pixels = writer.pixels(x) if by_pixels else x
    axes = writer.integers("pixels_axis", (1,)) if by_pixels else writer.integers("spatial_axes", (2, 3))
    if writer.channels[x] % _MEANS_AT_ONCE == 0:
        return writer.op("ReduceMean", [pixels, axes], name, {"keepdims": 0})
    return (_mean_by_product if by_pixels else _mean_of_squares)(writer, name, pixels, axes)


def _mean_by_product(writer: GraphWriter, name: str, pixels: str, axis: str) -> str:
    """Write the means (B, C) of pixels (B, H * W, C), by their product with a row of ones."""
    from onnx import TensorProto

    count = writer.op("Shape", [pixels], f"{name}.count", {"start": 1, "end": 2})
    shape = writer.op("Concat", [writer.integers("one_row", (1, 1)), count], f"{name}.row", {"axis": 0})
    ones = writer.op("Expand", [writer.constant("one", np.ones(1, np.float32)), shape], f"{name}.ones")
    total = writer.op("Squeeze", [writer.op("MatMul", [ones, pixels], f"{name}.product"), axis], f"{name}.sum")
    return writer.op("Div", [total, writer.op("Cast", [count], f"{name}.pixels", {"to": TensorProto.FLOAT})], name)


def _mean_of_squares(writer: GraphWriter, name: str, x: str, axes: str) -> str:
    """Write the means (B, C) of a map (B, C, H, W), by the means of squares of its pixels."""
    from onnx import TensorProto

    window = {"kernel_shape": [_SQUARE] * 2, "strides": [_SQUARE] * 2}
    squares = writer.op("AveragePool", [_filled(writer, x, (2, 3), _SQUARE)], f"{name}.squares", window)
    total = writer.op("ReduceSum", [squares, axes], f"{name}.sum", {"keepdims": 0})
    size = writer.op("Shape", [x], f"{name}.size", {"start": 2})
    count = writer.op("ReduceProd", [size], f"{name}.count")
    pixels = writer.op("Cast", [count], f"{name}.pixels", {"to": TensorProto.FLOAT})
    area = writer.constant("square", np.array([[_SQUARE**2]], np.float32))
    return writer.op("Mul", [total, writer.op("Div", [area, pixels], f"{name}.share")], name)


def _rows(writer: GraphWriter, name: str, gate: str, mixed: int) -> list[str]:
    """Write gates (B, P * O) as P rows (B, 1, 1, O)."""
    rows = [gate] if mixed == 1 else writer.equal_parts(f"{name}.rows", gate, mixed, 1)
    return [_pixel(writer, row) for row in rows]


def _pixel(writer: GraphWriter, values: str) -> str:
    """Write values (B, C) as maps (B, 1, 1, C) of one pixel."""
    return writer.op_once("Unsqueeze", [values, writer.integers("pixel_axes", (1, 2))], f"{values}.pixel")


def sum_of_moved(writer: GraphWriter, name: str, layer: GainDepthwise, x: str, gains: list[str]) -> str:
    """Mix a depthwise layer's kernels; sum up its map, moved to where each tap has it, times that tap's weights.

    A map is moved sideways for the taps of a row, and the row's sum up or down: 4 copies for 3 x 3 taps. At stride s it
    is taken apart before, so that each tap has every s-th pixel.
    """
    convs = [conv for conv in layer.convs if isinstance(conv, FoldedConv)]
    padding, stride, size = convs[0].padding, convs[0].stride, convs[0].weight.shape[2]
    bank_PTC = torch.stack([conv.weight.flatten(1).T for conv in convs])
    gates_B11C = [_pixel(writer, gain) for gain in gains]
    kernel_B1TC = _mixed(writer, f"{name}.mixed", gates_B11C, f"{name}.bank", bank_PTC)
    taps_B11C = writer.equal_parts(f"{name}.taps", kernel_B1TC, size * size, 2)
    parts = _parts(writer, writer.channels_last(x), stride)
    places = [divmod(tap - padding, stride) for tap in range(size)]  # of a tap: whole strides, and which part
    y = ""
    for number, (below, row) in enumerate(places):
        columns = [_moved(writer, parts[row][column], 0, -right) for right, column in places]
        taps = taps_B11C[number * size : (number + 1) * size]
        total = ""
        for place, pair in enumerate(zip(columns, taps, strict=True)):
            product = writer.op("Mul", pair, f"{name}.row.{number}.scaled.{place}")
            total = writer.op("Add", [total, product], f"{name}.row.{number}.sum.{place}") if total else product
        moved = _moved(writer, total, -below, 0)
        y = writer.op("Add", [y, moved], f"{name}.rows.{number}") if y else moved
    writer.last.add(name)
    return writer.op("Add", [y, writer.bias(f"{name}.bias", layer.bias)], name)


def _parts(writer: GraphWriter, x: str, stride: int) -> list[list[str]]:
    """Write every s-th pixel of a map (B, H, W, C), for each row and column to begin with.

    All parts are as large: rows and columns of zeros fill the map up to a multiple of s.
    """
    if stride == 1:
        return [[x]]
    whole = _filled(writer, x, (1, 2), stride)
    ends, axes = writer.integers("ends", [np.iinfo(np.int64).max] * 2), writer.integers("pixel_axes", (1, 2))
    steps = writer.integers(f"steps_{stride}", (stride, stride))
    parts: list[list[str]] = []
    for row in range(stride):
        begins = [writer.integers(f"from_{row}_{column}", (row, column)) for column in range(stride)]
        parts.append([writer.op("Slice", [whole, begin, ends, axes, steps], f"{x}.{begin}") for begin in begins])
    return parts


def _filled(writer: GraphWriter, x: str, axes: tuple[int, int], multiple: int) -> str:
    """Write a map with zeros behind its rows and columns, up to a multiple of so many; `axes` are theirs."""
    shape = writer.op("Shape", [x], f"{x}.shape")
    signs = writer.integers(f"below_{axes}", [-(axis in axes) for axis in range(4)])
    below = writer.op("Mul", [shape, signs], f"{x}.below")
    lacking = writer.op("Mod", [below, writer.integers(f"integer_{multiple}", (multiple,))], f"{x}.lacking")
    pads = writer.op("Concat", [writer.integers("no_pads", (0, 0, 0, 0)), lacking], f"{x}.pads", {"axis": 0})
    return writer.op("Pad", [x, pads], f"{x}.whole")


def _moved(writer: GraphWriter, x: str, down: int, right: int) -> str:
    """Write a map (B, H, W, C) moved by some pixels; zeros come in, and what leaves it is dropped."""
    if (down, right) == (0, 0):
        return x
    pads = writer.integers(f"pads_{down}_{right}", (0, down, right, 0, 0, -down, -right, 0))
    return writer.op_once("Pad", [x, pads], f"{x}.moved_{down}_{right}")


def _mixed(writer: GraphWriter, name: str, gates: Sequence[str], bank: str, matrices: Tensor) -> str:
    """Write the sum (B, 1, I, O) of a bank's matrices (P, I, O), each times its gates, a row (B, 1, 1, O).

    With three axes OpenVINO would compute it in blocks of 16 rows, and bring them into order again. Where it takes more
    than one pass, each goes on from the sum before it, as long as that comes with other axes: with these OpenVINO would
    try to join both passes, and, as that is too much for one, begin a third for their sum.
    """
    total, axis = "", writer.integers("pixels_axis", (1,))
    for number, (gate, matrix) in enumerate(zip(gates, matrices.unbind(0), strict=True)):
        passes_behind = (len(gates) - 1) // _ONE_PASS - number // _ONE_PASS
        apart = passes_behind % 2 == 1  # (B, 1, 1, I, O)
        if apart:
            gate = writer.op_once("Unsqueeze", [gate, axis], f"{gate}.apart")
        weight = writer.weight(f"{bank}.{number}", matrix[None, None])
        product = writer.op("Mul", [gate, weight], f"{name}.scaled.{number}")
        total = writer.op("Add", [total, product], f"{name}.sum.{number}") if total else product
        if passes_behind and (number + 1) % _ONE_PASS == 0:
            total = writer.op("Squeeze" if apart else "Unsqueeze", [total, axis], f"{name}.passed.{number}")
    return total
