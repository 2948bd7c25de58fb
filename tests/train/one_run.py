"""A training run for a process of its own, which a test starts with `JOB` among the globals and may kill.

JOB: `options` and `network` of the run; `answer`, the file for the outcome; optionally `resume`; `signal`, a (step,
number) to send to itself, and `group` to send it to its workers too; `max_file_bytes`, a (step, size): from there on no
file may be larger.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import torch

from weightnet.errors import WeightNetError
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.train.config import TrainConfig
from weightnet.train.loop import Progress, fit


def begin(job: dict[str, Any], step: int) -> None:
    """Do what the job asks for at a step."""
    if job.get("signal", (None,))[0] == step:
        (os.killpg if job.get("group") else os.kill)(os.getpid(), job["signal"][1])
    if job.get("max_file_bytes", (None,))[0] == step:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"][1],) * 2)


def main(job: dict[str, Any]) -> None:
    """Run the job."""
    os.setsid()
    # As in a process of its own: from the server that this one was forked from, workers would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    tiny = NetworkSpec(**job["network"])
    VARIANTS["tiny"] = dataclasses.replace(VARIANTS["shufflenet_v2_x0_5"], spec=tiny)
    begin(job, 0)

    def report(progress: Progress) -> None:
        if progress.measured is None:
            begin(job, progress.step)

    try:
        card = fit(TrainConfig(**job["options"]), resume=job.get("resume", False), report=report)
        outcome: dict[str, Any] = {"measured": dict(card.measured)}
    except WeightNetError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    Path(job["answer"]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(globals()["JOB"])
