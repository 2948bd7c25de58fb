"""How good a network is on the photos of a data folder, prepared as its card says.

Shape suffixes: B photos, H height, W width, 3 the colours blue, green, red.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from weightnet.errors import DataError
from weightnet.images.transforms import Preprocess
from weightnet.predict import metrics
from weightnet.train.data import Unreadable, validation_loader
from weightnet.train.folders import PhotoFolder
from weightnet.train.run import diverged


class Evaluation(NamedTuple):
    """What was measured.

    Args:
        figures: `photos` measured and `unreadable` ones left out, as counts; `top1`, `top5`, `class_averaged_top1` and
            the calibration error `ece`, as fractions of 1; `loss`, in nats.
        unreadable: the photos left out, and why.
    """

    figures: dict[str, float]
    unreadable: list[Unreadable]


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    folder: PhotoFolder,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure a network, which is left in evaluation mode.

    Args:
        network: gives one logit for each class of the folder.
        folder: labelled photos.
        preprocess: from a decoded photo to the network's input.
        batch_size: photos that run at once.
        workers: processes that load photos, as in `TrainConfig`.
        check_stop: called before each batch; what it raises ends the evaluation.

    Raises: DataError where no photo can be read; TrainingError where the network gives numbers that are not finite.
    """
    network.eval()
    device = next(network.parameters()).device
    logits, labels, unreadable = [], [], []
    for batch in validation_loader(folder, preprocess, batch_size=batch_size, workers=workers):
        check_stop()
        unreadable += batch.unreadable
        if len(batch.photos):
            x_B3HW = network_input(batch.photos.to(device), preprocess)
            logits.append(network(x_B3HW).float().cpu().numpy())
            labels.append(batch.labels.numpy())
    if not logits:
        raise DataError(
            f"{folder.root} must hold photos that can be read. Got none among {len(folder)}: {unreadable[0].reason}"
        )
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    if not np.isfinite(all_logits).all():
        raise diverged("logits that are not, of validation photos")
    figures = {"photos": len(all_labels), "unreadable": len(unreadable), **metrics.summary(all_logits, all_labels)}
    return Evaluation(figures, unreadable)


def network_input(photos_BHW3: Tensor, preprocess: Preprocess) -> Tensor:
    """Return crops as the network takes them, by the same arithmetic as `Preprocess.normalize`, on their own device.

    Shape: (B, H, W, 3) uint8, blue, green, red -> (B, 3, H, W) float32, channels last in memory.

    Example:
        >>> network_input(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), Preprocess(mean=None, std=None)).shape
        torch.Size([2, 3, 32, 32])
    """
    x = photos_BHW3.permute(0, 3, 1, 2).to(torch.float32)
    if preprocess.channel_order == "RGB":
        x = x.flip(1).contiguous(memory_format=torch.channels_last)
    if preprocess.mean is None or preprocess.std is None:
        return x
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (x - mean) / std
