"""Layers whose kernels are generated, as OpenVINO computes them fastest: sums of products, and products of pixels.

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


def product_with_pixels(
    writer: GraphWriter, name: str, layer: MatmulPointwise, x: str, gates: list[str], bias: str
) -> str:
    """Write a map's pixels (B, H * W, G * I) times kernels (B, G * I, O), and a ReLU, as a map (B, H, W, O)."""
    outputs = layer.banks[0].shape[0]
    gates_B1O = [_rows(writer, f"{name}.gates.{group}", gate, layer.mixed, outputs) for group, gate in enumerate(gates)]
    banks_PIO = [bank_OPI.permute(1, 2, 0) for bank_OPI in layer.banks]
    if layer.summed:
        gates_B1O, banks_PIO = [list(itertools.chain(*gates_B1O))], [torch.cat(banks_PIO)]
    kernels = [
        _mixed(writer, f"{name}.mixed.{group}", of_bank, f"{name}.banks.{group}", bank_PIO)
        for group, (of_bank, bank_PIO) in enumerate(zip(gates_B1O, banks_PIO, strict=True))
    ]
    kernel = kernels[0] if len(kernels) == 1 else writer.op("Concat", kernels, f"{name}.kernel", {"axis": 1})
    inputs = sum(bank_PIO.shape[1] for bank_PIO in banks_PIO)
    y = writer.op("MatMul", [writer.pixels(x, inputs), kernel], f"{name}.product")
    y = writer.op("Relu", [writer.op("Add", [y, writer.row(bias)], f"{name}.linear")], f"{name}.relu")
    return writer.map_of(y, x, outputs, name)


def _rows(writer: GraphWriter, name: str, gate: str, mixed: int, outputs: int) -> list[str]:
    """Write gates (B, O * P) as P rows (B, 1, O)."""
    if mixed == 1:
        return [writer.row(gate)]
    apart = writer.op("Reshape", [gate, writer.integers(f"rows_{outputs}_{mixed}", (0, outputs, mixed))], name)
    turned = writer.op("Transpose", [apart], f"{name}.turned", {"perm": (0, 2, 1)})
    return writer.equal_parts(f"{name}.rows", turned, mixed, 1)


def sum_of_moved(writer: GraphWriter, name: str, layer: GainDepthwise, x: str, gains: list[str]) -> str:
    """Mix a depthwise layer's kernels; sum up its map, moved to where each tap has it, times that tap's weights.

    A map is moved sideways for the taps of a row, and the row's sum up or down: 4 copies for 3 x 3 taps. At stride s it
    is taken apart before, so that each tap has every s-th pixel.
    """
    convs = [conv for conv in layer.convs if isinstance(conv, FoldedConv)]
    padding, stride, size = convs[0].padding, convs[0].stride, convs[0].weight.shape[2]
    bank_PTC = torch.stack([conv.weight.flatten(1).T for conv in convs])
    pixel_axes = writer.integers("pixel_axes", (1, 2))
    gates_B11C = [writer.op("Unsqueeze", [gain, pixel_axes], f"{gain}.{name}.pixel") for gain in gains]
    kernel_B1TC = _mixed(writer, f"{name}.mixed", gates_B11C, f"{name}.bank", bank_PTC)
    taps_B11C = writer.equal_parts(f"{name}.taps", kernel_B1TC, size * size, 2)
    parts = _parts(writer, writer.channels_last(x, len(layer.bias)), stride)
    places = [divmod(tap - padding, stride) for tap in range(size)]  # of a tap: whole strides, and which part
    y = ""
    for number, (below, row) in enumerate(places):
        columns = [_moved(writer, parts[row][column], 0, -right) for right, column in places]
        taps = taps_B11C[number * size : (number + 1) * size]
        total = _products_summed(writer, f"{name}.row.{number}", list(zip(columns, taps, strict=True)))
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
    shape = writer.op("Shape", [x], f"{x}.shape")
    below = writer.op("Mul", [shape, writer.integers("below", (0, -1, -1, 0))], f"{x}.below")
    lacking = writer.op("Mod", [below, writer.integers(f"integer_{stride}", (stride,))], f"{x}.lacking")
    pads = writer.op("Concat", [writer.integers("no_pads", (0, 0, 0, 0)), lacking], f"{x}.pads", {"axis": 0})
    whole = writer.op("Pad", [x, pads], f"{x}.whole")
    ends, axes = writer.integers("ends", [np.iinfo(np.int64).max] * 2), writer.integers("pixel_axes", (1, 2))
    steps = writer.integers(f"steps_{stride}", (stride, stride))
    parts: list[list[str]] = []
    for row in range(stride):
        begins = [writer.integers(f"from_{row}_{column}", (row, column)) for column in range(stride)]
        parts.append([writer.op("Slice", [whole, begin, ends, axes, steps], f"{x}.{begin}") for begin in begins])
    return parts


def _moved(writer: GraphWriter, x: str, down: int, right: int) -> str:
    """Write a map (B, H, W, C) moved by some pixels; zeros come in, and what leaves it is dropped."""
    if (down, right) == (0, 0):
        return x
    pads = writer.integers(f"pads_{down}_{right}", (0, down, right, 0, 0, -down, -right, 0))
    return writer.op_once("Pad", [x, pads], f"{x}.moved_{down}_{right}")


def _mixed(writer: GraphWriter, name: str, gates: Sequence[str], bank: str, matrices: Tensor) -> str:
    """Write the sum of a bank's matrices, each times its gates: those of each photo as a row or as a column."""
    weights = [writer.weight(f"{bank}.{number}", matrix) for number, matrix in enumerate(matrices.unbind(0))]
    return _products_summed(writer, name, list(zip(gates, weights, strict=True)))


def _products_summed(writer: GraphWriter, name: str, factors: Sequence[tuple[str, str]]) -> str:
    """Write a sum of products, in pieces that are one pass each."""
    total = ""
    for first in range(0, len(factors), _ONE_PASS):
        piece = ""
        for number, pair in enumerate(factors[first : first + _ONE_PASS], first):
            product = writer.op("Mul", pair, f"{name}.scaled.{number}")
            piece = writer.op("Add", [piece, product], f"{name}.sum.{number}") if piece else product
        total = writer.op("Add", [total, piece], f"{name}.{first}") if total else piece
    return total
