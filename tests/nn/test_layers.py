"""The layer: what it refuses, where its descriptor comes from, which form it takes, how it starts."""

import copy
from typing import Any

import pytest
import torch

from weightnet.errors import UsageError
from weightnet.nn.layers import WeightNet2d, set_form


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, r"in_channels must be a whole number of at least 1. Got in_channels=0"),
        ({"out_channels": 2.5}, r"Got out_channels=2.5"),
        ({"M": True}, r"Got M=True"),
        ({"G": 0}, r"Got G=0"),
        ({"squeeze_channels": -1}, r"Got squeeze_channels=-1"),
        ({"kernel_size": (3, 0)}, r"Got kernel_size=\(3, 0\)"),
        ({"stride": 0}, r"Got stride=0"),
        ({"padding": -1}, r"padding must be one whole number of at least 0"),
        ({"dilation": (1, 2, 3)}, r"Got dilation=\(1, 2, 3\)"),
        ({"M": 3, "G": 2}, r"M must be a multiple of G. Got M=3, G=2"),
        ({"in_channels": 9, "G": 2}, r"G must divide in_channels. Got in_channels=9, G=2"),
        ({"depthwise": True, "out_channels": 4}, r"must have out_channels = in_channels. Got in_channels=8"),
        ({"form": "fast"}, r"form must be one of auto, reference, feature, matmul. Got form='fast'"),
    ],
)
def test_layer_refuses_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightNet2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 1, **options})


def test_layer_alone_makes_its_descriptor() -> None:
    layer = WeightNet2d(8, 16, 1, squeeze_channels=5)
    assert layer.reduce is not None
    assert layer.reduce.out_channels == 5
    with pytest.raises(UsageError, match="shared_descriptor"):
        layer(torch.zeros(2, 8, 4, 4), torch.zeros(2, 5))


def test_layer_in_a_block_takes_its_descriptor() -> None:
    alone = WeightNet2d(8, 16, 1).double()
    shared = WeightNet2d(8, 16, 1, shared_descriptor=True).double()
    assert shared.reduce is None
    shared.load_state_dict({k: v for k, v in alone.state_dict().items() if not k.startswith("reduce")})
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    assert alone.reduce is not None
    descriptor = alone.reduce(x.mean((2, 3), keepdim=True)).flatten(1)
    torch.testing.assert_close(shared(x, descriptor), alone(x))
    with pytest.raises(UsageError, match="shared_descriptor"):
        shared(x)
    with pytest.raises(UsageError, match=r"must have the shape \(3, 16\)"):
        shared(x, descriptor[:, :4])


@pytest.mark.parametrize("shape", [(2, 7, 4, 4), (8, 4, 4), (2, 8)])
def test_layer_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"must be a batch of shape \(B, 8, H, W\)"):
        WeightNet2d(8, 16, 1)(torch.zeros(shape))


def test_layer_refuses_an_image_smaller_than_its_kernel() -> None:
    with pytest.raises(UsageError, match="at least as large as the kernel"):
        WeightNet2d(8, 16, 5)(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("M", "G"), [(1, 1), (2, 2), (4, 2), (3, 1)])
def test_layer_gives_the_same_in_every_form(M: int, G: int, depthwise: bool) -> None:
    torch.manual_seed(0)
    layer = WeightNet2d(8, 8, 3, padding=1, M=M, G=G, depthwise=depthwise).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    outputs = []
    for form in ("auto", "reference", "feature", "matmul"):
        set_form(layer, form)  # type: ignore[arg-type]
        outputs.append(layer(x))
    assert outputs[0].abs().max() > 1e-3
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-12)


def test_set_form_reaches_every_layer_and_refuses_others() -> None:
    layers = torch.nn.Sequential(WeightNet2d(4, 4, 1), torch.nn.ReLU(), WeightNet2d(4, 4, 1))
    set_form(layers, "matmul")
    assert [module.form for module in layers.modules() if isinstance(module, WeightNet2d)] == ["matmul", "matmul"]
    with pytest.raises(UsageError, match="Got form='fast'"):
        set_form(layers, "fast")  # type: ignore[arg-type]


def test_cheapest_form_follows_the_shapes() -> None:
    assert WeightNet2d(48, 48, 1).cheapest_form((28, 28)) == "matmul"
    assert WeightNet2d(224, 224, 1).cheapest_form((4, 4)) == "feature"
    assert WeightNet2d(48, 48, 3, depthwise=True).cheapest_form((28, 28)) == "feature"
    assert WeightNet2d(48, 48, 3, depthwise=True, M=8, G=1).cheapest_form((28, 28)) == "reference"


@pytest.mark.parametrize(
    ("layer", "bank_std"),
    [
        (WeightNet2d(64, 64, 1, M=2, G=2), 2 / 64),
        (WeightNet2d(64, 64, 3, M=8, G=1), 1 / (64 * 9)),
        (WeightNet2d(512, 512, 3, depthwise=True, M=2, G=2), 1 / 9),
    ],
)
def test_layer_starts_as_the_original(layer: WeightNet2d, bank_std: float) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    assert layer.reduce is not None
    assert layer.wn_fc2.weight.std().item() == pytest.approx(bank_std, rel=0.05)
    assert layer.wn_fc1.weight.std().item() == pytest.approx(1 / layer.wn_fc1.in_channels, rel=0.1)
    assert layer.reduce.weight.std().item() == pytest.approx(1 / layer.reduce.in_channels, rel=0.1)
    assert not layer.wn_fc1.bias.any()  # type: ignore[union-attr]
    assert not layer.reduce.bias.any()  # type: ignore[union-attr]


def test_layer_copies_and_saves() -> None:
    layer = WeightNet2d(8, 16, 3)
    x = torch.randn(2, 8, 6, 6)
    other = WeightNet2d(8, 16, 3)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
