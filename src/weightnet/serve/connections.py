"""Deadlines and a bound where connections are accepted, before any application sees them: uvicorn has none.

A connection has a time limit from its beginning, or from the end of an answer, to the end of the next request's head;
each of the application's own limits begins there. One that does not read its answers has one too.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from weightnet.serve.limits import LINGER_S, Limits

_REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 57\r\n\r\nToo many connections are open. Try again in a second ...\n"
)


MAX_LINGERING = 64  # refused connections that get an answer; those beyond are closed without


class Connections:
    """Makes the protocol of each connection, and counts those that were refused or cut off."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open = 0
        self.lingering = 0
        self.refused = 0
        self.cut_off = 0

    def __call__(
        self,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """Return the protocol of a new connection; uvicorn calls this as it would call its own class."""
        return _Protocol(self, config, server_state, app_state, _loop)


class _Protocol(H11Protocol):
    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self._all = connections
        self._refused = False
        self._head_deadline: asyncio.TimerHandle | None = None
        self._reading_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._all.open >= self._all.limits.max_connections:
            self._refuse()
        else:
            self._all.open += 1
            self._head_deadline = self._cut_off_in(self._all.limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._refused:
            self._all.lingering -= 1
        else:
            self._all.open -= 1
        for timer in (self._head_deadline, self._reading_deadline):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_deadline = self._cut_off_in(self._all.limits.head_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None

    def _watch(self) -> None:
        """Run the deadline while no request is in work: bytes that trickle in do not move it."""
        in_work = self.cycle is not None and not self.cycle.response_complete
        if in_work and self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        elif not in_work and self._head_deadline is None:
            self._head_deadline = self._cut_off_in(self._all.limits.head_timeout_s)

    def _cut_off_in(self, timeout_s: float) -> asyncio.TimerHandle:
        return self.loop.call_later(timeout_s, self._cut_off)

    def _cut_off(self) -> None:
        self._all.cut_off += 1
        self.transport.abort()

    def _refuse(self) -> None:
        """Answer without reading a request, then wait for a moment: closing at once would destroy the answer."""
        self._refused = True
        self._all.refused += 1
        self._all.lingering += 1
        if self._all.lingering > MAX_LINGERING:
            self.transport.abort()
            return
        self.transport.write(_REFUSAL)
        self.transport.write_eof()
        self._head_deadline = self.loop.call_later(LINGER_S, self.transport.abort)
