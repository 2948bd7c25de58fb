"""Forked processes share work: answers in order, errors as they were, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.errors import ImageError, TrainingError
from weightnet.train.pool import ForkedPool, may_fork

pytestmark = pytest.mark.skipif(not may_fork(), reason="processes are forked on Linux only")


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


@settings(deadline=None, max_examples=20)
@given(rounds=st.lists(st.lists(st.integers(), max_size=7), max_size=3), processes=st.integers(1, 4))
def test_map_is_a_plain_map(rounds: list[list[int]], processes: int) -> None:
    pool: ForkedPool[int, str] = ForkedPool(str, processes)
    assert [pool.map(items) for items in rounds] == [[str(item) for item in items] for items in rounds]
    pool.close()


def test_map_shares_its_items_among_processes() -> None:
    pool: ForkedPool[int, int] = ForkedPool(lambda _: os.getpid(), 3)
    workers = pool.map([0] * 6)
    assert workers == [workers[0]] * 2 + [workers[2]] * 2 + [workers[4]] * 2
    assert len({*workers, os.getpid()}) == 4
    pool.close()
    assert not any(running(worker) for worker in workers)


def test_map_raises_what_the_work_raises_and_goes_on() -> None:
    def refuse_odd(number: int) -> int:
        if number % 2:
            raise ImageError(f"odd: {number}")
        return number

    pool = ForkedPool(refuse_odd, 2)
    with pytest.raises(ImageError, match="odd: 3"):
        pool.map([0, 2, 4, 3])
    assert pool.map([2, 4]) == [2, 4]
    pool.close()


def test_map_says_that_a_process_has_ended() -> None:
    pool: ForkedPool[int, int] = ForkedPool(lambda _: os.getpid(), 2)
    first, second = pool.map([0, 0])
    os.kill(first, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(TrainingError, match="Got one that has ended"):
            pool.map([0, 0])
    assert not running(second)


def test_map_interrupted_ends_the_pool() -> None:
    """Or else the next call would get the answers of this one."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    pool = ForkedPool(time.sleep, 2)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        pool.map([60.0, 60.0])
    signal.signal(signal.SIGALRM, before)
    with pytest.raises(TrainingError):
        pool.map([0.0])


def test_pool_that_is_forgotten_leaves_no_process() -> None:
    pool: ForkedPool[int, int] = ForkedPool(lambda _: os.getpid(), 2)
    workers = pool.map([0, 0])
    del pool
    assert not any(running(worker) for worker in workers)


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)", "os.killpg(os.getpgid(0), 15)", "raise SystemExit"])
def test_pool_ends_with_its_process(end: str) -> None:
    code = (
        "import os\nfrom weightnet.train.pool import ForkedPool\n"
        f"pool = ForkedPool(lambda _: os.getpid(), 2)\nprint(*pool.map([0, 0]), flush=True)\n{end}"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )
    assert answer.stderr == ""
    first, second = map(int, answer.stdout.split())
    wait_until(lambda: not running(first) and not running(second))


def test_pool_outlives_a_signal_to_the_whole_group() -> None:
    pool: ForkedPool[int, int] = ForkedPool(lambda _: os.getpid(), 2)
    workers = pool.map([0, 0])
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert pool.map([0, 0]) == workers
    pool.close()


def test_may_fork_not_in_a_process_that_may_have_no_children() -> None:
    code = (
        "import multiprocessing\nfrom weightnet.train.pool import may_fork\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n    print(may_fork(), pool.apply(may_fork))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.split() == ["True", "False"]
