"""A training run for a process of its own, which a test starts with `JOB` among the globals and may kill.

JOB: `options` and `network` of the run; `answer`, the file for the outcome; optionally `resume`; `signal`, a (step,
number) to send to itself, and `group` to send it to its workers too; `max_file_bytes`, a (step, size): from there on no
file may be larger.
"""

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Any

import torch

from weightnet.errors import WeightNetError
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.train.config import TrainConfig
from weightnet.train.loop import Progress, fit

JOB: dict[str, Any] = globals()["JOB"]


def report(progress: Progress) -> None:
    if progress.measured is None:
        begin(progress.step)


def begin(step: int) -> None:
    if JOB.get("signal", (None,))[0] == step:
        (os.killpg if JOB.get("group") else os.kill)(os.getpid(), JOB["signal"][1])
    if JOB.get("max_file_bytes", (None,))[0] == step:
        resource.setrlimit(resource.RLIMIT_FSIZE, (JOB["max_file_bytes"][1],) * 2)


os.setsid()
torch.set_num_threads(1)
tiny = NetworkSpec(**JOB["network"])
VARIANTS["tiny"] = dataclasses.replace(VARIANTS["shufflenet_v2_x0_5"], spec=tiny)
begin(0)
try:
    card = fit(TrainConfig(**JOB["options"]), resume=JOB.get("resume", False), report=report)
    outcome = {"measured": dict(card.measured)}
except WeightNetError as error:
    outcome = {"error": type(error).__name__, "message": str(error)}
Path(JOB["answer"]).write_text(json.dumps(outcome))
