"""Training, from the first line to the last: `fit(TrainConfig)` fills a run folder that is then a model everywhere."""

import csv
import dataclasses
import hashlib
import io
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning_fabric import Fabric
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import weightnet
from weightnet.errors import TrainingError, UsageError
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.predict import metrics
from weightnet.train import data
from weightnet.train.config import TrainConfig
from weightnet.zoo.cards import Card, write_atomically, write_card
from weightnet.nn.variants import VARIANTS

MEASURES = ("top1", "top5", "class_averaged_top1", "loss")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `fit` reports after each step and each evaluation.

    Args:
        step: steps done, of `total_steps`.
        epoch: epochs begun.
        loss: of the last step's photos, in nats.
        photos_per_s: since the last report.
        measured: of the validation photos, after an evaluation; None after a step.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    photos_per_s: float
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

    Args:
        config: the options of the run.
        resume: go on from the run folder's checkpoint; the result is that of an uninterrupted run.
        report: called after each step and each evaluation.

    Returns: the card of the trained model, with what was measured on the validation photos.

    Raises: DataError for a data folder that cannot be trained on, TrainingError where the run cannot start or go on,
        UsageError for options that do not fit a run that is resumed.

    Example: see docs/training.md.
    """
    fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
    fabric.seed_everything(config.seed, verbose=False)
    train_folder, val_folder = data.read_folders(config.data)
    run = _open_run(config, resume)

    network = _new_network(config, train_folder)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    optimizer = torch.optim.SGD(
        parameter_groups(network, config.weight_decay), lr=config.peak_learning_rate, momentum=config.momentum
    )
    average.to(fabric.device)
    model, optimizer = fabric.setup(network.to(memory_format=torch.channels_last), optimizer)
    state = _RunState(network, average, optimizer)
    if resume:
        state.read(run / "checkpoint.pt")

    cache = data.PhotoCache(train_folder.paths, run, config.cache) if config.cache else None
    batches = data.EpochBatches(train_folder.labels, config)
    photos = data.loader(data.TrainingPhotos(train_folder, config, cache), config.workers, batch_sampler=batches)
    total_steps = config.epochs * batches.steps
    evaluated = average.module if config.ema_decay else network
    card = _card(config, train_folder, network)
    saved_at = seen_at = time.monotonic()

    with _stop_signals() as stopped:
        while state.step < total_steps:
            batches.epoch, batches.first_step = divmod(state.step, batches.steps)
            for images, labels, unreadable in photos:
                state.unreadable += unreadable
                learning_rate = config.peak_learning_rate * (1 - state.step / total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                model.train()
                logits = model(network_input(images.to(fabric.device), config))
                loss = F.cross_entropy(logits, labels.to(fabric.device), label_smoothing=config.label_smoothing)
                if not math.isfinite(loss.item()):
                    raise TrainingError(
                        f"The loss must be finite. Got {loss.item()} at step {state.step}. The last checkpoint is "
                        "intact: resume it, or start again with a lower learning_rate."
                    )
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                if config.ema_decay:
                    average.update_parameters(network)
                state.step += 1
                now = time.monotonic()
                report(Progress(state.step, total_steps, batches.epoch + 1, loss.item(), len(labels) / (now - seen_at)))
                seen_at = now
                if stopped() or now - saved_at > 60 * config.checkpoint_minutes:
                    state.write(run / "checkpoint.pt")
                    saved_at = now
                if stopped():
                    raise TrainingError(f"The run was stopped at step {state.step} and saved. Resume it to go on.")
            epoch = batches.epoch + 1
            if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                measured = evaluate(evaluated, val_folder, config, fabric.device)
                card = dataclasses.replace(card, measured={**measured, "on": f"{config.data}/val", "epoch": epoch})
                _write_model(evaluated, card, run)
                _log(run / "log.csv", epoch=epoch, step=state.step, train_loss=loss.item(), **measured)
                report(Progress(state.step, total_steps, epoch, loss.item(), 0.0, measured))
            state.write(run / "checkpoint.pt")
            saved_at = seen_at = time.monotonic()
    if cache is not None:
        cache.remove()
    return card


def network_input(photos_BHW3: Tensor, config: TrainConfig) -> Tensor:
    """Return uint8 photos as the network takes them: float, normalised, channels first (in channels-last memory)."""
    x = photos_BHW3.permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in _mean_std(config))
    return (x - mean) / std


@torch.inference_mode()
def evaluate(
    network: nn.Module, folder: data.PhotoFolder, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Measure a network on the photos of a folder, prepared as the model's card says; fractions of 1, loss in nats."""
    network.eval()
    logits, labels = [], []
    photos = data.loader(data.ValidationPhotos(folder, config.preprocess), config.workers, batch_size=64)
    for images, targets, _ in photos:
        logits.append(network(network_input(images.to(device), config)).float().cpu().numpy())
        labels.append(targets.numpy())
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    return {
        "photos": len(all_labels),
        "top1": metrics.topk_accuracy(all_logits, all_labels, 1),
        "top5": metrics.topk_accuracy(all_logits, all_labels, 5),
        "class_averaged_top1": metrics.class_averaged_accuracy(
            all_logits.argmax(1), all_labels, num_classes=len(folder.classes)
        ),
        "loss": metrics.cross_entropy(all_logits, all_labels),
    }


