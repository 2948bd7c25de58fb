"""One step of a run: loss, gradients part by part, update, average.

Shape suffixes: B photos, K classes of a classifier.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightnet.train.config import TrainConfig
from weightnet.train.data import Batch
from weightnet.train.evaluation import network_input
from weightnet.train.run import RunState, diverged

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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


def averaged_model(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network, batch statistics included.

    The decay of update n is at most (1 + n) / (10 + n), so that the average of a short run is not that of its start.

    Source: the ramp of TensorFlow's `ExponentialMovingAverage`.
    """

    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        n = float(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, updates)  # type: ignore[no-untyped-call]

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: from the peak to 0, on a line or on half a cosine.

    Example:
        >>> config = TrainConfig(data="photos", out="run", schedule="cosine")
        >>> [round(learning_rate(config, step, 4) / config.peak_learning_rate, 2) for step in range(4)]
        [1.0, 0.85, 0.5, 0.15]
    """
    done = step / total_steps
    return config.peak_learning_rate * (1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def update(
    fabric: "Fabric", model: nn.Module, state: RunState, batch: Batch, config: TrainConfig, total_steps: int
) -> float:
    """Do one step on a batch of at least two photos, and return its loss against the labels.

    The gradient is the mean over the batch's `config.accumulate` parts, each with batch statistics of its own. What is
    drawn for a part is a function of the seed, the step and the part's place, counted over all processes.

    Raises: TrainingError for a loss that is not finite; no parameter has changed then.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step, total_steps)
    model.train()
    if config.freeze:  # batch norm keeps the statistics of the pretrained network
        state.network.eval()
        state.network.dropout.train()
    state.optimizer.zero_grad()
    parts = np.array_split(np.arange(len(batch.photos)), min(config.accumulate, len(batch.photos) // 2))
    losses = []
    for number, part in enumerate(parts):
        with fabric.no_backward_sync(model, enabled=number + 1 < len(parts)):  # type: ignore[arg-type]
            place = fabric.global_rank * config.accumulate + number
            loss, own = _part_loss(fabric, model, state, _rows(batch, part), config, place)
            if not math.isfinite(loss.item()):
                raise diverged(f"loss={loss.item()} at step {state.step}")
            losses.append(own.item())
            fabric.backward(loss / len(parts))
    if config.clip_norm:
        # Gradients may overflow in half precision: the step is then left out, and the loss scaled lower.
        fabric.clip_gradients(model, state.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
    state.optimizer.step()
    if state.average is not None:
        state.average.update_parameters(state.network)
    return sum(losses) / len(losses)


def draw_from(fabric: "Fabric", *key: int) -> None:
    """Make the random numbers that follow a function of the key alone, so that no generator needs to be saved."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if fabric.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _part_loss(
    fabric: "Fabric", model: nn.Module, state: RunState, part: Batch, config: TrainConfig, place: int
) -> tuple[Tensor, Tensor]:
    draw_from(fabric, config.seed, 1, state.step, place)  # dropout
    x = network_input(part.photos.to(fabric.device), state.preprocess)
    labels, targets = part.labels.to(fabric.device), None
    if part.targets is not None:
        targets = part.targets.to(fabric.device, torch.float32)
    if config.mixup:
        # Four numbers, the last not 0: no other generator of the run draws from this key.
        rng = np.random.default_rng((config.seed, state.step, place, 2))
        share = float(rng.beta(config.mixup, config.mixup))
        x = mix(x, share)
        labels = mix(F.one_hot(labels, state.network.num_classes).to(x.dtype), share)
        targets = None if targets is None else mix(targets, share)
    return loss_of(model(x), labels, targets, config)


def mix(rows: Tensor, share: float) -> Tensor:
    """Return each row mixed with its opposite in the batch: share of its own, the rest of the other's.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Example:
        >>> mix(torch.tensor([1.0, 2.0, 4.0]), 0.75)
        tensor([1.7500, 2.0000, 3.2500])
    """
    return share * rows + (1 - share) * rows.flip(0)


def loss_of(outputs: Any, labels: Tensor, targets: Tensor | None, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and its part against the labels: less than all where a teacher has given targets.

    Args:
        outputs: logits (B, K); with targets two of them, the second of the teacher's classes.
        labels: classes (B,), or their probabilities (B, K).
        targets: the teacher's probabilities (B, its classes), or None.
    """
    if targets is None:
        own = F.cross_entropy(outputs, labels, label_smoothing=config.label_smoothing)
        return own, own
    logits, teacher_logits = outputs
    own = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    return own + config.teacher_weight * F.cross_entropy(teacher_logits, targets), own


def _rows(batch: Batch, rows: Any) -> Batch:
    if len(rows) == len(batch.photos):
        return batch
    targets = None if batch.targets is None else batch.targets[rows]
    return Batch(batch.photos[rows], batch.labels[rows], batch.unreadable, targets)
