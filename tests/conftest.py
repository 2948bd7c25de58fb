"""Fixtures shared by all tests."""

import dataclasses
import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from weightnet.nn.shufflenet import ShuffleNetV2

ROOT = Path(__file__).parents[1]
LABELS = ("cat", "dog", "fox", "tree", "house")

os.environ["COLUMNS"] = "100"  # a command of the program keeps the width that it first wrote in


def write_tar(path: Path, members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar file, in a folder that is made where it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of ground truth beside the repository; tests that need it are skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the ground truth in ../shared, which is not part of the product")
    return path


@pytest.fixture(scope="session")
def tiny_network() -> "ShuffleNetV2":
    """A small network with a card, whose answers depend on the photo. Not to be changed."""
    import torch

    from weightnet.images.labels import ClassLabel
    from weightnet.images.transforms import Preprocess
    from weightnet.nn.shufflenet import ShuffleNetV2
    from weightnet.nn.variants import NetworkSpec
    from weightnet.zoo.cards import Card

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
    network.card = Card("tiny", spec, tuple(map(ClassLabel, LABELS)), preprocess)
    return network


@pytest.fixture(scope="session")
def make_run(tiny_network: "ShuffleNetV2", tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder as training leaves it, of the small network; options change its card."""
    from safetensors.torch import save_file

    from weightnet.zoo.cards import write_card

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        save_file(tiny_network.state_dict(), folder / "weights.safetensors")
        write_card(dataclasses.replace(tiny_network.card, **changes), folder / "weights.json")
        return folder

    return make
