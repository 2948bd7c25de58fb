"""Training, from the first line to the last: `fit(TrainConfig)` fills a run folder that is then a model everywhere."""

import contextlib
import dataclasses
import os
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from weightnet.errors import DataError, MissingDependencyError, TrainingError, UsageError, WeightsWarning
from weightnet.images.labels import ClassLabel
from weightnet.train import data
from weightnet.train.config import TrainConfig
from weightnet.train.data import Unreadable
from weightnet.train.evaluation import evaluate
from weightnet.train.folders import PhotoFolder
from weightnet.train.run import RunFolder, RunState
from weightnet.train.shards import read_photos
from weightnet.train.step import averaged_model, draw_from, parameter_groups, update
from weightnet.train.teacher import Student, Teacher, load_teacher, teach
from weightnet.zoo.cards import Card, numbered_classes, read_card
from weightnet.zoo.weights import load

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_SKIPPED_STEPS = 20  # in a row, before the photos count as gone

Report = Callable[["Progress"], None]
CheckStop = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `fit` reports after each step and each evaluation.

    Args:
        step: steps done, of `total_steps`.
        total_steps: steps of the whole run.
        epoch: epochs begun.
        loss: of the last step's photos against their labels, or after an evaluation the mean since the last one; in
            nats.
        photos_per_s: of the last step, loading included; 0 after an evaluation.
        unreadable: different photos so far that could not be read.
        measured: of the validation photos, after an evaluation; None after a step.
        taught: crops that the teacher has seen, and of how many; None but before the first step.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    photos_per_s: float
    unreadable: int
    measured: dict[str, float] | None = None
    taught: tuple[int, int] | None = None


class _StoppedError(Exception):
    """A signal asked the run to end."""


def fit(config: TrainConfig, *, resume: bool = False, report: Report = lambda progress: None) -> Card:
    """Train a network and leave weights, card, checkpoint, configuration and log in the run folder.

    Ctrl-C and SIGTERM save the run and end it with a TrainingError. Photos that cannot be read are left out, counted,
    and listed in the run folder's `unreadable.csv`.

    Under `torchrun` the processes share each step's photos: each has batch statistics of its own, as the original's
    eight had, and the gradients are averaged. The first evaluates and writes the run folder, which all must see.

    Args:
        config: the options of the run.
        resume: go on from the run folder's checkpoint, where it has one; on a CPU the result is the uninterrupted
            run's, bit for bit. A finished run is left as it is.
        report: called after each step and each evaluation.

    Returns: the card of the trained model, with what was measured on the validation photos.

    Raises:
        DataError: the data folder cannot be trained on.
        TrainingError: the run cannot start or go on; its last checkpoint is intact.
        UsageError: options or photos are not those of the run that is resumed, or this machine has no such device.
        UnknownModelError, WeightsError, DownloadError: pretrained weights or a teacher cannot be had.
        MissingDependencyError: lightning-fabric, matplotlib or the teacher's packages are not installed.

    Example:
        >>> fit(TrainConfig(data="photos", out="run", epochs=30)).measured["top1"]  # doctest: +SKIP
        0.71

    Source: megvii-model/WeightNet, `train.py`.
    """
    train_photos, val_photos = read_photos(config.data)
    fabric = start_fabric(config)
    first = fabric.is_global_zero
    with (
        _process_group(fabric),
        RunFolder.open(config, train_photos, resume=resume, writes=first) as run,
        _own_random_numbers(fabric),
        data.opencv_in_one_thread(),
    ):
        begun = fabric.broadcast(run.begun)
        if begun and fabric.broadcast(run.finished):
            run.read_checkpoint()  # for its errors
            return read_card(run.path / "weights.json")
        teacher = None if config.teacher is None else load_teacher(config.teacher, fabric.device)
        targets = data.Targets(run.path / "teacher")
        state, model = _start(fabric, config, train_photos.classes, teacher, begun=begun)
        with _stop_requests() as check_stop:  # not before: a download ends by Ctrl-C
            if begun:
                run.restore(state)
            else:
                run.save(state)  # a folder that cannot be written shows before the first step
            try:
                _train(
                    fabric, model, teacher, targets, state, run, val_photos, report if first else _ignore, check_stop
                )
            except _StoppedError as request:
                run.save(state)
                raise TrainingError(
                    f"The run was stopped at step {state.step} and saved. Resume it to go on."
                ) from request
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise TrainingError(
                    f"A step must fit into memory. Got batch_size={config.batch_size}, accumulate={config.accumulate}: "
                    f"{error}. Start a new run with a smaller batch_size, or a larger accumulate."
                ) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise TrainingError(
                    f"The processes that load photos must live on. Got: {error}. The last checkpoint is intact: "
                    "resume, with fewer workers or more memory."
                ) from error
        run.finish(state)
    return run.card(state)


