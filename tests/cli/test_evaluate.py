import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weightnet.cli import main, output
from weightnet.predict.classifier import Classifier


@pytest.fixture
def labelled(tmp_path, png, monkeypatch) -> Path:
    """The current folder's `data`: three classes of different pictures, one of them not a picture."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("cat", 3), ("[red]fox[-red]", 2), ("Tree", 4)):
        for number in range(count):
            path = tmp_path / "data" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
    (tmp_path / "data" / "classes.csv").write_text("folder,label\n[red]fox[-red],[red]fox[/red]\n")
    return tmp_path / "data"


def test_evaluate_writes_exactly_the_documented_json(weightnet, labelled, run_folder, png):
    outcome = weightnet("evaluate", run_folder, "data", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.isascii()
    assert list(outcome.rows) == [
        "model",
        "name",
        "data",
        "images",
        "unreadable",
        "top1",
        "top5",
        "class_averaged_top1",
        "loss",
        "ece",
        "preprocess",
        "classes",
        "confusion",
        "reliability",
        "unreadable_images",
    ]
    result = outcome.rows
    (prediction,) = Classifier(run_folder, device="cpu")(png, k=5)
    best = prediction.top[0].index
    images = {0: 3, 2: 2, 3: 4}
    assert (result["model"], result["name"], result["data"]) == (str(run_folder), "tiny", "data")
    assert (result["images"], result["unreadable"], result["unreadable_images"]) == (9, 0, [])
    assert result["top1"] == images.get(best, 0) / 9
    assert result["top5"] == 1.0
    assert [(row["index"], row["images"], row["top1"]) for row in result["classes"]] == [
        (index, count, float(index == best)) for index, count in images.items()
    ]
    expected = np.zeros((3, 5), int)
    expected[:, best] = list(images.values())
    assert result["confusion"] == expected.tolist()
    assert list(result["classes"][0]) == ["index", "label", "wnid", "folders", "images", "top1", "predicted"]
    assert list(result["reliability"][0]) == ["above", "up_to", "photos", "confidence", "accuracy"]
    assert len(result["reliability"]) == 15


def test_evaluate_tells_people_the_same(weightnet, labelled, run_folder):
    result = weightnet("evaluate", run_folder, "data", "--json").rows
    outcome = weightnet("evaluate", run_folder, "data")
    lines = [line.strip() for line in outcome.out.splitlines()]
    assert lines[0] == f"{run_folder} on data"
    for line in (
        "photos             9, left out 0",
        "classes            3 of the model's 5",
        "input              short edge 40, crop 32, area",
        f"top-1              {result['top1']:.2%}",
        f"top-5              {result['top5']:.2%}",
        f"top-1 by class     {result['class_averaged_top1']:.2%}",
        f"cross-entropy      {result['loss']:.4f}",
        f"calibration error  {result['ece']:.4f}",
    ):
        assert line in lines
    assert lines[-1].startswith("worst classes ")
    assert "[red]fox[/red]" in lines[-1]


def test_evaluate_counts_what_a_model_that_can_tell_calls_unknown(weightnet, labelled, telling_folder):
    assert weightnet("evaluate", telling_folder, "data", "--json").rows["unknown"] == 1.0
    assert "  called unknown     100.00%" in weightnet("evaluate", telling_folder, "data").out.splitlines()


def test_evaluate_names_no_worst_class_where_all_is_right(weightnet, labelled, run_folder, png):
    (prediction,) = Classifier(run_folder, device="cpu")(png, k=1)
    for name in ("cat", "Tree"):
        (labelled / name).rename(labelled.parent / name)
    (labelled / "[red]fox[-red]").rename(labelled / "it")
    (labelled / "classes.csv").write_text(f"folder,label\nit,{prediction.top[0].label}\n")
    lines = weightnet("evaluate", run_folder, "data").out.splitlines()
    assert lines[-1].split() == ["worst", "classes", "none"]


def test_evaluate_leaves_out_counts_and_names_what_it_cannot_read(weightnet, labelled, run_folder):
    for number in range(8):
        (labelled / "cat" / f"bad{number}\x1b[31m\n.jpg").write_text("no photo")
    outcome = weightnet("evaluate", run_folder, "data", "--json")
    assert outcome.code == 1
    assert (outcome.rows["images"], outcome.rows["unreadable"]) == (9, 8)
    assert {row["path"] for row in outcome.rows["unreadable_images"]} == {
        os.path.join("data", "cat", f"bad{number}\x1b[31m\n.jpg") for number in range(8)
    }
    *named, last = outcome.err.splitlines()
    assert len(named) == 5
    assert named[0].startswith(r"weightnet: data/cat/bad0\x1b[31m\n.jpg: a photo must be a JPEG")
    assert last == "weightnet: 8 of 17 photos could not be classified and are left out."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_evaluate_shows_progress_on_a_terminal_too(labelled, run_folder, monkeypatch):
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", -1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", messages := Terminal())
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    assert main(["evaluate", str(run_folder), "data"]) == 0
    assert "9/9" in messages.getvalue()
    assert "top-1 " in shown.getvalue()


def test_evaluate_writes_a_report(weightnet, labelled, run_folder):
    outcome = weightnet("evaluate", run_folder, "data", "--report", "page.html", "--json")
    assert (outcome.code, outcome.err) == (0, "weightnet: the report is page.html\n")
    text = Path("page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert f">{outcome.rows['top1']:.2%}</td>" in text
    assert "[red]fox[/red]" in text
    assert sorted(path.name for path in Path().iterdir()) == ["data", "page.html"]


def test_evaluate_measures_at_the_size_that_is_asked_for(weightnet, labelled, run_folder):
    own = weightnet("evaluate", run_folder, "data", "--json").rows
    for resize, crop in ((64, 48), (40, 40)):
        outcome = weightnet("evaluate", run_folder, "data", "--json", "--resize", resize, "--crop", crop)
        assert (outcome.rows["preprocess"]["resize"], outcome.rows["preprocess"]["crop"]) == (resize, crop)
        assert outcome.rows["loss"] != own["loss"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--crop", "64"], 2, "usage: crop must be at most resize. Got crop=64, resize=40."),
        (["--crop", "8"], 2, "at least 32 px"),
        (["--resize", "0"], 2, "usage: resize must be a whole number of at least 1"),
        (["--batch-size", "0"], 2, "usage: batch_size must be"),
        (["--engine", "torhc"], 2, "Did you mean torch"),
        (["--device", "cuda:77"], 2, "usage: device must be one"),
        (["--report", "page.pdf"], 2, "usage: The report's suffix must be .html. Got report='page.pdf'."),
        (["--report", "no/such/page.html"], 2, "usage: The report must be a file in a folder that exists."),
        (["--report", "folder.html"], 2, "usage: The report must be a file in a folder that exists."),
    ],
)
def test_evaluate_refuses_impossible_options(weightnet, labelled, run_folder, arguments, code, message):
    Path("folder.html").mkdir()
    outcome = weightnet("evaluate", run_folder, "data", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err


def test_evaluate_refuses_a_report_where_nothing_can_be_written(weightnet, labelled, run_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    outcome = weightnet("evaluate", run_folder, "data", "--report", "page.html")
    assert (outcome.code, outcome.out) == (2, "")
    assert "The report's folder must be writable." in outcome.err


def test_evaluate_says_which_folder_fits_no_class(weightnet, labelled, run_folder):
    (labelled / "<script>\x1b[31m\n").mkdir()
    outcome = weightnet("evaluate", run_folder, "data", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("weightnet: data: Every class folder must be called like one class of the model")
    assert r"'<script>\x1b[31m\n'" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["no-such-model", "data"], 2, "unknown model"),
        (["RUN", "missing"], 1, "data"),
        (["RUN"], 2, "usage"),
    ],
)
def test_evaluate_wants_a_model_and_a_folder(weightnet, labelled, run_folder, arguments, code, kind):
    outcome = weightnet("evaluate", *(str(run_folder) if word == "RUN" else word for word in arguments))
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(f"weightnet: {kind}: ")


def test_evaluate_without_a_readable_photo_is_an_error(weightnet, labelled, run_folder):
    for path in labelled.rglob("*.png"):
        path.write_text("no photo")
    outcome = weightnet("evaluate", run_folder, "data", "--report", "page.html")
    assert (outcome.code, outcome.out) == (1, "")
    assert "data: data must hold photos that can be read. Got none among 9" in outcome.err
    assert not Path("page.html").exists()


def test_evaluate_takes_an_only_class_and_undecodable_names(labelled, run_folder, png):
    for folder in ("cat", "[red]fox[-red]"):
        for path in (labelled / folder).iterdir():
            path.unlink()
        (labelled / folder).rmdir()
    try:
        Path(os.fsdecode(b"data/Tree/\xff.jpg")).write_text("no photo")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    command = [sys.executable, "-m", "weightnet", "evaluate", str(run_folder), "data", "--json", "--report", "r.html"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["images"], len(result["classes"]), len(result["confusion"])) == (4, 1, 1)
    assert result["unreadable_images"][0]["path"] == os.fsdecode(b"data/Tree/\xff.jpg")
    assert rb"data/Tree/\xff.jpg: a photo must be" in done.stderr
    assert r"Tree/\udcff.jpg" in Path("r.html").read_text(encoding="utf-8")
