"""The twelve networks: exact totals, the page's tables, any size, one interface, the original's start."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weightnet.errors import UsageError
from weightnet.nn.complexity import complexity
from weightnet.nn.fold import fold
from weightnet.nn.layers import WeightNet2d, set_form
from weightnet.nn.shufflenet import ShuffleNetV2, outline
from weightnet.nn.variants import VARIANTS, NetworkSpec

SMALL = NetworkSpec((16, 32, 64), 2, 2, 0.0, (2, 2, 1), 8, 32, 10)
SMALL_SPECS = [SMALL, dataclasses.replace(SMALL, M=0, G=0), dataclasses.replace(SMALL, M=4, G=1)]
EXACT = {  # parameters and multiply-adds in millions, worked out independently of this package
    "shufflenet_v2_x0_5.plain": (1_366_792, "40.476"),
    "shufflenet_v2_x1_0.plain": (2_211_976, "137.611"),
    "shufflenet_v2_x1_5.plain": (3_507_720, "298.971"),
    "shufflenet_v2_x2_0.plain": (5_503_992, "557.270"),
    "shufflenet_v2_x0_5": (1_463_928, "40.704"),
    "shufflenet_v2_x1_0": (2_435_832, "138.534"),
    "shufflenet_v2_x1_5": (3_915_344, "301.097"),
    "shufflenet_v2_x2_0": (6_198_068, "561.368"),
    "shufflenet_v2_x0_5.wn8x": (2_736_216, "41.958"),
    "shufflenet_v2_x1_0.wn4x": (5_143_896, "141.209"),
    "shufflenet_v2_x1_5.wn4x": (9_624_336, "306.781"),
    "shufflenet_v2_x2_0.wn4x": (18_268_604, "573.364"),
}


def calibrated(spec: NetworkSpec) -> ShuffleNetV2:
    torch.manual_seed(0)
    network = ShuffleNetV2(spec).double()
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(4, spec.in_channels, 64, 64, dtype=torch.float64))
    nn.init.normal_(network.classifier[0].weight)
    return network.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_its_exact_totals(name: str) -> None:
    totals = complexity(ShuffleNetV2(VARIANTS[name].spec))
    assert totals == VARIANTS[name].totals
    assert (totals.params, f"{totals.macs / 1e6:.3f}") == EXACT[name]


def test_complexity_refuses_what_it_cannot_count() -> None:
    network = ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec)
    with pytest.raises(UsageError, match=r"network must be a ShuffleNetV2\. Got network=FoldedShuffleNetV2"):
        complexity(fold(network))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"size_px must be at least 32\. Got size_px=-1"):
        complexity(network, -1)


def test_page_params_are_reproduced_in_every_row() -> None:
    for variant in VARIANTS.values():
        assert f"{variant.totals.page_params / 1e6:.1f}M" == variant.printed.params


def test_page_flops_are_reproduced_in_all_rows_but_one() -> None:
    missed = {n for n, v in VARIANTS.items() if f"{v.totals.page_flops / 1e6:.0f}M" != v.printed.flops}
    assert missed == {"shufflenet_v2_x2_0"}
    assert VARIANTS["shufflenet_v2_x2_0"].printed.flops == "562M"
    assert f"{VARIANTS['shufflenet_v2_x2_0'].totals.page_flops / 1e6:.0f}M" == "561M"


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5.plain", "shufflenet_v2_x0_5", "shufflenet_v2_x0_5.wn8x"])
def test_multiply_adds_agree_with_torchs_counter(name: str) -> None:
    network = ShuffleNetV2(VARIANTS[name].spec).eval()
    set_form(network, "reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    # With one kernel per block the kernels are made by a product without a sum, which the counter does not see.
    unseen = sum(
        module.wn_fc2.out_channels
        for module in network.modules()
        if isinstance(module, WeightNet2d) and module.kernels_per_block == 1
    )
    assert counter.get_total_flops() // 2 + unseen == VARIANTS[name].totals.macs


@pytest.mark.parametrize("spec", SMALL_SPECS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224)])
@torch.no_grad()
def test_network_takes_any_size(spec: NetworkSpec, size: tuple[int, int]) -> None:
    network = ShuffleNetV2(spec).eval()
    x = torch.randn(2, 3, *size)
    features = network.forward_features(x)
    assert features.shape == (2, 32, -(-size[0] // 32), -(-size[1] // 32))
    assert network.forward_head(features, pre_logits=True).shape == (2, 32)
    torch.testing.assert_close(network.forward_head(features), network(x))
    assert [tuple(f.shape[:2]) for f in network.stage_features(x)] == [(2, 16), (2, 32), (2, 64)]


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_network_refuses_other_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"must be a batch of shape \(B, 3, H, W\)"):
        ShuffleNetV2(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("spec", SMALL_SPECS)
@torch.no_grad()
def test_network_pools_the_whole_image(spec: NetworkSpec) -> None:
    network = calibrated(spec)
    x = torch.randn(1, 3, 448, 448, dtype=torch.float64)
    corner = x.clone()
    corner[:, :, 320:, 320:] += 100  # the original at 7x7 sees the top left half only
    assert not torch.allclose(network(x), network(corner))
    assert len(network(x)) == 1


def test_network_takes_other_channels_and_classes() -> None:
    network = ShuffleNetV2(dataclasses.replace(SMALL, in_channels=5, num_classes=3)).eval()
    assert network(torch.zeros(2, 5, 32, 32)).shape == (2, 3)


def test_reset_classifier_keeps_the_rest() -> None:
    network = ShuffleNetV2(SMALL)
    before = copy.deepcopy(network.features.state_dict())
    network.reset_classifier(4)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert network.num_classes == network.spec.num_classes == 4
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in network.features.state_dict().items()
        if "running" not in name and "num" not in name
    )
    with pytest.raises(UsageError, match="num_classes"):
        network.reset_classifier(0)


@pytest.mark.parametrize("spec", SMALL_SPECS)
@torch.no_grad()
def test_network_gives_the_same_in_every_form_and_layout(spec: NetworkSpec) -> None:
    network = calibrated(spec)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    set_form(network, "reference")
    expected = network(x)
    assert expected.std() > 1e-3
    for form in ("auto", "feature", "matmul"):
        set_form(network, form)  # type: ignore[arg-type]
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-11)
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(network(x[1:2]), expected[1:2], rtol=0, atol=1e-11)
    assert network(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("spec", SMALL_SPECS)
def test_training_reaches_every_parameter(spec: NetworkSpec) -> None:
    torch.manual_seed(0)
    network = ShuffleNetV2(spec).double()
    network(torch.randn(4, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@torch.no_grad()
def test_network_runs_under_autocast() -> None:
    network = calibrated(SMALL).float()
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(x), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_network_saves_and_copies() -> None:
    network = calibrated(SMALL)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    other = ShuffleNetV2(SMALL).double().eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


COMPILES = """
import torch
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec

