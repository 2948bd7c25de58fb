"""Single layers of the deploy form, and how each is made of a trained layer and its batch norm.

Legend: as in `weightnet.nn.functional`. Lists of tensors run over the G blocks of input channels. What is folded is
computed in double precision; `fold` converts the whole network at the end.

Source: the identities are derived in docs/static.md.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightnet.nn.functional import as_pair
from weightnet.nn.layers import WeightNet2d


class FoldedConv(nn.Module):
    """A static convolution, padded to keep the size at stride 1.

    Shape: as `torch.nn.Conv2d`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias)
        self.stride, self.padding, self.groups = stride, weight.shape[2] // 2, groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class GainPointwise(nn.Module):
    """A generated 1x1 layer and a ReLU, as static convolutions, P for each block of inputs, scaled and summed.

    Shape: G inputs (B, I, H, W), G * P gains (B, O) and a bias (1, O) give (B, O, H, W), times a factor (B, O) that is
    not negative where one is given.
    """

    def __init__(self, banks: list[Tensor]) -> None:
        super().__init__()
        self.mixed = banks[0].shape[1]
        self.convs = nn.ModuleList(
            FoldedConv(bank_OI[..., None, None], None) for bank_OPI in banks for bank_OI in bank_OPI.unbind(1)
        )

    def forward(self, xs: list[Tensor], gains: Sequence[Tensor], bias: Tensor, factor: Tensor | None = None) -> Tensor:
        if factor is not None:  # before the ReLU, where it takes no pass over a map
            gains, bias = [gain * factor for gain in gains], bias * factor
        y = _per_channel(bias)
        for number, (conv, gain) in enumerate(zip(self.convs, gains, strict=True)):
            y = y + conv(xs[number // self.mixed]) * _per_channel(gain)
        return F.relu(y)


class MatmulPointwise(nn.Module):
    """A generated 1x1 layer and a ReLU, as a batched matrix product by kernels mixed from banks.

    The banks of the blocks of inputs give pieces of a kernel, to be joined, or to be summed up where each bank is as
    wide as the whole input, with zeros for the other blocks.

    Shape: one input (B, G * I, H, W), G gates (B, P * O) and a bias (1, O) give (B, O, H, W), times a factor (B, O)
    that is not negative where one is given, which goes with P = 1.
    """

    def __init__(self, banks: list[Tensor], *, summed: bool) -> None:
        super().__init__()
        self.banks = nn.ParameterList(bank_OPI.contiguous() for bank_OPI in banks)
        self.mixed, self.summed = banks[0].shape[1], summed

    def forward(self, xs: list[Tensor], gates: Sequence[Tensor], bias: Tensor, factor: Tensor | None = None) -> Tensor:
        (x,) = xs
        if factor is not None:
            gates, bias = [gate * factor for gate in gates], bias * factor
        kernels = []
        for bank_OPI, gate in zip(self.banks, gates, strict=True):
            outputs, mixed, _ = bank_OPI.shape
            if mixed == 1:
                kernels.append(gate[:, :, None] * bank_OPI[:, 0])
            else:
                kernels.append(torch.einsum("bpo,opi->boi", gate.reshape(gate.shape[0], mixed, outputs), bank_OPI))
        kernel = sum(kernels[1:], kernels[0]) if self.summed else torch.cat(kernels, 2)
        y = kernel @ x.flatten(2) + bias[..., None]
        return F.relu(y).reshape(x.shape[0], bias.shape[1], x.shape[2], x.shape[3])


class GainDepthwise(nn.Module):
    """A generated depthwise layer as P static ones, scaled by gains and summed.

    Shape: (B, C, H, W) and P gains (B, C) give (B, C, H / stride, W / stride).
    """

    def __init__(self, bank_CPkk: Tensor, bias: Tensor, *, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            FoldedConv(bank_Ckk[:, None], None, stride=stride, groups=len(bank_Ckk)) for bank_Ckk in bank_CPkk.unbind(1)
        )
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, gains: Sequence[Tensor]) -> Tensor:
        y = _per_channel(self.bias[None])
        for conv, gain in zip(self.convs, gains, strict=True):
            y = y + conv(x) * _per_channel(gain)
        return y


class ChannelSelect(nn.Module):
    """A map that has each channel from either of two.

    Shape: two maps (B, C, H, W) give (B, C, H, W).

    Args:
        mask: for each channel whether it is the first map's.
    """

    def __init__(self, mask: list[bool]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(mask))
        self.mask: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.mask[:, None, None], x, y)


