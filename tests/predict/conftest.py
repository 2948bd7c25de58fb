"""A small network with a card, whose answers depend on the photo."""

import pytest
import torch

from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo.cards import Card

LABELS = ("cat", "dog", "fox", "tree", "house")


@pytest.fixture(scope="session")
def tiny_network() -> ShuffleNetV2:
    spec = NetworkSpec(
        (16, 32, 64), M=2, G=2, stage_repeats=(1, 1, 1), stem_channels=8, head_channels=32, num_classes=len(LABELS)
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = ShuffleNetV2(spec)
        photos = torch.nn.functional.interpolate(4 * torch.rand(64, 3, 4, 4) - 2, 32, mode="bicubic")
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network(photos)  # batch norm statistics, without which every photo looks alike
        linear = network.eval().classifier[0]
        torch.nn.init.normal_(linear.weight)
        linear.bias -= network(photos).mean(0)
    preprocess = Preprocess(resize=40, crop=32, interpolation="area")
    network.card = Card("tiny", spec, tuple(ClassLabel(label) for label in LABELS), preprocess)
    return network
