"""Parameters and multiply-adds of a network, by two named conventions: exact totals, and what the published page prints.

Source: `models.md`-style recount of the page's two tables; conventions are stated at each function.
"""

import dataclasses

import torch
from torch import Tensor, nn

from weightnet.nn.layers import WeightNet2d


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Totals of a network for one image.

    Args:
        params: every trainable number.
        macs: multiply-adds of convolutions and fully connected layers, the generating ones included.
        page_params: numbers the page counts: all weights of convolutions and fully connected layers, and the biases of
            the first and last convolution and of the classifier (no batch norm, no biases of generating layers).
        page_flops: what the page counts: the multiply-adds, and one add for each input of the final pool.
    """

    params: int
    macs: int
    page_params: int
    page_flops: int


def complexity(network: nn.Module, size_px: int = 224) -> Complexity:
    """Count a network's parameters and its multiply-adds for one square image.

    Generated layers count as the published form computes them at batch 1: the gates, the product that makes the kernel,
    the convolution by it.

    Args:
        network: a `ShuffleNetV2`; it is not changed, and nothing is computed.
        size_px: height and width of the image.

    Example:
        >>> from weightnet.nn.shufflenet import ShuffleNetV2
        >>> from weightnet.nn.variants import VARIANTS
        >>> complexity(ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec)).params
        1463928

    Source: the counting rules are given with `Complexity`.
    """
    macs = pool_inputs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, pool_inputs
        if isinstance(module, WeightNet2d):
            kernel = module.wn_fc2.out_channels
            macs += kernel * module.kernels_per_block + kernel * output[0, 0].numel()
        elif isinstance(module, nn.Conv2d):
            macs += module.weight[0].numel() * output[0].numel()
        elif isinstance(module, nn.Linear):
            macs += module.weight.numel()
        elif module is last:
            pool_inputs = output[0].numel()

    on_paper = _copy_to_meta(network)
    last = on_paper.conv_last
    hooks = [module.register_forward_hook(count) for module in on_paper.modules()]
    on_paper(torch.empty(1, on_paper.spec.in_channels, size_px, size_px, device="meta"))
    for hook in hooks:
        hook.remove()
    params = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Complexity(params, macs, _page_params(network), macs + pool_inputs)
