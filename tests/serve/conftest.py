"""A service in this process, behind a real socket, with a small model."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from weightnet.serve.limits import Limits
from weightnet.serve.server import Server, listen

PATIENCE_S = 30  # a test that waits longer has failed


@pytest.fixture(scope="session")
def run_folder(make_run) -> Path:
    return make_run(measured={"top1": 0.25})


def photo(seed: int = 0, suffix: str = ".png", size: tuple[int, int] = (60, 48)) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.imencode(suffix, cv2.resize(small, size, interpolation=cv2.INTER_CUBIC))[1].tobytes()


class Running:
    """A service that runs, and ways to talk to it."""

    def __init__(self, server: Server, client: httpx.Client, port: int) -> None:
        self.server = server
        self.service = server.service
        self.client = client
        self.port = port

    def classify(self, body: bytes, **parameters: Any) -> httpx.Response:
        return self.client.post("/v1/classify", content=body, params=parameters)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.005)


@contextmanager
def running(*models: str | Path, wait: bool = True, host: str = "127.0.0.1", **limits: Any) -> Iterator[Running]:
    opened, settled, messages = threading.Event(), threading.Event(), []

    def report(message: str) -> None:
        messages.append(message)
        (opened if message.startswith("listening") else settled).set()

    with listen(host, 0) as listening:
        server = Server(
            [str(model) for model in models], engine="auto", device="auto", limits=Limits(**limits), report=report
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert opened.wait(PATIENCE_S)
            assert not wait or settled.wait(PATIENCE_S)
            with httpx.Client(base_url=messages[0].removeprefix("listening on "), timeout=PATIENCE_S) as client:
                yield Running(server, client, listening.getsockname()[1])
        finally:
            server.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the service does not end"


@pytest.fixture
def start(run_folder) -> Iterator[Callable[..., Running]]:
    """Start a service with limits of its own."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(running(run_folder, **limits))


@pytest.fixture(scope="module")
def service(run_folder) -> Iterator[Running]:
    """A service with the usual limits."""
    with running(run_folder) as started:
        yield started


class Gate:
    """Stands before the network: shut, photos wait there. `fail` is raised in the network's place."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fail: Exception | None = None
        self.nan = False
        self.arrived = 0
        self.batches: list[int] = []

    def run(self, network: Callable[..., dict], x_BCHW: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        self.arrived += len(x_BCHW)
        self.batches.append(len(x_BCHW))
        assert self.open.wait(PATIENCE_S)
        if self.fail is not None:
            raise self.fail
        return {name: array * (np.nan if self.nan else 1) for name, array in network(x_BCHW, names).items()}


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    """Hold what runs through the networks of services that start after this."""
    from weightnet.serve import service as module

    gate, open_engine = Gate(), module.open_engine

    def open_gated(*arguments: Any, **options: Any) -> Any:
        engine = open_engine(*arguments, **options)
        network = engine.run_outputs
        engine.run_outputs = lambda x_BCHW, names: gate.run(network, x_BCHW, names)
        return engine

    monkeypatch.setattr(module, "open_engine", open_gated)
    yield gate
    gate.open.set()


def head(method: str = "POST", path: str = "/v1/classify", **headers: object) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side ends the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        parts.append(b"[reset]")
    return b"".join(parts)


def read_answer(connection: socket.socket) -> tuple[int, Any]:
    """Read one answer with a body in JSON."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, f"the connection ended: {data!r}"
        data += part
    top, body = data.split(b"\r\n\r\n", 1)
    length = next(int(line.split(b":")[1]) for line in top.lower().split(b"\r\n") if b"content-length" in line)
    while len(body) < length:
        body += connection.recv(65536)
    return int(top.split()[1]), json.loads(body)
