"""The twelve networks as data: one line per row of the two published tables. Needs no PyTorch.

Source: Ma et al., "WeightNet: Revisiting the Design Space of Weight Networks", ECCV 2020 (arXiv 2007.11823), tables of
the MegEngine hub page; widths, M and G from the original code (megvii-model/WeightNet).
"""

import dataclasses

from weightnet.errors import UsageError


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that shapes a network: what `ShuffleNetV2` is built from and what a model card stores.

    `M` and `G` are the paper's: `M` gates per output channel describe a sample's kernel, and the layer that generates
    it works in `G` blocks of input channels, each a mix of M / G kernels. M = G = 0 is the plain network.

    Args:
        stage_channels: output channels of the three stages, even numbers.
        M: gates per output channel, a multiple of G; 0 for a plain network.
        G: blocks of input channels; 0 for a plain network.
        dropout: probability of dropping a feature before the classifier, in training.
        stage_repeats: blocks of the three stages.
        stem_channels: channels of the first convolution.
        head_channels: channels of the last convolution.
        num_classes: classes of the classifier.
        in_channels: channels of the input.

    Raises: UsageError for sizes that cannot be built.

    Example:
        >>> NetworkSpec((48, 96, 192), M=2, G=2).num_classes
        1000
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

    def __post_init__(self) -> None:
        for name in ("stem_channels", "head_channels", "num_classes", "in_channels"):
            _check_count(name, getattr(self, name))
        for name in ("stage_channels", "stage_repeats"):
            sizes = getattr(self, name)
            if not isinstance(sizes, tuple) or len(sizes) != 3:
                raise UsageError(f"{name} must be three whole numbers. Got {name}={sizes!r}. Give one for each stage.")
            for size in sizes:
                _check_count(name, size)
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1. Got dropout={self.dropout!r}. Choose another.")
        self._check_widths()
        self._check_groups()

    def _check_widths(self) -> None:
        in_channels = self.stem_channels
        for out_channels in self.stage_channels:
            if out_channels % 2 or out_channels <= in_channels:
                raise UsageError(
                    "Each stage must have an even number of channels, more than the one before it. "
                    f"Got stem_channels={self.stem_channels}, stage_channels={self.stage_channels}. Widen the stage."
                )
            in_channels = out_channels

    def _check_groups(self) -> None:
        if self.M == self.G == 0:
            return
        _check_count("M", self.M)
        _check_count("G", self.G)
        # A stage's inputs are its predecessor's channels, then half its own; its middle width is that half as well.
        widths = {self.stem_channels, *self.stage_channels[:2], *(channels // 2 for channels in self.stage_channels)}
        if self.M % self.G or any(width % self.G for width in widths):
            raise UsageError(
                "G must divide M and the input channels of every block. "
                f"Got M={self.M}, G={self.G}, stem_channels={self.stem_channels}, "
                f"stage_channels={self.stage_channels}. Choose a G that divides them all."
            )


@dataclasses.dataclass(frozen=True)
class Totals:
    """Exact counts for one 224 x 224 photo; `weightnet.nn.complexity` states the conventions and recounts them.

    Args:
        params: every trainable number.
        macs: multiply-adds of convolutions and fully connected layers, the generating ones included.
        page_params: what the page's "#Params." counts.
        page_flops: what the page's "FLOPs" counts.
    """

    params: int
    macs: int
    page_params: int
    page_flops: int


@dataclasses.dataclass(frozen=True)
class Printed:
    """What the page prints, word for word; the error is in percent on ImageNet's validation photos."""

    params: str
    flops: str
    top1_error: str


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the published tables: its title there, the network, the exact totals, and what the page prints."""

    title: str
    spec: NetworkSpec
    totals: Totals
    printed: Printed


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1. Got {name}={value!r}. Choose another.")


X05, X10, X15, X20 = (48, 96, 192), (112, 224, 448), (176, 352, 704), (248, 496, 992)

# fmt: off
VARIANTS: dict[str, Variant] = {
    "shufflenet_v2_x0_5.plain": Variant("ShuffleNetV2 (0.5×)", NetworkSpec(X05),                        Totals(1366792, 40476448, 1358840, 40526624),     Printed("1.4M", "41M", "39.7")),
    "shufflenet_v2_x1_0.plain": Variant("ShuffleNetV2 (1.0×)", NetworkSpec(X10),                        Totals(2211976, 137610912, 2196280, 137661088),   Printed("2.2M", "138M", "30.9")),
    "shufflenet_v2_x1_5.plain": Variant("ShuffleNetV2 (1.5×)", NetworkSpec(X15),                        Totals(3507720, 298970656, 3484280, 299020832),   Printed("3.5M", "299M", "27.4")),
    "shufflenet_v2_x2_0.plain": Variant("ShuffleNetV2 (2.0×)", NetworkSpec(X20, dropout=0.2),           Totals(5503992, 557269648, 5471840, 557319824),   Printed("5.5M", "557M", "25.5")),
    "shufflenet_v2_x0_5":       Variant("+ WeightNet (1×)",    NetworkSpec(X05, M=2, G=2),              Totals(1463928, 40704040, 1450896, 40754216),     Printed("1.5M", "41M", "36.7")),
    "shufflenet_v2_x1_0":       Variant("+ WeightNet (1×)",    NetworkSpec(X10, M=2, G=2),              Totals(2435832, 138534120, 2408656, 138584296),   Printed("2.4M", "139M", "28.8")),
    "shufflenet_v2_x1_5":       Variant("+ WeightNet (1×)",    NetworkSpec(X15, M=2, G=2),              Totals(3915344, 301097064, 3874000, 301147240),   Printed("3.9M", "301M", "25.6")),
    "shufflenet_v2_x2_0":       Variant("+ WeightNet (1×)",    NetworkSpec(X20, M=2, G=2, dropout=0.2), Totals(6198068, 561367920, 6140776, 561418096),   Printed("6.1M", "562M", "24.1")),
    "shufflenet_v2_x0_5.wn8x":  Variant("+ WeightNet (8×)",    NetworkSpec(X05, M=8, G=1),              Totals(2736216, 41957728, 2704584, 42007904),     Printed("2.7M", "42M", "34.0")),
    "shufflenet_v2_x1_0.wn4x":  Variant("+ WeightNet (4×)",    NetworkSpec(X10, M=8, G=2),              Totals(5143896, 141208512, 5083048, 141258688),   Printed("5.1M", "141M", "27.6")),
    "shufflenet_v2_x1_5.wn4x":  Variant("+ WeightNet (4×)",    NetworkSpec(X15, M=4, G=1),              Totals(9624336, 306780992, 9557928, 306831168),   Printed("9.6M", "307M", "25.0")),
    "shufflenet_v2_x2_0.wn4x":  Variant("+ WeightNet (4×)",    NetworkSpec(X20, M=8, G=2, dropout=0.2), Totals(18268604, 573363984, 18136840, 573414160), Printed("18.1M", "573M", "23.5")),
}
# fmt: on
