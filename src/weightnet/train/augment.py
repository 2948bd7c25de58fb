"""Training crops as the original makes them: random resized crop, flip, colour jitter; each a function of a generator.

Source: megvii-model/WeightNet, `train.py`; MegEngine's `RandomResizedCrop` and `ColorJitter`.
"""

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from weightnet.train.config import TrainConfig

Pixels = npt.NDArray[Any]
Box = tuple[int, int, int, int]  # x, y, width, height
BGR_TO_GREY = np.array([0.114, 0.587, 0.299], np.float32)
_IDENTITY, _TO_GREY = np.eye(3, dtype=np.float32), np.tile(BGR_TO_GREY, (3, 1))


def augment(
    photo_HW3: Pixels, rng: np.random.Generator, config: TrainConfig, box: Box | None = None, *, epoch: int = 0
) -> Pixels:
    """Return a training crop (size, size, 3) of a photo, as large as the epoch's are, of a given or a random box."""
    if box is None:
        box = random_crop_box(photo_HW3.shape[1], photo_HW3.shape[0], rng, config.min_scale)
    crop = cut(photo_HW3, box, config.train_size_in(epoch), config.interpolation)
    if rng.random() < 0.5:
        crop = cv2.flip(crop, 1)
    return colour_jitter(crop, rng, config.jitter)


def cut(photo_HW3: Pixels, box: Box, size: int, interpolation: str) -> Pixels:
    """Return a box of a photo, resized to (size, size, 3); "area" shrinks antialiased, anything else never is."""
    x, y, width, height = box
    shrinks = min(width, height) > size and interpolation == "area"
    crop = photo_HW3[y : y + height, x : x + width]
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def view_box(photo_HW3: Pixels, view: int, index: int, config: TrainConfig) -> Box:
    """Return the box of a photo's view that a teacher sees: a function of the seed, the view and the photo's index."""
    rng = np.random.default_rng((config.seed, view, index, 1))  # four numbers: no other generator has the same
    return random_crop_box(photo_HW3.shape[1], photo_HW3.shape[0], rng, config.min_scale)


def random_crop_box(width: int, height: int, rng: np.random.Generator, min_scale: float) -> Box:
    """Return a random box (x, y, width, height) in pixels: min_scale to 1 of the area, aspect ratio 3/4 to 4/3.

    Example:
        >>> random_crop_box(100, 80, np.random.default_rng(0), 1.0)
        (0, 0, 100, 80)
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # No such box fits: the largest central one whose ratio is within the bounds.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def colour_jitter(photo_HW3: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength, in random order.

    Each step is clipped to 0..255 and truncated, as in the original.
    """
    photo_HW3 = np.ascontiguousarray(photo_HW3)
    if strength == 0:
        return photo_HW3
    for step in rng.permutation(3):
        factor = np.float32(rng.uniform(1 - strength, 1 + strength))
        if step == 0:
            photo_HW3 = _through_table(photo_HW3, factor, np.float32(0))
        elif step == 1:
            mean_grey = np.float32(cv2.mean(photo_HW3)[:3] @ BGR_TO_GREY)
            photo_HW3 = _through_table(photo_HW3, factor, mean_grey)
        else:
            mixed = cv2.transform(photo_HW3.astype(np.float32), factor * _IDENTITY + (1 - factor) * _TO_GREY)
            photo_HW3 = np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)
    return photo_HW3


def shrink_short_edge(photo_HW3: Pixels, short_edge_px: int) -> Pixels:
    """Return the photo with its short edge shrunk to so many pixels, antialiased; smaller photos as they are."""
    height, width = photo_HW3.shape[:2]
    scale = short_edge_px / min(height, width)
    if scale >= 1:
        return photo_HW3
    return cv2.resize(photo_HW3, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def _through_table(photo: Pixels, factor: np.float32, centre: np.float32) -> Pixels:
    """Return photo * factor + centre * (1 - factor), by a table of the 256 grey levels."""
    levels = np.arange(256, dtype=np.float32) * factor + centre * (1 - factor)
    return cv2.LUT(photo, np.clip(levels, 0, 255).astype(np.uint8))
