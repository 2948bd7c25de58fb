"""The maths of a generated convolution, apart from any parameters: three exact forms of one layer.

A WeightNet layer convolves every sample with a kernel of its own,

    W[o, block g] = sum_p a[o, g, p] * V[o, g, p]          y = W * x

where `a` are the sample's gates (sigmoid outputs, one set per sample), `V` is a learned bank of kernels, `block g` is the
g-th of `G` equal parts of the input channels, and p runs over the `r = M / G` kernels that are mixed.

Legend: B batch, C input channels, O output channels, G blocks of input channels, P = r kernels per block, I = C / G
channels per block (1 for depthwise layers, where G = 1 and O = C), k kernel size, H W height and width.

Source: Ma et al., ECCV 2020, section 3 (arXiv 2007.11823); megvii-model/WeightNet, `shufflenet_v2.py`, class `WeightNet`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

IntPair = int | tuple[int, int]


def generate_kernels(a_BOGP: Float[Tensor, "B O G P"], bank_OGPIkk: Float[Tensor, "O G P I kh kw"]) -> Tensor:
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
) -> Tensor:
    """Convolve each sample with its own kernel, as one convolution with groups = batch: the plain form, as published.

    Args:
        x_BCHW: input.
        a_BOGP: gates of each sample.
        bank_OGPIkk: the learned kernels.
        stride: step of the convolution in pixels.
        padding: zeros added at each side, in pixels.
        dilation: distance of kernel taps in pixels.
        depthwise: True where each channel has its own kernel (O = C, G = 1, I = 1).

    Shape: x (B, C, H, W) gives (B, O, H', W'), H' and W' as `torch.nn.Conv2d` has them.

    Returns: the convolved samples.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_reference(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: megvii-model/WeightNet, `WeightNet.forward`.
    """
    kernels = generate_kernels(a_BOGP, bank_OGPIkk)
    if len(x_BCHW) == 0:  # groups = 0 is not a convolution; any kernel gives the right empty output
        return _static_conv(x_BCHW, kernels.sum(0), stride, padding, dilation, depthwise)
    per_sample = x_BCHW.shape[1] if depthwise else 1
    y = F.conv2d(
        x_BCHW.reshape(1, -1, *x_BCHW.shape[2:]),
        kernels.flatten(0, 1),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=len(x_BCHW) * per_sample,
    )
    return y.reshape(len(x_BCHW), -1, *y.shape[2:])


def weightnet_conv2d_feature(
    x_BCHW: Float[Tensor, "B C H W"],
    a_BOGP: Float[Tensor, "B O G P"],
    bank_OGPIkk: Float[Tensor, "O G P I kh kw"],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    depthwise: bool = False,
) -> Tensor:
    """The same layer as one static convolution by the whole bank, whose outputs are scaled by the gates and summed.

    Convolution is linear in its kernel, so the gates move from the kernels to the features. For r = 1 the multiply-adds
    are those of an ordinary convolution; for larger r they are r times as many. Arguments, shapes and result are those
    of `weightnet_conv2d_reference`.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_feature(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: the identity is ours; see docs/layer.md.
    """
    out_channels, G, P = bank_OGPIkk.shape[:3]
    if depthwise:
        y = F.conv2d(
            x_BCHW, bank_OGPIkk.flatten(0, 2), stride=stride, padding=padding, dilation=dilation, groups=x_BCHW.shape[1]
        )
        if P == 1:
            return y * a_BOGP
        return (y.unflatten(1, (out_channels, P)) * a_BOGP[:, :, 0, :, None, None]).sum(2)
    bank_GOP = bank_OGPIkk.transpose(0, 1).flatten(0, 2)
    y = F.conv2d(x_BCHW, bank_GOP, stride=stride, padding=padding, dilation=dilation, groups=G)
    gates_BGOP = a_BOGP.transpose(1, 2).flatten(1)[..., None, None]
    return (y * gates_BGOP).unflatten(1, (G, out_channels, P)).sum((1, 3))


def weightnet_conv2d_matmul(
    x_BCHW: Float[Tensor, "B C H W"],
    a_BOGP: Float[Tensor, "B O G P"],
    bank_OGPIkk: Float[Tensor, "O G P I kh kw"],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    depthwise: bool = False,
) -> Tensor:
    """The same layer as a batched matrix product of each sample's kernel with the columns of its input.

    Cheapest where feature maps are larger than kernels: the kernels cost a small product, and the batch needs no groups.
    Arguments, shapes and result are those of `weightnet_conv2d_reference`.

    Example:
        >>> x, a, bank = torch.ones(2, 4, 3, 3), torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
        >>> weightnet_conv2d_matmul(x, a, bank)[0, 0, 0, 0].item()
        4.0

    Source: models of this project, docs/layer.md; convolution as a matrix product is textbook.
    """
    kernels = generate_kernels(a_BOGP, bank_OGPIkk)
    batch, out_channels = kernels.shape[:2]
    kernel_size = (kernels.shape[3], kernels.shape[4])
    height, width = conv_output_size(x_BCHW.shape[2:], kernel_size, stride, padding, dilation)
    if kernel_size == (1, 1) and as_pair(padding) == (0, 0) and not depthwise:
        step_h, step_w = as_pair(stride)
        x_BCHW = x_BCHW[:, :, ::step_h, ::step_w]
        kernels_BOC = kernels.flatten(2)
        if x_BCHW.is_contiguous(memory_format=torch.channels_last):  # rows of pixels: no copy in this layout
            y_BHWO = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2) @ kernels_BOC.transpose(1, 2)
            return y_BHWO.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (kernels_BOC @ x_BCHW.flatten(2)).unflatten(2, (height, width))
    columns = F.unfold(x_BCHW, kernel_size, dilation=dilation, padding=padding, stride=stride)
    if depthwise:
        taps = kernel_size[0] * kernel_size[1]
        columns = columns.unflatten(1, (out_channels, taps))
        y = (kernels.reshape(batch, out_channels, 1, taps) @ columns).squeeze(2)
    else:
        y = kernels.flatten(2) @ columns
    return y.unflatten(2, (height, width))


def conv_output_size(
    size: tuple[int, ...] | torch.Size, kernel_size: IntPair, stride: IntPair, padding: IntPair, dilation: IntPair
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


def split_shuffled(x_BCHW: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor]:
    """Split channels into the even ones and the odd ones: the channel shuffle of ShuffleNetV2 at a block's entry.

    Shape: (B, C, H, W) with even C gives two of (B, C / 2, H, W).

    Returns: the channels that pass through, and those that enter the branch.

    Example:
        >>> even, odd = split_shuffled(torch.arange(4.0).reshape(1, 4, 1, 1))
        >>> even.flatten().tolist(), odd.flatten().tolist()
        ([0.0, 2.0], [1.0, 3.0])

    Source: megvii-model/WeightNet, `ShuffleV2Block.channel_shuffle`.
    """
    return x_BCHW[:, 0::2], x_BCHW[:, 1::2]


def _static_conv(
    x_BCHW: Tensor, kernel: Tensor, stride: IntPair, padding: IntPair, dilation: IntPair, depthwise: bool
) -> Tensor:
    groups = x_BCHW.shape[1] if depthwise else 1
    return F.conv2d(x_BCHW, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def as_pair(value: IntPair) -> tuple[int, int]:
    """Return a size given once for both directions as (height, width)."""
    return (value, value) if isinstance(value, int) else value
