"""The container's and systemd's files fit the program: nothing here builds or starts them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from weightnet.cli import app
from weightnet.serve.limits import Limits

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["weightnet"]
UNIT = ROOT / "deploy" / "weightnet.service"
PORT = 8000  # the program's own


def instructions(name: str) -> list[str]:
    return re.findall(rf"^ *{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def served_by(words: list[str]) -> dict:
    """What `weightnet serve` is told by a command line; it is not run."""
    assert Path(words[0]).name == "weightnet"
    command, bound, _ = app.parse_args(words[1:], print_error=False, exit_on_error=False)
    assert command.__name__ == "serve"
    bound.apply_defaults()
    return bound.arguments


def test_container_runs_the_service_on_the_port_that_it_exposes():
    said = served_by(json.loads(instructions("CMD")[-1]))
    assert (said["host"], said["port"]) == ("0.0.0.0", PORT)
    assert instructions("EXPOSE") == [str(PORT)]
    assert COMPOSE["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]


def test_container_has_the_extra_without_pytorch_and_an_ordinary_user():
    (install,) = (line for line in instructions("RUN") if "pip install" in line)
    assert shlex.split(install)[-1] == ".[serve]"
    assert "torch" not in DOCKERFILE
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", instructions("USER")[-1])
    assert DOCKERFILE.index("USER") < DOCKERFILE.index("CMD [")


def test_container_is_built_from_files_that_are_there_and_not_ignored():
    ignored, *others = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    kept = [line[1:] for line in others if line.startswith("!")]
    copied = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert "pyproject.toml" in copied
    for name in copied:
        assert (ROOT / name).exists()
        assert any(fnmatch(name, pattern) for pattern in kept)


def test_containers_health_check_tells_ready_from_not(service, start, gate):
    check = json.loads(DOCKERFILE.split("HEALTHCHECK")[1].split("CMD", 1)[1].split("\n")[0])
    assert check[:2] == ["python", "-c"]

    def healthy(port: int) -> bool:
        command = [sys.executable, "-c", check[2].replace(str(PORT), str(port))]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0

    assert str(PORT) in check[2]
    assert healthy(service.port)
    gate.open.clear()
    assert not healthy(start(wait=False).port)
    gate.open.set()


def test_compose_file_lets_the_service_drain_and_keeps_what_it_downloads():
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) > Limits().drain_timeout_s
    cache = re.search(r"XDG_CACHE_HOME=(\S+)", DOCKERFILE)[1]
    assert COMPOSE["volumes"] == [f"cache:{cache}/weightnet"]
    assert f"{cache}/weightnet" in instructions("RUN")[-1]
    assert (COMPOSE["init"], COMPOSE["read_only"], COMPOSE["cap_drop"]) == (True, True, ["ALL"])


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT, encoding="utf-8")
    return parser


def test_unit_runs_the_service_and_starts_it_again_after_a_crash():
    section = unit()["Service"]
    said = served_by(shlex.split(section["ExecStart"]))
    assert (said["host"], said["port"]) == ("127.0.0.1", PORT)
    assert float(section["TimeoutStopSec"]) > Limits().drain_timeout_s
    assert (section["Restart"], section["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert section["SuccessExitStatus"] == "143", "as docs/serve.md says of SIGTERM"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_is_one_that_systemd_reads(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/weightnet/bin/weightnet", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
