"""Processes that share one piece of work after the other, while the one that asks waits.

Threads would share one interpreter: work of many short calls, each of which gives it up and wants it back, is no faster
in two of them than in one. A data loader's processes work beside the one that asks, and take its cores.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from weightnet.errors import TrainingError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def may_fork() -> bool:
    """Whether a ForkedPool can be made here: on Linux, and not by a process that may have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


class ForkedPool(Generic[Item, Answer]):
    """Copies of this process that do some work; they end with the pool, and with this process however it ends.

    Args:
        work: makes an answer of an item; answers and what it raises are sent back by pickle.
        processes: how many copies.

    Example:
        >>> pool = ForkedPool(abs, 2)
        >>> pool.map([-3, -2, -1])
        [3, 2, 1]
        >>> pool.close()
    """

    def __init__(self, work: Callable[[Item], Answer], processes: int) -> None:
        self._pipes: list[Connection] = []
        ends: list[tuple[Connection, BaseProcess]] = []
        self.close = multiprocessing.util.Finalize(self, _end, (ends,), exitpriority=0)  # before it waits for children
        context = multiprocessing.get_context("fork")
        for _ in range(processes):
            pipe, theirs = context.Pipe()
            self._pipes.append(pipe)
            process = context.Process(target=_answer, args=(theirs, work, tuple(self._pipes)), daemon=True)
            process.start()
            theirs.close()
            ends.append((pipe, process))

    def map(self, items: Sequence[Item]) -> list[Answer]:
        """Return the answers to items, in their order.

        Raises: what the work raises; TrainingError where a process has ended.
        """
        count = len(self._pipes)
        try:
            for place, pipe in enumerate(self._pipes):
                pipe.send(items[len(items) * place // count : len(items) * (place + 1) // count])
            parts = [pipe.recv() for pipe in self._pipes]
        except (OSError, EOFError) as error:
            self.close()
            raise TrainingError(
                "The processes that load photos must live as long as the run. Got one that has ended, perhaps for lack "
                "of memory. Close other programs, or lower batch_size, and go on with resume."
            ) from error
        except BaseException:  # interrupted: answers that nobody waits for must not be taken for the next ones
            self.close()
            raise
        for part in parts:
            if isinstance(part, Exception):
                raise part
        return [answer for part in parts for answer in part]


def _end(ends: list[tuple[Connection, BaseProcess]]) -> None:
    for pipe, process in ends:
        pipe.close()
        process.kill()  # it has nothing to lose
        process.join()


def _answer(pipe: Connection, work: Callable[[Any], Any], others: tuple[Connection, ...]) -> None:
    """Answer until the other end of the pipe is closed, as it is too where the process that holds it is killed."""
    for other in others:  # copies of that end and its like: while one is open anywhere, the pipe is
        other.close()
    # A signal to the whole process group is for the process that asks.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, EOFError):
        while True:
            items = pipe.recv()
            try:
                answers: Any = [work(item) for item in items]
            except Exception as error:
                answers = error
            pipe.send(answers)
