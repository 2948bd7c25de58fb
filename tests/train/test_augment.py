"""Training crops against plain recomputations of the original's formulas."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from weightnet.train.augment import augment, colour_jitter, random_crop_box, shrink_short_edge
from weightnet.train.config import TrainConfig

Pixels = npt.NDArray[Any]
STRENGTH = 0.4
PHOTO = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)


class Script:
    """A generator that gives known numbers: the order of the steps, then their factors."""

    def __init__(self, order: list[int], factors: list[float]) -> None:
        self.order, self.factors = order, iter(factors)

    def permutation(self, n: int) -> list[int]:
        return self.order

    def uniform(self, low: float, high: float) -> float:
        return next(self.factors)


def original_step(photo: Pixels, step: int, factor: float) -> Pixels:
    """One step of MegEngine's ColorJitter, in float64 before its truncation."""
    pixels = photo.astype(np.float64)
    grey = pixels @ [0.114, 0.587, 0.299]
    centre = {0: 0.0, 1: grey.mean(), 2: grey[..., None]}[step]
    return np.clip(pixels * factor + centre * (1 - factor), 0, 255)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(data="", out="", train_size=32, **options)


@pytest.mark.parametrize("factor", [0.6, 0.87, 1.0, 1.13, 1.4])
@pytest.mark.parametrize("step", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_colour_jitter_step_follows_the_original(step: int, factor: float) -> None:
    others = [other for other in range(3) if other != step]
    rng: Any = Script([step, *others], [factor, 1.0, 1.0])
    got = colour_jitter(PHOTO, rng, STRENGTH)
    want = original_step(PHOTO, step, factor)
    assert got.dtype == np.uint8
    # Truncated, as there; where float32 and float64 fall on two sides of a whole number, that number or the one below.
    near_whole = np.abs(want - want.round()) < 1e-3
    np.testing.assert_array_equal(got[~near_whole], np.floor(want[~near_whole]))
    assert np.abs(got - want)[near_whole].max(initial=0) <= 1.001


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_colour_jitter_steps_follow_each_other_in_the_drawn_order(order: list[int]) -> None:
    factors = [1.3, 0.7, 1.2]
    rng: Any = Script(order, factors)
    want: Pixels = PHOTO
    for step, factor in zip(order, factors, strict=True):
        want = np.floor(original_step(want, step, factor))
    got = colour_jitter(PHOTO, rng, STRENGTH)
    assert np.abs(got - want).max() <= 3  # a truncation on the other side of a whole number, amplified by two steps
    assert (got == want).mean() > 0.99


def test_colour_jitter_draws_factors_within_its_strength() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)  # of one colour: contrast and saturation leave it as it is
    levels = [colour_jitter(grey, np.random.default_rng(seed), STRENGTH)[0, 0, 0] for seed in range(300)]
    assert 58 <= min(levels) <= 63  # each of the other two steps may truncate a level away
    assert 137 <= max(levels) <= 140


def test_colour_jitter_of_no_strength_is_the_photo() -> None:
    got = colour_jitter(PHOTO[:, ::-1], np.random.default_rng(0), 0.0)
    np.testing.assert_array_equal(got, PHOTO[:, ::-1])
    assert got.flags.c_contiguous


@settings(deadline=None)
@given(
    photo=arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3))),
    seed=st.integers(0, 2**32),
    strength=st.floats(0, 1),
)
def test_colour_jitter_stays_a_photo(photo: Pixels, seed: int, strength: float) -> None:
    before = photo.copy()
    got = colour_jitter(photo, np.random.default_rng(seed), strength)
    assert (got.shape, got.dtype) == (photo.shape, np.uint8)
    np.testing.assert_array_equal(photo, before)


SIZES = st.one_of(st.integers(1, 4), st.integers(1, 2000), st.sampled_from([1000, 16_384]))


