"""Photos as batches: order and augmentation are functions of (seed, epoch, position), whatever the workers."""

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from weightnet.errors import ImageError, TrainingError
from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess
from weightnet.predict.exported import usable_cores
from weightnet.train.augment import augment, cut, shrink_short_edge, view_box
from weightnet.train.config import TrainConfig
from weightnet.train.folders import PhotoFolder
from weightnet.train.pool import ForkedPool, may_fork

CACHE_BLOCK_PHOTOS = 256  # decoded at once while the cache is made: bounds its memory

Pixels = npt.NDArray[np.uint8]
Place = tuple[int, int, int]  # epoch, position in the epoch, index of the photo


class Crop(NamedTuple):
    """A photo as the network sees it, uint8 (size, size, 3) BGR, its class, and a teacher's probabilities of it."""

    pixels: Pixels
    label: int
    target: npt.NDArray[np.float16] | None = None


class Unreadable(NamedTuple):
    """A photo that cannot be read: "split/class folder/name", and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Photos uint8 (B, size, size, 3) BGR, classes (B,), photos that are left out, a teacher's probabilities (B, K)."""

    photos: Tensor
    labels: Tensor
    unreadable: list[Unreadable]
    targets: Tensor | None = None


class PhotoCache:
    """Decoded photos in one file, shrunk to a short edge: read back without copying.

    Args:
        folder: the photos.
        file: where they are kept; it must stay while photos are read.
        short_edge_px: photos with a longer short edge are shrunk to it, antialiased.
        check_stop: called between blocks of photos; what it raises ends the making.

    Raises: OSError where the file cannot be written.
    """

    def __init__(
        self, folder: PhotoFolder, file: Path, short_edge_px: int, check_stop: Callable[[], None] = lambda: None
    ) -> None:
        self.file = file
        self.places = np.zeros((len(folder), 3), np.int64)  # offset, height, width
        self.reasons: dict[int, str] = {}  # of photos that cannot be read
        offset = 0
        with file.open("wb") as cache, ThreadPool(usable_cores()) as pool:
            for start in range(0, len(folder), CACHE_BLOCK_PHOTOS):
                check_stop()
                block = range(start, min(start + CACHE_BLOCK_PHOTOS, len(folder)))
                jobs = ((folder, index, short_edge_px) for index in block)
                for index, photo in zip(block, pool.map(_decode_small, jobs), strict=True):
                    if isinstance(photo, str):
                        self.reasons[index] = photo
                        continue
                    cache.write(photo.tobytes())
                    self.places[index] = offset, *photo.shape[:2]
                    offset += photo.nbytes

    @functools.cached_property
    def _bytes(self) -> Pixels:
        return np.memmap(self.file, np.uint8, "r")  # by each worker, when it reads its first photo

    def __getitem__(self, index: int) -> Pixels:
        if index in self.reasons:
            raise ImageError(self.reasons[index])
        offset, height, width = (int(number) for number in self.places[index])
        return self._bytes[offset : offset + height * width * 3].reshape(height, width, 3)


def read_photo(folder: PhotoFolder, index: int, cache: PhotoCache | None) -> Pixels:
    """Return a decoded photo, from the cache where there is one.

    Raises: ImageError where it cannot be read.
    """
    return read_image(folder.source(index)) if cache is None else cache[index]


def _decode_small(job: tuple[PhotoFolder, int, int]) -> Pixels | str:
    folder, index, short_edge_px = job
    try:
        return shrink_short_edge(read_image(folder.source(index)), short_edge_px)
    except ImageError as error:
        return str(error)


class Targets:
    """A teacher's probabilities of each view of each photo, on disk: `targets[view, index]` is one row of them.

    Args:
        folder: holds `view0.npy` and so on, each (photos, classes) float16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._views: dict[int, npt.NDArray[np.float16]] = {}  # opened by each worker, when it reads its first row

    def file(self, view: int) -> Path:
        """Return where a view's probabilities lie."""
        return self.folder / f"view{view}.npy"

    def __getitem__(self, place: tuple[int, int]) -> npt.NDArray[np.float16]:
        view, index = place
        if view not in self._views:
            self._views[view] = np.load(self.file(view), mmap_mode="r")
        return np.array(self._views[view][index])


