"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

os.environ["COLUMNS"] = "100"  # a command of the program keeps the width that it first wrote in


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of ground truth beside the repository; tests that need it are skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the ground truth in ../shared, which is not part of the product")
    return path
