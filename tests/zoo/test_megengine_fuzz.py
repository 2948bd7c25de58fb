"""Mutated checkpoints: whatever the bytes, either a clear error or exactly the arrays that they hold, cheaply."""

import collections
import pickle
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from weightnet.errors import WeightsError
from weightnet.zoo.megengine import DTYPES, read_megengine, write_megengine
from weightnet.zoo.pickle_machine import MAX_OPCODES

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")

DATA = Path(__file__).parents[1] / "data/megengine"
MIB = 1 << 20
# Opcodes and lengths that matter to a pickle reader, whether it knows them or not.
SNIPPETS = [
    bytes([code]) for code in b"(.)012FIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b"
]
SNIPPETS += [bytes([code]) for code in b"\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98"]
SNIPPETS += [b"\xff" * 4, b"\xff" * 8, b"\x7f" * 8, bytes(4), bytes(8), b"\x8c\x01>", b"cos\nsystem\n", b"\x8c\x02O8"]
SNIPPETS += [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n"]


def seeds(folder: Path) -> list[bytes]:
    """Small honest files in every protocol and layout, so that a mutation hits structure more often than data."""
    state = collections.OrderedDict(
        {
            "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
            "conv.bias": np.asfortranarray(np.ones((1, 2, 1, 1), np.float16)),
            "order": np.arange(6, dtype=np.int64).reshape(2, 3).T,
            "flags": np.array(True),
        }
    )
    write_megengine(state, folder / "seed.pkl")
    wrapped = pickle.dumps({"step": 7, "rates": [0.5, None], "state_dict": state}, protocol=4)
    return [pickle.dumps(state, protocol=protocol) for protocol in range(2, 6)] + [
        (folder / "seed.pkl").read_bytes(),
        wrapped,
    ]


def mutations(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield files with one to four random edits each."""
    source = random.Random(seed)
    for _ in range(count):
        data = bytearray(source.choice(files))
        for _ in range(source.choice((1, 1, 2, 4))):
            mutate(data, files, source)
        yield bytes(data)


def mutate(data: bytearray, files: list[bytes], source: random.Random) -> None:
    """Edit at a random place: flip, set, cut, insert, repeat, splice or truncate."""
    start = source.randrange(len(data) + 1)
    stop = min(len(data), start + source.choice((1, 1, 2, 4, 8, 64)))
    other = source.choice(files)
    cut = source.randrange(len(other))
    match source.randrange(8):
        case 0 if start < len(data):
            data[start] ^= 1 << source.randrange(8)
        case 1 if start < len(data):
            data[start] = source.randrange(256)
        case 2:
            del data[start:stop]
        case 3:
            data[start:start] = source.choice(SNIPPETS)
        case 4:
            snippet = source.choice(SNIPPETS)
            data[start : start + len(snippet)] = snippet
        case 5:
            data[start:start] = data[start:stop] * source.choice((1, 2, 50))
        case 6:
            data[start:] = other[cut:]
        case 7 if source.random() < 0.2:
            del data[start:]


def assert_reads_or_refuses(data: bytes) -> bool:
    """The one property of this file; tells whether the file was read."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    state, message = {}, ""
    try:
        state = read_megengine(data)
    except WeightsError as error:
        message = str(error)
    cpu_s = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    assert cpu_s < 1 + len(data) / 1e5, data
    assert peak < MIB + 20 * len(data) + 200 * min(len(data), MAX_OPCODES), data
    assert message.isprintable(), data
    assert len(message) < 700, data
    assert bool(message) != bool(state), data
    assert type(state) is dict, data
    assert sum(array.nbytes for array in state.values()) <= len(data), data
    for name, array in state.items():
        assert type(name) is str, data
        assert type(array) is np.ndarray, data
        assert array.dtype in DTYPES.values(), data
        assert array.flags.owndata, data
        assert array.flags.c_contiguous, data
    if state:
        assert_equals_unpickling(state, data)
    return bool(state)


def assert_equals_unpickling(state: dict[str, np.ndarray], data: bytes) -> None:
    """Python's unpickler gives the same arrays. It is safe here: the reader has refused all other globals."""
    try:
        unpickled = pickle.loads(data)
    except TypeError as error:  # a dtype that no array uses, and that the reader therefore never looked at
        assert "not understood" in str(error), data  # noqa: PT017
        return
    if isinstance(unpickled.get("state_dict"), dict):
        unpickled = unpickled["state_dict"]
    assert list(unpickled) == list(state), data
    for name, array in state.items():
        assert unpickled[name].dtype == array.dtype, data
        assert unpickled[name].shape == array.shape, data
        assert unpickled[name].tobytes() == array.tobytes(), data


@pytest.fixture
def traced_memory() -> Iterator[None]:
    """Count allocations during a test."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced_memory")
def test_read_megengine_reads_or_refuses_500_mutated_files(tmp_path: Path) -> None:
    read = sum(map(assert_reads_or_refuses, mutations(seeds(tmp_path), 500, seed=1)))
    assert 25 <= read <= 475  # the mutations neither spare all files nor break them all


@pytest.mark.full
@pytest.mark.usefixtures("traced_memory")
@pytest.mark.parametrize("seed", range(10))
def test_read_megengine_reads_or_refuses_20000_mutated_files(seed: int, tmp_path: Path) -> None:
    read = sum(map(assert_reads_or_refuses, mutations(seeds(tmp_path), 2_000, seed=100 + seed)))
    assert 100 <= read <= 1_900


@pytest.mark.full
@pytest.mark.usefixtures("traced_memory")
@pytest.mark.parametrize("name", ["tiny.pkl", "tiny_mge051_py38.pkl", "tiny_mge051_py38_keepvar.pkl"])
def test_read_megengine_reads_or_refuses_mutated_real_files(name: str) -> None:
    for data in mutations([(DATA / name).read_bytes()], 300, seed=5):
        assert_reads_or_refuses(data)


@pytest.mark.usefixtures("traced_memory")
def test_read_megengine_reads_or_refuses_random_opcodes() -> None:
    source = random.Random(9)
    for _ in range(2_000):
        body = b"".join(source.choice(SNIPPETS) for _ in range(source.randrange(40)))
        assert_reads_or_refuses(b"\x80\x04" + body + b".")