@settings(deadline=None)
@given(width=SIZES, height=SIZES, seed=st.integers(0, 2**32), min_scale=st.floats(0.001, 1))
def test_random_crop_box_lies_in_the_photo(width: int, height: int, seed: int, min_scale: float) -> None:
    x, y, w, h = random_crop_box(width, height, np.random.default_rng(seed), min_scale)
    assert w >= 1
    assert h >= 1
    assert 0 <= x <= width - w
    assert 0 <= y <= height - h


@settings(deadline=None)
@given(width=st.integers(200, 900), height=st.integers(200, 900), seed=st.integers(0, 2**32))
def test_random_crop_box_keeps_area_and_ratio(width: int, height: int, seed: int) -> None:
    _, _, w, h = random_crop_box(width, height, np.random.default_rng(seed), 0.2)
    assert 0.2 * 0.97 <= w * h / (width * height) <= 1  # whole pixels leave the bounds by a little
    assert 3 / 4 * 0.97 <= w / h <= 4 / 3 * 1.03


@pytest.mark.parametrize(("width", "height", "size"), [(1, 1000, (1, 1)), (1000, 1, (1, 1)), (10, 1000, (10, 13))])
def test_random_crop_box_falls_back_to_the_middle(width: int, height: int, size: tuple[int, int]) -> None:
    x, y, w, h = random_crop_box(width, height, np.random.default_rng(0), 1.0)
    assert (w, h) == size
    assert (x, y) == ((width - w) // 2, (height - h) // 2)


def test_random_crop_box_covers_the_range_of_areas() -> None:
    rng = np.random.default_rng(0)
    shares = [w * h / 300**2 for _, _, w, h in (random_crop_box(300, 300, rng, 0.08) for _ in range(500))]
    assert min(shares) < 0.1
    assert max(shares) > 0.95
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 2), (100, 3), (400, 500)])
@pytest.mark.parametrize("interpolation", ["linear", "area"])
def test_augment_makes_a_square_of_any_photo(shape: tuple[int, int], interpolation: str) -> None:
    photo = np.full((*shape, 3), 77, np.uint8)
    crop = augment(photo, np.random.default_rng(0), config(interpolation=interpolation, jitter=0.0))
    assert (crop.shape, crop.dtype, crop.flags.c_contiguous) == ((32, 32, 3), np.uint8, True)
    assert (crop == 77).all()


def test_augment_makes_larger_crops_epoch_by_epoch() -> None:
    growing = TrainConfig(data="", out="", first_train_size=32, train_size=64, epochs=3)
    photo = np.zeros((100, 100, 3), np.uint8)
    crops = [augment(photo, np.random.default_rng(0), growing, epoch=epoch) for epoch in range(3)]
    assert [crop.shape for crop in crops] == [(32, 32, 3), (48, 48, 3), (64, 64, 3)]


def test_augment_flips_half_of_the_photos() -> None:
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (100, 100, 3)).copy()
    crops = [augment(ramp, np.random.default_rng(seed), config(jitter=0.0)) for seed in range(200)]
    flipped = [int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops]
    assert 80 <= sum(flipped) <= 120


@pytest.mark.parametrize(("interpolation", "method"), [("area", cv2.INTER_AREA), ("linear", cv2.INTER_LINEAR)])
def test_augment_resizes_as_the_card_says(interpolation: str, method: int) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    options = config(interpolation=interpolation, jitter=0.0, min_scale=1.0)
    crop = augment(photo, np.random.default_rng(3), options)
    x, y, w, h = random_crop_box(90, 90, np.random.default_rng(3), 1.0)
    want = cv2.resize(photo[y : y + h, x : x + w], (32, 32), interpolation=method)
    assert np.array_equal(crop, want) or np.array_equal(crop, want[:, ::-1])


@pytest.mark.parametrize(
    ("shape", "want"), [((300, 400), (192, 256)), ((400, 300), (256, 192)), ((100, 500), (100, 500))]
)
def test_shrink_short_edge_keeps_small_photos(shape: tuple[int, int], want: tuple[int, int]) -> None:
    assert shrink_short_edge(np.zeros((*shape, 3), np.uint8), 192).shape[:2] == want
