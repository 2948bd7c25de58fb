import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weightnet.cli import main, output, predict
from weightnet.predict import inputs
from weightnet.predict.classifier import Classifier
from weightnet.zoo.cards import read_card

ODD_NAMES = [
    "two\nlines.png",
    "\x1b[31mred\x1b[0m.png",
    "[red]markup[-red].png",
    'comma,quote".png',
    "=1+1.png",
    "tab\t\r.png",
    "Ünïcödé \u202e.png",
    os.fsdecode(b"bytes \xff\xfe.png"),
    " spaced .png",
    "-k.png",
    "--json",
]


def test_predict_writes_exactly_the_documented_json(weightnet, photos, run_folder):
    outcome = weightnet("predict", "a.png", "sub/broken.jpg", "missing.jpg", "--model", run_folder, "--json", "-k", 2)
    assert outcome.code == 1
    good, broken, missing = outcome.rows
    assert list(good) == list(broken) == ["path", "status", "error", "top"]
    assert (good["path"], good["status"], good["error"]) == ("a.png", "ok", None)
    assert [list(score) for score in good["top"]] == [["label", "index", "probability"]] * 2
    assert good["top"][0]["probability"] >= good["top"][1]["probability"] > 0
    assert (broken["path"], broken["status"], broken["top"]) == ("sub/broken.jpg", "error", [])
    assert "JPEG, PNG" in broken["error"]
    assert "No such file" in missing["error"]
    assert outcome.err == "weightnet: 2 of 3 photos could not be classified; their rows say why.\n"


