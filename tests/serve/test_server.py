"""The process: how it starts, and how it ends."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from weightnet.cli import main
from weightnet.export.model import export_model

from .conftest import PATIENCE_S, head, photo, read_answer, running

# The command line in a process without PyTorch, as where it is not installed.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from weightnet.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    export_model(str(run_folder), path)
    return path


@contextmanager
def process(*arguments: object, until: str = "ready") -> Iterator[tuple[subprocess.Popen, int]]:
    """Run the command line, and give it with its port once it says something."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve", "--port", "0", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            text = ""
            while until not in text:
                assert select.select([started.stderr], [], [], PATIENCE_S)[0], text
                line = started.stderr.readline()
                assert line, f"it ended: {text}"
                text += line
            yield started, int(re.search(r"http://127\.0\.0\.1:(\d+)", text)[1])
        finally:
            started.kill()


def test_sigterm_finishes_what_is_in_work_and_frees_the_port(exported):
    data = photo()
    with process("--model", exported) as (server, port):
        address = ("127.0.0.1", port)
        with socket.create_connection(address, PATIENCE_S) as idle, socket.create_connection(address) as busy:
            busy.sendall(head(Content_Length=len(data)) + data[:50])
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # it is told at once
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, PATIENCE_S)
            busy.sendall(data[50:])
            status, row = read_answer(busy)
            assert (status, row["status"]) == (200, "ok")
            assert busy.recv(1) == b""
        assert server.wait(PATIENCE_S) == 0
        assert server.stderr.read() == ""
        with socket.create_server(address):
            pass


def test_sigterm_while_loading_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the question for the weights and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.safetensors"
        with process("--model", address, until="listening") as (server, port):
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").json() == {"status": "loading"}
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENCE_S)


def test_sigterm_ends_the_first_process_of_a_container_before_it_listens(tmp_path):
    (tmp_path / "uvicorn.py").write_text("import sys, time; print('importing', file=sys.stderr); time.sleep(60)")
    code = "import os, sys; os.getpid = lambda: 1; from weightnet.cli import run; sys.exit(run())"
    command = [sys.executable, "-c", code, "serve", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr.readline() == "importing\n"
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 128 + signal.SIGTERM  # its own doing: the system would have said -SIGTERM
        finally:
            server.kill()


@pytest.mark.full
def test_sigterm_under_load_loses_no_answer(exported):
    data = photo(size=(800, 600))

    def ask(port: int) -> str:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
            connection.sendall(head(Content_Length=len(data)) + data)
            return str(read_answer(connection)[0])

    with process("--model", exported) as (server, port), ThreadPoolExecutor(32) as clients:
        futures = [clients.submit(ask, port) for _ in range(32)]
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        outcomes = [str(future.exception() or future.result()) for future in futures]
        assert server.wait(PATIENCE_S) == 0
    assert set(outcomes) == {"200"}


def test_what_takes_too_long_is_cut_off_at_the_end(gate, run_folder):
    with running(run_folder, drain_timeout_s=0.2) as service, service.connect() as connection:
        before = gate.arrived
        gate.open.clear()
        connection.sendall(head(Content_Length=len(photo())) + photo())
        service.until(lambda: gate.arrived == before + 1)
        begun = time.monotonic()
        service.server.stop()
        assert service.service.state == "draining"
        assert b" 500 " in connection.recv(65536)
        assert time.monotonic() - begun < 5
        gate.open.set()


def test_answers_in_onnx_runtime_are_those_in_torch(exported, run_folder):
    with running(exported) as there, running(run_folder) as here:
        rows = [service.classify(photo(), k=1).json()["top"][0] for service in (there, here)]
    assert rows[0]["label"] == rows[1]["label"]
    assert rows[0]["probability"] == pytest.approx(rows[1]["probability"], abs=1e-5)


def test_several_models_are_served_side_by_side(exported, run_folder):
    names = [str(exported), str(run_folder)]
    with running(*names, exported) as service:
        assert [model["name"] for model in service.client.get("/v1/models").json()] == names
        rows = [service.classify(photo(), **chosen).json() for chosen in ({}, {"model": names[0]}, {"model": names[1]})]
        assert rows[0] == rows[1]
        assert [score["label"] for score in rows[0]["top"]] == [score["label"] for score in rows[2]["top"]]
        assert [type(service.service.models[name].engine).__name__ for name in names] == [
            "OnnxRuntimeEngine",
            "TorchEngine",
        ]


def test_model_that_cannot_be_loaded_ends_the_service_with_code_2(capsys):
    assert main(["serve", "--port", "0", "--model", "no-such"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"weightnet: listening on http://127.0.0.1:\d+\nweightnet: unknown model: .*\n", err)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--port 65536", 2, "port must be 0 (any free one) to 65535"),
        ("--port 0 --max-requests 0", 2, "max_requests must be a finite number above 0"),
        ("--port 0 --max-megapixels 51", 2, "max_megapixels must be at most 50"),
        ("--port 0 --max-buffered-mb 10", 2, "max_buffered_mb must be at least max_body_mb"),
        ("--host= --port 0", 2, "host must be a name or an address of this machine. Got host=''."),
        ("--host \xfc..b --port 0", 2, "host must be a name or an address"),
        ("--host 192.0.2.1 --port 0", 1, "the system says: "),
        ("--engine no-such --port 0", 2, "engine must be auto"),
    ],
)
def test_wrong_usage_is_said_plainly(capsys, arguments, code, message):
    assert main(["serve", *arguments.split()]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_port_that_is_taken_is_said_plainly(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err


def test_missing_packages_name_the_extra(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "weightnet.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'weightnet[serve]'" in capsys.readouterr().err


def test_service_listens_on_ipv6(run_folder):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with running(run_folder, host="::1") as service:
        assert service.client.base_url.host == "::1"
        assert service.classify(photo()).status_code == 200