def fold_conv(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, *, inputs: list[int] | None = None, outputs: list[int] | None = None
) -> FoldedConv:
    scale, shift = _affine(norm)
    weight, bias = _scaled(conv.weight, scale), shift
    if conv.bias is not None:
        bias = shift + scale * conv.bias
    if inputs is not None:
        weight = weight[:, inputs]
    if outputs is not None:
        weight, bias = weight[outputs], bias[outputs]
    groups = 1 if conv.groups == 1 else len(weight)
    return FoldedConv(weight, bias, stride=conv.stride[0], groups=groups)


def fold_pointwise(
    layer: WeightNet2d,
    norm: nn.BatchNorm2d,
    channels: list[list[int]],
    *,
    matmul: bool,
    outputs: list[int] | None = None,
) -> tuple[nn.Module, nn.Parameter]:
    """Return a generated 1x1 layer and its bias; `channels` are its input channels, for each tensor that it takes.

    These are the blocks of inputs, in feature form. A product takes one tensor, with its channels in any order.
    """
    scale, shift = _affine(norm)
    bank_OGPI = _scaled(layer.bank(), scale).flatten(3)
    if outputs is not None:
        bank_OGPI, shift = bank_OGPI[outputs], shift[outputs]
    _, blocks, mixed, width = bank_OGPI.shape
    weight_OPC = bank_OGPI.transpose(1, 2).flatten(2)
    if not matmul:
        return GainPointwise([weight_OPC[:, :, indices] for indices in channels]), nn.Parameter(shift[None])
    (inputs,) = channels
    block_of = [index // width for index in inputs]
    weight_OPI = weight_OPC[:, :, inputs]
    summed = mixed == 1 or block_of != sorted(block_of)  # for one kernel summing up costs less than joining
    if summed:
        belongs = torch.tensor(block_of, device=weight_OPI.device)
        banks = [weight_OPI * (belongs == block) for block in range(blocks)]
    else:
        banks = list(torch.split(weight_OPI, width, 2))
    return MatmulPointwise(banks, summed=summed), nn.Parameter(shift[None])


def fold_depthwise(
    layer: WeightNet2d, norm: nn.BatchNorm2d, channels: list[int] | None = None, *, static: bool = False
) -> FoldedConv | GainDepthwise:
    """Return a generated depthwise layer; a static one where its gain is applied before it."""
    scale, shift = _affine(norm)
    bank_CPkk = _scaled(layer.bank(), scale)[:, 0, :, 0]
    if channels is not None:
        bank_CPkk, shift = bank_CPkk[channels], shift[channels]
    stride = as_pair(layer.stride)[0]
    if static:
        return FoldedConv(bank_CPkk, shift, stride=stride, groups=len(bank_CPkk))
    return GainDepthwise(bank_CPkk, shift, stride=stride)


def fold_reduce(conv: nn.Conv2d, pooled: list[int]) -> nn.Linear:
    """Return the layer that gates begin with, of means in the order of `pooled`; means at -1 are not taken."""
    weight, used = conv.weight.flatten(1), torch.tensor(pooled, device=conv.weight.device) >= 0
    return linear(weight[:, pooled] * used, conv.bias)


def gate_rows(
    layer: WeightNet2d, outputs: list[int] | None = None, *, together: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of `wn_fc1` that make the gates of a layer, as weight and bias.

    There are G * P gates, those of the first block of inputs first; so many come together, (together * O, S).
    """
    shape = (layer.out_channels, layer.blocks, layer.kernels_per_block)
    weight_OGPS = layer.wn_fc1.weight.reshape(*shape, -1)
    bias_OGP = cast(Tensor, layer.wn_fc1.bias).reshape(shape)
    if outputs is not None:
        weight_OGPS, bias_OGP = weight_OGPS[outputs], bias_OGP[outputs]
    weights, biases = (torch.split(rows.flatten(1, 2), together, 1) for rows in (weight_OGPS, bias_OGP))
    pairs = zip(weights, biases, strict=True)
    return [(weight.transpose(0, 1).flatten(0, 1), bias.T.flatten()) for weight, bias in pairs]


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of a batch norm that stands still, in double precision."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = norm.weight.double() / (variance + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * mean


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a fully connected layer of these parameters; they are copied."""
    assert bias is not None  # all layers that are folded have one
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


def _per_channel(values_BC: Tensor) -> Tensor:
    return values_BC[:, :, None, None]
