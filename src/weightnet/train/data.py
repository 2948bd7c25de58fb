"""Photos in folders, as batches: order and augmentation are functions of (seed, epoch, position), whatever the workers.

A data folder holds `train/` and `val/`, each with one folder of photos per class. Class names are the folder names,
or the rows of an optional `classes.csv` beside them (columns folder, label, wnid, imagenet_index).
"""

import contextlib
import csv
import dataclasses
import os
import signal
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from weightnet.errors import DataError, ImageError, TrainingError
from weightnet.images.decode import IMAGE_SUFFIXES, read_image
from weightnet.images.labels import ClassLabel, imagenet_classes
from weightnet.images.transforms import Preprocess
from weightnet.train.augment import augment, shrink_short_edge
from weightnet.train.config import TrainConfig

Pixels = npt.NDArray[np.uint8]
Place = tuple[int, int, int]  # epoch, position in the epoch, index of the photo


@dataclasses.dataclass(frozen=True)
class PhotoFolder:
    """The photos of one split.

    Args:
        paths: files, sorted by class, then by name.
        labels: class index of each.
        classes: one entry per class index.
    """

    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[ClassLabel, ...]

    def __len__(self) -> int:
        return len(self.paths)


def read_folders(root: str | Path) -> tuple[PhotoFolder, PhotoFolder]:
    """Return the training and validation photos of a data folder.

    Raises: DataError where a split or class is missing or empty, or the two splits have different classes.
    """
    root = Path(root)
    names = {}
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"A data folder must hold train/ and val/. Got data={root} without {split}/. Add it.")
        names[split] = sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir())
    if not names["train"]:
        raise DataError(f"{root / 'train'} must hold one folder of photos per class. Got no folder. Add them.")
    if names["train"] != names["val"]:
        odd = sorted(set(names["train"]) ^ set(names["val"]))
        raise DataError(
            f"train/ and val/ must hold the same classes. Got {odd} in one of them only. Add or remove them."
        )
    folders, classes = _class_labels(root, names["train"])
    train, val = (_read_split(root / split, folders, classes) for split in ("train", "val"))
    return train, val


def _class_labels(root: Path, names: list[str]) -> tuple[list[str], tuple[ClassLabel, ...]]:
    """Return folders and labels in class order: that of classes.csv, or else sorted by folder."""
    table = root / "classes.csv"
    if not table.exists():
        known = {label.wnid: label for label in imagenet_classes()}
        return names, tuple(known.get(name) or ClassLabel(name) for name in names)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    folders = [row.get("folder") for row in rows]
    if sorted(map(str, folders)) != names or not all(row.get("label") for row in rows):
        raise DataError(
            f"{table} must have the columns folder and label and one row for each folder in train/. "
            f"Got {len(rows)} rows for {len(names)} folders. Mend the file or remove it."
        )
    classes = []
    for row in rows:
        index = row.get("imagenet_index")
        classes.append(ClassLabel(row["label"], row.get("wnid") or None, int(index) if index else None))
    return [str(folder) for folder in folders], tuple(classes)


def _read_split(split: Path, folders: list[str], classes: tuple[ClassLabel, ...]) -> PhotoFolder:
    paths: list[str] = []
    labels: list[int] = []
    for index, folder in enumerate(folders):
        found = sorted(entry.path for entry in os.scandir(split / folder) if _is_photo(entry.name))
        if not found:
            raise DataError(
                f"Every class folder must hold photos. Got none in {split / folder}. Add some or remove it."
            )
        paths += found
        labels += [index] * len(found)
    return PhotoFolder(tuple(paths), np.array(labels), classes)


def _is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


class PhotoCache:
    """Decoded photos in one file, shrunk to a short edge: read back without copying. Unreadable ones are None.

    Args:
        paths: files to decode.
        file: where they are kept.
        short_edge_px: photos with a longer short edge are shrunk to it, antialiased.
    """

    def __init__(self, paths: tuple[str, ...], file: Path, short_edge_px: int) -> None:
        self.places: list[tuple[int, int, int] | None] = []  # offset, height, width
        offset = 0
        with file.open("wb") as cache, ThreadPool(os.cpu_count()) as pool:
            jobs = ((path, short_edge_px) for path in paths)
            for photo in pool.imap(_decode_small, jobs, chunksize=32):
                if photo is None:
                    self.places.append(None)
                    continue
                cache.write(photo.tobytes())
                self.places.append((offset, *photo.shape[:2]))
                offset += photo.nbytes
        self.bytes = np.memmap(file, np.uint8, "r")

    def __getitem__(self, index: int) -> Pixels | None:
        place = self.places[index]
        if place is None:
            return None
        offset, height, width = place
        return self.bytes[offset : offset + height * width * 3].reshape(height, width, 3)


