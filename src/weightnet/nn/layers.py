"""The WeightNet layer: it holds the parameters, `weightnet.nn.functional` holds the maths."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightnet.errors import UsageError
from weightnet.nn import functional as WF

Form = Literal["auto", "reference", "feature", "matmul"]

FORMS = {
    "reference": WF.weightnet_conv2d_reference,
    "feature": WF.weightnet_conv2d_feature,
    "matmul": WF.weightnet_conv2d_matmul,
}


class WeightNet2d(nn.Module):
    """A convolution whose kernel is generated, per sample, from a descriptor of the sample.

    The descriptor s (a vector) becomes gates a = sigmoid(wn_fc1(s)), the gates mix a learned bank of kernels
    (`wn_fc2`). Used alone, the layer makes the descriptor from its own input: mean over the image, then `reduce`. With
    `shared_descriptor=True` it has no `reduce` and the caller passes one, as the blocks of the networks do.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel, in pixels.
        stride: step of the convolution, in pixels.
        padding: zeros added at each side, in pixels.
        dilation: distance of kernel taps, in pixels.
        depthwise: True for one kernel per channel; needs out_channels = in_channels.
        M: the paper's M: each output channel has M gates. M = G = 1 gates output channels, like squeeze-and-excitation.
        G: the paper's G: input channels are in G blocks, each with M / G kernels to mix.
        squeeze_channels: length of the descriptor; by default max(16, in_channels // 16), as in the networks.
        shared_descriptor: whether the descriptor is passed to `forward` instead of made here.
        form: which exact form computes the layer: "reference" (groups = batch, as published), "feature" or "matmul"
            (`weightnet.functional`); "auto" takes the cheapest for the shapes at hand.

    Shape: (B, in_channels, H, W) gives (B, out_channels, H', W'), H' and W' as `torch.nn.Conv2d` has them; B may be 0.

    Raises: UsageError where the arguments do not fit together.

    Example:
        >>> import torch
        >>> layer = WeightNet2d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.zeros(2, 8, 10, 10)).shape
        torch.Size([2, 16, 10, 10])

    Source: arXiv 2007.11823, section 3; megvii-model/WeightNet, class `WeightNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: WF.IntPair,
        *,
        stride: WF.IntPair = 1,
        padding: WF.IntPair = 0,
        dilation: WF.IntPair = 1,
        depthwise: bool = False,
        M: int = 2,
        G: int = 2,
        squeeze_channels: int | None = None,
        shared_descriptor: bool = False,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, out_channels=out_channels, M=M, G=G)
        squeeze_channels = squeeze_width(in_channels) if squeeze_channels is None else squeeze_channels
        _check_counts(squeeze_channels=squeeze_channels)
        _check_pairs(1, kernel_size=kernel_size, stride=stride, dilation=dilation)
        _check_pairs(0, padding=padding)
        _check_groups(in_channels, out_channels, M, G, depthwise)
        check_form(form)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = WF.as_pair(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.depthwise, self.M, self.G, self.form = depthwise, M, G, form
        self.kernels_per_block = M // G
        # A depthwise kernel has one input channel, so one block: the published layer gives it M / G gates.
        self.blocks = 1 if depthwise else G
        gates = out_channels * self.blocks * self.kernels_per_block
        numbers = (1 if depthwise else in_channels) * self.kernel_size[0] * self.kernel_size[1]
        self.reduce = None if shared_descriptor else nn.Conv2d(in_channels, squeeze_channels, 1)
        self.wn_fc1 = nn.Conv2d(squeeze_channels, gates, 1)
        self.wn_fc2 = nn.Conv2d(gates, out_channels * numbers, 1, groups=out_channels * self.blocks, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters from the original's distribution.

        Ordinary weights are N(0, 1 / inputs) as a standard deviation; the bank's is 1 / numbers per block, because
        MegEngine's grouped weights have five axes and the original divides by the second.

        Source: megvii-model/WeightNet, `ShuffleNetV2._initialize_weights`.
        """
        bank_std = self.wn_fc2.groups / self.wn_fc2.out_channels
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0, bank_std if name == "wn_fc2.weight" else 1 / parameter.shape[1])

    def forward(
        self, x_BCHW: Float[Tensor, "B C H W"], descriptor_BS: Float[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B O H_out W_out"]:
        """Convolve each sample with its own kernel; `descriptor_BS` is the block's descriptor where it is shared."""
        self._check_input(x_BCHW)
        descriptor_BS = self._descriptor(x_BCHW, descriptor_BS)
        gates = WF.linear_1x1(descriptor_BS, self.wn_fc1.weight, self.wn_fc1.bias).sigmoid()
        form = self.form if self.form != "auto" else self.cheapest_form(x_BCHW.shape[2:])
        return FORMS[form](
            x_BCHW,
            gates.reshape(-1, self.out_channels, self.blocks, self.kernels_per_block),
            self.bank(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            depthwise=self.depthwise,
        )

    def bank(self) -> Float[Tensor, "O G P I kh kw"]:
        """Return the learned kernels.

        Shape: (out_channels, blocks, r, in_channels per block, kernel height, kernel width), r = M / G.
        """
        in_channels = 1 if self.depthwise else self.in_channels // self.blocks
        shape_OGIkkP = (self.out_channels, self.blocks, in_channels, *self.kernel_size, self.kernels_per_block)
        return self.wn_fc2.weight.reshape(shape_OGIkkP).movedim(5, 2)

    def cheapest_form(self, size: torch.Size | tuple[int, ...]) -> Form:
        """Return the form that trains fastest for inputs of this height and width, in pixels.

        Per output channel, making the kernels handles as many numbers as a kernel has, and the gains of the feature
        form M numbers for each pixel; the smaller of the two is the faster. A larger kernel costs the matmul form a
        copy of its input for each tap, and more than one kernel per block costs the feature form the whole convolution
        each time.
        """
        if self.depthwise:
            return "feature" if self.kernels_per_block == 1 else "reference"
        height, width = WF.conv_output_size(size, self.kernel_size, self.stride, self.padding, self.dilation)
        kernel_height, kernel_width = self.kernel_size
        gains_are_fewer = self.in_channels * kernel_height * kernel_width > self.M * height * width
        if self.kernel_size == (1, 1):
            return "feature" if gains_are_fewer else "matmul"
        return "feature" if gains_are_fewer and self.kernels_per_block == 1 else "reference"

    def extra_repr(self) -> str:
        kind = ", depthwise" if self.depthwise else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}{kind}, M={self.M}, G={self.G}, form={self.form!r}"
        )

    def _descriptor(self, x_BCHW: Tensor, descriptor_BS: Tensor | None) -> Tensor:
        if self.reduce is not None and descriptor_BS is None:
            return WF.linear_1x1(WF.spatial_mean(x_BCHW), self.reduce.weight, self.reduce.bias)
        if self.reduce is not None or descriptor_BS is None:
            raise UsageError(
                "The descriptor must be passed to a WeightNet2d exactly when shared_descriptor is True. "
                f"Got descriptor={'None' if descriptor_BS is None else 'a tensor'}, "
                f"shared_descriptor={self.reduce is None}. Pass one, or build the layer with the other setting."
            )
        if descriptor_BS.shape != (x_BCHW.shape[0], self.wn_fc1.in_channels):
            raise UsageError(
                f"The descriptor must have the shape ({x_BCHW.shape[0]}, {self.wn_fc1.in_channels}): one vector of "
                f"squeeze_channels numbers for each sample. Got shape={tuple(descriptor_BS.shape)}. Reshape it."
            )
        return descriptor_BS

    def _check_input(self, x_BCHW: Tensor) -> None:
        shape = tuple(x_BCHW.shape)
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise UsageError(
                f"The input must be a batch of shape (B, {self.in_channels}, H, W). Got shape={shape}. Reshape it."
            )
        if min(WF.conv_output_size(shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)) < 1:
            raise UsageError(
                "The input must be at least as large as the kernel. "
                f"Got shape={shape}, kernel_size={self.kernel_size}, padding={self.padding}, "
                f"dilation={self.dilation}. Add padding or take larger images."
            )


def squeeze_width(in_channels: int) -> int:
    """Return the length of the descriptor that the networks use for a branch of so many channels.

    Example:
        >>> squeeze_width(24), squeeze_width(496)
        (16, 31)

    Source: megvii-model/WeightNet, `ShuffleV2Block`.
    """
    return max(16, in_channels // 16)


def set_form(network: nn.Module, form: Form) -> None:
    """Choose the exact form in which all WeightNet layers of a network compute; every form gives the same numbers.

    Args:
        network: any module.
        form: "auto", "reference", "feature" or "matmul", as in `WeightNet2d`.

    Raises: UsageError for another form.

    Example:
        >>> layer = WeightNet2d(4, 4, 1)
        >>> set_form(nn.Sequential(layer), "reference")
        >>> layer.form
        'reference'
    """
    check_form(form)
    for module in network.modules():
        if isinstance(module, WeightNet2d):
            module.form = form


def check_form(form: str) -> None:
    if form not in get_args(Form):
        raise UsageError(f"form must be one of {', '.join(get_args(Form))}. Got form={form!r}. Choose one of them.")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not _is_number(value, 1):
            raise UsageError(f"{name} must be a whole number of at least 1. Got {name}={value!r}. Choose another.")


def _check_pairs(least: int, **pairs: WF.IntPair) -> None:
    for name, value in pairs.items():
        numbers = value if isinstance(value, tuple) and len(value) == 2 else [value]
        if not all(_is_number(number, least) for number in numbers):
            raise UsageError(
                f"{name} must be one whole number of at least {least}, or a tuple of two of them. "
                f"Got {name}={value!r}. Choose another."
            )


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_groups(in_channels: int, out_channels: int, M: int, G: int, depthwise: bool) -> None:
    if M % G:
        raise UsageError(f"M must be a multiple of G. Got M={M}, G={G}. Choose M = r * G for r kernels per block.")
    if depthwise and in_channels != out_channels:
        raise UsageError(
            "A depthwise layer must have out_channels = in_channels. "
            f"Got in_channels={in_channels}, out_channels={out_channels}. Set both to the same number."
        )
    if not depthwise and in_channels % G:
        raise UsageError(
            f"G must divide in_channels. Got in_channels={in_channels}, G={G}. Choose a G that divides them."
        )
