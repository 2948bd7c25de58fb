"""`weightnet classify-many` as a user sees it: exit codes, the line at the end, messages."""

import csv
import io
import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from weightnet.cli import main


@pytest.fixture
def classify(weightnet, run_folder):
    """Run the command with the small model."""
    return lambda *arguments: weightnet("classify-many", *arguments, "--model", run_folder, "--device", "cpu")


def test_classify_many_counts_at_the_end(classify, photos):
    outcome = classify("a.png", "b.png", "--out", "out")
    assert outcome == (0, "images 2, ok 2, errors 0, partitions 1\n", "")
    assert parquet.read_table("out/part-00000.parquet").column_names == ["path", "status", "error", "top"]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_classify_many_says_which_photos_show_none_of_the_classes(weightnet, photos, telling_folder, format):
    arguments = ("a.png", "sub/broken.jpg", "--model", telling_folder, "--format", format)
    assert weightnet("classify-many", *arguments, "--out", "out").code == 1
    path = photos / f"out/part-00000.{format}"
    if format == "parquet":
        known = parquet.read_table(path)["known"].to_pylist()
    elif format == "jsonl":
        known = [json.loads(line).get("known") for line in path.read_text().splitlines()]
    else:
        cells = [row["known"] for row in csv.DictReader(io.StringIO(path.read_text()))]
        known = [json.loads(cell) if cell else None for cell in cells]
    assert known == [False, None]
    weightnet("classify-many", *arguments, "--out", "vectors", "--embeddings")
    assert b"known" not in (photos / f"vectors/part-00000.{format}").read_bytes()


def test_classify_many_with_a_broken_photo_exits_1(classify, photos):
    outcome = classify(".", "--out", "out", "--json", "--rows-per-file", 3)
    assert outcome.code == 1
    assert outcome.rows == {"images": 4, "ok": 3, "errors": 1, "partitions": 2, "resumed": 0, "out": "out"}


def test_classify_many_that_was_finished_says_so(classify, photos):
    first = classify(".", "--out", "out")
    again = classify(".", "--out", "out")
    assert again[:2] == first[:2]
    assert again.err == "weightnet: nothing is left to do in out: the run was finished before.\n"


def test_classify_many_that_goes_on_says_how_much_was_done(classify, photos):
    classify(".", "--out", "out", "--rows-per-file", 1)
    (photos / "out/part-00002.parquet").unlink()
    assert "went on with 3 of 4 partitions" in classify(".", "--out", "out", "--rows-per-file", 1).err


def test_classify_many_takes_a_list_from_standard_input(classify, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\nsub/broken.jpg\n")))
    assert classify("-", "--out", "out", "--format", "jsonl").code == 1
    rows = [json.loads(line) for line in (photos / "out/part-00000.jsonl").read_text().splitlines()]
    assert [(row["path"], row["status"]) for row in rows] == [("a.png", "ok"), ("sub/broken.jpg", "error")]


@pytest.mark.parametrize(("stream", "inputs"), [("stdin", ["-"]), ("stdin", ["a.png", "-"]), ("stdout", ["a.png"])])
def test_classify_many_with_a_closed_stream_does_no_work(classify, photos, monkeypatch, stream, inputs):
    with monkeypatch.context() as closed:
        closed.setattr(sys, stream, None)
        code = main(["classify-many", *inputs, "--out", "out", "--format", "jsonl"])
    assert (code, (photos / "out").exists()) == (2, False)


def test_classify_many_reads_another_column_in_the_engine_that_is_asked_for(weightnet, photos):
    cells = pa.array([(photos / "a.png").read_bytes()], pa.binary())
    parquet.write_table(pa.table({"image": pa.array([1]), "picture": cells}), photos / "t.parquet")
    options = ("--out", "out", "--format", "jsonl", "--image-column", "picture", "--batch-size", "3")
    assert weightnet("classify-many", "t.parquet", *options, "--engine", "torch").code == 0
    manifest = (photos / "out/_run.json").read_text()
    assert '"torch"' in manifest
    assert weightnet("classify-many", "t.parquet", *options, "--engine", "no-such").code == 2


def test_classify_many_writes_embeddings(classify, photos):
    classify("a.png", "--out", "out", "--embeddings", "--format", "csv")
    header, row = (photos / "out/part-00000.csv").read_text().splitlines()
    assert header.startswith("path,status,error,pre_logits1,")
    assert len(row.split(",")) == len(header.split(",")) == 3 + 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out"], "IN must name at least one photo"),
        (["*.jpg", "--out", "out"], "*.jpg: no photo matches this pattern."),
        (["a.png"], "--out requires an argument"),
        (["a.png", "--out", "-"], "out must be a folder. Got out='-'."),
        (["a.png", "--out=-"], "out must be a folder. Got out='-'."),
        (["a.png", "--out", "sub"], "holds other files"),
        (["a.png", "--out", "out", "--format", "xml"], "--format"),
        (["missing.txt", "--out", "out"], "A list of photos must be a readable file"),
        (["a.png", "--out", "out", "--runner", "ray", "-k", "0"], "k must be at least 1"),
    ],
)
def test_classify_many_refuses_wrong_usage(classify, photos, arguments, message):
    outcome = classify(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_classify_many_with_a_folder_without_photos_among_others_exits_1(classify, photos):
    (photos / "none").mkdir()
    outcome = classify("none", "a.png", "--out", "out")
    assert outcome == (1, "images 1, ok 1, errors 0, partitions 1\n", "weightnet: none: no photo is in this folder.\n")
