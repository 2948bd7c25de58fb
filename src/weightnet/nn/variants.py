"""The twelve networks as data: one line per row of the two published tables. Needs no PyTorch.

Source: Ma et al., "WeightNet: Revisiting the Design Space of Weight Networks", ECCV 2020 (arXiv 2007.11823), tables of
the MegEngine hub page; widths, M and G from the original code (megvii-model/WeightNet).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that shapes a network: what `ShuffleNetV2` is built from and what a model card stores.

    `M` and `G` are the paper's names: `M * out_channels` numbers describe a sample's kernel, and the layer that
    generates it has `G` groups per output channel. `M = G = 0` is the plain network, with ordinary convolutions.
    """

    stage_channels: tuple[int, int, int]
    M: int = 0
    G: int = 0
    dropout: float = 0.0
    stage_repeats: tuple[int, int, int] = (4, 8, 4)
    stem_channels: int = 24
    head_channels: int = 1024
    num_classes: int = 1000
    in_channels: int = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the published tables: the network, its exact totals, and what the page prints for it.

    `params` counts every trainable number; `macs` counts multiply-adds of convolutions and fully connected layers, the
    generating ones included, for one 224 x 224 photo; `page_*` are the page's strings, top-1 error in percent.
    """

    title: str
    spec: NetworkSpec
    params: int
    macs: int
    page_params: str
    page_flops: str
    page_top1_error: str


W05, W10, W15, W20 = (48, 96, 192), (112, 224, 448), (176, 352, 704), (248, 496, 992)

VARIANTS: dict[str, Variant] = {}
