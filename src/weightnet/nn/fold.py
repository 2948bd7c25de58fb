"""From a trained network to its deploy form, exactly.

* Batch norms become factors of the kernels and biases.
* A generated kernel's gates move to the features or into a batched matrix product, whichever is faster: no convolution
  is left whose weight is computed.
* A depthwise layer's gain is positive, so it passes through the ReLU before it and joins the gains of the pointwise
  layer there.
* The channel shuffle becomes the order of the static weights' channels (`weightnet.nn.routes`): a block's input is
  joined of slices, or selected from two maps.

Legend: as in `weightnet.nn.functional`.

Source: the identities are derived in docs/static.md.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weightnet.errors import UsageError
from weightnet.nn.folded_layers import (
    ChannelSelect,
    MatmulPointwise,
    fold_conv,
    fold_depthwise,
    fold_pointwise,
    fold_reduce,
    gate_rows,
    linear,
)
from weightnet.nn.routes import Selection, Slice, channel_runs, join_slices, plan_routes, plan_selection
from weightnet.nn.shufflenet import PlainBlock, ShuffleNetV2, WeightNetBlock
from weightnet.nn.variants import NetworkSpec

FoldForm = Literal["auto", "feature", "matmul"]
_Form: TypeAlias = Literal["feature", "matmul"]
_Block: TypeAlias = PlainBlock | WeightNetBlock

# The size of photos for which forms are chosen: the faster one for a stage is that at most sizes.
_SIZE_PX = 224


class _Given(NamedTuple):
    """What a block is given: the channels of its tensors, and which of its channels each mean is that of (-1: none)."""

    channels: list[list[int]]
    pooled: list[int]


class FoldedPlainBlock(nn.Module):
    """A plain block without batch norms; it takes one tensor, and no means, and returns its producers' outputs."""

    def __init__(self, block: PlainBlock, inputs: list[int], emitted: list[list[int]]) -> None:
        super().__init__()
        *projected, branch = emitted
        self.conv1 = fold_conv(block.conv1, block.bn1, inputs=inputs)
        self.conv2 = fold_conv(block.conv2, block.bn2)
        self.conv3 = fold_conv(block.conv3, block.bn3, outputs=branch)
        self.projection = nn.Sequential()
        for rows in projected:
            self.projection.append(fold_conv(block.conv_proj_1, block.bn_proj_1, outputs=inputs))
            self.projection.append(fold_conv(block.conv_proj_2, block.bn_proj_2, inputs=inputs, outputs=rows))

    def forward(self, xs: list[Tensor], _means: list[Tensor]) -> list[Tensor]:
        (x,) = xs
        y = F.relu(self.conv3(self.conv2(F.relu(self.conv1(x)))))
        return [F.relu(self.projection(x)), y] if self.projection else [y]