torch.manual_seed(0)
for M, G in ((0, 0), (2, 2), (4, 1)):
    network = ShuffleNetV2(NetworkSpec((16, 32, 64), M, G, 0.0, (1, 1, 1), 8, 32, 10))
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        network(x)
        network.eval()
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.full
def test_network_compiles_as_one_graph() -> None:
    # In a process of its own: the shape checks of this test run are not code that the compiler can follow.
    subprocess.run([sys.executable, "-c", COMPILES], check=True, timeout=600)


def test_network_starts_as_the_original() -> None:
    torch.manual_seed(0)
    network = ShuffleNetV2(VARIANTS["shufflenet_v2_x1_0"].spec)
    plain = ShuffleNetV2(VARIANTS["shufflenet_v2_x1_0.plain"].spec)
    assert network.first_conv[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert network.conv_last[0].weight.std().item() == pytest.approx(1 / 448, rel=0.05)
    assert network.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert plain.features[5].conv1.weight.std().item() == pytest.approx(1 / 112, rel=0.1)
    assert plain.features[5].conv2.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert network.features[5].wnet1.wn_fc2.weight.std().item() == pytest.approx(2 / 112, rel=0.05)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            is_norm = parameter.ndim == 1 and (".bn" in name or name in ("first_conv.1.bias", "conv_last.1.bias"))
            assert torch.equal(parameter, torch.full_like(parameter, 1e-4 if is_norm else 0.0)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_channels": (16, 31, 64)}, "even number of channels"),
        ({"stage_channels": (16, 16, 64)}, "more than the one before it"),
        ({"stage_channels": (16, 32)}, "three whole numbers"),
        ({"M": 3, "G": 2}, "G must divide M"),
        ({"M": 3, "G": 3}, "G must divide M"),
        ({"M": 2, "G": 0}, "G must be a whole number of at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
    ],
)
def test_spec_refuses_what_cannot_be_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(SMALL, **options)  # type: ignore[arg-type]


def test_outline_has_the_networks_names_and_shapes_but_no_values() -> None:
    spec = VARIANTS["shufflenet_v2_x0_5.wn8x"].spec
    state = torch.get_rng_state()
    sketch = outline(spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in sketch.parameters())
    want = {name: value.shape for name, value in ShuffleNetV2(spec).state_dict().items()}
    assert {name: value.shape for name, value in sketch.state_dict().items()} == want


def test_outline_is_quick_to_begin() -> None:
    """Drawing values on the meta device makes PyTorch import sympy, for more than a second."""
    code = (
        "import sys; from weightnet.nn.shufflenet import outline; from weightnet.nn.variants import VARIANTS; "
        "outline(VARIANTS['shufflenet_v2_x0_5'].spec); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
