"""A run's state and its folder, of which each file is written whole or not at all.

checkpoint.pt        all that is needed to go on
weights.safetensors  the model as it is, averaged if the run averages
weights.json         its card
config.yaml          the options
log.csv              one row per evaluation
curves.png           these as a picture, once the run is finished
teacher/             the teacher's probabilities, until then
unreadable.csv       photos that could not be read, and why

The checkpoint is written last and everything else follows from it: wherever a save is cut off, the folder holds a
model that loads, a card that claims nothing false of it, and a checkpoint from which the run ends the same.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml
from safetensors.torch import save as safetensors_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import weightnet
from weightnet.errors import TrainingError, UsageError, WeightNetError
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.train.config import TrainConfig
from weightnet.train.curves import draw_curves
from weightnet.train.data import Unreadable
from weightnet.train.folders import PhotoFolder
from weightnet.zoo.cards import Card, printable_name, read_card, write_atomically, write_card

# Options that may change when a run is resumed: they change none of its numbers, or only where it runs and looks up.
FREE_OPTIONS = {"out", "data", "workers", "device", "checkpoint_minutes", "evaluate_every", "terms"}

LOCK_TIMEOUT_S = 15  # the workers of a killed run live on for some seconds, and hold its lock


@dataclasses.dataclass
class RunState:
    """All that a run needs to go on exactly where it was.

    Args:
        network: the network in training.
        average: its exponential moving average; None where the run does not average.
        optimizer: the optimiser of the network.
        precision: Fabric's precision, which has a state where it scales the loss.
        preprocess: from a decoded photo to the network's input, outside training.
        step: steps done.
        loss_sum: losses against the labels of the photos since the last evaluation, added up.
        loss_photos: how many these were.
        skipped: steps without an update since the last one with one, because their photos could not be read.
        unreadable: photos that could not be read, and why.
        history: one mapping of figures per evaluation.
        teacher_head: the second classifier, of the teacher's classes; None where the run has no teacher.
    """

    network: ShuffleNetV2
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    precision: Any
    preprocess: Preprocess
    step: int = 0
    loss_sum: float = 0.0
    loss_photos: int = 0
    skipped: int = 0
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    teacher_head: nn.Module | None = None

    @property
    def evaluated(self) -> ShuffleNetV2:
        """The network that is evaluated and kept."""
        return self.network if self.average is None else self.average.module  # type: ignore[return-value]

    def note_unreadable(self, photos: Sequence[Unreadable]) -> None:
        """Remember photos that could not be read."""
        self.unreadable.update(photos)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain data."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "preprocess": self.preprocess.to_dict(), **{name: getattr(self, name) for name in _FIGURES}}

    def set_from_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.preprocess = Preprocess.from_dict(saved["preprocess"])
        for name in _FIGURES:
            setattr(self, name, saved[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "precision": self.precision}
        more = {"average": self.average, "teacher_head": self.teacher_head}
        return parts | {name: part for name, part in more.items() if part is not None}


_FIGURES = ("step", "loss_sum", "loss_photos", "skipped", "unreadable", "history")


@dataclasses.dataclass
class RunFolder:
    """The folder of a run, held by one process at a time.

    Args:
        path: where it is.
        config: the options of the run.
        photos: what it trains on.
        writes: whether this process writes the folder; of a run on several processes, one does.
        saved_at: when it was last saved, on the monotonic clock, in seconds.
    """

    path: Path
    config: TrainConfig
    photos: PhotoFolder
    writes: bool = True
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: TrainConfig, photos: PhotoFolder, *, resume: bool, writes: bool = True
    ) -> Iterator["RunFolder"]:
        """Hold the run folder, made where it is missing, within the block; without `writes`, just look at it.

        What a run that ended before its first checkpoint left there is removed.

        Raises: TrainingError where it cannot be made, another process holds it, or it has a model already: a run that
            is not resumed, or weights without a checkpoint.
        """
        run = cls(Path(config.out), config, photos, writes)
        if not writes:
            yield run
            return
        lock = filelock.FileLock(run.path / ".lock", timeout=LOCK_TIMEOUT_S)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise TrainingError(
                f"A run folder must be of one process. Got {run.path}, in which another trains. Name another."
            ) from error
        except OSError as error:
            raise TrainingError(
                f"The run folder must be a folder that can be written. Got {run.path}: {error}. Name another."
            ) from error
        try:
            if run.begun and not resume:
                raise TrainingError(f"The run folder must be new. Got a run in {run.path}. Resume it, or name another.")
            if not run.begun:
                run.check_free()
                run.remove_views()
            for rest in (*run.path.glob(".*.part"), *run.path.glob("photos*.cache")):  # of a run that was killed
                rest.unlink(missing_ok=True)
            yield run
        finally:
            lock.release()

    @property
    def begun(self) -> bool:
        """Whether there is a run to resume."""
        return self._checkpoint.exists()

    @property
    def finished(self) -> bool:
        """Whether the run is at its end: the curves are drawn last."""
        return (self.path / "curves.png").exists()

    def check_free(self) -> None:
        """Raise TrainingError where there are weights, but not those of a first save that was cut off."""
        if not (self.path / "weights.safetensors").exists():
            return
        with contextlib.suppress(WeightNetError):
            made_by = read_card(self.path / "weights.json").made_by
            if "config" in made_by and not made_by.get("steps"):
                return
        raise TrainingError(
            f"The run folder must be new. Got {self.path}, which holds a model, and no checkpoint to resume. "
            "Name another."
        )

    def remove_views(self) -> None:
        """Remove the teacher's probabilities, and nothing else that may lie in their folder."""
        folder = self.path / "teacher"
        with contextlib.suppress(OSError):
            for view in (*folder.glob("view*.npy"), *folder.glob(".view*.part")):
                view.unlink(missing_ok=True)
            folder.rmdir()

    @property
    def seconds_since_save(self) -> float:
        """The age of the last save."""
        return time.monotonic() - self.saved_at

    def read_checkpoint(self) -> dict[str, Any]:
        """Return what `save` kept of the run.

        Raises: TrainingError where the checkpoint is damaged; UsageError for other options or photos than it has.
        """
        path = self._checkpoint
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            options, photos = dict(saved["config"]), str(saved["photos"])
            classes = tuple(ClassLabel(*row) for row in saved["classes"])
        except Exception as error:  # torch reports a damaged archive by many classes of exceptions
            raise _damaged(path, error) from error
        self._check_same(options, photos, classes)
        return saved  # type: ignore[no-any-return]

    def restore(self, state: RunState) -> None:
        """Put the run's state where the checkpoint was.

        Raises: as `read_checkpoint`.
        """
        saved = self.read_checkpoint()
        try:
            state.set_from_dict(saved)
        except Exception as error:
            raise _damaged(self._checkpoint, error) from error

    def save(self, state: RunState) -> None:
        """Write the state, the model as it is now, its card and the log, if this process is to.

        Raises: TrainingError where the state has run off to infinity or a file cannot be written; the last checkpoint
            is intact then.
        """
        if not self.writes:
            return
        classes = [dataclasses.astuple(entry) for entry in self.photos.classes]
        same = {"config": dataclasses.asdict(self.config), "photos": self.photos.digest(), "classes": classes}
        saved = same | state.to_dict()
        if not all(_finite(saved[name]) for name in ("network", "average", "teacher_head") if name in saved):
            raise diverged(f"weights that are not at step {state.step}")
        checkpoint = io.BytesIO()
        torch.save(saved, checkpoint)
        weights = safetensors_of({name: value.contiguous() for name, value in state.evaluated.state_dict().items()})
        card = self.card(state)
        # Until its own card is there, the new model has one that holds for every model of the run.
        outline = dataclasses.replace(card, measured={}, made_by={**card.made_by, "steps": None}, notes={})
        try:
            write_atomically(self.path / "config.yaml", _yaml(self.config))
            write_card(outline, self.path / "weights.json")
            write_atomically(self.path / "weights.safetensors", weights)
            notes = {"weights_sha256": hashlib.sha256(weights).hexdigest()}
            write_card(dataclasses.replace(card, notes=notes), self.path / "weights.json")
            if state.history:
                write_atomically(self.path / "log.csv", _table(list(state.history[0]), state.history))
            if state.unreadable:
                rows = [{"photo": name, "reason": state.unreadable[name]} for name in sorted(state.unreadable)]
                write_atomically(self.path / "unreadable.csv", _table(["photo", "reason"], rows))
            write_atomically(self._checkpoint, checkpoint.getvalue())
        except OSError as error:
            raise TrainingError(
                f"The run folder must be writable. Got {self.path}: {error}. The last checkpoint is intact: "
                "make room or mend the folder, and resume."
            ) from error
        self.saved_at = time.monotonic()

    def finish(self, state: RunState) -> None:
        """Remove what only a run under way needs, and draw the curves of this one, which is at its end.

        Raises: TrainingError where the picture cannot be written.
        """
        if not self.writes:
            return
        self.remove_views()
        try:
            write_atomically(self.path / "curves.png", draw_curves(state.history))
        except OSError as error:
            raise TrainingError(
                f"The run folder must be writable. Got {self.path}: {error}. The model is whole: make room, and resume."
            ) from error

    def card(self, state: RunState) -> Card:
        """Return the card of the run's model; it states figures only where this very model was measured."""
        config = self.config
        latest = state.history[-1] if state.history else {"step": -1}
        measured = {**latest, "on": f"{config.data}/val"} if latest["step"] == state.step else {}
        command = ["weightnet", "train", "--config", f"{config.out}/config.yaml", "--out", "NEW_FOLDER"]
        return Card(
            name=printable_name(self.path.resolve().name, otherwise="run"),
            network=state.network.spec,
            classes=self.photos.classes,
            preprocess=state.preprocess,
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

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def _check_same(self, options: dict[str, Any], photos: str, classes: tuple[ClassLabel, ...]) -> None:
        for field in dataclasses.fields(TrainConfig):
            value, before = getattr(self.config, field.name), options.get(field.name, field.default)
            if field.name not in FREE_OPTIONS and value != before:
                raise UsageError(
                    f"A resumed run must keep its options. Got {field.name}={value!r}, before {before!r}. "
                    f"Keep it (see {self.path / 'config.yaml'}), or start a new run."
                )
        if photos != self.photos.digest():
            raise UsageError(
                f"A resumed run must keep its training photos. Got others in {self.photos.root}. "
                "Put them back, or start a new run."
            )
        if classes != self.photos.classes:
            raise UsageError(
                f"A resumed run must keep the names of its classes. Got others in {self.config.data}. "
                "Put them back, or start a new run."
            )


def diverged(what: str) -> TrainingError:
    """Return the error of a run whose numbers have left all bounds."""
    return TrainingError(
        f"Loss and weights must be finite. Got {what}. The last checkpoint is intact, but this run leads here again: "
        "start a new one with a lower learning_rate."
    )


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"The checkpoint {path} must be whole. Got: {error}. Start a new run in another folder.")


def _finite(state: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def _yaml(config: TrainConfig) -> bytes:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True).encode()


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
