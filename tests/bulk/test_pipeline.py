"""A bulk run gives one row for each photo, the one that `Classifier` gives, whatever happens on the way."""

import json
import os
import shutil
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

from weightnet.bulk import pipeline, sinks
from weightnet.bulk.pipeline import Summary
from weightnet.bulk.worker import BulkConfig
from weightnet.errors import MissingDependencyError, UnknownModelError, UsageError
from weightnet.predict.classifier import Classifier
from weightnet.predict.inputs import find_images

from .conftest import png, rows_of, shard, table

FORMATS = ("parquet", "jsonl", "csv")


@pytest.fixture
def expected(model, photos) -> list:
    """What `Classifier` says of the folder."""
    return Classifier(model, device="cpu")(find_images([str(photos)], report=pytest.fail))


@pytest.mark.parametrize("format", FORMATS)
def test_run_gives_the_rows_of_the_classifier_in_order(bulk, photos, tmp_path, expected, format):
    assert bulk(format=format, k=3) == Summary(images=23, ok=21, errors=2, partitions=6, resumed=0)
    rows = rows_of(tmp_path / "out")
    assert len({prediction.top[0].label for prediction in expected if prediction.top}) > 2, "the photos must differ"
    assert [row["path"] for row in rows] == [prediction.path for prediction in expected]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["status"] == prediction.status
        assert (row["error"] or None) == prediction.error
        if format == "csv":
            labels = [row[f"label{rank}"] for rank in (1, 2, 3) if row[f"label{rank}"]]
            probabilities = [float(row[f"probability{rank}"]) for rank in (1, 2, 3) if row[f"probability{rank}"]]
        else:
            labels, probabilities = row["top"]["labels"], row["top"]["probabilities"]
            assert row["top"]["indices"] == [score.index for score in prediction.top[:3]]
        assert labels == [score.label for score in prediction.top[:3]]
        np.testing.assert_allclose(probabilities, [score.probability for score in prediction.top[:3]], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_run_writes_vectors(bulk, photos, tmp_path, model, format):
    bulk(format=format, embeddings=True)
    rows = rows_of(tmp_path / "out")
    vectors = list(Classifier(model, device="cpu").embed(row["path"] for row in rows))
    assert sum(vector.status == "error" for vector in vectors) == 2
    for row, vector in zip(rows, vectors, strict=True):
        assert "top" not in row
        if format == "csv":
            found = [float(row[f"pre_logits{number}"]) for number in range(1, 33) if row["pre_logits1"]] or None
        else:
            found = row["pre_logits"]
        if vector.pre_logits is None:
            assert found is None
        else:
            np.testing.assert_allclose(found, vector.pre_logits, atol=1e-5)


def test_run_over_every_kind_of_input_gives_a_row_for_each(bulk, photos, tmp_path):
    members = {f"{seed}.png": png(seed) for seed in range(5)} | {"5.png": b"broken"}
    tar = shard(tmp_path / "s.tar", members)
    parquet = table(tmp_path / "t.parquet", [png(1), None, b"broken", png(2)], "binary")
    bulk(tar, str(tmp_path / "missing.png"), parquet, str(photos), format="jsonl", rows_per_file=5)
    rows = rows_of(tmp_path / "out")
    assert [row["path"] for row in rows[:11]] == [
        *(f"{tar}/{name}" for name in members),
        str(tmp_path / "missing.png"),
        *(f"{parquet}#{number}" for number in range(4)),
    ]
    assert [row["status"] for row in rows[:11]] == ["ok"] * 5 + ["error"] * 2 + ["ok", "error", "error", "ok"]
    assert len(rows) == 11 + 23
    probabilities = {row["path"]: row["top"]["probabilities"] for row in rows}
    for path in (f"{tar}/1.png", f"{parquet}#0"):
        np.testing.assert_allclose(probabilities[path], probabilities[str(photos / "sub/01.png")], atol=1e-5)


def test_run_that_was_finished_is_left_as_it_is(bulk, photos, tmp_path, monkeypatch):
    first = bulk()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(pipeline, "Worker", None)
    again = bulk()
    assert again == Summary(**{**vars(first), "resumed": 6})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("lost", ["part-00002.parquet", "part-00005.parquet"])
@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_run_writes_a_lost_partition_again(bulk, photos, tmp_path, lost, how):
    bulk()
    whole = rows_of(tmp_path / "out")
    if how == "gone":
        (tmp_path / "out" / lost).unlink()
    else:
        (tmp_path / "out" / lost).write_bytes(b"PAR1")
    assert bulk().resumed == 5
    assert rows_of(tmp_path / "out") == whole


def test_run_that_fails_in_the_middle_goes_on_with_the_rest(bulk, photos, tmp_path, monkeypatch):
    write, calls = sinks.write_atomically, []

    def full_disk(path, data):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "write_atomically", full_disk)
        with pytest.raises(OSError, match="No space"):
            bulk(format="jsonl")
    assert bulk(format="jsonl").resumed == 3
    assert len({row["path"] for row in rows_of(tmp_path / "out")}) == len(rows_of(tmp_path / "out")) == 23


