"""The deploy form gives the network's numbers, by static weights alone."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from weightnet.errors import UsageError
from weightnet.nn.fold import FoldedSelectingStage, FoldedStage, FoldForm, cheapest_folded_form, fold
from weightnet.nn.folded_layers import ChannelSelect, FoldedConv, GainPointwise, MatmulPointwise
from weightnet.nn.routes import plan_routes, plan_selection
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS, NetworkSpec

SMALL = {
    "plain": NetworkSpec((16, 32, 64), stage_repeats=(2, 3, 2), stem_channels=8, head_channels=32, num_classes=10),
    "r1": NetworkSpec((16, 32, 128), 2, 2, 0.0, (2, 3, 2), 8, 32, 10),  # by products but for the last stage
    "r1 one block": NetworkSpec((16, 32, 64), 1, 1, 0.0, (1, 2, 1), 8, 32, 10),
    "r2 four blocks": NetworkSpec((16, 32, 64), 8, 4, 0.0, (2, 1, 2), 8, 32, 10),
    "r3 one block": NetworkSpec((16, 32, 64), 3, 1, 0.0, (2, 1, 2), 8, 32, 10),
    # A first block's projection, which keeps its input's width, has less than half of its stage's channels, or more.
    "plain, narrow projections": NetworkSpec((20, 40, 88), stage_repeats=(2, 3, 2), stem_channels=6, num_classes=10),
    "r3, a wide projection": NetworkSpec((18, 36, 72), 3, 1, 0.0, (3, 1, 2), 12, 32, 10),
    "r1 four blocks": NetworkSpec((16, 32, 512), 4, 4, 0.0, (1, 3, 1), 8, 32, 10),  # the last stage by maps
}


def calibrated(spec: NetworkSpec, size_px: int = 64) -> ShuffleNetV2:
    """Return a network in double precision whose every tensor is non-trivial and whose logits are of order 1."""
    torch.manual_seed(0)
    network = ShuffleNetV2(spec).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    nn.init.normal_(network.classifier[0].weight)
    nn.init.normal_(network.classifier[0].bias)
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(4, spec.in_channels, size_px, size_px, dtype=torch.float64))
    return network.eval()


def photos(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("form", ["auto", "feature", "matmul"])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_fold_gives_the_same_numbers(name: str, form: FoldForm, select: bool) -> None:
    network = calibrated(SMALL[name])
    folded = fold(network, form=form, select=select)
    x = photos(3, 3, 64, 96)
    assert network(x).std() > 0.1
    torch.testing.assert_close(folded(x), network(x), rtol=0, atol=1e-10)
    features = network.forward_features(x)
    torch.testing.assert_close(folded.forward_features(x), features, rtol=0, atol=1e-10)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(folded.forward_head(features, pre_logits=True), pooled, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "form", ["auto", *(pytest.param(form, marks=pytest.mark.full) for form in ("feature", "matmul"))]
)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_fold_gives_the_same_numbers_for_every_variant(name: str, form: FoldForm) -> None:
    network = calibrated(VARIANTS[name].spec, 32)
    folded = fold(network, form=form)
    x = photos(2, 3, 32, 32)
    assert network(x).std() > 0.1
    torch.testing.assert_close(folded(x), network(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(fold(network, form=form, select=True)(x), network(x), rtol=0, atol=1e-10)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["r1", "r3 one block"])
@torch.no_grad()
def test_fold_serves_every_batch(name: str) -> None:
    folded = fold(calibrated(SMALL[name]))
    x = photos(4, 3, 64, 64)
    assert folded(x[:0]).shape == (0, 10)
    torch.testing.assert_close(folded(x[2:3]), folded(x)[2:3], rtol=0, atol=1e-10)
    torch.testing.assert_close(folded(x[[2, 0, 3]]), folded(x)[[2, 0, 3]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["auto", "feature"])
@pytest.mark.parametrize("name", SMALL)
def test_fold_leaves_no_batch_norm_and_no_computed_convolution(name: str, form: FoldForm) -> None:
    folded = fold(calibrated(SMALL[name]), form=form)
    kinds = {type(module) for module in folded.modules()}
    assert nn.BatchNorm2d not in kinds
    generated = SMALL[name].M > 0
    assert (MatmulPointwise in kinds) == (generated and "matmul" in folded.forms)
    assert (GainPointwise in kinds) == (generated and "feature" in folded.forms)

    seen: set[Tensor] = set()
    convs = [module for module in folded.modules() if isinstance(module, FoldedConv)]
    for conv in convs:
        conv.register_forward_pre_hook(lambda module, inputs: seen.add(module.weight))
    folded(photos(2, 3, 64, 64))
    assert seen == {conv.weight for conv in convs}


def test_fold_in_feature_form_uses_static_convolutions_only() -> None:
    graph = torch.export.export(fold(calibrated(SMALL["r1"]), form="feature"), (photos(2, 3, 64, 64),)).graph
    weights = [node.args[1] for node in graph.nodes if node.target == torch.ops.aten.conv2d.default]
    assert len(weights) > 30
    assert all(weight.op == "placeholder" for weight in weights)
    targets = {str(node.target) for node in graph.nodes}
    assert not {name for name in targets if "permute" in name or "transpose" in name or "batch_norm" in name}


def test_fold_leaves_the_network_as_it_was() -> None:
    network = calibrated(SMALL["r1"]).train()
    before = copy.deepcopy(network.state_dict())
    folded = fold(network)
    for parameter in folded.parameters():
        parameter.data.zero_()
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_fold_is_idempotent() -> None:
    folded = fold(calibrated(SMALL["r1"]))
    assert fold(folded) is folded


def test_fold_keeps_type_and_card() -> None:
    network = calibrated(SMALL["plain"]).float()
    network.card = "a card"
    folded = fold(network)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    assert folded.card == "a card"


def test_fold_refuses_an_unknown_form() -> None:
    with pytest.raises(UsageError, match=r"form must be one of auto, feature, matmul. Got form='fast'"):
        fold(calibrated(SMALL["plain"]), form="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_routes_bring_every_channel_where_the_shuffle_brings_it(groups: int) -> None:
    blocks, width = 5, 32
    routes = plan_routes((8, 24), [groups] * (blocks + 1))
    # Let every producer emit the numbers of its channels, and follow them through the plain shuffle beside the routes.
    sizes = [8, 24, *[width // 2] * blocks]
    outputs = [torch.arange(size) + 100 * producer for producer, size in enumerate(sizes)]
    emitted = [output[order] for output, order in zip(outputs, routes.emitted, strict=True)]
    x = torch.cat(outputs[:2])
    for block in range(blocks):
        passed, entering = x[0::2], x[1::2]
        assert torch.equal(_brought(routes.uses[block], emitted), entering)
        x = torch.cat([passed, outputs[block + 2]])
    assert torch.equal(_brought(routes.uses[-1], emitted), x)


@pytest.mark.parametrize("produced", [(16, 16), (8, 24), (24, 8), (9, 9), (1, 3), (2, 0)])
@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_selections_bring_every_channel_where_the_shuffle_brings_it(produced: tuple[int, int], blocks: int) -> None:
    plan, half = plan_selection(produced, blocks), sum(produced) // 2
    outputs = [torch.arange(size) + 100 * producer for producer, size in enumerate([*produced, *[half] * blocks])]
    emitted = [output[order] for output, order in zip(outputs, plan.emitted, strict=True)]
    x = torch.cat(outputs[:2])
    identity, last = (torch.cat([emitted[of][start:stop] for of, start, stop in slices]) for slices in plan.halves)
    for block, (mask, channels) in enumerate(zip(plan.masks, plan.channels, strict=True)):
        taken, entering = torch.where(torch.tensor(mask), identity, last), x[1::2]
        assert torch.equal(taken, entering[channels])
        identity, last = torch.where(torch.tensor(mask), last, identity), emitted[block + 2]
        x = torch.cat([x[0::2], outputs[block + 2]])
    assert torch.equal(torch.cat([identity, last]), x[plan.end])
    assert sorted(plan.end) == list(range(2 * half))


def _brought(use: object, emitted: list[Tensor]) -> Tensor:
    """Return what a use's slices bring, put back into the order of its input channels."""
    brought, channels = [], []
    for slices, indices in zip(use.slices, use.channels, strict=True):  # type: ignore[attr-defined]
        brought += [emitted[producer][start:stop] for producer, start, stop in slices]
        channels += indices
    result = torch.empty(len(channels), dtype=torch.long)
    result[torch.tensor(channels)] = torch.cat(brought)
    return result