def _decode_small(job: tuple[str, int]) -> Pixels | None:
    path, short_edge_px = job
    photo = read_or_none(path)
    return None if photo is None else shrink_short_edge(photo, short_edge_px)


def read_or_none(path: str) -> Pixels | None:
    """Return a photo's pixels, or None where it cannot be read."""
    try:
        return read_image(path)
    except ImageError:
        return None


class TrainingPhotos(Dataset[tuple[Pixels, int] | None]):
    """Augmented crops, uint8 (size, size, 3) BGR, with their labels; None for a photo that cannot be read."""

    def __init__(self, folder: PhotoFolder, config: TrainConfig, cache: PhotoCache | None) -> None:
        self.folder, self.config, self.cache = folder, config, cache

    def __getitem__(self, place: Place) -> tuple[Pixels, int] | None:
        epoch, position, index = place
        photo = read_or_none(self.folder.paths[index]) if self.cache is None else self.cache[index]
        if photo is None:
            return None
        rng = np.random.default_rng((self.config.seed, epoch, position))
        return augment(photo, rng, self.config), int(self.folder.labels[index])


class ValidationPhotos(Dataset[tuple[Pixels, int] | None]):
    """Centre crops, uint8 (crop, crop, 3) BGR, with their labels; None for a photo that cannot be read."""

    def __init__(self, folder: PhotoFolder, preprocess: Preprocess) -> None:
        self.folder, self.preprocess = folder, preprocess

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Pixels, int] | None:
        photo = read_or_none(self.folder.paths[index])
        return None if photo is None else (self.preprocess.crop_uint8(photo), int(self.folder.labels[index]))


def epoch_order(labels: npt.NDArray[np.int64], *, seed: int, epoch: int, balance: float) -> npt.NDArray[np.int64]:
    """Return the indices of an epoch's photos, in order: a permutation, or with `balance` a draw with replacement.

    Example:
        >>> epoch_order(np.array([0, 0, 1]), seed=0, epoch=0, balance=0).tolist()
        [2, 0, 1]
    """
    rng = np.random.default_rng((seed, epoch))
    if balance == 0:
        return rng.permutation(len(labels))
    sizes = np.bincount(labels)[labels]
    weights = sizes ** -float(balance)
    return rng.choice(len(labels), len(labels), p=weights / weights.sum())


class EpochBatches:
    """The places of one epoch, batch by batch, from a given step on."""

    def __init__(self, labels: npt.NDArray[np.int64], config: TrainConfig) -> None:
        self.labels, self.config = labels, config
        self.epoch, self.first_step = 0, 0
        self.steps = max(1, len(labels) // config.batch_size)  # an incomplete last batch is left out

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Place]]:
        config = self.config
        order = epoch_order(self.labels, seed=config.seed, epoch=self.epoch, balance=config.balance)
        for step in range(self.first_step, self.steps):
            positions = range(step * config.batch_size, min((step + 1) * config.batch_size, len(order)))
            yield [(self.epoch, position, int(order[position])) for position in positions]


def collate(samples: list[tuple[Pixels, int] | None]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return photos uint8 (B, size, size, 3), labels (B,) and the number of photos that could not be read."""
    good = [sample for sample in samples if sample is not None]
    photos = np.stack([photo for photo, _ in good]) if good else np.empty((0, 1, 1, 3), np.uint8)
    labels = np.array([label for _, label in good], np.int64)
    return torch.from_numpy(photos), torch.from_numpy(labels), len(samples) - len(good)


def training_loader(
    folder: PhotoFolder, batches: EpochBatches, config: TrainConfig, cache: PhotoCache | None
) -> DataLoader[Any]:
    """Return the loader of augmented batches; each pass over it is the epoch that `batches` stands at."""
    # A generator of its own keeps the loader off the one that dropout draws from, so that a resumed run draws the same.
    return DataLoader(
        TrainingPhotos(folder, config, cache),
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


def validation_loader(folder: PhotoFolder, config: TrainConfig) -> DataLoader[Any]:
    """Return the loader of centre crops, in order."""
    return DataLoader(
        ValidationPhotos(folder, config.preprocess),
        batch_size=64,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


@contextlib.contextmanager
def cached(folder: PhotoFolder, config: TrainConfig, run: Path) -> Iterator[PhotoCache | None]:
    """Within the block, the decoded photos lie in the run folder if the configuration asks for it."""
    if not config.cache:
        yield None
        return
    file = run / "photos.cache"
    try:
        try:
            cache = PhotoCache(folder.paths, file, config.cache)
        except OSError as error:
            raise TrainingError(f"The run folder must have room for decoded photos. Got {file}: {error}.") from error
        yield cache
    finally:
        file.unlink(missing_ok=True)


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # A signal to the whole process group is the training loop's to handle: it saves first, and the workers end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
