"""`fit` in one process: what it resumes, where it stops and what it refuses."""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weightnet
from weightnet.errors import MissingDependencyError, TrainingError, UsageError
from weightnet.train.loop import Progress, fit

from .conftest import MakeConfig, log_of, weights_of


class _KilledError(BaseException):
    """Ends a run as abruptly as one process allows."""


def stop_at(step: int, how: Callable[[], None]) -> Callable[[Progress], None]:
    """Return a report that does something after a step, or where it is a multiple of the epoch's, before evaluation."""

    def report(progress: Progress) -> None:
        if progress.step == step and progress.measured is None:
            how()

    return report


def kill() -> None:
    raise _KilledError


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# Resuming


@pytest.mark.parametrize(("step", "minutes"), [(1, 10.0), (3, 0.0), (4, 0.0), (5, 0.0), (8, 0.0)])
def test_fit_resumed_ends_the_same(tmp_path: Path, make_config: MakeConfig, step: int, minutes: float) -> None:
    """Step 1: no checkpoint but the first; 4: saved after an epoch's last step, before its evaluation; 8: the last."""
    whole = fit(make_config(out=str(tmp_path / "whole"), ema_decay=0.9))
    config = make_config(ema_decay=0.9, checkpoint_minutes=minutes)
    with pytest.raises(_KilledError):
        fit(config, report=stop_at(step, kill))
    torch.rand(step)  # a resumed run does not depend on the caller's random numbers
    card = fit(config, resume=True)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert card.measured == whole.measured


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4, 8])
def test_fit_saves_and_ends_at_a_signal(tmp_path: Path, make_config: MakeConfig, number: int, step: int) -> None:
    before = signal.getsignal(number)
    fit(make_config(out=str(tmp_path / "whole")))
    with pytest.raises(TrainingError, match=f"stopped at step {step} and saved. Resume it"):
        fit(make_config(), report=stop_at(step, send(number)))
    assert signal.getsignal(number) is before
    weightnet.load(str(tmp_path / "run"))
    done: list[int] = []
    fit(make_config(), resume=True, report=lambda p: done.append(p.step) if p.measured is None else None)
    assert done == list(range(step + 1, 9))
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("how", [kill, send(signal.SIGTERM)])
def test_fit_takes_its_workers_with_it(make_config: MakeConfig, how: Callable[[], None], workers: int | None) -> None:
    with pytest.raises((_KilledError, TrainingError)) as raised:  # which holds on to the loop's frames
        fit(make_config(workers=workers), report=stop_at(2, how))
    assert raised.value is not None
    assert multiprocessing.active_children() == []


def test_fit_stops_within_an_evaluation(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightnet.train import evaluation

    fit(make_config(out=str(tmp_path / "whole")))
    plain = evaluation.network_input

    def signalled(*arguments: Any) -> Any:
        send(signal.SIGTERM)()
        return plain(*arguments)

    monkeypatch.setattr(evaluation, "network_input", signalled)
    with pytest.raises(TrainingError, match="stopped at step 4"):
        fit(make_config())
    monkeypatch.setattr(evaluation, "network_input", plain)
    assert not (tmp_path / "run" / "log.csv").exists()
    fit(make_config(), resume=True)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_fit_stops_while_photos_are_decoded(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightnet.train import data

    plain = data.shrink_short_edge

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(data, "shrink_short_edge", signalled)
    monkeypatch.setattr(data, "CACHE_BLOCK_PHOTOS", 10)
    with pytest.raises(TrainingError, match="stopped at step 0"):
        fit(make_config(cache=64))


def test_fit_trains_outside_the_main_thread(make_config: MakeConfig) -> None:
    cards: list[Any] = []
    thread = threading.Thread(target=lambda: cards.append(fit(make_config(epochs=1))))
    thread.start()
    thread.join()
    assert cards[0].measured["epoch"] == 1


def test_fit_leaves_a_finished_run_as_it_is(tmp_path: Path, make_config: MakeConfig) -> None:
    card = fit(make_config())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    reports: list[Progress] = []
    again = fit(make_config(cache=0), resume=True, report=reports.append)
    assert again.measured == card.measured
    assert not reports
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_fit_resume_begins_where_there_is_no_run(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(out=str(tmp_path / "whole"), epochs=1))
    fit(make_config(epochs=1), resume=True)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_fit_resume_needs_no_pretrained_weights(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(out=str(tmp_path / "first"), epochs=1))
    config = make_config(pretrained=str(tmp_path / "first"))
    with pytest.raises(TrainingError, match="stopped"):
        fit(config, report=stop_at(2, send(signal.SIGTERM)))
    (tmp_path / "first" / "weights.safetensors").unlink()
    assert fit(config, resume=True).measured["epoch"] == 2


# What is refused


def test_fit_refuses_a_folder_with_a_run(make_config: MakeConfig) -> None:
    fit(make_config(epochs=1))
    with pytest.raises(TrainingError, match=r"must be new.*Resume it, or name another"):
        fit(make_config(epochs=1))


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"seed": 1}, {"ema_decay": 0.5}, {"cache": 64}, {"model": "shufflenet_v2_x0_5"}]
)
def test_fit_refuses_to_resume_with_other_options(make_config: MakeConfig, change: dict[str, Any]) -> None:
    with pytest.raises(TrainingError):
        fit(make_config(), report=stop_at(1, send(signal.SIGTERM)))
    (name,) = change
    with pytest.raises(UsageError, match=f"must keep its options. Got {name}="):
        fit(make_config(**change), resume=True)


