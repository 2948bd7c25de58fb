"""How much the service takes on at once and how long it waits for anybody: every limit in one place."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

from weightnet.errors import UsageError

SLOW_AFTER_S = 1.0  # a body that takes longer keeps no place among the photos in work while it comes
LINGER_S = 2.0  # how long a refused upload is read and thrown away, so that its sender comes to read the refusal
_CEILINGS = {"max_body_mb": 100, "max_megapixels": 50}  # those of the decoder


class RefusedError(Exception):
    """A request that is answered with an error; `text` says what must be different."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes on at once, and how long it waits.

    Args:
        batch_size: Photos that run at once at most; batches have 1, 2, 4, ... photos.
        batch_wait_ms: How long a photo waits for others that are being decoded, in milliseconds.
        max_requests: Photos in work at once, from the request's head to the answer (those whose body takes more than a
            second count again once it has come); more get 429.
        max_connections: Connections at once; more get 429 and are closed.
        max_body_mb: Size of a request's body, at most 100; larger ones get 413.
        max_buffered_mb: Size of all bodies in work together, at least max_body_mb; beyond it requests get 429.
        max_megapixels: Size of a photo, at most 50; larger ones get 422 before they are decoded.
        head_timeout_s: From connecting, or from the last answer, to the end of a request's head; then it is cut off.
        body_timeout_s: From a request's head to the end of its body; then it gets 408.
        answer_timeout_s: From the end of a request's body to its answer; then it gets 504.
        drain_timeout_s: From SIGTERM to the end of the last request; then the rest is cut off.

    Raises:
        UsageError: a limit that is not above 0, or above what the decoder takes; bodies that could never be taken.

    >>> Limits(max_requests=0)
    Traceback (most recent call last):
    weightnet.errors.UsageError: max_requests must be a finite number above 0. Got max_requests=0. Give a larger one.
    """

    batch_size: int = 8
    batch_wait_ms: float = 5.0
    max_requests: int = 64
    max_connections: int = 256
    max_body_mb: int = 20
    max_buffered_mb: int = 256
    max_megapixels: int = 50
    head_timeout_s: float = 10.0
    body_timeout_s: float = 15.0
    answer_timeout_s: float = 30.0
    drain_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be a finite number above 0. Got {name}={value}. Give a larger one.")
            if value > _CEILINGS.get(name, math.inf):
                raise UsageError(
                    f"{name} must be at most {_CEILINGS[name]}, what the decoder takes. Got {name}={value}. Lower it."
                )
        if self.max_buffered_mb < self.max_body_mb:
            raise UsageError(
                "max_buffered_mb must be at least max_body_mb, or a body could never be taken. "
                f"Got max_buffered_mb={self.max_buffered_mb}, max_body_mb={self.max_body_mb}. Change one of them."
            )

    @property
    def max_body_bytes(self) -> int:
        """Size of a request's body."""
        return self.max_body_mb * 10**6


class Admission:
    """Counts the requests in work and the bytes of their bodies, and refuses what is too much. Not for threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.requests = 0
        self.buffered_bytes = 0

    @contextmanager
    def enter(self) -> "Iterator[Ticket]":
        """Admit a request for as long as the context lasts.

        Raises: RefusedError, with status 429, where too many are in work.
        """
        ticket = Ticket(self, self._limits)
        ticket.take_place()
        try:
            yield ticket
        finally:
            ticket.give_place_up()
            self.buffered_bytes -= ticket.held_bytes


class Ticket:
    """An admitted request: whether it has a place among those in work, and how much memory its body takes."""

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self._admission = admission
        self._max_requests = limits.max_requests
        self._max_bytes = limits.max_buffered_mb * 10**6
        self._has_place = False
        self.held_bytes = 0

    def take_place(self) -> None:
        """Take a place, unless it has one; RefusedError, with status 429, where there is none."""
        if self._has_place:
            return
        if self._admission.requests >= self._max_requests:
            raise RefusedError(429, f"{self._max_requests} photos are in work, the most at once. Try again later.")
        self._admission.requests += 1
        self._has_place = True

    def give_place_up(self) -> None:
        """Leave the place to others, if it has one."""
        self._admission.requests -= self._has_place
        self._has_place = False

    def hold(self, more_bytes: int) -> None:
        """Count bytes that came; RefusedError, with status 429, where all bodies together are too large."""
        if self._admission.buffered_bytes + more_bytes > self._max_bytes:
            raise RefusedError(429, "The photos in work take all the memory set aside for them. Try again in a second.")
        self.held_bytes += more_bytes
        self._admission.buffered_bytes += more_bytes
