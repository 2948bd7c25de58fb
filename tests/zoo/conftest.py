"""A tiny network of the original, and a server on this machine that does all that servers do wrong."""

import hashlib
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo import hub
from weightnet.zoo.cards import Card
from weightnet.zoo.megengine import read_megengine, to_torch_layout

TINY = Path(__file__).parents[1] / "data/megengine/tiny.pkl"
TINY_RAW = TINY.with_name("tiny_rawcal.pkl")
TINY_SPEC = NetworkSpec((16, 32, 64), 2, 2, stage_repeats=(2, 3, 2), stem_channels=8, head_channels=96, num_classes=10)
TINY_CARD = Card("tiny", TINY_SPEC, tuple(ClassLabel(f"thing {i}") for i in range(10)), Preprocess(resize=64, crop=48))

Tensors = dict[str, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    """The weights of tiny.pkl, to be spoilt."""
    return {name: torch.from_numpy(array) for name, array in to_torch_layout(read_megengine(TINY)).items()}


def save_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server:
    """A server on the loopback interface that gives its `answers` one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [whole]
        self.requests: list[str] = []
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                answer(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/weights.bin"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reply(body: bytes = BODY, status: int = 200, length: int | str | None = len(BODY), **headers: str) -> Answer:
    """An answer of this body, which claims to have this length."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def redirect(target: str) -> Answer:
    return reply(b"", 302, 0, Location=target)


def stall(server: Server) -> Answer:
    """Half of the file, then nothing until the test is over."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        reply(BODY[: len(BODY) // 2])(handler)
        handler.wfile.flush()
        server.release.wait(10)

    return answer


whole = reply()
truncated = reply(BODY[:100_000])
broken = reply(b"try later", 503, 9)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test; retries do not wait."""
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hub, "BACKOFF_S", 0.001)
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    """What lies in the cache but for locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")
