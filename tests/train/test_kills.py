"""Runs in processes of their own, which are killed, interrupted and denied disk space."""

import dataclasses
import json
import multiprocessing
import runpy
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weightnet
from weightnet.train.config import TrainConfig

from .conftest import TINY, MakeConfig, log_of, weights_of

SCRIPT = str(Path(__file__).with_name("one_run.py"))
KILLS = 20


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """A function that starts a run in a process of its own, forked from one that has all imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightnet.train.loop", "lightning_fabric"])
    started: list[ForkServerProcess] = []

    def start(config: TrainConfig, **job: Any) -> ForkServerProcess:
        (tmp_path / "answer.json").unlink(missing_ok=True)
        more = {"options": dataclasses.asdict(config), "network": dataclasses.asdict(TINY)}
        job |= {"answer": str(tmp_path / "answer.json"), **more}
        process = context.Process(target=runpy.run_path, args=(SCRIPT, {"JOB": job}, "__main__"))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def outcome_of(process: ForkServerProcess, tmp_path: Path) -> dict[str, Any]:
    process.join(120)
    assert process.exitcode == 0
    outcome: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
    return outcome


def assert_same_run(run: Path, whole: Path) -> None:
    assert weights_of(run) == weights_of(whole)
    assert log_of(run) == log_of(whole)
    got, want = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, whole))
    for part in ("network", "average") if "average" in want else ("network",):
        assert all(torch.equal(got[part][name], value) for name, value in want[part].items())
    for mine, other in zip(got["optimizer"]["state"].values(), want["optimizer"]["state"].values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], other["momentum_buffer"])


@pytest.mark.parametrize("workers", [None, 1])
def test_fit_killed_with_workers_and_cache_ends_the_same(
    tmp_path: Path, make_config: MakeConfig, start: Any, workers: int | None
) -> None:
    """The run alone is killed: its worker lives on, by itself for some seconds, and holds the folder's lock."""
    config = make_config(ema_decay=0.9, workers=workers, cache=64, checkpoint_minutes=0.0)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), workers=0)
    assert "measured" in outcome_of(start(whole), tmp_path)
    killed = start(config, signal=(6, signal.SIGKILL))
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "photos0.cache").exists()
    assert "measured" in outcome_of(start(config, resume=True), tmp_path)
    assert not (tmp_path / "run" / "photos0.cache").exists()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fit_saves_when_the_whole_process_group_is_signalled(
    tmp_path: Path, make_config: MakeConfig, start: Any, number: int, workers: int | None
) -> None:
    outcome = outcome_of(start(make_config(workers=workers), signal=(3, number), group=True), tmp_path)
    assert outcome["error"] == "TrainingError"
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {saved} and saved" in outcome["message"]
    assert saved in (3, 4)  # a signal to a group may come a moment later


def test_fit_says_that_files_cannot_grow_before_it_trains(tmp_path: Path, make_config: MakeConfig, start: Any) -> None:
    outcome = outcome_of(start(make_config(), max_file_bytes=(0, 10_000)), tmp_path)
    assert outcome["error"] == "TrainingError"
    assert "File too large" in outcome["message"]
    assert not list((tmp_path / "run").glob(".*.part"))


def test_fit_keeps_its_last_checkpoint_where_files_cannot_grow(
    tmp_path: Path, make_config: MakeConfig, start: Any
) -> None:
    config = make_config(ema_decay=0.9)
    assert "measured" in outcome_of(start(dataclasses.replace(config, out=str(tmp_path / "whole"))), tmp_path)
    # More than the weights, which are written first, and less than the checkpoint.
    outcome = outcome_of(start(config, max_file_bytes=(5, len(weights_of(tmp_path / "whole")) + 1)), tmp_path)
    assert outcome["error"] == "TrainingError"
    assert "The last checkpoint is intact" in outcome["message"]
    weightnet.load(str(tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert "measured" in outcome_of(start(config, resume=True), tmp_path)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize(("ema_decay", "workers"), [(0.0, 0), (0.9, None)])
def test_fit_killed_at_random_ends_the_same(
    tmp_path: Path, make_config: MakeConfig, start: Any, ema_decay: float, workers: int | None
) -> None:
    config = make_config(epochs=40, evaluate_every=3, ema_decay=ema_decay, workers=workers, checkpoint_minutes=0.0)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), checkpoint_minutes=10.0)
    began = time.monotonic()
    assert "measured" in outcome_of(start(whole), tmp_path)
    patience_s = (time.monotonic() - began) / KILLS
    rng = np.random.default_rng()
    steps: list[int] = []
    for _ in range(KILLS):
        process = start(config, resume=True)
        process.join(rng.uniform(0, 2 * patience_s))
        process.kill()
        process.join()
        if (tmp_path / "run" / "checkpoint.pt").exists():
            weightnet.load(str(tmp_path / "run"))
            steps.append(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"])
    assert "measured" in outcome_of(start(config, resume=True), tmp_path)
    assert len(set(steps)) > 5, steps  # the kills were spread over the run
    assert_same_run(tmp_path / "run", tmp_path / "whole")
