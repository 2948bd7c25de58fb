"""The documentation is true: its code runs, its numbers are those of the program, its links lead somewhere.

A line before a block says what is special about it: `<!-- not run: why -->`, `<!-- needs: package -->` for what is run
where that package is installed, `<!-- command: name -->` for the README's two commands, which `.ci/run` takes from
there, `<!-- service: name -->` for lines that start `weightnet serve` in the background and ask it, or
`<!-- from the program: what -->`, which `scripts/update_pages.py` writes.
"""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jsonschema_rs
import pytest
import skimage.data
from cyclopts import App

from weightnet.cli import app, main
from weightnet.images import decode
from weightnet.zoo.cards import embedded_models

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/*.md"))]
RUN_PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]

# A run of the documentation trains for moments: these options take the place of those that a page gives.
BRIEFLY = {"--epochs": "1", "--batch-size": "4", "--train-size": "32", "--resize": "32", "--crop": "32"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line, counted from 1."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in ("python", "bash") and not self.mark.startswith(("not run:", "command:", "service:"))


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page} has a block without an end"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        mark = re.fullmatch(r"<!-- (.*) -->", lines[start - 1])
        text = "\n".join(lines[start + 1 : end])
        yield Block(page, start + 2, lines[start][3:], mark[1] if mark else "", text)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def marked(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.mark.startswith(f"{kind}: ")]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a page in: examples/, configs/, photos/, a data set of two classes in pets/, training_photos/."""
    for folder in ("examples", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "photos").mkdir()
    coffee = cv2.cvtColor(skimage.data.coffee(), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(tmp_path / "photos/coffee.png"), coffee)
    (tmp_path / "training_photos").mkdir()
    for number in range(32):
        piece = coffee[20 * (number // 8) :, 30 * (number % 8) :]
        cv2.imwrite(str(tmp_path / f"training_photos/{number}.jpg"), piece)
    for split, copies in (("train", 4), ("val", 1)):
        for name, photo in (("cat", cv2.imread(str(ROOT / "examples/cat.png"))), ("coffee", coffee)):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for copy in range(copies):
                cv2.imwrite(str(tmp_path / "pets" / split / name / f"{copy}.jpg"), photo)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block) -> None:
    # Blank lines before the code make a traceback name the page's own line.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


def run_shell(line: str) -> int:
    """Run a line `weightnet ... [< FILE] [> FILE]` in this process, for speed; return its exit code."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars="<>|&;"))
    assert words[0] == "weightnet", f"the tests cannot run this line: {line}"
    with contextlib.ExitStack() as stack:
        while words[-2] in ("<", ">"):
            *words, sign, name = words
            if sign == ">":
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(name, "w", encoding="utf-8"))))
            else:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(sys, "stdin", stack.enter_context(open(name)))
        return main(briefly(words[1:]))


def briefly(words: list[str]) -> list[str]:
    if words[0] != "train" or "--resume" in words:
        return words
    for option, value in BRIEFLY.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return [*words, "--workers", "0"]


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_page_code_runs(page: Path, workspace: Path) -> None:
    for block in filter(lambda block: block.page == page and block.is_run, BLOCKS):
        if block.mark.startswith("needs: "):
            pytest.importorskip(block.mark.removeprefix("needs: "))
        if block.language == "python":
            run_python(block)
            continue
        for offset, line in enumerate(block.text.split("\n")):
            assert run_shell(line) == 0, f"{page.name}:{block.line + offset}: {line}"


@pytest.mark.parametrize("block", marked("service"), ids=lambda block: block.mark)
def test_service_answers_as_the_page_asks(block: Block, workspace: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "8000" in block.text
    script = f"trap 'kill $!; wait' EXIT\nset -e\n{block.text.replace('8000', str(port))}\n"
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert '"status":"ok"' in done.stdout


@pytest.fixture(scope="module")
def updater() -> dict[str, Any]:
    """The script that writes parts of the pages: `python scripts/update_pages.py` mends what these tests find."""
    return runpy.run_path(str(ROOT / "scripts/update_pages.py"))


def written_in_readme(updater: dict[str, Any], name: str) -> str:
    return str(updater["part_pattern"](name).search(README.read_text(encoding="utf-8"))[2])


def test_every_block_is_run_or_says_why_not() -> None:
    explained = [*marked("not run"), *marked("command"), *marked("service")]
    code = [block for block in BLOCKS if block.language not in ("text", "") and block not in explained]
    assert [block.place for block in code if not block.is_run or block.page not in RUN_PAGES] == []
    assert len(marked("not run")) <= 11


def test_readme_commands_are_one_line_each() -> None:
    commands = {block.mark: block.text for block in marked("command") if block.page == README}
    assert list(commands) == ["command: predict", "command: tests"]
    assert all("\n" not in text for text in commands.values())


def arguments_of(command: App) -> set[str]:
    return {name for argument in command.assemble_argument_collection() for name in argument.names}


COMMANDS = {name: app[name] for name in app if not name.startswith("-")}
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_only_commands_and_options_that_exist(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text(encoding="utf-8")))
    ours = re.sub(r"^.*(curl|pip|pytest|python3?|torchrun|ruff|lint-imports) .*$", "", code, flags=re.MULTILINE)
    named = re.findall(r"\bweightnet ([a-z-]+)(?: ([^`\n|]*))?", ours)
    assert {command for command, _ in named} <= set(COMMANDS)
    for command, rest in named:
        unknown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) - arguments_of(COMMANDS[command]) - {"--help"}
        assert not unknown, f"weightnet {command} has no {unknown}"
    everywhere = set().union(*map(arguments_of, COMMANDS.values()), {"--help", "--version"})
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) <= everywhere


def test_readme_names_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"weightnet {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_network_tables_are_those_of_the_zoo(updater: dict[str, Any]) -> None:
    for name in ("first table", "second table"):
        assert written_in_readme(updater, name) == updater["PARTS"][name]()


def test_tables_of_the_docs_are_those_of_the_results(updater: dict[str, Any]) -> None:
    for path in updater["TABLE_PAGES"]:
        page, parts = path.read_text(encoding="utf-8"), updater["table_parts"](path)
        assert parts
        for name, make in parts.items():
            assert updater["part_pattern"](name).search(page)[2] == make()


@pytest.mark.parametrize("name", ["inference", "inference_avx2"])
def test_benchmark_results_are_of_their_schema(name: str) -> None:
    schema, results = (
        json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8"))
        for file in ("inference.schema.json", f"results/{name}.json")
    )
    jsonschema_rs.validate(schema, results)


@pytest.mark.parametrize("name", embedded_models())
def test_embedded_models_figures_are_those_of_its_card(updater: dict[str, Any], name: str) -> None:
    assert written_in_readme(updater, name) == updater["PARTS"][name]()


def test_first_command_prints_what_the_readme_says(updater: dict[str, Any]) -> None:
    number = re.compile(r"\d+\.\d+")
    name = "weightnet predict examples/cat.png"
    texts = (written_in_readme(updater, name), updater["PARTS"][name]())
    assert number.sub("", texts[0]).split() == number.sub("", texts[1]).split()
    written, printed = ([float(text) for text in number.findall(text)] for text in texts)
    assert printed == pytest.approx(written, abs=1.0)  # percent: processors round differently


def test_weights_page_states_the_decoders_limits() -> None:
    text = " ".join((ROOT / "docs/weights.md").read_text(encoding="utf-8").split())
    assert (
        f"files over {decode.MAX_FILE_BYTES // 10**6} MB, over {decode.MAX_PIXELS // 10**6} million pixels, over "
        f"{decode.MAX_SIDE_PX:,} pixels on a side, and pictures over {decode.MAX_ASPECT} times as long"
    ) in text
