"""A run's state and its folder: checkpoint, weights, card, configuration and log, each written whole or not at all.

config.yaml          the options
checkpoint.pt        all that is needed to go on
weights.safetensors  the model, averaged if the run averages
weights.json         its card
log.csv              one row per evaluation
"""

import csv
import dataclasses
import hashlib
import io
import shlex
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import weightnet
from weightnet.errors import TrainingError, UsageError
from weightnet.nn.variants import NetworkSpec
from weightnet.train.config import TrainConfig
from weightnet.train.data import PhotoFolder
from weightnet.zoo.cards import Card, write_atomically, write_card

# Options that may change when a run is resumed: they do not change its numbers, or only where it is cut.
FREE_OPTIONS = {"out", "data", "workers", "device", "checkpoint_minutes", "cache", "evaluate_every", "terms"}


@dataclasses.dataclass
class RunState:
    """All that a run needs to go on exactly where it was.

    Args:
        network: the network in training.
        average: its exponential moving average; the network itself where the run does not average.
        optimizer: the optimiser of the network.
        averaged: whether the average is what is evaluated and kept.
        step: steps done.
        unreadable: photos skipped because they could not be read.
        history: one mapping of figures per evaluation.
    """

    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    averaged: bool
    step: int = 0
    unreadable: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept."""
        return self.average.module if self.averaged else self.network


@dataclasses.dataclass
class RunFolder:
    """The folder of a run.

    Args:
        path: where it is.
        config: the options of the run.
        photos: what it trains on.
        checkpoint_at: when the last checkpoint was written, on the monotonic clock, in seconds.
    """

    path: Path
    config: TrainConfig
    photos: PhotoFolder
    checkpoint_at: float = dataclasses.field(default_factory=time.monotonic)

    @classmethod
    def open(cls, config: TrainConfig, photos: PhotoFolder, *, resume: bool) -> "RunFolder":
        """Make a new run folder, or check the one that is resumed.

        Raises: TrainingError where it cannot be written, or has or lacks a checkpoint; UsageError for changed options.
        """
        path = Path(config.out)
        checkpoint = path / "checkpoint.pt"
        if resume and not checkpoint.exists():
            raise TrainingError(f"A run to resume must have a checkpoint. Got none in {path}. Start it anew.")
        if checkpoint.exists() and not resume:
            raise TrainingError(f"The run folder must be new. Got a checkpoint in {path}. Resume it, or name another.")
        if resume:
            _check_same_run(config, path / "config.yaml")
        run = cls(path, config, photos)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"The run folder must be a folder that can be made. Got {path}: {error}.") from error
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        run._write("config.yaml", text.encode())
        return run

    def seconds_since_checkpoint(self) -> float:
        """Return the age of the last checkpoint, in seconds."""
        return time.monotonic() - self.checkpoint_at

    def read_checkpoint(self, state: RunState) -> None:
        """Put the run's state where the checkpoint was.

        Raises: TrainingError where the checkpoint is damaged.
        """
        path = self.path / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state.network.load_state_dict(saved["network"])
            state.average.load_state_dict(saved["average"])
            state.optimizer.load_state_dict(saved["optimizer"])
            state.step, state.unreadable, state.history = saved["step"], saved["unreadable"], saved["history"]
            torch.set_rng_state(saved["random"])
        except Exception as error:  # torch reports a damaged archive by many classes of exceptions
            raise TrainingError(f"The checkpoint {path} must be whole. Got: {error}. Start a new run.") from error

    def write_checkpoint(self, state: RunState) -> None:
        """Write the state, the model as it is now, its card and the log.

        Raises: TrainingError where a file cannot be written; the last good ones are intact then.
        """
        buffer = io.BytesIO()
        saved = {name: getattr(state, name).state_dict() for name in ("network", "average", "optimizer")}
        saved |= {name: getattr(state, name) for name in ("step", "unreadable", "history")}
        torch.save({**saved, "random": torch.get_rng_state()}, buffer)
        weights = save({name: tensor.contiguous() for name, tensor in state.evaluated.state_dict().items()})
        card = self.card(state)
        card = dataclasses.replace(card, notes={"weights_sha256": hashlib.sha256(weights).hexdigest()})
        self._write("checkpoint.pt", buffer.getvalue())
        self._write("weights.safetensors", weights)
        try:
            write_card(card, self.path / "weights.json")
        except OSError as error:
            self._refuse("weights.json", error)
        if state.history:
            self._write("log.csv", _table(state.history))
        self.checkpoint_at = time.monotonic()

    def card(self, state: RunState) -> Card:
        """Return the card of the run's model; it states figures only where this very model was measured."""
        latest = state.history[-1] if state.history else {"step": -1.0}
        measured = {**latest, "on": f"{self.config.data}/val"} if latest["step"] == state.step else {}
        config = self.config
        spec: NetworkSpec = state.network.spec  # type: ignore[assignment]
        command = ["weightnet", "train", "--config", f"{config.out}/config.yaml", "--out", "NEW_FOLDER"]
        return Card(
            name=self.path.name,
            network=spec,
            classes=self.photos.classes,
            preprocess=config.preprocess,
            measured=measured,
            made_by={
                "command": shlex.join(command),
                "config": dataclasses.asdict(config),
                "train_photos": len(self.photos),
                "steps": state.step,
                "weightnet": weightnet.__version__,
                "torch": str(torch.__version__),
            },
            terms=config.terms,
        )

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            self._refuse(name, error)

    def _refuse(self, name: str, error: OSError) -> None:
        raise TrainingError(
            f"The run folder must be writable. Got {self.path / name}: {error}. Files written before are intact: "
            "make room or mend the folder, and resume."
        ) from error


def start_state(network: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> RunState:
    """Return the state of a run that begins."""
    average = AveragedModel(
        network,
        multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    return RunState(network, average, optimizer, averaged=config.ema_decay > 0)


def _check_same_run(config: TrainConfig, path: Path) -> None:
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TrainingError(f"{path} must hold the run's options. Got: {error}. Start a new run.") from error
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE_OPTIONS and before.get(name) != value:
            raise UsageError(
                f"A resumed run must keep its options. Got {name}={value!r}, before {before.get(name)!r}. "
                "Keep it, or start a new run."
            )


def _table(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
