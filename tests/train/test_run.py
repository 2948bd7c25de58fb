"""The run folder: wherever a save is cut off, it holds a model and a checkpoint that fit what their files say."""

import dataclasses
import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import filelock
import pytest
import torch

import weightnet
from weightnet.errors import TrainingError, WeightsError
from weightnet.train import loop
from weightnet.train import run as run_module
from weightnet.train.folders import PhotoFolder, read_folders
from weightnet.train.loop import _start, fit, start_fabric
from weightnet.train.run import RunFolder, RunState
from weightnet.zoo import cards
from weightnet.zoo.cards import numbered_classes, read_card

from .conftest import MakeConfig, log_of, weights_of

WRITES = 6  # of a save: options, outline of the card, weights, card, log, checkpoint


class _KilledError(BaseException):
    """Ends a run as abruptly as one process allows."""


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException | None], list[str]]:
    """A function that lets a write fail, counted from now; it returns the list of the files that are written."""
    plain = cards.write_atomically

    def start(number: int, error: BaseException | None) -> list[str]:
        names: list[str] = []

        def write(path: Any, data: bytes) -> None:
            names.append(Path(path).name)
            if error is not None and len(names) == number:
                raise error
            plain(path, data)

        for module in (cards, run_module):
            monkeypatch.setattr(module, "write_atomically", write)
        return names

    return start


def check_claims(run: Path) -> None:
    """The model loads, and its card claims nothing of other weights."""
    weightnet.load(str(run))
    card = read_card(run / "weights.json")
    own = hashlib.sha256(weights_of(run)).hexdigest()
    assert card.notes.get("weights_sha256", own) == own
    if card.measured or card.made_by["steps"] is not None:
        assert card.notes["weights_sha256"] == own


def test_save_writes_the_checkpoint_last(make_config: MakeConfig, fail_at: Any) -> None:
    names = fail_at(0, None)
    fit(make_config(epochs=1))
    start = ["config.yaml", "weights.json", "weights.safetensors", "weights.json"]
    assert names == [*start, "checkpoint.pt", *start, "log.csv", "checkpoint.pt", "curves.png"]