@dataclasses.dataclass
class _RunState:
    """All that a run needs to go on exactly where it was."""

    network: nn.Module
    average: nn.Module
    optimizer: Any
    step: int = 0
    unreadable: int = 0

    def write(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "unreadable": self.unreadable,
                "random": torch.get_rng_state(),
            },
            buffer,
        )
        write_atomically(path, buffer.getvalue())

    def read(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.unreadable = saved["step"], saved["unreadable"]
        torch.set_rng_state(saved["random"])


def _mean_std(config: TrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    preprocess = config.preprocess
    return preprocess.mean or (0.0, 0.0, 0.0), preprocess.std or (1.0, 1.0, 1.0)


def _open_run(config: TrainConfig, resume: bool) -> Path:
    """Return the run folder, made or checked, with the configuration in it."""
    run = Path(config.out)
    checkpoint = run / "checkpoint.pt"
    if resume and not checkpoint.exists():
        raise TrainingError(f"A run to resume must have a checkpoint. Got none in {run}. Start it without --resume.")
    if checkpoint.exists() and not resume:
        raise TrainingError(f"The run folder must be new. Got a checkpoint in {run}. Pass --resume, or another folder.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        if resume:
            _check_same_run(config, yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        write_atomically(run / "config.yaml", text.encode())
    except OSError as error:
        raise TrainingError(f"The run folder must be a folder that can be written. Got {run}: {error}.") from error
    return run


def _check_same_run(config: TrainConfig, before: dict[str, Any]) -> None:
    free = {"out", "data", "workers", "device", "checkpoint_minutes", "cache", "evaluate_every"}
    for name, value in dataclasses.asdict(config).items():
        if name not in free and before.get(name) != value:
            raise UsageError(
                f"A resumed run must keep its options. Got {name}={value!r}, before {before.get(name)!r}. "
                "Keep it, or start a new run."
            )


def _new_network(config: TrainConfig, folder: data.PhotoFolder) -> ShuffleNetV2:
    network = ShuffleNetV2(dataclasses.replace(VARIANTS[config.model].spec, num_classes=len(folder.classes)))
    network.card = None
    return network


def _card(config: TrainConfig, folder: data.PhotoFolder, network: ShuffleNetV2) -> Card:
    command = ["weightnet", "train", "--config", f"{config.out}/config.yaml"]
    return Card(
        name=Path(config.out).name,
        network=network.spec,
        classes=folder.classes,
        preprocess=config.preprocess,
        made_by={
            "command": shlex.join(command),
            "config": dataclasses.asdict(config),
            "weightnet": weightnet.__version__,
            "torch": torch.__version__,
            "train_photos": len(folder),
        },
        terms=config.terms,
    )


def _write_model(network: nn.Module, card: Card, run: Path) -> None:
    weights = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    write_atomically(run / "weights.safetensors", weights)
    card = dataclasses.replace(card, notes={**card.notes, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    write_card(card, run / "weights.json")


def _log(path: Path, **row: float) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM and Ctrl-C only set a flag, which the loop reads after a step."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
