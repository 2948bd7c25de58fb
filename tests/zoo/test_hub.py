"""Downloads, against a server on this machine that does all that servers do wrong."""

import http.server
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3

from weightnet.errors import DownloadError, UsageError
from weightnet.zoo import hub
from weightnet.zoo.hub import cached_path, fetch

from .conftest import BODY, SHA256, Answer, Server, broken, left_over, redirect, reply, stall, truncated, whole

# Downloads that succeed


def test_fetch_downloads_once_and_records_what_it_got(server: Server, cache: Path) -> None:
    path = fetch(server.url)
    assert path.read_bytes() == BODY
    assert path == cached_path(server.url) == fetch(server.url)
    assert len(server.requests) == 1
    record = json.loads(path.with_name(f"{path.name}.record.json").read_text())
    assert record == {"url": server.url, "size": len(BODY), "sha256": SHA256}
    assert left_over(cache) == [path.name, f"{path.name}.record.json"]


@pytest.mark.parametrize("failure", [broken, truncated, reply(b"", 429, 0), reply(b"", 408, 0)])
def test_fetch_tries_again_after_a_failure_that_may_pass(server: Server, cache: Path, failure: Answer) -> None:
    server.answers = [failure, failure, whole]
    assert fetch(server.url).read_bytes() == BODY
    assert len(server.requests) == 3


