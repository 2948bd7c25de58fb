"""The load of benchmarks/serve_load.py: it checks every answer, and the memory that the service takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


def outcomes_of(*arguments: object) -> dict:
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["outcomes"]


@pytest.mark.full
def test_ten_thousand_requests_are_all_answered_in_bounded_memory():
    outcomes = outcomes_of("--requests", 10_000)
    assert outcomes["good: right"] > 4000
    assert sum(outcomes.values()) == 10_000


@pytest.mark.full
def test_crowd_is_answered_or_refused():
    outcomes = outcomes_of("--requests", 3000, "--clients", 200, "--", "--max-requests", 16)
    assert outcomes["good: 429"] > 0
    assert outcomes["good: right"] > 0
