"""Memory that a step frees stays with the process."""

import ctypes
import platform
import subprocess
import sys

import pytest

from weightnet.train.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import numpy as np
from weightnet.train.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [np.ones(2**24, np.uint8) for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("given back", "kept")
    }
    assert faults["kept"] < 100 < faults["given back"]


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_other_c_libraries_change_nothing(monkeypatch: pytest.MonkeyPatch, missing: type[Exception]) -> None:
    class Library:
        def __init__(self, name: None) -> None:
            if missing is not AttributeError:
                raise missing

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert not keep_freed_memory()