@pytest.mark.parametrize("write", range(1, WRITES + 1))
@pytest.mark.parametrize("error", [_KilledError(), OSError(errno.ENOSPC, "No space left on device")])
def test_save_cut_off_leaves_a_folder_that_loads_and_goes_on(
    tmp_path: Path, make_config: MakeConfig, fail_at: Any, write: int, error: BaseException
) -> None:
    config = make_config(epochs=2, batch_size=36, workers=0)
    fit(dataclasses.replace(config, out=str(tmp_path / "whole")))
    failing = WRITES - 1 + WRITES + write  # after the first save and that of the first epoch
    fail_at(failing, error)
    with pytest.raises(_KilledError if isinstance(error, _KilledError) else TrainingError) as raised:
        fit(config)
    if isinstance(error, OSError):
        assert "must be writable" in str(raised.value)
        assert "No space left" in str(raised.value)
        assert "The last checkpoint is intact" in str(raised.value)
    check_claims(tmp_path / "run")
    fail_at(0, None)
    fit(config, resume=True)
    check_claims(tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("write", range(1, WRITES))
def test_first_save_that_fails_ends_the_run_before_a_step(
    tmp_path: Path, make_config: MakeConfig, fail_at: Any, write: int
) -> None:
    fail_at(write, OSError(errno.ENOSPC, "No space left on device"))
    steps: list[int] = []
    with pytest.raises(TrainingError, match="No space left"):
        fit(make_config(), report=lambda progress: steps.append(progress.step))
    assert not steps
    if (tmp_path / "run" / "weights.safetensors").exists():
        check_claims(tmp_path / "run")
    else:
        with pytest.raises(WeightsError):
            weightnet.load(str(tmp_path / "run"))
    fail_at(0, None)
    fit(make_config(epochs=1))


@pytest.fixture
def parts(make_config: MakeConfig, photos: Path) -> tuple[RunState, PhotoFolder]:
    config = make_config(ema_decay=0.5)
    state, _ = _start(start_fabric(config), config, numbered_classes(3), None, begun=False)
    return state, read_folders(photos)[0]


@pytest.mark.parametrize("part", ["network", "average"])
def test_save_refuses_weights_that_are_not_finite(
    make_config: MakeConfig, parts: tuple[RunState, PhotoFolder], part: str
) -> None:
    state, photos = parts
    with RunFolder.open(make_config(ema_decay=0.5), photos, resume=False) as run:
        run.save(state)
        before = {path.name: path.read_bytes() for path in run.path.iterdir()}
        with torch.no_grad():
            next(getattr(state, part).parameters())[0] = float("nan")
        with pytest.raises(TrainingError, match=r"must be finite.*checkpoint is intact"):
            run.save(state)
        assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_restore_brings_everything_back(
    make_config: MakeConfig, photos: Path, parts: tuple[RunState, PhotoFolder]
) -> None:
    config = make_config(ema_decay=0.5)
    state, folder = parts
    state.step, state.loss_sum, state.loss_photos, state.skipped = 3, 0.1 + 0.2, 7, 2
    state.unreadable, state.history = {"train/red/\udcff.png": "no"}, [{"step": 2, "loss": 1 / 3}]
    other, _ = _start(start_fabric(config), dataclasses.replace(config, seed=1), numbered_classes(3), None, begun=False)
    with RunFolder.open(config, folder, resume=False) as run:
        run.save(state)
        run.restore(other)
    got, want = other.to_dict(), state.to_dict()
    assert got.keys() == want.keys()
    for name in ("network", "average"):
        assert all(torch.equal(got[name][key], value) for key, value in want[name].items())
    names = ("step", "loss_sum", "loss_photos", "skipped", "unreadable", "history", "preprocess")
    assert [got[name] for name in names] == [want[name] for name in names]


def test_open_refuses_a_folder_in_use(
    tmp_path: Path, make_config: MakeConfig, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "LOCK_TIMEOUT_S", 0.1)
    folder, _ = read_folders(photos)
    (tmp_path / "run").mkdir()
    with (
        filelock.FileLock(tmp_path / "run" / ".lock", is_singleton=False),
        pytest.raises(TrainingError, match="in which another trains"),
        RunFolder.open(make_config(), folder, resume=True),
    ):
        pass
    with RunFolder.open(make_config(), folder, resume=True):
        pass


def test_open_removes_what_a_killed_save_left(tmp_path: Path, make_config: MakeConfig, photos: Path) -> None:
    (tmp_path / "run").mkdir()
    rest = tmp_path / "run" / ".checkpoint.pt.0123abcd.part"
    rest.touch()
    with RunFolder.open(make_config(), read_folders(photos)[0], resume=True):
        assert not rest.exists()


def test_card_has_a_name_wherever_the_run_lies(
    make_config: MakeConfig, parts: tuple[RunState, PhotoFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state, photos = parts
    names = {out: RunFolder(Path(out), make_config(), photos).card(state).name for out in (".", "/", "a\nb", "x" * 250)}
    assert names == {".": tmp_path.name, "/": "run", "a\nb": "ab", "x" * 250: "x" * 200}


def test_card_claims_no_figures_of_earlier_weights(
    make_config: MakeConfig, parts: tuple[RunState, PhotoFolder]
) -> None:
    state, photos = parts
    run = RunFolder(Path("run"), make_config(), photos)
    state.step, state.history = 4, [{"step": 4, "top1": 0.5}]
    assert run.card(state).measured["top1"] == 0.5
    state.step = 5
    assert run.card(state).measured == {}


def test_fit_removes_caches_that_a_killed_run_left(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "run").mkdir()
    for number in range(3):
        (tmp_path / "run" / f"photos{number}.cache").write_bytes(b"decoded")
    fit(make_config(epochs=1))
    assert not list((tmp_path / "run").glob("photos*.cache"))


def test_fit_says_what_to_lower_where_a_step_does_not_fit_into_memory(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("40 GB")

    monkeypatch.setattr(loop, "update", fail)
    with pytest.raises(TrainingError, match=r"Got batch_size=9, accumulate=1: 40 GB\. Start a new run"):
        fit(make_config(epochs=1))


def test_fit_leaves_opencvs_threads_as_they_were(make_config: MakeConfig) -> None:
    before = cv2.getNumThreads()
    fit(make_config(epochs=1))
    assert cv2.getNumThreads() == before
