"""Training, from the first line to the last: `fit(TrainConfig)` fills a run folder that is then a model everywhere."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from weightnet.errors import DataError, TrainingError
from weightnet.predict import metrics
from weightnet.train import data
from weightnet.train.config import TrainConfig
from weightnet.train.run import RunFolder, RunState, start_state
from weightnet.zoo.cards import Card
from weightnet.zoo.weights import load


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `fit` reports after each step and each evaluation.

    Args:
        step: steps done, of `total_steps`.
        total_steps: steps of the whole run.
        epoch: epochs begun.
        loss: of the last step's photos, in nats.
        photos_per_s: of the last step, loading included.
        unreadable: photos skipped so far because they could not be read.
        measured: of the validation photos, after an evaluation; None after a step.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    photos_per_s: float
    unreadable: int
    measured: dict[str, float] | None = None


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the original's two groups: weights of more than one axis decay, biases and batch norms do not.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3), 4e-5)]
        [1, 1]

    Source: megvii-model/WeightNet, `train.py`.
    """
    decayed = [p for p in network.parameters() if p.ndim > 1]
    free = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def fit(
    config: TrainConfig, *, resume: bool = False, report: Callable[[Progress], None] = lambda progress: None
) -> Card:
    """Train a network and leave weights, card, checkpoint, configuration and log in the run folder.

    Ctrl-C and SIGTERM save the run and end it with a TrainingError.

    Args:
        config: the options of the run.
        resume: go on from the run folder's checkpoint; on a CPU the result is the uninterrupted run's, bit for bit.
        report: called after each step and each evaluation.

    Returns: the card of the trained model, with what was measured on the validation photos.

    Raises: DataError for a data folder that cannot be trained on, TrainingError where the run cannot start or go on,
        UsageError for options that do not fit the run that is resumed.

    Example:
        >>> fit(TrainConfig(data="photos", out="run", epochs=30)).measured["top1"]  # doctest: +SKIP
        0.71

    Source: megvii-model/WeightNet, `train.py`.
    """
    train_photos, val_photos = data.read_folders(config.data)
    run = RunFolder.open(config, train_photos, resume=resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(config.seed)
        fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
        network = load(config.model, pretrained=config.pretrained or False, num_classes=len(train_photos.classes))
        network = cast(Any, network).to(memory_format=torch.channels_last)
        groups = parameter_groups(network, config.weight_decay)
        sgd = torch.optim.SGD(groups, lr=config.peak_learning_rate, momentum=config.momentum)
        state = start_state(network, sgd, config)
        model, optimizer = fabric.setup(network, sgd)
        state.average.to(fabric.device)
        if resume:
            run.read_checkpoint(state)
        batches = data.EpochBatches(train_photos.labels, config)
        loader = data.training_loader(
            train_photos, batches, config, stack.enter_context(data.cached(train_photos, config, run.path))
        )
        stopped = stack.enter_context(_stop_signals())
        total_steps = config.epochs * batches.steps
        while state.step < total_steps:
            epoch, batches.first_step = divmod(state.step, batches.steps)
            batches.epoch = epoch
            for step in _train_steps(fabric, model, optimizer, loader, state, config, total_steps):
                report(Progress(state.step, total_steps, epoch + 1, *step, state.unreadable))
                if stopped():
                    run.write_checkpoint(state)
                    raise TrainingError(f"The run was stopped at step {state.step} and saved. Resume it to go on.")
                if run.seconds_since_checkpoint() > 60 * config.checkpoint_minutes:
                    run.write_checkpoint(state)
            if (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs:
                measured = evaluate(state.evaluated, val_photos, config, fabric.device)
                state.history.append({"epoch": epoch + 1, "step": state.step, "train_loss": step[0], **measured})
                report(Progress(state.step, total_steps, epoch + 1, *step, state.unreadable, measured))
            run.write_checkpoint(state)
    return run.card(state)


def _train_steps(
    fabric: Fabric,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    state: RunState,
    config: TrainConfig,
    total_steps: int,
) -> Iterator[tuple[float, float]]:
    """Do the rest of an epoch, a step at a time; yield each step's loss and photos per second."""
    seen_at = time.monotonic()
    for images, labels, unreadable in loader:
        for group in optimizer.param_groups:
            group["lr"] = config.peak_learning_rate * (1 - state.step / total_steps)
        model.train()
        logits = model(network_input(images.to(fabric.device), config))
        loss = F.cross_entropy(logits, labels.to(fabric.device), label_smoothing=config.label_smoothing)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"The loss must be finite. Got {loss.item()} at step {state.step}. The last checkpoint is intact: "
                "start again with a lower learning_rate."
            )
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if config.ema_decay:
            state.average.update_parameters(state.network)
        state.step += 1
        state.unreadable += unreadable
        now = time.monotonic()
        yield loss.item(), len(labels) / (now - seen_at)
        seen_at = time.monotonic()


def network_input(photos_BHW3: Tensor, config: TrainConfig) -> Tensor:
    """Return uint8 photos as the network takes them: float, normalised, channels first (in channels-last memory)."""
    preprocess = config.preprocess
    x = photos_BHW3.permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (x - mean) / std


@torch.inference_mode()
def evaluate(
    network: nn.Module, folder: data.PhotoFolder, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Measure a network on the photos of a folder, prepared as the model's card says.

    Returns: counts of photos, accuracies and calibration error as fractions of 1, the loss in nats.

    Raises: DataError where no photo can be read.
    """
    network.eval()
    logits, labels, unreadable = [], [], 0
    for images, targets, skipped in data.validation_loader(folder, config):
        unreadable += skipped
        if len(images):
            logits.append(network(network_input(images.to(device), config)).float().cpu().numpy())
            labels.append(targets.numpy())
    if not logits:
        raise DataError(f"val/ must hold photos that can be read. Got {unreadable} unreadable ones. Replace them.")
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    classes = len(folder.classes)
    return {
        "photos": len(all_labels),
        "unreadable": unreadable,
        "top1": metrics.topk_accuracy(all_logits, all_labels, 1),
        "top5": metrics.topk_accuracy(all_logits, all_labels, min(5, classes)),
        "class_averaged_top1": metrics.class_averaged_accuracy(all_logits.argmax(1), all_labels, classes),
        "loss": metrics.cross_entropy(all_logits, all_labels),
        "ece": metrics.expected_calibration_error(metrics.softmax(all_logits), all_labels),
    }


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM and Ctrl-C only set a flag, which the loop reads after a step."""
    received: list[int] = []
    try:
        before = {
            number: signal.signal(number, lambda number, frame: received.append(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
    except ValueError:  # only the main thread can handle signals; elsewhere they keep their meaning
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