class FoldedWeightNetBlock(nn.Module):
    """A WeightNet block as static convolutions and gains, or products; it returns its producers' outputs.

    Besides its inputs it takes the means, over the pixels, of them or of the maps that they are cut from. The gates of
    all its layers come from one product. For r = 1 the gain of the depthwise layer is applied together with those of
    the pointwise layer before it: it is positive, so relu(u) * a = relu(u * a), and a factor per channel passes a
    depthwise convolution.
    """

    def __init__(
        self,
        block: WeightNetBlock,
        channels: list[list[int]],
        pooled: list[int],
        emitted: list[list[int]],
        *,
        matmul: bool,
    ) -> None:
        super().__init__()
        *projected, branch = emitted
        self.groups = 1 if matmul else block.wnet1.blocks
        self.early_gain = block.wnet2.kernels_per_block == 1
        self.reduce = fold_reduce(block.reduce, pooled)
        middle = channel_runs(block.wnet3.in_channels, self.groups)
        self.conv1, self.bias1 = fold_pointwise(block.wnet1, block.bn1, channels, matmul=matmul)
        self.conv2 = fold_depthwise(block.wnet2, block.bn2, static=self.early_gain)
        self.conv3, self.bias3 = fold_pointwise(block.wnet3, block.bn3, middle, outputs=branch, matmul=matmul)
        first = gate_rows(block.wnet1, together=_gates_together(self.conv1))
        second = gate_rows(block.wnet2)
        third = gate_rows(block.wnet3, branch, together=_gates_together(self.conv3))
        rows = [*first, *second, *third]
        self.counts = len(first), len(second), len(third)
        self.depthwise = nn.ModuleList()
        for order in projected:
            for tensor in channels:
                self.depthwise.append(fold_depthwise(block.wnet_proj_1, block.bn_proj_1, tensor))
                rows += gate_rows(block.wnet_proj_1, tensor)
            self.pointwise, self.bias_proj = fold_pointwise(
                block.wnet_proj_2, block.bn_proj_2, channels, outputs=order, matmul=matmul
            )
            rows += gate_rows(block.wnet_proj_2, order, together=_gates_together(self.pointwise))
        self.gates = linear(torch.cat([weight for weight, _ in rows]), torch.cat([bias for _, bias in rows]))
        self.sizes = [len(bias) for _, bias in rows]

    def forward(self, xs: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        gates = iter(self.gates(self.reduce(torch.cat(means, 1))).sigmoid().split(self.sizes, 1))
        first, depthwise, third = (_take(gates, count) for count in self.counts)
        if self.early_gain:
            y = self.conv2(self.conv1(xs, first, self.bias1, depthwise[0]))
        else:
            y = self.conv2(self.conv1(xs, first, self.bias1), depthwise)
        y = self.conv3(y.chunk(self.groups, 1) if self.groups > 1 else [y], third, self.bias3)
        if not self.depthwise:
            return [y]
        xs = [conv(x, _take(gates, self.counts[1])) for conv, x in zip(self.depthwise, xs, strict=True)]
        return [self.pointwise(xs, list(gates), self.bias_proj), y]


class FoldedStage(nn.Module):
    """The blocks of a stage, whose inputs are joined of slices of what the blocks before them emit.

    It takes and returns a list of maps, and the means that the gates of the block behind are made of.
    """

    def __init__(self, blocks: list[nn.Module], slices: list[list[list[Slice]]], pooled: list[list[int]]) -> None:
        super().__init__()
        self.blocks, self.slices, self.pooled = nn.ModuleList(blocks), slices, pooled

    def forward(self, xs: list[Tensor], means: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        emitted: list[Tensor] = []
        known: dict[int, Tensor] = {}
        for block, uses, pooled in zip(self.blocks, self.slices, self.pooled, strict=True):
            emitted += block(xs, means)
            known |= {producer: emitted[producer].mean((2, 3)) for producer in pooled if producer not in known}
            xs, means = _gather(emitted, uses), [known[producer] for producer in pooled]
        return xs, means


class FoldedSelectingStage(nn.Module):
    """The blocks of a stage, whose inputs are selected from the map that passes a block and the one it emits.

    It takes and returns what a `FoldedStage` does; at its end both maps, in one tensor or in two.
    """

    def __init__(
        self, blocks: list[nn.Module], plan: Selection, *, tensors: int, gates: bool, gates_behind: bool
    ) -> None:
        super().__init__()
        self.blocks, self.halves = nn.ModuleList(blocks), plan.halves
        self.taken = nn.ModuleList(ChannelSelect(mask) for mask in plan.masks)
        self.left = nn.ModuleList(ChannelSelect([not taken for taken in mask]) for mask in plan.masks)
        self.tensors, self.gates, self.gates_behind = tensors, gates, gates_behind

    def forward(self, xs: list[Tensor], means: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        first, *blocks = self.blocks
        identity, last = _gather(first(xs, means), self.halves)
        for block, taken, left in zip(blocks, self.taken, self.left, strict=True):
            x = taken(identity, last)
            identity = left(identity, last)
            (last,) = block([x], [x.mean((2, 3))] if self.gates else [])
        xs = [identity, last] if self.tensors > 1 else [torch.cat([identity, last], 1)]
        return xs, [x.mean((2, 3)) for x in xs] if self.gates_behind else []


class FoldedShuffleNetV2(nn.Module):
    """The deploy form of a `ShuffleNetV2`, made by `fold`: the same numbers by static weights, gains and products.

    Shape: as the network it was made of.
    """

    def __init__(self, network: ShuffleNetV2, *, forms: list[_Form], select: bool = False) -> None:
        super().__init__()
        self.spec, self.card, self.num_features, self.forms = network.spec, network.card, network.num_features, forms
        stem, last, head = cast(Any, (network.first_conv, network.conv_last, network.classifier))
        self.first_conv = fold_conv(stem[0], stem[1])
        blocks = cast(list[_Block], list(network.features))
        channels = channel_runs(self.spec.stem_channels, _tensors(blocks[0], forms[0]))
        self.slices = [[Slice(0, run[0], run[-1] + 1)] for run in channels]
        given = _Given(channels, list(range(self.spec.stem_channels)))
        self.stages = nn.ModuleList()
        for repeats, form, form_behind in zip(self.spec.stage_repeats, forms, [*forms[1:], "matmul"], strict=True):
            stage, blocks = blocks[:repeats], blocks[repeats:]
            behind = blocks[0] if blocks else None
            folded, given = _fold_stage(stage, given, behind, form, form_behind, select=select)
            self.stages.append(folded)
        self.conv_last = fold_conv(last[0], last[1], inputs=list(chain(*given.channels)))
        self.classifier = linear(head[0].weight, head[0].bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Return the last feature map (B, num_features, H / 32, W / 32), rounded up."""
        x = F.max_pool2d(F.relu(self.first_conv(x)), 3, 2, 1)
        xs, means = _gather([x], self.slices), [x.mean((2, 3))] if self.spec.M else []
        for stage in self.stages:
            xs, means = stage(xs, means)
        return F.relu(self.conv_last(xs[0]))

    def forward_head(self, x: Float[Tensor, "B F h w"], *, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of a last feature map, or its pooled features (B, num_features)."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.classifier(pooled)


def cheapest_folded_form(blocks: int, kernels_per_block: int, in_channels: int, pixels: int) -> _Form:
    """Return the faster way to compute a generated 1x1 layer of G blocks of inputs and r kernels for each.

    With O outputs, I inputs and N pixels, "feature" takes r * O * I * N multiply-adds, and makes r * G maps of O * N
    numbers to sum up; "matmul" takes O * I * N, and makes r * O * I weights. From r = 2 on the multiply-adds decide: at
    7 x 7 pixels and r = 2, 98 against 51 for each weight. At r = 1 they are the same, and what is made decides: G - 1
    maps more than the one that both give, or the weights. docs/static.md has the times.
    """
    return "matmul" if kernels_per_block > 1 or in_channels < (blocks - 1) * pixels else "feature"


@torch.no_grad()
def fold(
    network: ShuffleNetV2 | FoldedShuffleNetV2, *, form: FoldForm = "auto", select: bool = False
) -> FoldedShuffleNetV2:
    """Return the deploy form of a trained network: equal numbers, static weights, no batch norm, no shuffle.

    The result is for inference: batch norms stand still. The network is not changed.

    Args:
        network: a trained network; one that is folded already is returned as it is.
        form: how generated pointwise layers are computed: "feature" as static convolutions and gains, "matmul" as a
            batched matrix product by mixed kernels; "auto" takes the faster one for each stage, as
            `cheapest_folded_form` says for photos of 224 px. Plain networks have only one form.
        select: whether a block's input is selected from two maps, as OpenVINO computes it fastest, rather than joined
            of slices; where a block takes its input in one tensor, as products and plain networks do.

    Raises: UsageError for another form, for what is no network of this package, and for a network that is folded
        already in another form.

    Example:
        >>> from weightnet.nn.variants import VARIANTS
        >>> network = ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec).eval()
        >>> x = torch.rand(1, 3, 64, 64)
        >>> torch.allclose(fold(network)(x), network(x), atol=1e-4)
        True

    Source: docs/static.md.
    """
    if form not in get_args(FoldForm):
        raise UsageError(f"form must be one of {', '.join(get_args(FoldForm))}. Got form={form!r}. Choose one of them.")
    if not isinstance(network, ShuffleNetV2 | FoldedShuffleNetV2):
        given = type(network).__name__
        raise UsageError(f"network must be one of this package. Got network={given}. Load one by weightnet.load.")
    forms = _stage_forms(network.spec, form)
    if isinstance(network, FoldedShuffleNetV2):
        if form != "auto" and network.forms != forms:
            raise UsageError(
                f"A network can be folded once. Got form={form!r} for one that is folded already in another form. "
                f"Fold the network that it was made of, with form={form!r}."
            )
        return network
    weight = next(network.parameters())
    return FoldedShuffleNetV2(network, forms=forms, select=select).to(weight.device, weight.dtype).eval()


def _stage_forms(spec: NetworkSpec, form: FoldForm) -> list[_Form]:
    """Return the form of each stage's pointwise layers."""
    if not spec.M:
        return ["feature"] * len(spec.stage_channels)
    if form != "auto":
        return [form] * len(spec.stage_channels)
    sides = [_SIZE_PX // 2 ** (stage + 3) for stage in range(len(spec.stage_channels))]
    return [
        cheapest_folded_form(spec.G, spec.M // spec.G, channels // 2, side**2)
        for channels, side in zip(spec.stage_channels, sides, strict=True)
    ]


def _fold_stage(
    blocks: list[_Block], given: _Given, behind: _Block | None, form: _Form, form_behind: _Form, *, select: bool
) -> tuple[nn.Module, _Given]:
    """Return a folded stage, and what it gives to the block behind it; None is the network's last convolution."""
    tensors = _tensors(behind, form_behind)
    if select and _tensors(blocks[0], form) == 1 and tensors <= 2:
        return _fold_selecting(blocks, given, behind, form, tensors)
    return _fold_joining(blocks, given, behind, form, tensors)


def _tensors(block: _Block | None, form: _Form) -> int:
    """Return in how many tensors a block takes its input."""
    return block.wnet1.blocks if isinstance(block, WeightNetBlock) and form == "feature" else 1


def _fold_joining(
    blocks: list[_Block], given: _Given, behind: _Block | None, form: _Form, tensors: int
) -> tuple[FoldedStage, _Given]:
    consumers = [*blocks[1:], behind]
    groups = [1 if isinstance(consumer, PlainBlock | None) else consumer.wnet1.blocks for consumer in consumers]
    routes = plan_routes((blocks[0].bn_proj_2.num_features, blocks[0].bn3.num_features), groups)
    joined = [form == "matmul"] * (len(blocks) - 1) + [tensors == 1]
    folded: list[nn.Module] = []
    for index, (block, use, one) in enumerate(zip(blocks, routes.uses, joined, strict=True)):
        emitted = routes.emitted[:2] if index == 0 else [routes.emitted[index + 1]]
        folded.append(_fold_block(block, given, emitted, form))
        channels = [list(chain(*use.channels))] if one else use.channels
        given = _Given(channels, list(chain(*use.pooled.values())))
    slices = [join_slices(use.slices) if one else use.slices for use, one in zip(routes.uses, joined, strict=True)]
    gated = [isinstance(consumer, WeightNetBlock) for consumer in consumers]
    pooled = [list(use.pooled) if gates else [] for use, gates in zip(routes.uses, gated, strict=True)]
    return FoldedStage(folded, slices, pooled), given


def _fold_selecting(
    blocks: list[_Block], given: _Given, behind: _Block | None, form: _Form, tensors: int
) -> tuple[FoldedSelectingStage, _Given]:
    plan = plan_selection((blocks[0].bn_proj_2.num_features, blocks[0].bn3.num_features), len(blocks) - 1)
    folded = [_fold_block(blocks[0], given, plan.emitted[:2], form)]
    for block, channels, order in zip(blocks[1:], plan.channels, plan.emitted[2:], strict=True):
        folded.append(_fold_block(block, _Given([channels], channels), [order], form))
    gates, gates_behind = isinstance(blocks[0], WeightNetBlock), isinstance(behind, WeightNetBlock)
    stage = FoldedSelectingStage(folded, plan, tensors=tensors, gates=gates, gates_behind=gates_behind)
    size = len(plan.end) // tensors
    return stage, _Given([plan.end[start : start + size] for start in range(0, len(plan.end), size)], plan.end)


def _fold_block(block: _Block, given: _Given, emitted: list[list[int]], form: _Form) -> nn.Module:
    if isinstance(block, PlainBlock):
        return FoldedPlainBlock(block, list(chain(*given.channels)), emitted)
    return FoldedWeightNetBlock(block, given.channels, given.pooled, emitted, matmul=form == "matmul")


def _gates_together(layer: nn.Module) -> int:
    """Return how many gates for each output a pointwise layer takes in one tensor."""
    return layer.mixed if isinstance(layer, MatmulPointwise) else 1


def _gather(emitted: list[Tensor], uses: list[list[Slice]]) -> list[Tensor]:
    pieces = [[emitted[producer][:, start:stop] for producer, start, stop in use] for use in uses]
    return [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in pieces]


def _take(items: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(items) for _ in range(count)]
