"""Batches: the same whatever loads them, and no photo can break them."""

import dataclasses
import os
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from weightnet.errors import ImageError, TrainingError
from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess
from weightnet.train import data
from weightnet.train.augment import augment
from weightnet.train.config import TrainConfig
from weightnet.train.data import Batch, EpochBatches, PhotoCache, epoch_order
from weightnet.train.folders import PhotoFolder, read_folders

from .conftest import MakeConfig


def never() -> None:
    """A check that nothing asks to stop."""


def batches_of(
    folder: PhotoFolder, config: TrainConfig, run: Path, *, epoch: int = 0, first_step: int = 0
) -> list[Batch]:
    batches = EpochBatches(folder.labels, config)
    batches.epoch, batches.first_step = epoch, first_step
    with data.cached(folder, config, run / "photos.cache", never) as cache:
        return list(data.training_loader(folder, batches, config, cache))


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.photos, other.photos)
        assert torch.equal(one.labels, other.labels)
        assert one.unreadable == other.unreadable


@settings(deadline=None)
@given(n=st.integers(1, 50), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_epoch_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    labels = np.zeros(n, np.int64)
    order = epoch_order(labels, seed=seed, epoch=epoch, balance=0)
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(order, epoch_order(labels, seed=seed, epoch=epoch, balance=0))


@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_epoch_order_differs_by_seed_and_epoch(balance: float) -> None:
    labels = np.arange(100) % 3
    orders = {
        tuple(epoch_order(labels, seed=seed, epoch=epoch, balance=balance)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(("balance", "shares"), [(1, (0.5, 0.5)), (0.5, (0.25, 0.75))])
def test_epoch_order_balances_classes(balance: float, shares: tuple[float, float]) -> None:
    labels = np.repeat([0, 1], [1000, 9000])
    drawn = Counter(labels[epoch_order(labels, seed=0, epoch=0, balance=balance)].tolist())
    assert drawn[0] / 10_000 == pytest.approx(shares[0], abs=0.02)
    assert drawn[1] / 10_000 == pytest.approx(shares[1], abs=0.02)


def test_epoch_batches_go_on_from_a_step(make_config: MakeConfig) -> None:
    batches = EpochBatches(np.zeros(38, np.int64), make_config())
    batches.epoch = 3
    whole = list(batches)
    assert [len(places) for places in whole] == [9, 9, 9, 9]  # the last two photos are left out
    assert len({index for places in whole for _, _, index in places}) == 36
    assert [position for places in whole for _, position, _ in places] == list(range(36))
    batches.first_step = 3
    assert list(batches) == whole[3:]
    assert len(batches) == 1


def test_epoch_batches_of_fewer_photos_than_a_batch(make_config: MakeConfig) -> None:
    batches = EpochBatches(np.zeros(4, np.int64), make_config())
    assert batches.steps == 1
    assert [len(places) for places in batches] == [4]


@pytest.mark.parametrize("cache", [0, 64])
def test_training_loader_is_a_function_of_seed_epoch_and_position(
    photos: Path, tmp_path: Path, make_config: MakeConfig, cache: int
) -> None:
    folder, _ = read_folders(photos)
    config = make_config(seed=5, workers=2, cache=cache)  # the photos are smaller than the cache's 64 px
    order = epoch_order(folder.labels, seed=5, epoch=7, balance=0)
    got = batches_of(folder, config, tmp_path, epoch=7)
    for position, index in enumerate(order):
        want = augment(read_image(folder.source(index)), np.random.default_rng((5, 7, position)), config)
        np.testing.assert_array_equal(got[position // 9].photos[position % 9].numpy(), want)
        assert got[position // 9].labels[position % 9] == folder.labels[index]


def test_training_loader_gives_crops_of_the_size_of_the_epoch(
    photos: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    folder, _ = read_folders(photos)
    config = make_config(first_train_size=32, train_size=48, epochs=3)
    shapes = [batches_of(folder, config, tmp_path, epoch=epoch)[0].photos.shape[1:3] for epoch in range(3)]
    assert shapes == [(32, 32), (40, 40), (48, 48)]


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_training_loader_does_not_depend_on_workers_or_where_it_begins(
    photos: Path, tmp_path: Path, make_config: MakeConfig, workers: int | None
) -> None:
    folder, _ = read_folders(photos)
    config = make_config(balance=0.5, workers=2)
    whole = batches_of(folder, config, tmp_path, epoch=1)
    others = dataclasses.replace(config, workers=workers)
    assert_same(batches_of(folder, others, tmp_path, epoch=1, first_step=2), whole[2:])


def test_training_loader_draws_nothing_from_the_callers_generator(
    photos: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    before = torch.get_rng_state()
    batches_of(read_folders(photos)[0], make_config(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def spoil(folder: Path) -> set[str]:
    """Spoil photos in four ways and return their names."""
    (folder / "red" / "0.png").write_bytes(b"")
    whole = (folder / "red" / "1.png").read_bytes()
    (folder / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "green" / "2.png").write_text("<html>not found</html>")
    (folder / "blue" / "3.png").unlink()
    (folder / "blue" / "3.png").symlink_to("nowhere")
    return {f"{folder.name}/{name}" for name in ("red/0.png", "red/1.png", "green/2.png", "blue/3.png")}


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("cache", [0, 64])
def test_training_loader_leaves_unreadable_photos_out(
    own_photos: Path, tmp_path: Path, make_config: MakeConfig, cache: int, workers: int | None
) -> None:
    spoiled = spoil(own_photos / "train")
    folder, _ = read_folders(own_photos)
    got = batches_of(folder, make_config(cache=cache, workers=workers), tmp_path)
    reasons = {name: reason for batch in got for name, reason in batch.unreadable}
    assert reasons.keys() == spoiled
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=re.escape(reason)):
            read_image(own_photos / name)
    assert sum(len(batch.photos) for batch in got) == sum(len(batch.labels) for batch in got) == 32


def test_training_loader_gives_an_empty_batch_where_no_photo_can_be_read(
    own_photos: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    for path in (own_photos / "train").rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    folder, _ = read_folders(own_photos)
    for config in (make_config(), make_config(cache=64)):
        got = batches_of(folder, config, tmp_path)
        assert [(len(batch.photos), len(batch.labels), len(batch.unreadable)) for batch in got] == [(0, 0, 9)] * 4


def test_validation_loader_prepares_photos_as_the_card_says(own_photos: Path) -> None:
    spoiled = spoil(own_photos / "val")
    _, folder = read_folders(own_photos)
    preprocess = Preprocess(resize=40, crop=32, interpolation="area")
    batches: DataLoader[Any] = data.validation_loader(folder, preprocess, batch_size=5, workers=1)
    unreadable = [photo for batch in batches for photo in batch.unreadable]
    assert {photo.name for photo in unreadable} == spoiled
    crops = np.concatenate([batch.photos.numpy() for batch in batches])
    kept = [index for index in range(len(folder)) if folder.name(index) not in spoiled]
    want = np.stack([preprocess.crop_uint8(read_image(folder.source(index))) for index in kept])
    np.testing.assert_array_equal(crops, want)
    assert torch.cat([batch.labels for batch in batches]).tolist() == folder.labels[kept].tolist()


def test_photo_cache_shrinks_and_survives_pickling(own_photos: Path, tmp_path: Path) -> None:
    spoil(own_photos / "train")
    folder, _ = read_folders(own_photos)
    cache = PhotoCache(folder, tmp_path / "cache", 20)
    cache = pickle.loads(pickle.dumps(cache))  # as workers that are not forked get it
    readable = [index for index in range(len(folder)) if index not in cache.reasons]
    assert len(readable) == 32
    assert all(min(cache[index].shape[:2]) == 20 for index in readable)
    with pytest.raises(ImageError, match="damaged"):
        cache[folder.files.index("red/1.png")]


def test_photo_cache_can_be_stopped(photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    def stop() -> None:
        raise KeyError

    file, (folder, _) = tmp_path / "photos.cache", read_folders(photos)
    with pytest.raises(KeyError), data.cached(folder, make_config(cache=64), file, stop):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [True, False])
def test_cached_says_that_there_is_no_room(photos: Path, tmp_path: Path, make_config: MakeConfig, full: bool) -> None:
    folder, _ = read_folders(photos)
    if full:
        (tmp_path / "photos.cache").symlink_to("/dev/full")  # a disk without room
    run = tmp_path if full else tmp_path / "missing"
    with (
        pytest.raises(TrainingError, match=r"room for decoded photos.*Make room, or lower cache"),
        data.cached(folder, make_config(cache=64), run / "photos.cache", never),
    ):
        pass
    assert not list(tmp_path.iterdir())


class _Priorities(Dataset[data.Unreadable]):
    """The priority of the process that loads, told as the reason of a photo that cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> data.Unreadable:
        return data.Unreadable("photo", str(os.nice(0)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the network runs on the processor only where there is no GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_gives_way_to_the_network(workers: int) -> None:
    (batch,) = data._loader(_Priorities(), workers, batch_sampler=[[0]])
    assert int(batch.unreadable[0].reason) == (19 if workers else os.nice(0))