def test_fit_refuses_to_resume_with_other_photos(own_photos: Path, make_config: MakeConfig) -> None:
    config = make_config(data=str(own_photos))
    with pytest.raises(TrainingError):
        fit(config, report=stop_at(1, send(signal.SIGTERM)))
    (own_photos / "train" / "red" / "0.png").unlink()
    with pytest.raises(UsageError, match="must keep its training photos"):
        fit(config, resume=True)


def test_fit_refuses_to_resume_with_other_names_of_classes(own_photos: Path, make_config: MakeConfig) -> None:
    config = make_config(data=str(own_photos))
    with pytest.raises(TrainingError):
        fit(config, report=stop_at(1, send(signal.SIGTERM)))
    (own_photos / "classes.csv").write_text("folder,label\nblue,red\ngreen,green\nred,blue\n")
    with pytest.raises(UsageError, match="must keep the names of its classes"):
        fit(config, resume=True)


def test_fit_refuses_a_folder_with_a_model_that_cannot_be_resumed(tmp_path: Path, make_config: MakeConfig) -> None:
    fit(make_config(epochs=1))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    for _ in range(2):
        with pytest.raises(TrainingError, match="holds a model, and no checkpoint to resume"):
            fit(make_config(epochs=1, seed=1))
        assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before
        (tmp_path / "run" / "weights.json").unlink(missing_ok=True)


def test_fit_resumes_with_free_options(own_photos: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(data=str(own_photos))
    with pytest.raises(TrainingError):
        fit(config, report=stop_at(1, send(signal.SIGTERM)))
    own_photos.rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "renamed")
    change = {"data": str(tmp_path / "moved"), "out": str(tmp_path / "renamed"), "terms": "free", "evaluate_every": 2}
    card = fit(make_config(**change), resume=True)
    assert (card.name, card.terms) == ("renamed", "free")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80" + data])
def test_fit_says_that_a_checkpoint_is_damaged(
    tmp_path: Path, make_config: MakeConfig, damage: Callable[[bytes], bytes]
) -> None:
    fit(make_config(epochs=1))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(TrainingError, match=r"checkpoint.* must be whole"):
        fit(make_config(epochs=1), resume=True)


def test_fit_refuses_a_checkpoint_that_would_run_code(tmp_path: Path, make_config: MakeConfig) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "run").mkdir()
    torch.save({"config": Hostile()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(TrainingError, match="must be whole"):
        fit(make_config(), resume=True)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_fit_refuses_a_file_in_the_way(tmp_path: Path, make_config: MakeConfig, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="must be a folder that can be written"):
        fit(make_config(out=str(tmp_path / out)))


def test_fit_says_that_the_loss_is_not_finite(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match=r"must be finite.*lower learning_rate"):
        fit(make_config(learning_rate=1e30, jitter=0.0))
    assert math.isfinite(weightnet.load(str(tmp_path / "run")).first_conv[0].weight.sum().item())


def test_fit_says_that_the_model_is_not_finite(make_config: MakeConfig) -> None:
    """One step that runs off shows in the evaluation, after a finite loss."""
    with pytest.raises(TrainingError, match=r"must be finite.*lower learning_rate"):
        fit(make_config(batch_size=36, epochs=1, learning_rate=1e29))


def test_fit_refuses_a_device_that_is_not_there(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device must be one that PyTorch finds here\. Got device='cuda'"):
        fit(make_config(device="cuda"))
    with pytest.raises(UsageError, match="bf16-mixed without a GPU"):
        fit(make_config(precision="16-mixed", device="auto"))


def test_fit_says_how_to_install_fabric(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'weightnet\[train\]'"):
        fit(make_config())