def test_predict_writes_the_same_in_every_form(weightnet, photos, run_folder):
    arguments = ("predict", "sub", "a.png", "--model", run_folder, "-k", 3)
    rows = weightnet(*arguments, "--json").rows
    assert [row["path"] for row in rows] == [str(Path("sub/broken.jpg")), str(Path("sub/c.png")), "a.png"]

    lines = weightnet(*arguments, "--jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == rows

    table = list(csv.DictReader(io.StringIO(weightnet(*arguments, "--csv").out)))
    for row, line in zip(rows, table, strict=True):
        assert (line["path"], line["status"], line["error"]) == (row["path"], row["status"], row["error"] or "")
        for rank in (1, 2, 3):
            cells = tuple(line[f"{name}{rank}"] for name in ("label", "index", "probability"))
            top = row["top"][rank - 1] if row["top"] else dict.fromkeys(("label", "index", "probability"), "")
            assert cells == (top["label"], str(top["index"]), str(top["probability"]))

    text = weightnet(*arguments).out.splitlines()
    assert text[0] == rows[0]["path"]
    assert text[1] == f"  error: {rows[0]['error']}"
    assert text[2] == rows[1]["path"]
    assert text[3:6] == [f"  {top['probability']:7.2%}  {top['label']}" for top in rows[1]["top"]]


def test_predict_says_of_a_photo_of_none_of_the_classes_that_it_is_unknown(weightnet, photos, telling_folder):
    arguments = ("predict", "a.png", "sub/broken.jpg", "--model", telling_folder, "-k", 2)
    good, broken = weightnet(*arguments, "--json").rows
    assert good["known"] is False
    assert len(good["top"]) == 2
    assert "known" not in broken
    table = list(csv.DictReader(io.StringIO(weightnet(*arguments, "--csv").out)))
    assert [row["known"] for row in table] == ["false", ""]
    assert list(table[0])[:5] == ["path", "status", "error", "known", "label1"]
    assert table[0]["label1"] == good["top"][0]["label"]
    lines = weightnet(*arguments).out.splitlines()
    assert lines[:2] == ["a.png", "  nothing I know; nearest:"]
    assert lines[2:4] == [f"  {top['probability']:7.2%}  {top['label']}" for top in good["top"]]
    vectors = list(csv.DictReader(io.StringIO(weightnet(*arguments, "--csv", "--embeddings").out)))
    assert list(vectors[0])[:4] == ["path", "status", "error", "pre_logits1"]


def test_predict_names_all_classes_when_asked_for_more(weightnet, photos, run_folder):
    outcome = weightnet("predict", "a.png", "--model", run_folder, "-k", 100, "--csv")
    assert outcome.code == 0
    assert outcome.out.splitlines()[0].endswith(",label5,index5,probability5")


def test_predict_walks_folders_and_patterns_in_order(weightnet, photos, run_folder):
    outcome = weightnet("predict", "[ab].png", "sub", "a.png", "--model", run_folder, "--json")
    names = [row["path"] for row in outcome.rows]
    assert names == ["a.png", "b.png", str(Path("sub/broken.jpg")), str(Path("sub/c.png")), "a.png"]


@pytest.mark.parametrize("arguments", [["empty"], ["*.tiff"], ["empty", "*.tiff"], []])
def test_predict_without_a_photo_is_wrong_usage(weightnet, photos, arguments):
    (photos / "empty").mkdir()
    outcome = weightnet("predict", *arguments, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "usage: PATH must name at least one photo" in outcome.err


def test_predict_goes_on_after_a_pattern_without_a_photo(weightnet, photos, run_folder):
    outcome = weightnet("predict", "*.tiff", "a.png", "--model", run_folder, "--json")
    assert outcome.code == 1
    assert [row["path"] for row in outcome.rows] == ["a.png"]
    assert outcome.err == "weightnet: *.tiff: no photo matches this pattern.\n"


@pytest.mark.parametrize("data", [None, b"hello", b""])
def test_predict_reads_a_photo_from_standard_input(weightnet, photos, run_folder, png, monkeypatch, data):
    stdin = io.TextIOWrapper(io.BytesIO(png if data is None else data))
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = weightnet("predict", "a.png", "-", "b.png", "--model", run_folder, "--json")
    first, middle, last = outcome.rows
    assert [row["path"] for row in outcome.rows] == ["a.png", "-", "b.png"]
    assert first["status"] == last["status"] == "ok"
    assert middle["status"] == ("error" if data is not None else "ok")
    assert outcome.code == (1 if data is not None else 0)
    if data is None:
        assert middle["top"] == first["top"]


@pytest.mark.parametrize("paths", [["-"], ["a.png", "-", "b.png", "--json"]])
def test_predict_refuses_a_closed_standard_input(weightnet, photos, monkeypatch, paths):
    monkeypatch.setattr(sys, "stdin", None)
    outcome = weightnet("predict", *paths)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Standard input must be open" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "0"], "k must be a whole number of at least 1"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1"),
        (["--engine", "torhc"], "Did you mean torch"),
        (["--device", "cuda:77"], "device must be one"),
        (["--json", "--csv"], "The output must have one form. Got --json and --csv."),
        (["--model", "tiny"], "--model specified multiple times"),
    ],
)
def test_predict_refuses_impossible_options_before_any_output(weightnet, photos, run_folder, arguments, message):
    outcome = weightnet("predict", "a.png", "--model", run_folder, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


@pytest.fixture
def odd_photos(tmp_path, png, monkeypatch) -> list[str]:
    """The current folder, with photos of all odd names that the file system takes."""
    monkeypatch.chdir(tmp_path)
    names = []
    for name in ODD_NAMES:
        try:
            Path(name).write_bytes(png)
        except OSError:
            continue
        names.append(name)
    return names


def written(capture: pytest.CaptureFixture[bytes], *arguments: object) -> bytes:
    assert main(["predict", "-k", "1", *map(str, arguments)]) == 0
    return capture.readouterr().out


@pytest.mark.parametrize("form", ["--json", "--jsonl"])
def test_predict_writes_odd_names_exactly_as_json(odd_photos, run_folder, capfdbinary, form):
    text = written(capfdbinary, "--model", run_folder, form, "--", *odd_photos).decode("ascii")
    rows = json.loads(text) if form == "--json" else [json.loads(line) for line in text.splitlines()]
    assert [row["path"] for row in rows] == odd_photos
    assert {row["status"] for row in rows} == {"ok"}


def test_predict_writes_odd_names_exactly_as_csv(odd_photos, run_folder, capfdbinary):
    text = written(capfdbinary, "--model", run_folder, "--csv", "--", *odd_photos).decode("utf-8", "surrogateescape")
    assert text.endswith("\n")
    assert "\r\n" not in text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["path"] for row in rows] == odd_photos
    assert {row["status"] for row in rows} == {"ok"}


def test_predict_writes_odd_names_safely_as_text(odd_photos, run_folder, capfdbinary):
    text = written(capfdbinary, "--model", run_folder, "--", *odd_photos).decode("utf-8")
    assert text.replace("\n", "").isprintable()
    assert text.count("\n") == 2 * len(odd_photos)


def test_predict_finds_odd_names_in_a_folder(odd_photos, run_folder, capfdbinary):
    rows = json.loads(written(capfdbinary, ".", "--model", run_folder, "--json"))
    names = [name for name in odd_photos if name.endswith(".png")]
    assert [row["path"] for row in rows] == [os.path.join(".", name) for name in sorted(names)]


def test_predict_on_a_terminal_shows_no_markup_or_control_characters(
    photos, run_folder, telling_folder, png, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    (photos / "[bold]\x1b[5m.png").write_bytes(png)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["predict", "a.png", "--model", str(telling_folder)]) == 0
    assert "nothing I know; nearest:" in terminal.getvalue()
    terminal.truncate(0)
    assert main(["predict", "[[]bold*", "sub/broken.jpg", "--model", str(run_folder)]) == 1
    shown = terminal.getvalue()
    assert "nothing I know" not in shown
    assert "[bold]\\x1b[5m.png" in shown
    assert "[red]fox[/red]" in shown
    assert "error: a photo must be a JPEG" in shown
    assert "\x1b[5m" not in shown
    assert "\x1b[1m" in shown  # its own colours
    terminal.truncate(0)
    assert main(["predict", "[[]bold*", "--model", str(run_folder), "--csv"]) == 0
    assert "\x1b" not in terminal.getvalue()


