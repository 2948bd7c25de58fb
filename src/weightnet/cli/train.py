"""`weightnet train`: every field of `TrainConfig` is a flag."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weightnet.cli.output import Switch, figures, open_results, printable, say
from weightnet.errors import needs_torch
from weightnet.train.config import TrainConfig, read_options

if TYPE_CHECKING:
    from weightnet.train.loop import Progress


def _flag(field: dataclasses.Field[Any]) -> tuple[str, Any, Any]:
    """Return a field of TrainConfig as a flag: None where it is not given, so that a file can stand behind it."""
    default = False if field.default in (dataclasses.MISSING, None, "") else str(field.default)
    hint = Annotated[field.type | None, Parameter(show_default=default)]  # type: ignore[name-defined]
    return field.name, hint, dataclasses.field(default=None, kw_only=True)


Flags = dataclasses.make_dataclass(
    "Flags",
    [_flag(field) for field in dataclasses.fields(TrainConfig)],
    frozen=True,
    namespace={"__doc__": TrainConfig.__doc__, "__module__": __name__},
)


def train(
    flags: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    *,
    config: str | None = None,
    resume: Switch = False,
) -> int:
    """Train a network on folders of photos.

    The run folder is then a model's name everywhere. Progress goes to standard error; Ctrl-C saves the run.

    Args:
        config: YAML file of options, named as here with _ for -; what flags say counts more.
        resume: Go on from the run folder's checkpoint, by the run's own options (`--config RUN/config.yaml`); only out,
            data, workers, device, checkpoint_minutes, evaluate_every and terms may be others.
    """
    given = {name: value for name, value in (dataclasses.asdict(flags) if flags else {}).items() if value is not None}
    options = TrainConfig.from_options({**(read_options(config) if config else {}), **given})
    results = open_results()

    with needs_torch("`weightnet train`", extra="train"):
        from weightnet.train.loop import fit
        from weightnet.train.memory import keep_freed_memory

    keep_freed_memory()
    with _reports(options.out) as report:
        card = fit(options, resume=resume, report=report)
    if os.environ.get("RANK", "0") == "0":  # under torchrun, the first process speaks for all
        results.write(printable(f"{options.out}: {figures(card.measured)}") + "\n")
    return 0


@contextmanager
def _reports(out: str) -> "Iterator[Callable[[Progress], None]]":
    """Show steps in a progress bar, where standard error is a terminal, and evaluations line by line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task("steps", total=None)

        def report(progress: "Progress") -> None:
            if progress.measured is not None:
                say(f"epoch {progress.epoch}: {figures(progress.measured)}")
                if progress.unreadable:
                    listed = os.path.join(out, "unreadable.csv")
                    say(f"{progress.unreadable} photos could not be read and are left out, see {listed}")
                return
            if progress.taught is not None:
                done, total = progress.taught
                bar.update(task, completed=done, total=total, description="the teacher looks at the photos")
                return
            text = f"epoch {progress.epoch}, loss {progress.loss:.3f}, {progress.photos_per_s:.0f} photos/s"
            bar.update(task, completed=progress.step, total=progress.total_steps, description=text)

        yield report
