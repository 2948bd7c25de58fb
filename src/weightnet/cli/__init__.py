"""The command line. One command is one function, in a module of its name; only this package prints and exits.

Modules that take long to import (NumPy, OpenCV, PyTorch) are imported inside the commands: `weightnet --help` is quick.
"""

import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cyclopts import App, CycloptsError

from weightnet import __version__
from weightnet.cli import classify_many, convert, evaluate, export, models, predict, serve
from weightnet.cli.output import printable, say, silence_results
from weightnet.errors import (
    DataError,
    DownloadError,
    ImageError,
    MissingDependencyError,
    TrainingError,
    UnknownModelError,
    UsageError,
    WeightNetError,
    WeightsError,
    WeightsWarning,
)

FAILED, WRONG_USAGE, BUG, INTERRUPTED, BROKEN_PIPE = 1, 2, 70, 130, 141

_KINDS: dict[type[WeightNetError], tuple[str, int]] = {
    UnknownModelError: ("unknown model", WRONG_USAGE),  # before UsageError, which it is a kind of
    UsageError: ("usage", WRONG_USAGE),
    WeightsError: ("weights", WRONG_USAGE),
    DownloadError: ("download", WRONG_USAGE),
    ImageError: ("photo", FAILED),
    DataError: ("data", FAILED),
    TrainingError: ("training", FAILED),
    MissingDependencyError: ("missing package", FAILED),
}

app = App(
    name="weightnet",
    help="Efficient image classifiers with generated kernels: WeightNet on ShuffleNetV2.",
    version=f"weightnet {__version__}",
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app.command(predict.predict)
app.command(models.models)
app.command(convert.convert)
app.command(evaluate.evaluate)
app.command(export.export)
app.command(serve.serve)
app.command(classify_many.classify_many)
app.command("weightnet.cli.train:train", help="Train a network on folders of photos.")  # its flags need NumPy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Exit codes: 0 all went well; 1 an input or the run failed; 2 wrong usage, no such model, or its weights cannot be
    had; 70 a bug of this package; 130 interrupted; 141 whoever read standard output went away.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Example:
        >>> main(["--version"])
        weightnet 0.1.0
        0
    """
    try:
        with _warnings_as_messages():
            code = app(_tokens(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
    except CycloptsError as error:
        say(f"weightnet: usage: {printable(str(error))}\nSee `weightnet {_command(error)}--help`.")
        return WRONG_USAGE
    except WeightNetError as error:
        kind, code = next(found for cls, found in _KINDS.items() if isinstance(error, cls))
        say(f"weightnet: {kind}: {printable(str(error))}")
        return code
    except KeyboardInterrupt:
        say("weightnet: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        silence_results()
        return BROKEN_PIPE
    except OSError as error:  # a full disk, a folder that is not ours, ...
        silence_results()
        say(f"weightnet: the system says: {printable(str(error))}")
        return FAILED
    except Exception:
        traceback.print_exc()
        say("weightnet: this is a bug of weightnet. Please report it with the lines above.")
        return BUG
    return code or 0


def run() -> int:
    """Run the command line as the one thing that this process does, and return its exit code."""
    if os.getpid() == 1:  # a container's first process does not end by a signal that it leaves alone
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    code = main()
    gc.freeze()  # or the interpreter looks through all modules for garbage once more before it ends: 40 ms
    return code


def _tokens(argv: Sequence[str]) -> list[str]:
    """Hide lone dashes, which mean standard input to two commands, from cyclopts, which takes them for options."""
    return [predict.STDIN if token == "-" and argv[0] in ("predict", "classify-many") else token for token in argv]


@contextmanager
def _warnings_as_messages() -> Iterator[None]:
    """Show warnings about weights as plain messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", WeightsWarning)
        show = warnings.showwarning

        def show_plainly(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
            if issubclass(category, WeightsWarning):
                say(f"weightnet: note: {printable(str(message))}")
            else:
                show(message, category, *where, **more)  # type: ignore[arg-type]

        warnings.showwarning = show_plainly
        yield


def _command(error: CycloptsError) -> str:
    return "".join(f"{name} " for name in error.command_chain or ())
