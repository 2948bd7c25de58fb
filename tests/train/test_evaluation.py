"""Figures against a plain recount."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightnet.errors import DataError
from weightnet.images.decode import read_image
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.predict.classifier import Classifier
from weightnet.train.evaluation import evaluate, network_input
from weightnet.train.folders import read_folders
from weightnet.zoo.cards import Card

from .conftest import COLOURS_BGR, TINY


@pytest.fixture
def network() -> ShuffleNetV2:
    """A network whose answers depend on the photo."""
    spec = dataclasses.replace(TINY, num_classes=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        network = ShuffleNetV2(spec)
        network(torch.randn(16, 3, 32, 32).cumsum(2) / 4)  # batch statistics
        nn.init.normal_(network.classifier[0].weight)
    card = Card("tiny", spec, tuple(map(ClassLabel, COLOURS_BGR)), Preprocess(resize=40, crop=32, interpolation="area"))
    network.card = card
    return network.eval()


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 0), (64, 1)])
def test_evaluate_agrees_with_a_recount_by_the_classifier(
    photos: Path, network: ShuffleNetV2, batch_size: int, workers: int
) -> None:
    folder, _ = read_folders(photos)
    figures, unreadable = evaluate(network, folder, network.card.preprocess, batch_size=batch_size, workers=workers)
    rows = Classifier(network)([folder.source(index) for index in range(len(folder))])
    best = np.array([row.top[0].index for row in rows])
    right = best == folder.labels
    own = [
        next(score.probability for score in row.top if score.index == label)
        for row, label in zip(rows, folder.labels, strict=True)
    ]
    assert 0.1 < right.mean() < 0.9
    assert figures["top1"] == right.mean()
    assert figures["class_averaged_top1"] == pytest.approx(
        np.mean([right[folder.labels == c].mean() for c in range(3)])
    )
    assert figures["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    assert figures["top5"] == 1.0
    assert 0 <= figures["ece"] <= 1
    assert (figures["photos"], figures["unreadable"], unreadable) == (36, 0, [])


def test_evaluate_leaves_unreadable_photos_out(own_photos: Path, network: ShuffleNetV2) -> None:
    (own_photos / "val" / "red" / "2.png").write_bytes(b"")
    _, folder = read_folders(own_photos)
    figures, unreadable = evaluate(network, folder, network.card.preprocess, batch_size=1)
    assert (figures["photos"], figures["unreadable"]) == (11, 1)
    assert [photo.name for photo in unreadable] == ["val/red/2.png"]


def test_evaluate_wants_a_photo_that_can_be_read(own_photos: Path, network: ShuffleNetV2) -> None:
    for path in (own_photos / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"val must hold photos that can be read\. Got none among 12"):
        evaluate(network, read_folders(own_photos)[1], network.card.preprocess)


def test_evaluate_measures_in_evaluation_mode(photos: Path, network: ShuffleNetV2) -> None:
    _, folder = read_folders(photos)
    want = evaluate(network, folder, network.card.preprocess).figures
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert evaluate(network.train(), folder, network.card.preprocess).figures == want
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{}, {"mean": None, "std": None}, {"channel_order": "RGB"}, {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0)}],
)
def test_network_input_is_the_cards_arithmetic(options: dict[str, Any]) -> None:
    preprocess = Preprocess(**options)
    crops = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    got: Tensor = network_input(torch.from_numpy(crops), preprocess)
    np.testing.assert_array_equal(got.numpy(), np.stack([preprocess.normalize(crop) for crop in crops]))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_network_input_takes_views(photos: Path) -> None:
    crop = read_image(next((photos / "val").rglob("*.png")))[:32, :32]
    got = network_input(torch.from_numpy(crop.copy())[None], Preprocess())
    np.testing.assert_array_equal(got[0].numpy(), Preprocess().normalize(crop))