@pytest.mark.parametrize(("name", "stages"), [("plain", 3), ("r1", 2), ("r1 four blocks", 1), ("r3 one block", 3)])
def test_fold_selects_where_a_block_takes_one_tensor(name: str, stages: int) -> None:
    folded = fold(calibrated(SMALL[name]), select=True)
    kinds = [type(stage) for stage in folded.stages]
    assert kinds == [FoldedSelectingStage] * stages + [FoldedStage] * (3 - stages)
    selections = [module for module in folded.modules() if isinstance(module, ChannelSelect)]
    assert len(selections) == sum(2 * (repeats - 1) for repeats in SMALL[name].stage_repeats[:stages])
    assert {type(stage) for stage in fold(calibrated(SMALL[name]), form="feature").stages} == {FoldedStage}


def test_fold_refuses_nothing_for_more_channels_and_classes() -> None:
    spec = dataclasses.replace(SMALL["r1"], in_channels=1, num_classes=3)
    network = calibrated(spec)
    with torch.no_grad():
        x = photos(2, 1, 40, 33)
        torch.testing.assert_close(fold(network)(x), network(x), rtol=0, atol=1e-10)


def test_fold_refuses_what_is_no_network_of_this_package() -> None:
    with pytest.raises(UsageError, match=r"network must be one of this package\. Got network=Linear"):
        fold(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_fold_refuses_to_change_the_form_of_what_is_folded() -> None:
    folded = fold(calibrated(SMALL["r1"]), form="feature")
    assert fold(folded, form="feature") is folded
    with pytest.raises(UsageError, match=r"Got form='matmul' for one that is folded already"):
        fold(folded, form="matmul")


def test_fold_takes_the_form_that_is_less_work_in_each_stage() -> None:
    product, maps = "matmul", "feature"
    # Of several kernels always the product; of one, where a map has more pixels than a kernel has inputs.
    assert [cheapest_folded_form(1, r, 100, 49) for r in (1, 2, 4)] == [maps, product, product]
    assert [cheapest_folded_form(2, 1, inputs, 196) for inputs in (195, 196)] == [product, maps]
    assert [cheapest_folded_form(blocks, 1, 100, 49) for blocks in (1, 2, 3, 4)] == [maps, maps, maps, product]
    forms = {name: fold(ShuffleNetV2(variant.spec)).forms for name, variant in VARIANTS.items()}
    assert forms == {
        **{name: [maps] * 3 for name in VARIANTS if name.endswith(".plain")},
        **{f"shufflenet_v2_x{size}": [product, product, maps] for size in ("0_5", "1_0", "1_5")},
        "shufflenet_v2_x2_0": [product, maps, maps],
        **{name: [product] * 3 for name in VARIANTS if name.endswith("x")},
    }