class _Photos(Dataset[Crop | Unreadable]):
    """Photos that a loader asks for batch by batch; where it has no processes of its own, all cores work at a batch."""

    def __getitems__(self, places: list[Any]) -> list[Crop | Unreadable]:
        if get_worker_info() is not None:
            return [self[place] for place in places]
        return list(_threads().map(self.__getitem__, places))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores())


@contextlib.contextmanager
def opencv_in_one_thread() -> Iterator[None]:
    """Within the block, OpenCV starts no threads: photos have one each, and more would be more than there are cores."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


class TrainingPhotos(_Photos):
    """Augmented crops: random ones, or with targets those that a teacher has seen, mirrored and coloured anew.

    A crop takes many short calls, which threads would make in turn: where nothing is said of workers, forked processes
    share a batch.
    """

    def __init__(
        self, folder: PhotoFolder, config: TrainConfig, cache: PhotoCache | None, targets: Targets | None = None
    ) -> None:
        self.folder, self.config, self.cache, self.targets = folder, config, cache, targets
        self.pool: ForkedPool[Place, Crop | Unreadable] | None = None

    def __getitems__(self, places: list[Place]) -> list[Crop | Unreadable]:
        if self.config.workers is not None or get_worker_info() is not None or not may_fork():
            return super().__getitems__(places)
        if self.pool is None:
            self.pool = ForkedPool(self.__getitem__, usable_cores())
        return self.pool.map(places)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.close()

    def __getitem__(self, place: Place) -> Crop | Unreadable:
        epoch, position, index = place
        try:
            photo = read_photo(self.folder, index, self.cache)
        except ImageError as error:
            return Unreadable(self.folder.name(index), str(error))
        rng = np.random.default_rng((self.config.seed, epoch, position))
        label = int(self.folder.labels[index])
        if self.targets is None:
            return Crop(augment(photo, rng, self.config, epoch=epoch), label)
        view = epoch % self.config.teacher_views
        box = view_box(photo, view, index, self.config)
        return Crop(augment(photo, rng, self.config, box, epoch=epoch), label, self.targets[view, index])


class TeacherPhotos(_Photos):
    """One view of each photo as a teacher sees it; instead of its class the crop has the photo's index."""

    def __init__(self, folder: PhotoFolder, config: TrainConfig, cache: PhotoCache | None, view: int) -> None:
        self.folder, self.config, self.cache, self.view = folder, config, cache, view

    def __getitem__(self, index: int) -> Crop | Unreadable:
        try:
            photo = read_photo(self.folder, index, self.cache)
        except ImageError as error:
            return Unreadable(self.folder.name(index), str(error))
        box = view_box(photo, self.view, index, self.config)
        return Crop(cut(photo, box, self.config.teacher_size, self.config.interpolation), index)


class ValidationPhotos(_Photos):
    """Centre crops."""

    def __init__(self, folder: PhotoFolder, preprocess: Preprocess) -> None:
        self.folder, self.preprocess = folder, preprocess

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Crop | Unreadable:
        try:
            crop = self.preprocess.crop_uint8(read_image(self.folder.source(index)))
        except ImageError as error:
            return Unreadable(self.folder.name(index), str(error))
        return Crop(crop, int(self.folder.labels[index]))


