"""The process: a socket, an event loop, and an end that finishes what was begun."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn

from weightnet.errors import UsageError
from weightnet.serve.app import create_app
from weightnet.serve.connections import Connections
from weightnet.serve.limits import Limits
from weightnet.serve.metrics import Metrics
from weightnet.serve.service import Service

_BACKLOG = 256
_MAX_HEAD_BYTES = 16_384
_NEVER_S = 1_000_000  # uvicorn's own limit on idle connections, which bytes that trickle in reset; ours takes its place


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "auto",
    device: str = "auto",
    limits: Limits | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> None:
    """Serve models over HTTP in this process, until SIGTERM or SIGINT; what is in work then is finished.

    Args:
        models: names as `Classifier` takes them; the first answers requests that name none.
        host: the address to listen on.
        port: the port to listen on, 0 for a free one.
        engine: what runs the networks, as `Classifier` has it.
        device: where they run, as `Classifier` has it.
        limits: what the service takes on; None takes the defaults.
        report: called with the address when it is open, and when the models are loaded.

    Raises:
        UsageError: an impossible host, port, engine or device.
        UnknownModelError, WeightsError, DownloadError, MissingDependencyError: as `Classifier`; the port is open by
            then, and is closed again.
        OSError: the address is taken or not of this machine.
    """
    limits = limits or Limits()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each bad form, whose sender is told
    with listen(host, port) as listening:
        server = Server(models, engine=engine, device=device, limits=limits, report=report)
        server.run([listening])
    if server.service.failure is not None:
        raise server.service.failure


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, and takes connections once the server runs."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port must be 0 (any free one) to 65535. Got port={port}. Choose another one.")
    if not _may_be_host(host):
        raise UsageError(
            f"host must be a name or an address of this machine. Got host={host!r}. "
            "Use 127.0.0.1, or 0.0.0.0 for all addresses."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def _may_be_host(text: str) -> bool:
    try:
        return bool(text.encode("idna"))  # the system would take an empty one for all addresses
    except UnicodeError:
        return False


class Server(uvicorn.Server):
    """uvicorn's server with our application, limits and signals."""

    def __init__(
        self,
        models: Sequence[str],
        *,
        engine: str,
        device: str,
        limits: Limits,
        report: Callable[[str], None],
    ) -> None:
        self.service = Service(models, engine=engine, device=device, limits=limits)
        self.service.on_ready = lambda: report(f"ready: {', '.join(self.service.names)}")
        self.service.on_failure = self._fail
        self._report = report
        connections = Connections(limits)
        config = uvicorn.Config(
            create_app(self.service, Metrics(self.service, connections)),
            loop="asyncio",
            http=connections,  # type: ignore[arg-type]  # it is only called
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=_NEVER_S,
            timeout_graceful_shutdown=limits.drain_timeout_s,  # type: ignore[arg-type]  # it takes fractions
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the address, and say so."""
        await super().startup(sockets)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            self._report(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    def stop(self) -> None:
        """Refuse new work, finish what is in work, and end; may be called from any thread."""
        self.service.drain()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in an orderly way; a second SIGINT cuts off what is in work, and while loading there is none."""
        if self.service.state == "loading":  # a download in a thread would hold the process for minutes
            os._exit(0)
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs. Unlike uvicorn's own, this does not die of them once all is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fail(self) -> None:
        self.should_exit = True
