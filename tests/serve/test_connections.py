"""Clients that are slow, lie, go away or come in crowds. Each of them costs its own connection and nobody else's."""

import socket
import struct
import threading
import time
from contextlib import ExitStack, closing

import pytest

from .conftest import PATIENCE_S, Running, head, photo, read_all, read_answer

BRIEF_S = 0.3


def dribble(connection: socket.socket, data: bytes, stop: threading.Event) -> None:
    """Send a byte now and then until told to stop, or until the other side ends it."""
    for byte in data:
        if stop.wait(BRIEF_S / 10):
            return
        try:
            connection.send(bytes([byte]))
        except OSError:
            return


class Dribbling:
    """Sends a byte now and then while the context lasts."""

    def __init__(self, connection: socket.socket, data: bytes) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=dribble, args=(connection, data, self._stop))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)


@pytest.fixture
def brief(start) -> Running:
    """A service of little patience."""
    return start(head_timeout_s=BRIEF_S, body_timeout_s=BRIEF_S)


def test_silent_client_is_cut_off(brief):
    with brief.connect() as connection:
        assert read_all(connection) == b""
    assert brief.metric("weightnet_connections_cut_off ") == 1


def test_dribbled_head_is_cut_off(brief):
    with brief.connect() as connection, Dribbling(connection, head("GET", "/healthz", X="a" * 200)):
        begun = time.monotonic()
        assert read_all(connection) in (b"", b"[reset]")
    assert time.monotonic() - begun < 10 * BRIEF_S


def test_idle_connection_is_cut_off_after_an_answer_even_if_it_dribbles(brief):
    with brief.connect() as connection:
        connection.sendall(head("GET", "/healthz"))
        assert read_answer(connection) == (200, {"status": "ok"})
        with Dribbling(connection, head("GET", "/healthz", X="a" * 200)):
            assert read_all(connection) in (b"", b"[reset]")


def test_connection_serves_many_requests_in_a_row(start):
    service = start(head_timeout_s=1.2)
    with service.connect() as connection:
        data = photo()
        request = head(Content_Length=len(data)) + data
        for _ in range(3):
            time.sleep(0.5)
            connection.sendall(request)
            assert read_answer(connection)[0] == 200
    assert service.metric("weightnet_connections_cut_off ") == 0


def test_slow_answer_is_not_cut_off_by_the_deadline_for_heads(gate, start):
    service = start(head_timeout_s=BRIEF_S)
    gate.open.clear()
    with service.connect() as connection:
        data = photo()
        connection.sendall(head(Content_Length=len(data)) + data)
        time.sleep(2 * BRIEF_S)
        gate.open.set()
        assert read_answer(connection)[0] == 200


def test_dribbled_body_gets_408(brief):
    with brief.connect() as connection:
        connection.sendall(head(Content_Length=10_000))
        with Dribbling(connection, b"a" * 10_000):
            status, row = read_answer(connection)
    assert (status, "within 0.3 s" in row["error"]) == (408, True)
    brief.until(lambda: brief.service.admission.requests == 0)


def test_body_shorter_than_it_says_gets_408(brief):
    data = photo()
    with brief.connect() as connection:
        connection.sendall(head(Content_Length=len(data) + 1) + data)
        assert read_answer(connection)[0] == 408


def test_body_longer_than_it_says_is_not_taken_for_a_second_photo(brief):
    data = photo()
    with brief.connect() as connection:
        connection.sendall(head(Content_Length=len(data)) + data + b"more\r\n\r\n")
        answers = read_all(connection)
    assert [answers.count(b"HTTP/1.1 %d " % status) for status in (200, 400)] == [1, 1]


def test_body_that_says_it_is_huge_gets_413_at_once(start):
    service = start(max_body_mb=1)
    for length in (10**6 + 1, 10**15):
        with service.connect() as connection:
            connection.sendall(head(Content_Length=length))
            status, row = read_answer(connection)
            assert (status, "at most 1 MB" in row["error"]) == (413, True)


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 25, "5, 6"])
def test_impossible_content_length_gets_400(service, length):
    with service.connect() as connection:
        connection.sendall(head(Content_Length=length))
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_chunked_body_gets_413_once_it_is_too_large(start):
    service = start(max_body_mb=1)

    def chunks():
        for _ in range(40):
            yield b"a" * 100_000

    answer = service.client.post("/v1/classify", content=chunks())
    assert answer.status_code == 413
    service.until(lambda: service.service.admission.buffered_bytes == 0)
    answer = service.client.post("/v1/classify", content=iter([photo()[:50], photo()[50:]]))
    assert answer.status_code == 200


def test_refused_upload_is_read_on_so_that_the_refusal_arrives(start):
    service = start(max_body_mb=1)
    body = b"a" * 8_000_000  # more than the system's buffers hold
    for headers in ({}, {"Connection": "close"}):
        with service.connect() as connection:
            connection.sendall(head(Content_Length=len(body), **headers) + body)
            assert read_answer(connection)[0] == 413
    assert service.client.post("/v1/classify", content=body).headers["connection"] == "close"
    with service.connect() as connection:  # one that never ends is ended
        connection.sendall(head(Content_Length=10**9))
        assert read_answer(connection)[0] == 413
        with Dribbling(connection, b"a" * 10_000):
            assert read_all(connection) in (b"", b"[reset]")


