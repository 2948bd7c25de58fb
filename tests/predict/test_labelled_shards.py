"""Labelled photos in tar shards give what the same photos in class folders give."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from weightnet.errors import DataError
from weightnet.predict.classifier import Classifier
from weightnet.predict.evaluate import evaluate
from weightnet.predict.labelled import LabelledPhotos, read_labelled_photos
from weightnet.predict.report import render_report

from ..conftest import write_tar

FOLDERS = ("dog", "cat", "house")  # in the order of the shards' numbers, which is not the model's


@pytest.fixture(scope="module")
def classifier(tiny_network) -> Classifier:
    return Classifier(tiny_network, device="cpu", batch_size=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same photos in class folders and in two shards, one of each class unreadable."""
    rng = np.random.default_rng(0)
    shards: list[dict[str, bytes]] = [{}, {}]
    for number, folder in enumerate(FOLDERS):
        (tmp_path / "folders" / folder).mkdir(parents=True)
        for photo in range(5):
            small = rng.integers(0, 256, (4, 5, 3), np.uint8)
            picture = cv2.imencode(".png", cv2.resize(small, (60, 48), interpolation=2))[1].tobytes()
            picture = picture if photo else b"no photo"
            (tmp_path / "folders" / folder / f"{photo}.png").write_bytes(picture)
            shards[photo % 2] |= {f"./{folder}/{photo}.png": picture, f"./{folder}/{photo}.cls": str(number).encode()}
    for number, members in enumerate(shards):
        write_tar(tmp_path / "shards" / "val" / f"{number}.tar", members)
    (tmp_path / "shards" / "classes.csv").write_text("\n".join(["label", *FOLDERS]))
    return tmp_path


def test_shards_give_the_figures_of_folders(classifier, data):
    in_shards, in_folders = (
        evaluate(classifier, read_labelled_photos(data / name, classifier.card.classes))
        for name in ("shards/val", "folders")
    )
    assert in_shards.figures == pytest.approx(in_folders.figures)
    assert in_shards.confusion().tolist() == in_folders.confusion().tolist()
    assert [result.images for result in in_shards.classes] == [4, 4, 4]
    assert [result.folders for result in in_shards.classes] == [("1",), ("0",), ("2",)]  # cat, dog, house
    assert sorted(path for path, _ in in_shards.unreadable) == [
        f"{data}/shards/val/0.tar/./{folder}/0.png" for folder in sorted(FOLDERS)
    ]
    pages = [render_report(result, model="tiny") for result in (in_shards, in_folders)]
    assert pages[0].count("data:image/jpeg") == pages[1].count("data:image/jpeg") > 0


def test_numbers_are_the_models_own_without_a_table(classifier, data):
    (data / "shards" / "classes.csv").unlink()
    photos = read_labelled_photos(data / "shards", classifier.card.classes)
    assert photos.folders == {"0": 0, "1": 1, "2": 2}
    assert np.bincount(photos.labels).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("label\ndog\ncat\n", "must be one of the 2 rows of .*classes.csv, counted from 0. Got 2"),
        (
            "label\ndog\ncat\nhome\n",
            "Every class number of the shards must stand for one class.* Got '2' .*says 'home'",
        ),
        ("folder\ndog\ncat\nhouse\n", "must have the column label"),
    ],
)
def test_table_that_does_not_fit_is_refused(classifier, data, table, message):
    (data / "shards" / "classes.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        read_labelled_photos(data / "shards", classifier.card.classes)


def test_number_beyond_the_models_classes_is_refused(classifier, data):
    (data / "shards" / "classes.csv").unlink()
    write_tar(data / "shards" / "val" / "2.tar", {"a.png": b"", "a.cls": b"7"})
    with pytest.raises(DataError, match=r"must be one of the model's 5 classes, without classes.csv.* Got 7"):
        read_labelled_photos(data / "shards", classifier.card.classes)


def test_shard_that_shrinks_meanwhile_is_said(classifier, data):
    photos = read_labelled_photos(data / "shards", classifier.card.classes)
    assert isinstance(photos, LabelledPhotos)
    with (data / "shards" / "val" / "1.tar").open("r+b") as shard:
        shard.truncate(600)
    with pytest.raises(DataError, match=r"Photos must stay where they are.*1\.tar.* Copy the shard again"):
        evaluate(classifier, photos)


def test_class_folders_count_before_shards(classifier, data):
    write_tar(data / "folders" / "rest.tar", {"a.png": b""})
    assert len(read_labelled_photos(data / "folders", classifier.card.classes)) == 15
