"""Where a network looked: class activation maps, exact for a network that ends in global pooling and one linear layer.

Shape suffixes: F features, h and w cells of the last feature map.

Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (arXiv 1512.04150).
"""

import dataclasses
from typing import Any

import numpy as np

from weightnet.images.transforms import Preprocess
from weightnet.predict.interface import Batch

CELL_PX = 32  # of the network's input for each cell of the last feature map


@dataclasses.dataclass(frozen=True)
class Region:
    """A rectangle in a photo.

    Args:
        left, right: fractions of the photo's width.
        top, bottom: fractions of its height.
    """

    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """What each part of a photo said for a class.

    Args:
        index: number of the class.
        values_hw: evidence for the class in each cell, in units of logits; below 0: against it. Their mean and the
            class's bias make its logit.
        box: where the whole map lies. A cell lies where its own receptive field has its centre, which places the map
            half a cell further left and up than the part that the network sees: up to there it may be outside.
        seen: the part of the photo that the network sees.
    """

    index: int
    values_hw: Batch
    box: Region
    seen: Region

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        rows, columns = self.values_hw.shape
        return {
            "index": self.index,
            "rows": rows,
            "columns": columns,
            "values": self.values_hw.tolist(),
            "box": dataclasses.asdict(self.box),
            "seen": dataclasses.asdict(self.seen),
        }


def class_activation(features_Fhw: Batch, class_weights_F: Batch) -> Batch:
    """Return what each cell of a feature map says for a class.

    The network's logit is the mean of these values and the class's bias: pooling is a mean, and the classifier linear.

    Args:
        features_Fhw: the last feature map of a photo.
        class_weights_F: the classifier's weights for the class.

    Shape: (F, h, w) and (F,) -> (h, w) float32.

    Example:
        >>> features = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 2]]], np.float32)
        >>> class_activation(features, np.array([3, -1], np.float32)).tolist()
        [[3.0, 0.0], [0.0, -2.0]]
    """
    values_hw: Batch = np.einsum("f,fhw->hw", class_weights_F, features_Fhw, dtype=np.float32)
    return values_hw


def seen_region(preprocess: Preprocess, height_px: int, width_px: int) -> Region:
    """Return the part of a photo of this size that the network sees: the crop out of its middle.

    Example:
        >>> seen_region(Preprocess(resize=256, crop=256), 300, 400)
        Region(left=0.12316715542521994, top=0.0, right=0.873900293255132, bottom=1.0)
    """
    short_px = min(height_px, width_px)
    resized_px = [int(preprocess.resize * edge_px / short_px) for edge_px in (width_px, height_px)]  # as the resize
    crop_px = preprocess.crop
    # Rounded as the crop rounds: a half to the even side.
    left, top = (round((edge_px - crop_px) / 2) / edge_px for edge_px in resized_px)
    return Region(left, top, left + crop_px / resized_px[0], top + crop_px / resized_px[1])


def map_region(seen: Region, crop_px: int, rows: int, columns: int) -> Region:
    """Return where a map lies in a photo.

    Each of the network's five halvings keeps the pixels 0, 2, 4, ... as the centres of what it makes: cell i has its
    centre in the middle of pixel 32 i, not of pixels 32 i to 32 i + 31.

    Args:
        seen: the part of the photo that the network sees.
        crop_px: edge of the network's input, in pixels.
        rows, columns: cells of the map.
    """
    begin = (0.5 - CELL_PX / 2) / crop_px
    across, down = seen.right - seen.left, seen.bottom - seen.top
    left, top = seen.left + begin * across, seen.top + begin * down
    cell = CELL_PX / crop_px
    return Region(left, top, left + columns * cell * across, top + rows * cell * down)


def make_heatmap(
    features_Fhw: Batch,
    class_weights_F: Batch,
    *,
    index: int,
    preprocess: Preprocess,
    height_px: int,
    width_px: int,
) -> Heatmap:
    """Return the heat map of a class.

    Args:
        features_Fhw: the last feature map of the photo.
        class_weights_F: the classifier's weights for the class.
        index: number of the class.
        preprocess: what made the network's input of the photo.
        height_px: the photo's height.
        width_px: the photo's width.
    """
    values_hw = class_activation(features_Fhw, class_weights_F)
    seen = seen_region(preprocess, height_px, width_px)
    return Heatmap(index, values_hw, map_region(seen, preprocess.crop, *values_hw.shape), seen)
