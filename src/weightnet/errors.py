"""Every error this package raises on purpose: one tree, so that a caller can catch as much or as little as it wants.

Messages follow one form: "<what> must be <rule>. Got <name>=<value>. <what to do>."
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class WeightNetError(Exception):
    """Base of all errors raised on purpose by this package."""


class UsageError(WeightNetError, ValueError):
    """An argument, option or configuration value that breaks a stated rule (exit code 2)."""


class UnknownModelError(UsageError):
    """A model name that is not in the zoo and not a file or run folder."""


class ImageError(WeightNetError):
    """A photo that cannot be read, or that is refused before decoding because of its size or shape."""


class WeightsError(WeightNetError):
    """A weights file that is damaged, hostile, of an unknown format, or does not fit the network."""


class DownloadError(WeightNetError):
    """A file that could not be downloaded whole; the message says where to put it by hand."""


class DataError(WeightNetError):
    """A data set folder that cannot be trained on or evaluated."""


class TrainingError(WeightNetError):
    """A training run that cannot start or go on; the last good checkpoint is intact."""


class MissingDependencyError(WeightNetError, ImportError):
    """An optional package that is not installed; the message gives the command that installs it."""


class WeightsWarning(UserWarning):
    """Weights that were adapted to another network, or that want other pixels than the hub page's."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean a, b or c?" for the known names nearest to `name`, or "" when none is near.

    >>> nearest("shufflenet_v2_x05", ["shufflenet_v2_x0_5", "resnet"])
    'Did you mean shufflenet_v2_x0_5?'
    """
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return f"Did you mean {' or '.join(filter(None, [', '.join(close[:-1]), close[-1]]))}?"


@contextmanager
def needs_torch(what: str, *, extra: str = "torch") -> Iterator[None]:
    """Say what to install where an import in this context finds no PyTorch.

    Args:
        what: what needs it, as the beginning of a sentence.
        extra: the extra of this package that brings it, with whatever else is needed.

    Raises: MissingDependencyError in place of the import's own error.

    Example:
        >>> with needs_torch("Training", extra="train"):
        ...     raise ModuleNotFoundError("No module named 'torch'", name="torch")
        Traceback (most recent call last):
        weightnet.errors.MissingDependencyError: Training needs PyTorch. Install it by: pip install 'weightnet[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "jaxtyping"):
            raise
        raise MissingDependencyError(
            f"{what} needs PyTorch. Install it by: pip install 'weightnet[{extra}]'"
        ) from error