def test_overlong_head_gets_400(service):
    with service.connect() as connection:
        connection.sendall(head(X="a" * 100_000)[:40_000])
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\0\x01\0", b"hello", b"\0" * 100, b"GET / HTTP/9.x"],
    ids=["TLS", "text", "zeros", "version"],
)
def test_what_is_not_http_gets_400(service, data):
    with service.connect() as connection:
        connection.sendall(data + b"\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")
    assert service.client.get("/healthz").status_code == 200


def reset(connection: socket.socket) -> None:
    """Go away as a process does that is killed: without a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_client_that_leaves_amid_its_body_frees_its_place(start, leave, monkeypatch):
    monkeypatch.setattr("weightnet.serve.body.SLOW_AFTER_S", PATIENCE_S)
    service = start(max_requests=1)
    connection = service.connect()
    connection.sendall(head(Content_Length=10_000) + b"a" * 5000)
    service.until(lambda: service.service.admission.buffered_bytes == 5000)
    assert service.classify(photo()).status_code == 429
    leave(connection)
    service.until(lambda: service.service.admission.requests == 0)
    assert service.service.admission.buffered_bytes == 0
    assert service.classify(photo()).status_code == 200


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_client_that_leaves_before_its_answer_frees_its_place(gate, start, leave):
    service = start(max_requests=1)
    gate.open.clear()
    connection, data, before = service.connect(), photo(), gate.arrived
    connection.sendall(head(Content_Length=len(data)) + data)
    service.until(lambda: gate.arrived == before + 1)
    leave(connection)
    service.until(lambda: service.service.admission.requests == 0)
    gate.open.set()
    assert service.classify(photo()).status_code == 200


def test_connections_beyond_the_bound_are_refused_and_others_go_on(start):
    service = start(max_connections=3)
    assert service.client.get("/healthz").status_code == 200  # its connection stays open: one
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()) for _ in range(2)]
        service.until(lambda: service.metric("weightnet_connections ") == 3)
        refused = stack.enter_context(service.connect())  # it stays open on this side, and takes nobody's place there
        refused.sendall(head("GET", "/healthz"))
        answer = read_all(refused)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 1\r\n" in answer
        assert service.classify(photo()).status_code == 200
        silent[0].close()
        service.until(lambda: service.metric("weightnet_connections ") == 2)
        with service.connect() as connection:
            connection.sendall(head("GET", "/healthz"))
            assert read_answer(connection)[0] == 200


def test_crowd_of_connections_is_not_answered_one_by_one(start, monkeypatch):
    monkeypatch.setattr("weightnet.serve.connections.MAX_LINGERING", 2)
    service = start(max_connections=2)
    with ExitStack() as stack:
        crowd = [stack.enter_context(service.connect()) for _ in range(8)]
        answers = [read_all(connection) for connection in crowd[4:]]
    assert set(answers) <= {b"", b"[reset]"}
    service.until(lambda: service.classify(photo()).status_code == 200)


def test_client_that_does_not_read_its_answers_is_cut_off(start):
    service = start(head_timeout_s=BRIEF_S)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", service.port))
        request = head("GET", "/openapi.json") * 100
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(request * 1000)
    assert service.client.get("/healthz").status_code == 200


def test_slow_clients_do_not_keep_others_waiting(start):
    service = start(max_connections=300, max_requests=10)
    with ExitStack() as stack:
        for number in range(100):
            connection = stack.enter_context(service.connect())
            connection.sendall(head(Content_Length=10_000) + b"a" if number % 2 else head()[:20])
        service.until(lambda: service.classify(photo()).status_code == 200)
        begun = time.monotonic()
        assert service.classify(photo()).status_code == 200
        assert time.monotonic() - begun < 2
        assert service.metric("weightnet_connections ") > 60


def test_slow_body_counts_again_once_it_has_come(gate, start, monkeypatch):
    monkeypatch.setattr("weightnet.serve.body.SLOW_AFTER_S", 0.05)
    service, data = start(max_requests=1), photo()
    with service.connect() as slow, service.connect() as quick, service.connect() as late:
        slow.sendall(head(Content_Length=len(data)) + data[:-1])
        service.until(lambda: service.service.admission.buffered_bytes > 0 == service.service.admission.requests)
        gate.open.clear()
        quick.sendall(head(Content_Length=len(data)) + data)
        service.until(lambda: service.service.admission.requests == 1)
        slow.sendall(data[-1:])
        assert read_answer(slow)[0] == 429
        gate.open.set()
        assert read_answer(quick)[0] == 200
        late.sendall(head(Content_Length=len(data)) + data[:-1])
        service.until(lambda: service.service.admission.buffered_bytes > 0 == service.service.admission.requests)
        late.sendall(data[-1:])
        assert read_answer(late)[0] == 200
    assert service.service.admission.requests == 0