def epoch_order(labels: npt.NDArray[np.int64], *, seed: int, epoch: int, balance: float) -> npt.NDArray[np.int64]:
    """Return the indices of an epoch's photos, in order: a permutation, or with `balance` a draw with replacement.

    Args:
        labels: class index of each photo.
        seed, epoch: the order is a function of both.
        balance: from 0, every photo once, to 1, every class equally often.

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
    """The places of one epoch, batch by batch, from a given step on; set `epoch` and `first_step` before each pass.

    Args:
        labels: class index of each photo.
        config: the options of the run.
        process, processes: which share of each batch, of how many.
    """

    def __init__(
        self, labels: npt.NDArray[np.int64], config: TrainConfig, *, process: int = 0, processes: int = 1
    ) -> None:
        self.labels, self.config = labels, config
        self.process, self.processes = process, processes
        self.epoch, self.first_step = 0, 0
        self.steps = max(1, len(labels) // config.batch_size)  # an incomplete last batch is left out

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Place]]:
        config = self.config
        order = epoch_order(self.labels, seed=config.seed, epoch=self.epoch, balance=config.balance)
        for step in range(self.first_step, self.steps):
            positions = np.arange(step * config.batch_size, min((step + 1) * config.batch_size, len(order)))
            share = np.array_split(positions, self.processes)[self.process]
            yield [(self.epoch, int(position), int(order[position])) for position in share]


def collate(samples: list[Crop | Unreadable]) -> Batch:
    """Return samples as a batch of those that could be read."""
    crops = [sample for sample in samples if isinstance(sample, Crop)]
    photos = np.stack([crop.pixels for crop in crops]) if crops else np.empty((0, 1, 1, 3), np.uint8)
    labels = np.array([crop.label for crop in crops], np.int64)
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    rows = [crop.target for crop in crops if crop.target is not None]
    targets = torch.from_numpy(np.stack(rows)) if rows else None
    return Batch(torch.from_numpy(photos), torch.from_numpy(labels), unreadable, targets)


def training_loader(
    folder: PhotoFolder,
    batches: EpochBatches,
    config: TrainConfig,
    cache: PhotoCache | None,
    targets: Targets | None = None,
) -> DataLoader[Any]:
    """Return the loader of augmented batches; each pass over it is the epoch that `batches` stands at."""
    return _loader(TrainingPhotos(folder, config, cache, targets), config.workers, batch_sampler=batches)


def teacher_loader(
    folder: PhotoFolder, config: TrainConfig, cache: PhotoCache | None, view: int, *, batch_size: int
) -> DataLoader[Any]:
    """Return the loader of one view of each photo, in order; the batches' labels are the photos' indices."""
    in_order = BatchSampler(range(len(folder)), batch_size, drop_last=False)
    return _loader(TeacherPhotos(folder, config, cache, view), config.workers, batch_sampler=in_order)


def validation_loader(
    folder: PhotoFolder, preprocess: Preprocess, *, batch_size: int, workers: int | None
) -> DataLoader[Any]:
    """Return the loader of centre crops, in order."""
    in_order = BatchSampler(range(len(folder)), batch_size, drop_last=False)
    return _loader(ValidationPhotos(folder, preprocess), workers, batch_sampler=in_order)


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Warn of nothing: more workers than processors are slower at worst, and a warning could not be acted on."""


def _loader(photos: Dataset[Any], workers: int | None, *, batch_sampler: Iterable[list[Any]]) -> DataLoader[Any]:
    if workers is None:  # beside a GPU the cores are free; on a CPU the network needs them too: in turn
        workers = usable_cores() if torch.cuda.is_available() else 0
    return _Loader(
        photos,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=functools.partial(_start_worker, beside_network=not torch.cuda.is_available()),
        generator=torch.Generator(),  # a loader draws a number, which nothing uses here: not from the caller's
    )


@contextlib.contextmanager
def cached(
    folder: PhotoFolder, config: TrainConfig, file: Path, check_stop: Callable[[], None]
) -> Iterator[PhotoCache | None]:
    """Within the block, the decoded photos lie in a file of the run folder if the configuration asks for it.

    Raises: TrainingError where they have no room there.
    """
    if not config.cache:
        yield None
        return
    try:
        try:
            cache = PhotoCache(folder, file, config.cache, check_stop)
        except OSError as error:
            raise TrainingError(
                f"The run folder must have room for decoded photos. Got {file}: {error}. Make room, or lower cache."
            ) from error
        yield cache
    finally:
        with contextlib.suppress(OSError):  # the error above, if there is one, says more
            file.unlink()


def _start_worker(worker: int, *, beside_network: bool) -> None:
    cv2.setNumThreads(0)
    if beside_network and hasattr(os, "nice"):
        # The network's threads wait for each other: a worker that takes the place of one holds up all. Workers at the
        # lowest priority run in the gaps, and whenever a batch is late.
        os.nice(19)
    # A signal to the whole process group is the training loop's to handle: it saves first, and the workers end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
