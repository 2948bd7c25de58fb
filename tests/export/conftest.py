"""Networks whose every weight is random and whose batch norms are calibrated, and pictures for them."""

import functools
from collections.abc import Callable

import pytest
import torch

from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo.cards import Card, numbered_classes

SMALL = {
    "plain": NetworkSpec((16, 32, 64), stage_repeats=(2, 3, 2), stem_channels=8, head_channels=32, num_classes=10),
    "r1": NetworkSpec((16, 32, 128), 2, 2, 0.0, (2, 3, 2), 8, 32, 10),  # by products but for the last stage
    "r1 one block": NetworkSpec((16, 32, 64), 1, 1, 0.0, (1, 2, 1), 8, 32, 10),
    "r2 four blocks": NetworkSpec((16, 32, 64), 8, 4, 0.0, (2, 1, 2), 8, 32, 10),
    "r3 one block": NetworkSpec((16, 32, 64), 3, 1, 0.0, (2, 1, 2), 8, 32, 10),
    "r9 one block": NetworkSpec((16, 32, 64), 9, 1, 0.0, (2, 1, 2), 8, 32, 10),
}


def calibrated(spec: NetworkSpec, *, crop: int = 64) -> ShuffleNetV2:
    """Return a network with a card whose photos are `crop` px on a side."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = ShuffleNetV2(spec)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.5, 0.5)
                module.momentum = None  # the average of all batches
            elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
                torch.nn.init.normal_(module.bias)
        torch.nn.init.normal_(network.classifier[0].weight)
        for _ in range(2):
            network(pictures(8, spec.in_channels, crop, crop).float())
    card = Card("calibrated", spec, numbered_classes(spec.num_classes), Preprocess(resize=crop, crop=crop))
    network.card = card
    return network.eval()


def pictures(*shape: int) -> torch.Tensor:
    """Return smooth random pictures in double precision, of about mean 0 and deviation 1."""
    coarse = 2 * torch.randn(*shape[:2], 6, 6, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic")


@pytest.fixture(scope="session")
def make_network() -> Callable[..., ShuffleNetV2]:
    return calibrated


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., torch.Tensor]:
    return pictures


@pytest.fixture(scope="session")
def small() -> Callable[[str], ShuffleNetV2]:
    """A small network by its name in `SMALL`; tests must not change it."""
    return functools.cache(lambda name: calibrated(SMALL[name]))
