"""On Ray a run gives the rows of the local one, also when a worker dies. Needs Ray: pip install 'weightnet[ray]'."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weightnet.errors import MissingDependencyError

from .conftest import png, rows_of

PATIENCE_S = 120
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


def test_runner_ray_without_ray_says_what_to_install(bulk, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'weightnet\[ray\]'"):
        bulk(runner="ray", workers=2)


def _status(pid: int) -> tuple[str, int]:
    """Return the command and the parent of a process."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        return command, int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):  # it has just ended
        return "", 0


def _actors(driver: int) -> list[int]:
    """Return the processes of the actors that a run began."""
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        command, parent = _status(pid)
        while command.startswith("ray::") and "_Actor" in command and parent > 1:
            if parent == driver:
                found.append(pid)
                break
            parent = _status(parent)[1]
    return found


@needs_ray
@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_run_on_two_workers_of_which_one_is_killed_gives_the_rows_of_the_local_run(bulk, model, tmp_path):
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{seed:04d}.png" for seed in range(400)]
    for seed, path in enumerate(paths):
        path.write_bytes(b"hello" if seed % 50 == 7 else png(seed))
    options = ["--model", model, "--device", "cpu", "--format", "jsonl", "--rows-per-file", "4"]
    out = tmp_path / "ray"
    command = [
        sys.executable,
        "-m",
        "weightnet",
        "classify-many",
        str(tmp_path / "photos"),
        "--out",
        str(out),
        *options,
    ]
    process = subprocess.Popen(
        [*command, "--runner", "ray", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    given_up_at = time.monotonic() + PATIENCE_S
    while len(list(out.glob("part-*"))) < 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < given_up_at
        time.sleep(0.01)
    actors = _actors(process.pid)
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    assert len(list(out.glob("part-*"))) < 100, "the run was over before the kill"
    printed, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, said
    assert printed == "images 400, ok 392, errors 8, partitions 100\n"

    bulk(format="jsonl", out=str(tmp_path / "local"))
    assert [row["path"] for row in rows_of(out)] == list(map(str, paths))
    for here, there in zip(sorted((tmp_path / "local").glob("part-*")), sorted(out.glob("part-*")), strict=True):
        assert here.read_bytes() == there.read_bytes()
