"""The maths of a generated convolution, apart from any parameters: three exact forms of one layer.

A WeightNet layer convolves every sample with a kernel of its own,

    W[o, block g] = sum_p a[o, g, p] * V[o, g, p]          y = W * x

where `a` are the sample's gates (sigmoid outputs, one set per sample), `V` is a learned bank of kernels, `block g` is
the g-th of `G` equal parts of the input channels, and p runs over the `r = M / G` kernels that are mixed.

Legend: B batch, C input channels, O output channels, G blocks of input channels, P = r kernels per block, I = C / G
channels per block (1 for depthwise layers, where G = 1 and O = C), k kernel size, H W height and width, N pixels,
K = C * kh * kw numbers of a kernel.

Every form keeps the memory layout of its input (channels first or last). docs/layer.md derives and compares the forms.

Source: Ma et al., ECCV 2020, section 3 (arXiv 2007.11823); megvii-model/WeightNet, class `WeightNet`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

IntPair = int | tuple[int, int]


def generate_kernels(
    a_BOGP: Float[Tensor, "B O G P"], bank_OGPIkk: Float[Tensor, "O G P I kh kw"]
) -> Float[Tensor, "B O C kh kw"]:
    """Mix the bank of kernels by each sample's gates.

    Args:
        a_BOGP: gates, between 0 and 1 when they come from a sigmoid.
        bank_OGPIkk: the learned kernels.

    Shape: gates (B, O, G, P) and bank (O, G, P, I, kh, kw) give kernels (B, O, G * I, kh, kw).

    Returns: one convolution kernel per sample.

    Example:
        >>> generate_kernels(torch.ones(2, 4, 1, 3), torch.ones(4, 1, 3, 5, 1, 1))[0, 0, 0].item()
        3.0

    Source: arXiv 2007.11823, section 3.3 (the grouped fully-connected layer).
    """
    if a_BOGP.shape[-1] == 1:  # one kernel per block: a product, with nothing to sum
        kernels = a_BOGP[..., None, None] * bank_OGPIkk[:, :, 0]
    else:
        kernels = torch.einsum("bogp,ogpihw->bogihw", a_BOGP, bank_OGPIkk)
    return kernels.flatten(2, 3)


def weightnet_conv2d_reference(
    x_BCHW: Float[Tensor, "B C H W"],
    a_BOGP: Float[Tensor, "B O G P"],
    bank_OGPIkk: Float[Tensor, "O G P I kh kw"],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    depthwise: bool = False,
) -> Float[Tensor, "B O H_out W_out"]:
    """Convolve each sample with its own kernel, as one convolution with groups = batch: the plain form, as published.

    Args:
        x_BCHW: input.
        a_BOGP: gates of each sample.
        bank_OGPIkk: the learned kernels.
        stride: step of the convolution in pixels.
        padding: zeros added at each side, in pixels.
        dilation: distance of kernel taps in pixels.
        depthwise: True where each channel has its own kernel (O = C, G = 1, I = 1).

    Shape: x (B, C, H, W) gives (B, O, H', W'), H' and W' as `torch.nn.Conv2d` has them; B may be 0.

    Returns: the convolved samples.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_reference(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: megvii-model/WeightNet, `WeightNet.forward`.
    """
    kernels = generate_kernels(a_BOGP, bank_OGPIkk)
    batch, groups = len(x_BCHW), x_BCHW.shape[1] if depthwise else 1
    if batch == 0:  # groups = 0 is not a convolution; any kernel gives the right empty output
        return _conv(x_BCHW, kernels.sum(0), stride, padding, dilation, groups)
    samples_1XHW = x_BCHW.reshape(1, -1, *x_BCHW.shape[2:])
    y_1XHW = _conv(samples_1XHW, kernels.flatten(0, 1), stride, padding, dilation, batch * groups)
    return _laid_out_like(x_BCHW, y_1XHW.reshape(batch, -1, *y_1XHW.shape[2:]))


def weightnet_conv2d_feature(
    x_BCHW: Float[Tensor, "B C H W"],
    a_BOGP: Float[Tensor, "B O G P"],
    bank_OGPIkk: Float[Tensor, "O G P I kh kw"],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    depthwise: bool = False,
) -> Float[Tensor, "B O H_out W_out"]:
    """The same layer as static convolutions by the learned kernels, whose outputs are scaled by the gates and summed.

    Convolution is linear in its kernel, so the gates move from the kernels to the features. For r = 1 the multiply-adds
    are those of an ordinary convolution and its gains; for larger r they are r times as many. Arguments, shapes and
    result are those of `weightnet_conv2d_reference`.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_feature(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: the identity is derived in docs/layer.md.
    """
    groups = x_BCHW.shape[1] if depthwise else 1
    blocks, mixed = bank_OGPIkk.shape[1:3]
    if blocks == mixed == 1:
        features = _conv(x_BCHW, bank_OGPIkk.flatten(0, 2), stride, padding, dilation, groups)
        return features * a_BOGP.flatten(1)[:, :, None, None]
    inputs, y_BOHW = x_BCHW.chunk(blocks, 1), None
    gates_and_kernels = zip(a_BOGP.flatten(2).unbind(2), bank_OGPIkk.flatten(1, 2).unbind(1), strict=True)
    for number, (a_BO, kernel_OIkk) in enumerate(gates_and_kernels):
        features = _conv(inputs[number // mixed], kernel_OIkk, stride, padding, dilation, groups)
        gains = a_BO[:, :, None, None]
        y_BOHW = features * gains if y_BOHW is None else torch.addcmul(y_BOHW, features, gains)
    assert y_BOHW is not None  # G and P are at least 1
    return y_BOHW


def weightnet_conv2d_matmul(
    x_BCHW: Float[Tensor, "B C H W"],
    a_BOGP: Float[Tensor, "B O G P"],
    bank_OGPIkk: Float[Tensor, "O G P I kh kw"],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    depthwise: bool = False,
) -> Float[Tensor, "B O H_out W_out"]:
    """The same layer as a batched matrix product of each sample's kernel with the columns of its input.

    Arguments, shapes and result are those of `weightnet_conv2d_reference`.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_matmul(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: docs/layer.md; convolution as a matrix product is textbook.
    """
    kernel_size = (bank_OGPIkk.shape[4], bank_OGPIkk.shape[5])
    size = conv_output_size(x_BCHW.shape[2:], kernel_size, stride, padding, dilation)
    batch, out_channels = a_BOGP.shape[:2]
    if kernel_size == (1, 1) and as_pair(padding) == (0, 0):  # the columns are the pixels themselves
        step_h, step_w = as_pair(stride)
        columns_BKN = x_BCHW[:, :, ::step_h, ::step_w].flatten(2)
    else:
        columns_BKN = F.unfold(x_BCHW, kernel_size, dilation, padding, stride)
    if depthwise:
        taps, pixels = kernel_size[0] * kernel_size[1], size[0] * size[1]
        kernels_BO1T = generate_kernels(a_BOGP, bank_OGPIkk).flatten(2)[:, :, None]
        y_BON = kernels_BO1T @ columns_BKN.reshape(batch, out_channels, taps, pixels)
    elif _is_channels_last(x_BCHW):
        y_BNO = columns_BKN.transpose(1, 2) @ _kernel_columns(a_BOGP, bank_OGPIkk)
        return y_BNO.reshape(batch, *size, out_channels).permute(0, 3, 1, 2)
    else:
        y_BON = _kernel_columns(a_BOGP, bank_OGPIkk).transpose(1, 2) @ columns_BKN
    return _laid_out_like(x_BCHW, y_BON.reshape(batch, out_channels, *size))


def conv_output_size(
    size: tuple[int, ...], kernel_size: IntPair, stride: IntPair, padding: IntPair, dilation: IntPair
) -> tuple[int, int]:
    """Return the height and width, in pixels, of a convolution's output.

    Example:
        >>> conv_output_size((224, 225), 3, 2, 1, 1)
        (112, 113)

    Source: the formula of `torch.nn.Conv2d`.
    """
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            size, as_pair(kernel_size), as_pair(stride), as_pair(padding), as_pair(dilation), strict=True
        )
    )
    return height, width


def linear_1x1(
    x_BC: Float[Tensor, "B C"], weight_OC11: Float[Tensor, "O C 1 1"], bias_O: Float[Tensor, " O"] | None
) -> Float[Tensor, "B O"]:
    """Apply a 1x1 convolution's parameters to vectors: the fully connected layer that a convolution of one pixel is.

    Example:
        >>> linear_1x1(torch.ones(2, 3), torch.ones(4, 3, 1, 1), torch.ones(4))[0, 0].item()
        4.0
    """
    return F.linear(x_BC, weight_OC11.flatten(1), bias_O)


def split_shuffled(x_BCHW: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor]:
    """Split channels into the even ones and the odd ones: the channel shuffle of ShuffleNetV2 at a block's entry.

    Shape: (B, C, H, W) with even C gives two of (B, C / 2, H, W).

    Returns: the channels that pass through, as a view, and those that enter the branch, as a copy.

    Example:
        >>> even, odd = split_shuffled(torch.arange(4.0).reshape(1, 4, 1, 1))
        >>> even.flatten().tolist(), odd.flatten().tolist()
        ([0.0, 2.0], [1.0, 3.0])

    Source: megvii-model/WeightNet, `ShuffleV2Block.channel_shuffle`.
    """
    # By `unbind`, whose gradient is a stack in the layout of the maps; that of strided slices is channels first.
    if _is_channels_last(x_BCHW):
        pairs_BHWC2 = torch.unflatten(x_BCHW.permute(0, 2, 3, 1), 3, (-1, 2))
        even, odd = (half_BHWC.permute(0, 3, 1, 2) for half_BHWC in pairs_BHWC2.unbind(4))
    else:
        even, odd = torch.unflatten(x_BCHW, 1, (-1, 2)).unbind(2)
    # The branch reads its channels several times, forward and backward: one dense copy instead of many strided reads.
    return even, odd.clone()


def spatial_mean(x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C"]:
    """Return the mean of each channel; its gradient has the memory layout of the input, unlike that of a plain mean.

    Example:
        >>> spatial_mean(torch.arange(4.0).reshape(1, 1, 2, 2)).item()
        1.5
    """
    return x_BCHW.permute(0, 2, 3, 1).mean((1, 2)) if _is_channels_last(x_BCHW) else x_BCHW.mean((2, 3))


def as_pair(value: IntPair) -> tuple[int, int]:
    """Return a size given once for both directions as (height, width)."""
    return (value, value) if isinstance(value, int) else value


def _kernel_columns(a_BOGP: Tensor, bank_OGPIkk: Tensor) -> Tensor:
    """Mix the bank as `generate_kernels` does, into (B, K, O).

    With the outputs side by side, the gradients of gates and bank are sums of whole rows.
    """
    a_BGPO, bank_GPKO = a_BOGP.permute(0, 2, 3, 1), bank_OGPIkk.flatten(3).permute(1, 2, 3, 0)
    if a_BGPO.shape[2] == 1:
        return (a_BGPO * bank_GPKO.squeeze(1)).flatten(1, 2)
    return torch.einsum("bgpo,gpko->bgko", a_BGPO, bank_GPKO).flatten(1, 2)


def _conv(x_BCHW: Tensor, kernel: Tensor, stride: IntPair, padding: IntPair, dilation: IntPair, groups: int) -> Tensor:
    plain = groups == 1 and kernel.shape[-2:] == (1, 1) and as_pair(stride) == (1, 1) and as_pair(padding) == (0, 0)
    if plain and _is_channels_last(x_BCHW):  # a product of rows: trains faster, above all on a view of some channels
        return F.linear(x_BCHW.permute(0, 2, 3, 1), kernel.flatten(1)).permute(0, 3, 1, 2)
    return F.conv2d(x_BCHW, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _is_channels_last(x_BCHW: Tensor) -> bool:
    """Say whether a pixel's channels lie together, in a view of some of them too (unlike `is_contiguous`)."""
    return x_BCHW.stride(1) < x_BCHW.stride(3)


def _laid_out_like(x_BCHW: Tensor, y_BOHW: Tensor) -> Tensor:
    return y_BOHW.contiguous(memory_format=torch.channels_last) if _is_channels_last(x_BCHW) else y_BOHW