def test_fetch_waits_longer_before_each_retry(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.answers = [broken]
    with pytest.raises(DownloadError):
        fetch(server.url)
    assert waits == [0.001, 0.002, 0.004]


def test_fetch_follows_redirects(server: Server, cache: Path) -> None:
    server.answers = [redirect("/elsewhere"), redirect(server.url), whole]
    assert fetch(server.url).read_bytes() == BODY
    assert server.requests == ["/weights.bin", "/elsewhere", "/weights.bin"]


def test_fetch_takes_a_body_without_a_length(server: Server, cache: Path) -> None:
    server.answers = [reply(length=None)]
    assert fetch(server.url).read_bytes() == BODY


def test_fetch_accepts_the_known_size_and_hash(server: Server, cache: Path) -> None:
    assert fetch(server.url, size=len(BODY), sha256=SHA256).read_bytes() == BODY


def test_fetch_uses_a_file_that_was_put_there_by_hand(server: Server, cache: Path) -> None:
    path = cached_path(server.url)
    path.parent.mkdir()
    path.write_bytes(b"by hand")
    assert fetch(server.url).read_bytes() == b"by hand"
    assert not server.requests
    path.write_bytes(b"changed")
    with pytest.raises(DownloadError, match="downloaded first"):
        fetch(server.url)


def test_fetch_uses_a_file_in_a_folder_that_cannot_be_written(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(hub, "write_atomically", refuse)
    cache.mkdir()
    cached_path(server.url).write_bytes(b"by hand")
    assert fetch(server.url).read_bytes() == b"by hand"
    assert not server.requests


def test_fetch_of_two_processes_at_once_downloads_once(server: Server, tmp_path: Path) -> None:
    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        server.release.wait(1)  # long enough for the other process to come
        whole(handler)

    server.answers = [slow]
    code = f"from weightnet.zoo.hub import fetch; print(fetch({server.url!r}))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert paths[0] == paths[1]
    assert paths[0].startswith(str(tmp_path / "weightnet"))
    assert Path(paths[0]).read_bytes() == BODY
    assert len(server.requests) == 1


# Downloads that fail: one clear error, and nothing left behind


@pytest.mark.parametrize(
    ("answer", "reason", "requested"),
    [
        (truncated, "read|ended after 100000 of 256000", 4),
        (broken, "503", 4),
        (reply(b"", 404, 0), "404", 1),
        (reply(b"", 403, 0), "403", 1),
        (reply(b"<!DOCTYPE html><p>sign in</p>", length=29, Content_Type="text/html; charset=utf-8"), "web page", 1),
        (reply(b"  <html>no type</html>", length=22), "web page", 1),
        (reply(b"", length=0), "empty", 1),
        (reply(b"", length=1 << 40), "more than the allowed", 1),
        (reply(length="many"), "many", 1),
        (redirect("file:///etc/hostname"), "redirects to file:///etc/hostname", 1),
        (redirect("/weights.bin"), "redirects", 31),
    ],
    ids=["truncated", "503", "404", "403", "html", "html untyped", "empty", "huge", "odd length", "file", "circle"],
)
def test_fetch_says_why_it_failed_and_where_to_put_the_file(
    server: Server, cache: Path, answer: Answer, reason: str, requested: int
) -> None:
    server.answers = [answer]
    with pytest.raises(DownloadError, match=reason) as raised:
        fetch(server.url)
    assert server.url in str(raised.value)
    assert str(cached_path(server.url)) in str(raised.value)
    assert left_over(cache) == []
    assert len(server.requests) == requested


def test_fetch_finds_a_truncated_body_itself(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = urllib3.HTTPResponse.__init__

    def lenient(self: urllib3.HTTPResponse, *args: Any, **options: Any) -> None:  # as urllib3 was before 2.0
        original(self, *args, **{**options, "enforce_content_length": False})

    monkeypatch.setattr(urllib3.HTTPResponse, "__init__", lenient)
    server.answers = [truncated]
    with pytest.raises(DownloadError, match="ended after 100000 of 256000 bytes"):
        fetch(server.url, retries=0)
    assert left_over(cache) == []


def test_fetch_gives_up_on_a_server_that_stalls(server: Server, cache: Path) -> None:
    server.answers = [stall(server)]
    before = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        fetch(server.url, timeout_s=0.1, retries=1)
    assert time.monotonic() - before < 5
    assert left_over(cache) == []


def test_fetch_stops_a_body_without_end(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_DOWNLOAD_BYTES", 100_000)
    server.answers = [reply(length=None)]
    with pytest.raises(DownloadError, match="more than the allowed 100000 bytes"):
        fetch(server.url)
    assert left_over(cache) == []


def test_fetch_says_so_where_nobody_answers(server: Server, cache: Path) -> None:
    server.close()
    with pytest.raises(DownloadError, match=r"weights\.bin: .*refused\. Check the network") as raised:
        fetch(server.url, retries=0)
    assert str(cached_path(server.url)) in str(raised.value)


@pytest.mark.parametrize("known", [{"size": 7}, {"sha256": "0" * 64}])
def test_fetch_refuses_another_file_than_the_known_one(
    server: Server, cache: Path, known: dict[str, int | str]
) -> None:
    with pytest.raises(DownloadError, match="not the expected"):
        fetch(server.url, **known)  # type: ignore[arg-type]
    assert left_over(cache) == []


def test_fetch_refuses_a_copy_that_changed_and_says_how_to_mend_it(server: Server, cache: Path) -> None:
    path = fetch(server.url)
    path.write_bytes(BODY[:-1])
    with pytest.raises(DownloadError, match="Delete it"):
        fetch(server.url)
    path.unlink()
    assert fetch(server.url).read_bytes() == BODY


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": "x", "sha256": 1}'])
def test_fetch_refuses_a_spoilt_record(server: Server, cache: Path, content: str) -> None:
    path = fetch(server.url)
    path.with_name(f"{path.name}.record.json").write_text(content)
    with pytest.raises(DownloadError, match=r"record\.json"):
        fetch(server.url)


def test_fetch_says_so_where_the_cache_cannot_be_written(server: Server, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in place of the folder")
    with pytest.raises(DownloadError, match="cache"):
        fetch(server.url)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://127.0.0.1/w", "data://x", "weights.bin", "http://[x", "http://x/\udcff"],
)
def test_fetch_refuses_addresses_that_are_not_of_the_web(url: str) -> None:
    with pytest.raises(UsageError, match="http or https"):
        fetch(url)


def test_fetch_of_an_impossible_address_is_not_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited to try again"))
    with pytest.raises(DownloadError):
        fetch("http:///nowhere")


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("https://a/x", "https://b/y", True),
        ("https://a/x", "/y", True),
        ("http://a/x", "https://b/y", True),
        ("http://a/x", "http://b/y", True),
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "//b/y", True),
        ("http://a/x", "ftp://b/y", False),
    ],
)
def test_redirect_must_not_leave_an_encrypted_connection(source: str, target: str, allowed: bool) -> None:
    response = requests.Response()
    response.url, response.status_code, response.headers["location"] = source, 302, target
    if allowed:
        hub._check_redirect(response)
    else:
        with pytest.raises(hub._RefusedError, match="redirects"):
            hub._check_redirect(response)


def test_fetch_writes_nothing_to_standard_output_or_error(
    server: Server, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch(server.url)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_standard_error_where_it_is_a_terminal(server: Server, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    code = f"from weightnet.zoo.hub import fetch; fetch({server.url!r}, progress=False); fetch({server.url + '2'!r})"
    mine, other = pty.openpty()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=other)
    output = process.communicate(timeout=60)[0]
    os.close(other)
    shown = b""
    while True:
        try:
            shown += os.read(mine, 1 << 16)
        except OSError:  # the terminal's other end is closed and all is read
            break
    os.close(mine)
    assert output == b""
    assert b"weights.bin2" in shown
    assert b"256.0/256.0 kB" in shown
    assert b"-weights.bin " not in shown
