"""A run on two processes, under torchrun, against one process that takes the same two halves of each batch in turn."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from weightnet.errors import UsageError
from weightnet.train.config import TrainConfig
from weightnet.train.loop import fit

from .conftest import TINY, MakeConfig

SCRIPT = """
import ast, dataclasses, sys
import torch
from weightnet.cli import main
from weightnet.nn.variants import VARIANTS, NetworkSpec

torch.set_num_threads(1)
spec = NetworkSpec(**ast.literal_eval(sys.argv[1]))
VARIANTS["tiny"] = dataclasses.replace(VARIANTS["shufflenet_v2_x0_5"], spec=spec)
sys.exit(main(sys.argv[2:]))
"""


def torchrun(config: TrainConfig, tmp_path: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    script, file = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    file.write_text(
        json.dumps({name: value for name, value in dataclasses.asdict(config).items() if value is not None})
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = [repr(dataclasses.asdict(TINY)), "train", "--config", str(file), *more]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


def parameters_of(run: Path) -> dict[str, Any]:
    network = torch.load(run / "checkpoint.pt", weights_only=True)["network"]
    return {name: value for name, value in network.items() if "running" not in name and "tracked" not in name}


@pytest.mark.full
def test_two_processes_learn_as_one_that_accumulates(tmp_path: Path, make_config: MakeConfig) -> None:
    options: dict[str, Any] = {"batch_size": 12, "cache": 64, "learning_rate": 0.5}
    options |= {"epochs": 3, "mixup": 0.2, "evaluate_every": 3}
    fit(make_config(out=str(tmp_path / "one"), accumulate=2, **options))
    done = torchrun(make_config(out=str(tmp_path / "two"), **options), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one process speaks for both
    one, two = parameters_of(tmp_path / "one"), parameters_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.suffix in {".cache", ".part"}) == []


@pytest.mark.full
def test_two_processes_list_the_unreadable_photos_of_both(
    tmp_path: Path, make_config: MakeConfig, own_photos: Path
) -> None:
    names = [f"{colour}/{number}.png" for colour in ("blue", "red") for number in range(6)]
    for name in names:
        (own_photos / "train" / name).write_bytes(b"no photo")
    options: dict[str, Any] = {"data": str(own_photos), "batch_size": 12, "workers": None, "learning_rate": 0.1}
    done = torchrun(make_config(**options), tmp_path)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "run" / "unreadable.csv").read_text()
    assert all(name in listed for name in names)


def test_fit_refuses_a_batch_that_the_processes_cannot_share(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"multiple of the number of processes, with 2 photos for each.*9 for 4"):
        fit(make_config(batch_size=9))
    with pytest.raises(UsageError, match=r"with 4 photos for each.*batch_size=8 for 4"):
        fit(make_config(batch_size=8, accumulate=2))
