"""Parameters and multiply-adds of a network, by two named conventions: exact totals, and what the page prints.

Source: a recount of the hub page's two tables; the conventions below give its printed strings in 12 of 12
(#Params.) and 11 of 12 rows (FLOPs: the page prints 562M for the 2.0x WeightNet 1x, the count is 561M).
"""

import copy

import torch
from torch import Tensor, nn

from weightnet.errors import UsageError
from weightnet.nn.layers import WeightNet2d
from weightnet.nn.shufflenet import MIN_SIZE_PX, ShuffleNetV2, WeightNetBlock
from weightnet.nn.variants import Totals

PAGE_BIASES = ("first_conv.0.bias", "conv_last.0.bias", "classifier.0.bias")


def complexity(network: ShuffleNetV2, size_px: int = 224) -> Totals:
    """Count a network's parameters and its multiply-adds for one square image.

    Generated layers count as the published form computes them at batch 1: the gates, the product that makes the kernel,
    the convolution by it.

    The page's convention counts, of the parameters, the weights of convolutions and fully connected layers and the
    biases of the first and last convolution and of the classifier (no batch norm, no biases of generating layers); of
    the work, the multiply-adds and one add for each input of the final pool.

    Args:
        network: a `ShuffleNetV2`; it is not changed, and nothing is computed.
        size_px: height and width of the image.

    Returns: the four totals.

    Raises: UsageError for an image smaller than the networks take, or for another network, a folded one too.

    Example:
        >>> from weightnet.nn.variants import VARIANTS
        >>> complexity(ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec)).params
        1463928

    Source: the counting rules are those above.
    """
    if not isinstance(network, ShuffleNetV2):
        given = type(network).__name__
        raise UsageError(f"network must be a ShuffleNetV2. Got network={given}. Count the network it was made of.")
    if size_px < MIN_SIZE_PX:
        raise UsageError(f"size_px must be at least {MIN_SIZE_PX}. Got size_px={size_px}. Choose a larger size.")
    on_paper = copy.deepcopy(network).to("meta").eval()
    macs = pool_inputs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, pool_inputs
        if isinstance(module, WeightNetBlock):
            macs += module.reduce.weight.numel()
        elif isinstance(module, WeightNet2d):
            kernel = module.wn_fc2.out_channels
            macs += module.wn_fc1.weight.numel() + module.kernels_per_block * kernel + kernel * output[0, 0].numel()
        elif isinstance(module, nn.Conv2d):
            macs += module.weight[0].numel() * output[0].numel()
        elif isinstance(module, nn.Linear):
            macs += module.weight.numel()
        elif module is on_paper.conv_last:
            pool_inputs = output[0].numel()

    for module in on_paper.modules():
        module.register_forward_hook(count)
    on_paper(torch.empty(1, network.spec.in_channels, size_px, size_px, device="meta"))
    params = sum(parameter.numel() for parameter in network.parameters())
    page_params = sum(p.numel() for name, p in network.named_parameters() if p.ndim > 1 or name in PAGE_BIASES)
    return Totals(params, macs, page_params, macs + pool_inputs)