def start_fabric(config: TrainConfig) -> "Fabric":
    """Return Lightning Fabric on the device and in the precision of the configuration.

    Raises: UsageError where this machine lacks them; MissingDependencyError where Fabric is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # draws the curves, hours later
        from lightning_fabric import Fabric
    except ImportError as error:
        raise MissingDependencyError(
            f"Training needs lightning-fabric and matplotlib. Got: {error}. "
            "Install them by: pip install 'weightnet[train]'"
        ) from error
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise UsageError("device must be one that PyTorch finds here. Got device='cuda'. Use auto or cpu.")
    if config.precision == "16-mixed" and (config.device == "cpu" or not has_gpu):
        raise UsageError("precision must be 32-true or bf16-mixed without a GPU. Got precision='16-mixed'. Use these.")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
    if config.batch_size % processes or config.batch_size // processes < 2 * config.accumulate:
        raise UsageError(
            f"batch_size must be a multiple of the number of processes, with {2 * config.accumulate} photos for each. "
            f"Got batch_size={config.batch_size} for {processes} processes. Choose another."
        )
    if processes == 1:
        return Fabric(accelerator=config.device, devices=1, precision=config.precision)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return Fabric(
        accelerator=config.device, devices=here, num_nodes=processes // here, strategy="ddp", precision=config.precision
    )


@contextlib.contextmanager
def _process_group(fabric: "Fabric") -> Iterator[None]:
    """Within the block, the processes of a run on several of them can talk to each other."""
    fabric.launch()
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not _is_broken_connection(error):
            raise
        raise TrainingError(
            f"All processes of a run must live to its end. Got one that has ended, and says why; here: {error}. "
            "The last checkpoint is intact: mend the cause, and resume."
        ) from error
    fabric.barrier()  # a process that ends early breaks the connections of the others


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)  # gloo has no class of its own


def _any_process(fabric: "Fabric", flag: bool) -> bool:
    """Return whether any process says so; all must ask at the same point."""
    if fabric.world_size == 1:
        return flag
    said = fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="max")
    return bool(said)


def _ignore(progress: Progress) -> None:
    """Report nothing, where another process does."""


def _start(
    fabric: "Fabric", config: TrainConfig, classes: Sequence[ClassLabel], teacher: Teacher | None, *, begun: bool
) -> tuple[RunState, nn.Module]:
    """Return the state of a run that begins, and the network as Fabric runs it in training."""
    draw_from(fabric, config.seed, 0)
    pretrained = False if begun or config.pretrained is None else config.pretrained
    network = load(config.model, pretrained=pretrained, num_classes=len(classes))
    preprocess = config.preprocess
    if network.card is not None:  # weights keep the pixels that they were trained on
        card = network.card
        own = card.preprocess
        preprocess = dataclasses.replace(preprocess, channel_order=own.channel_order, mean=own.mean, std=own.std)
        if _knows_others(card.classes, classes):
            warnings.warn(f"The classifier is new: {pretrained} knows other classes.", WeightsWarning, stacklevel=3)
            network.reset_classifier(len(classes))
    if config.freeze:
        network.requires_grad_(False)
        network.classifier.requires_grad_(True)
    network = cast(Any, network).to(memory_format=torch.channels_last)
    average = averaged_model(network, config.ema_decay).to(fabric.device) if config.ema_decay else None
    student = network if teacher is None else Student(network, teacher.num_classes)
    groups = parameter_groups(student, config.weight_decay)
    sgd = torch.optim.SGD(groups, lr=config.peak_learning_rate, momentum=config.momentum)
    model, optimizer = fabric.setup(student, sgd)
    state = RunState(network, average, optimizer, fabric.strategy.precision, preprocess)
    state.teacher_head = getattr(student, "teacher_head", None)
    return state, model


def _knows_others(known: Sequence[ClassLabel], classes: Sequence[ClassLabel]) -> bool:
    """Whether weights know as many classes, but not these; where they have no names, they are taken for the same."""
    if len(known) != len(classes) or tuple(known) == numbered_classes(len(known)):
        return False
    return not all(one.is_same(other) for one, other in zip(known, classes, strict=True))


def _train(
    fabric: "Fabric",
    model: nn.Module,
    teacher: Teacher | None,
    targets: data.Targets,
    state: RunState,
    run: RunFolder,
    val_photos: PhotoFolder,
    report: Report,
    check_stop: "CheckStop",
) -> None:
    """Bring a run from where it is to its end."""
    config = run.config
    batches = data.EpochBatches(run.photos.labels, config, process=fabric.global_rank, processes=fabric.world_size)
    total_steps = config.epochs * batches.steps

    def evaluate_if_due() -> None:
        epoch, rest = divmod(state.step, batches.steps)
        wanted = epoch % config.evaluate_every == 0 or epoch == config.epochs
        measured_at = state.history[-1]["step"] if state.history else 0
        if rest or not wanted or measured_at == state.step:
            return
        _gather_unreadable(fabric, state)
        if fabric.is_global_zero:
            row = _evaluation_row(state, epoch, val_photos, config, check_stop)
            report(Progress(state.step, total_steps, epoch, row["train_loss"], 0.0, len(state.unreadable), row))
            run.save(state)
        state.history = fabric.broadcast(state.history)

    def report_taught(done: int, total: int) -> None:
        report(Progress(state.step, total_steps, 0, 0.0, 0.0, len(state.unreadable), taught=(done, total)))
        check_stop()

    evaluate_if_due()  # the run may have been stopped between an epoch's last step and its evaluation
    if state.step == total_steps:
        return
    with data.cached(run.photos, config, run.path / f"photos{fabric.global_rank}.cache", check_stop) as cache:
        if teacher is not None:
            teach(teacher, targets, run.photos, config, cache, fabric, report_taught)
        loader = data.training_loader(run.photos, batches, config, cache, targets if teacher is not None else None)
        # Both are closed whatever happens, so that their processes end now and not when the exception is forgotten.
        with contextlib.closing(cast(data.TrainingPhotos, loader.dataset)):
            while state.step < total_steps:
                batches.epoch, batches.first_step = divmod(state.step, batches.steps)
                with contextlib.closing(_epoch_steps(fabric, model, loader, state, config, total_steps)) as steps:
                    for loss, photos_per_s in steps:
                        unreadable = len(state.unreadable)
                        report(Progress(state.step, total_steps, batches.epoch + 1, loss, photos_per_s, unreadable))
                        check_stop(fabric)
                        if run.seconds_since_save > 60 * config.checkpoint_minutes:
                            run.save(state)
                evaluate_if_due()


def _epoch_steps(
    fabric: "Fabric", model: nn.Module, loader: Any, state: RunState, config: TrainConfig, total_steps: int
) -> Generator[tuple[float, float]]:
    """Do the rest of an epoch, a step at a time; yield each step's loss and photos per second."""
    max_skipped = min(MAX_SKIPPED_STEPS, total_steps // config.epochs)
    begun_at = time.monotonic()
    for batch in loader:
        photos = len(batch.photos)
        state.note_unreadable(batch.unreadable)
        if _any_process(fabric, photos < 2):  # too few for batch statistics
            state.step, state.skipped = state.step + 1, state.skipped + 1
            if state.skipped >= max_skipped:
                last = batch.unreadable[-1] if batch.unreadable else Unreadable("a photo", "another process says why.")
                raise DataError(
                    f"train/ must hold photos that can be read. Got {state.skipped} steps in a row without two. "
                    f"The last one: {last.name}: {last.reason}"
                )
            continue
        loss = update(fabric, model, state, batch, config, total_steps)
        state.step, state.skipped = state.step + 1, 0
        state.loss_sum += loss * photos
        state.loss_photos += photos
        now = time.monotonic()
        yield loss, photos / (now - begun_at)
        begun_at = time.monotonic()


def _gather_unreadable(fabric: "Fabric", state: RunState) -> None:
    """Note the unreadable photos of all processes in each of them."""
    if fabric.world_size > 1:
        theirs: list[dict[str, str]] = [{} for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(theirs, state.unreadable)
        for unreadable in theirs:
            state.unreadable.update(unreadable)


def _evaluation_row(
    state: RunState, epoch: int, photos: PhotoFolder, config: TrainConfig, check_stop: Callable[[], None]
) -> dict[str, float]:
    """Measure the model as it is, and return the new last row of the run's history."""
    figures, unreadable = evaluate(
        state.evaluated,
        photos,
        state.preprocess,
        batch_size=config.batch_size,
        workers=config.workers,
        check_stop=check_stop,
    )
    row = {"epoch": epoch, "step": state.step, "train_loss": state.loss_sum / state.loss_photos, **figures}
    state.history.append(row)
    state.note_unreadable(unreadable)
    state.loss_sum, state.loss_photos = 0.0, 0
    return row


@contextlib.contextmanager
def _own_random_numbers(fabric: "Fabric") -> Iterator[None]:
    """Leave the caller's random numbers as they are."""
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _stop_requests() -> Iterator["CheckStop"]:
    """Within the block, SIGTERM and Ctrl-C do nothing until the yielded function is called, which then raises.

    Given Fabric, it raises in all processes where one of them was asked to stop.
    """
    received: list[int] = []
    try:
        before = {
            number: signal.signal(number, lambda number, frame: received.append(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
    except ValueError:  # only the main thread can handle signals; elsewhere they keep their meaning
        before = {}

    def check_stop(together: "Fabric | None" = None) -> None:
        if bool(received) if together is None else _any_process(together, bool(received)):
            raise _StoppedError

    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