def test_predict_writes_rows_as_they_come(photos, run_folder, png, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))

    def photos_without_end(paths, *, report):
        for number in range(40):
            if number > 12:
                assert written.getvalue().count(b"\n") >= number - 8
            yield "a.png"

    monkeypatch.setattr(inputs, "find_images", photos_without_end)
    assert main(["predict", "x", "--model", str(run_folder), "--jsonl", "--batch-size", "4"]) == 0
    assert written.getvalue().count(b"\n") == 40


def test_predict_says_what_the_default_knows(weightnet, photos, as_default):
    outcome = weightnet("predict", "a.png")
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert "knows 5 things (cat, dog, [red]fox[/red], tree, ...)" in outcome.err
    assert "--model shufflenet_v2_x1_0" in outcome.err
    assert weightnet("predict", "a.png", "--json").err == ""


def test_predict_keeps_quiet_about_other_models(weightnet, photos, run_folder):
    assert weightnet("predict", "a.png", "--model", run_folder).err == ""


def test_scope_is_one_line_for_any_model(run_folder):
    card = read_card(run_folder / "weights.json")
    assert "\n" not in predict._scope(card)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("arguments", "total"), [(["a.png", "b.png"], "2/2"), (["*.png"], "2/?")])
def test_predict_shows_progress_when_rows_go_elsewhere(photos, run_folder, monkeypatch, capsys, arguments, total):
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", -1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", messages := Terminal())
    assert main(["predict", *arguments, "--model", str(run_folder), "--json"]) == 0
    assert total in messages.getvalue()
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_predict_shows_no_progress_on_short_work_or_beside_the_rows(photos, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", messages := Terminal())
    assert main(["predict", "a.png", "--model", str(run_folder)]) == 0
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", -1)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["predict", "a.png", "--model", str(run_folder)]) == 0
    assert messages.getvalue() == ""


@pytest.mark.full
def test_predict_ends_when_its_reader_goes_away(photos, run_folder):
    command = [sys.executable, "-m", "weightnet", "predict", *["a.png"] * 3000, "--model", str(run_folder), "--jsonl"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert json.loads(child.stdout.readline())["status"] == "ok"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141


PEAK = (
    "import resource, sys; from weightnet.cli import main; code = main(sys.argv[1:]); "
    "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
)


@pytest.mark.full
def test_predict_needs_no_more_memory_for_many_photos(tmp_path, run_folder, png):
    def peak_kib(photos: int) -> int:
        folder = tmp_path / str(photos)
        for number in range(photos):
            (folder / f"{number // 1000:03d}").mkdir(parents=True, exist_ok=True)
            (folder / f"{number // 1000:03d}" / f"{number:06d}.png").write_bytes(png)
        command = [sys.executable, "-c", PEAK, "predict", str(folder), "--model", str(run_folder), "--json"]
        done = subprocess.run(command, capture_output=True, timeout=600, check=True)
        assert len(json.loads(done.stdout)) == photos
        code, peak = done.stderr.split()
        assert code == b"0"
        return int(peak)

    few, many = peak_kib(200), peak_kib(10_000)
    assert many - few < 16 * 1024


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_predict_writes_embeddings(weightnet, run_folder, photos, form):
    outcome = weightnet("predict", "a.png", "sub/broken.jpg", "--model", run_folder, "--embeddings", f"--{form}")
    assert outcome.code == 1
    if form == "csv":
        good, bad = csv.DictReader(io.StringIO(outcome.out))
        assert list(good) == ["path", "status", "error", *(f"pre_logits{number}" for number in range(1, 33))]
        vector, missing = [float(good[f"pre_logits{number}"]) for number in range(1, 33)], bad["pre_logits1"] or None
    else:
        good, bad = outcome.rows if form == "json" else map(json.loads, outcome.out.splitlines())
        assert list(good) == ["path", "status", "error", "pre_logits"]
        vector, missing = good["pre_logits"], bad["pre_logits"]
    (expected,) = Classifier(run_folder).embed(["a.png"])
    np.testing.assert_allclose(vector, expected.pre_logits, atol=1e-5)
    assert (good["status"], bad["status"], missing) == ("ok", "error", None)


def test_predict_refuses_embeddings_as_text(weightnet, run_folder, photos):
    outcome = weightnet("predict", "a.png", "--model", run_folder, "--embeddings")
    assert (outcome.code, outcome.out) == (2, "")
    assert "Add --json, --jsonl or --csv" in outcome.err