@pytest.mark.parametrize(
    "change",
    [{"k": 2}, {"embeddings": True}, {"format": "csv"}, {"rows_per_file": 5}, {"engine": "torch"}],
    ids=str,
)
def test_run_refuses_to_go_on_with_other_options(bulk, photos, change):
    bulk()
    with pytest.raises(UsageError, match="must go on as it began"):
        bulk(**change)


def test_run_refuses_to_go_on_over_other_photos(bulk, photos):
    bulk()
    (photos / "new.png").write_bytes(png(99))
    with pytest.raises(UsageError, match="images: 23, now 24"):
        bulk()


def test_run_refuses_to_go_on_by_another_model(bulk, photos, model, tmp_path):
    bulk()
    other = shutil.copytree(model, tmp_path / "other")
    card = json.loads((other / "weights.json").read_text())
    card["preprocess"]["resize"] = 36
    (other / "weights.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="model sha256"):
        bulk(model=str(other))


def test_run_goes_on_with_what_changes_no_row(bulk, photos):
    bulk()
    assert bulk(batch_size=3, device="auto").resumed == 6


def test_run_leaves_its_own_files_out_of_the_photos(bulk, photos, tmp_path):
    first = bulk(str(photos), out=str(photos / "out"))
    assert bulk(str(photos), out=str(photos / "out")).images == first.images == 23


def test_run_removes_what_a_kill_left_half_written(bulk, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.part-00000.parquet.abcd.part").write_bytes(b"x")
    bulk()
    assert not list((tmp_path / "out").glob(".*.part"))


def test_run_refuses_a_folder_with_other_files(bulk, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        bulk()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"identity": 3, "done": {}}', '{"identity": {}, "done": {"x": 1}}']
)
def test_run_refuses_a_damaged_record(bulk, photos, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_run.json").write_text(content)
    with pytest.raises(UsageError, match=r"whole _run\.json"):
        bulk()


def test_run_refuses_a_folder_in_which_another_works(bulk, photos, tmp_path):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out/.lock"), pytest.raises(UsageError, match="one run at a time"):
        bulk()


def test_run_refuses_a_file_for_a_folder(bulk, photos, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="must be a folder"):
        bulk()


def test_run_of_nothing_is_refused(bulk, tmp_path):
    reports: list[str] = []
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="at least one photo"):
        bulk(str(tmp_path / "none"), reports=reports)
    assert reports == [f"{tmp_path / 'none'}: no photo is in this folder."]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["none"], {}, "at least one photo"),
        (["photos", "missing.txt"], {}, "must be a readable file"),
        (["t.parquet"], {"image_column": "picture"}, "image_column must name a column"),
        (["photos"], {"engine": "torhc"}, "engine must be"),
        (["s.tar", "photos"], {"device": "cuda:77"}, "device must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["deep/out", "empty"])
def test_run_that_is_refused_leaves_nothing(bulk, photos, tmp_path, inputs, options, message, place):
    for folder in ("none", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "empty/.hidden").touch()
    shard(tmp_path / "s.tar", {"0.png": png(0)})
    table(tmp_path / "t.parquet", [png(0)], "binary")
    with pytest.raises(UsageError, match=message):
        bulk(*(str(tmp_path / name) for name in inputs), out=str(tmp_path / place), **options)
    assert not (tmp_path / "deep").exists()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == [".hidden"]
    assert bulk(out=str(tmp_path / place)).images == 23, "put right, it runs in the same place"


def test_run_over_a_folder_passes_over_what_runs_wrote_there(bulk, photos, tmp_path):
    bulk(out=str(photos / "answers"))
    assert bulk(out=str(photos / "others")).images == 23
    assert bulk(str(photos / "**"), out=str(tmp_path / "out"), format="jsonl").images == 23


def test_run_that_is_refused_leaves_what_an_earlier_one_made(bulk, photos, tmp_path):
    bulk()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UsageError, match="must go on as it began"):
        bulk(k=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_run_of_an_unknown_model_makes_no_folder(bulk, photos, tmp_path):
    with pytest.raises(UnknownModelError):
        bulk(model="missing")
    assert not (tmp_path / "out").exists()


def test_run_without_pyarrow_says_what_to_install(bulk, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'weightnet\[bulk\]'"):
        bulk()


def test_run_without_pyarrow_writes_the_other_formats(bulk, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert bulk(format="jsonl").images == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "parquett"}, "Did you mean parquet"),
        ({"runner": "spark"}, "one of local, ray"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"rows_per_file": -1}, "rows_per_file must be"),
        ({"runner": "ray", "workers": 0}, "workers must be"),
        ({"workers": 2}, "Add --runner ray"),
    ],
    ids=str,
)
def test_config_refuses_bad_values(options, message):
    with pytest.raises(UsageError, match=message):
        BulkConfig(out="out", **options)


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text")
@pytest.mark.parametrize("format", FORMATS)
def test_row_of_a_file_whose_name_is_no_text_is_written(bulk, tmp_path, format):
    name = os.fsencode(tmp_path) + b"/b\xffd.png"
    Path(os.fsdecode(name)).write_bytes(png(1))
    assert bulk(os.fsdecode(name), format=format).ok == 1
    data = (tmp_path / f"out/part-00000.{format}").read_bytes()
    assert {"parquet": b"b\\udcffd.png", "jsonl": b"b\\udcffd.png", "csv": b"b\xffd.png"}[format] in data
