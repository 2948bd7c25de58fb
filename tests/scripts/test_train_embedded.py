"""The commands that lead to an embedded model: those of the page and of the card, going on where they were cut off."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from weightnet.zoo.cards import EMBEDDED

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "train_embedded.py"
spec = importlib.util.spec_from_file_location("train_embedded", SCRIPT)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


class Machine:
    """Does what commands would do to files, and notes them; the one numbered `killed` is cut off."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: list[str] = []
        self.killed = -1

    def run(self, command: list[str], *, cwd: Path) -> Any:
        assert cwd == self.root
        text = " ".join(command[1:]).replace("-m weightnet", "weightnet")
        self.done.append(text)
        code = 0 if len(self.done) != self.killed else 1
        out = re.search(r"--out (\S+)", text)
        if out and "weightnet train" in text:
            (self.root / out[1]).mkdir(parents=True, exist_ok=True)
            (self.root / out[1] / "checkpoint.pt").touch()
        elif out:
            (self.root / (out[1] if code == 0 else f"{out[1]}.partial")).mkdir(parents=True)
        return types.SimpleNamespace(wait=lambda: code)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script.subprocess, "Popen", machine.run)
    monkeypatch.chdir("/")
    return machine


def start(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"pets": "PetImages", "caltech": "101_ObjectCategories", "imagenette": "imagenette2-320"}
    names |= {"tiny": "tiny", "mini": "mini"}
    folders = [text for option, name in names.items() for text in (f"--{option}", name)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), model, *folders])
    script.main()


def as_written(command: str) -> str:
    """A command with its folders as the page names them."""
    return re.sub(r"(?<= )/(?=\w)", "", command)


def test_commands_are_those_of_the_page(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    start("default", monkeypatch)
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    *commands, last = map(as_written, machine.done)
    assert len(commands) == 9
    assert [command for command in commands if command not in page] == []
    assert last == "weightnet evaluate runs/everyday112_last data/everyday112_kinds"


def test_commands_are_those_of_the_card(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    start("default", monkeypatch)
    made_by = json.loads((Path(str(EMBEDDED)) / "default.json").read_text(encoding="utf-8"))["made_by"]
    told = [command.removeprefix("python ") for command in made_by["commands"]]
    assert [as_written(command) for command in machine.done[:-1]] == told[:9]


@pytest.mark.parametrize("model", ["default", "imagenette"])
def test_configurations_begin_from_the_runs_before(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    start(model, monkeypatch)
    runs: list[str] = []
    for command in machine.done:
        if found := re.search(r"train --config (\S+) .*--out (\S+)", command):
            begun_from = re.search(r"^pretrained: (\S+)", (REPOSITORY / found[1]).read_text("utf-8"), re.MULTILINE)
            assert (begun_from is None) == (not runs)
            assert begun_from is None or begun_from[1] in runs
            runs.append(found[2])


@pytest.mark.parametrize("killed", range(1, 11))
def test_goes_on_where_it_was(machine: Machine, monkeypatch: pytest.MonkeyPatch, killed: int) -> None:
    machine.killed = killed
    with pytest.raises(SystemExit) as raised:
        start("default", monkeypatch)
    assert raised.value.code == 1
    assert len(machine.done) == killed
    before = list(machine.done)
    start("default", monkeypatch)
    builds = [command for command in machine.done if "build" in command]
    again = {before[-1]} if "build" in before[-1] else set()
    assert {command for command in builds if builds.count(command) > 1} == again
    fresh = [command for command in machine.done if "weightnet train" in command and "--out" in command]
    assert len(fresh) == len(set(fresh)) == 5
    resumed = [command for command in machine.done if "--resume" in command]
    assert len(resumed) == sum("weightnet train" in command for command in before)
