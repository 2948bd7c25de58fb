"""Class folders are matched by name."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from weightnet.errors import DataError
from weightnet.images.labels import ClassLabel, imagenet_classes
from weightnet.predict.labelled import read_labelled_photos

CLASSES = (
    ClassLabel("cat", "n02121620"),
    ClassLabel("dog", "n02084071"),
    ClassLabel("grand piano"),
    ClassLabel("Café"),
    ClassLabel("tench"),  # without a WordNet id
    ClassLabel("cougar body", "n02125311"),
    ClassLabel("cougar face", "n02125311"),
    ClassLabel("goldfish", "n00000001"),
    ClassLabel("Bass"),
    ClassLabel("bass", "n02565573"),
    ClassLabel("BASS", "n04141076"),
)


def make(root: Path, *folders: str, photo: str = "1.jpg") -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / photo).touch()
    return root


def matched(root: Path) -> dict[str, str]:
    return {name: CLASSES[index].label for name, index in read_labelled_photos(root, CLASSES).folders.items()}


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("n02121620", "cat"),
        ("n02084071-Any_dog", "dog"),
        ("n02084071_cat", "dog"),  # the id comes before the label
        ("cat", "cat"),
        ("CAT", "cat"),
        ("grand_piano", "grand piano"),
        ("Grand-  Piano ", "grand piano"),
        (unicodedata.normalize("NFD", "café"), "Café"),
        ("n01440764", "tench"),  # ImageNet's label of this id
        ("n09999999_cat", "cat"),
        ("n02125311_cougar-face", "cougar face"),
        ("Bass", "Bass"),
        ("bass", "bass"),
    ],
)
def test_folder_is_matched_by_id_then_label(tmp_path, folder, label):
    assert matched(make(tmp_path, folder)) == {folder: label}


@pytest.mark.parametrize(
    ("folder", "hint"),
    [
        ("catt", "Did you mean cat?"),
        ("grandpiano", "Did you mean grand piano?"),
        ("n02123045", "n02123045 is 'tabby' in ImageNet."),
        ("n01443537", "n01443537 is 'goldfish' in ImageNet. Did you mean goldfish"),  # the class has another id
        ("n02125311", "It may be 'cougar body' or 'cougar face'."),
        ("bAss", "It may be 'Bass' or 'bass' or 'BASS'."),
        ("0", "'0' in "),
        ("_", "'_' in "),
        ("<script>", "'<script>'"),
        ("two\nlines", r"'two\nlines'"),
        (os.fsdecode(b"caf\xe9"), r"'caf\udce9'"),
    ],
)
def test_folder_that_fits_no_class_is_named_with_a_hint(tmp_path, folder, hint):
    make(tmp_path, "cat", folder)
    with pytest.raises(DataError) as caught:
        read_labelled_photos(tmp_path, CLASSES)
    text = str(caught.value)
    assert text.startswith("Every class folder must be called like one class of the model")
    assert repr(folder) in text
    assert hint in text
    assert "'cat'" not in text


def test_many_folders_that_fit_no_class_are_counted(tmp_path):
    make(tmp_path, *(f"thing {number}" for number in range(7)))
    with pytest.raises(DataError, match=r"'thing 0', 'thing 1', 'thing 2' and 4 more in "):
        read_labelled_photos(tmp_path, CLASSES)


def test_order_does_not_matter(tmp_path):
    make(tmp_path, "dog", "cat", "tench")
    for classes in (CLASSES, CLASSES[::-1]):
        photos = read_labelled_photos(tmp_path, classes)
        found = {
            Path(path).parent.name: classes[label].label
            for path, label in zip(photos.paths, photos.labels, strict=True)
        }
        assert found == {"cat": "cat", "dog": "dog", "tench": "tench"}


@pytest.mark.parametrize("name", ["wnid", "label"])
def test_every_class_of_imagenet_is_found(tmp_path, name):
    classes = [imagenet_classes()[index] for index in np.random.default_rng(0).permutation(1000)]
    make(tmp_path, *(getattr(entry, name).replace("/", "_") for entry in classes))
    photos = read_labelled_photos(tmp_path, classes)
    assert {folder: getattr(classes[index], name) for folder, index in photos.folders.items()} == {
        folder: folder for folder in photos.folders
    }
    assert sorted(photos.folders.values()) == list(range(1000))


def test_photos_are_those_that_predict_finds(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.jpg", "notes.txt", ".hidden.jpg", ".hidden/d.jpg"):
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).touch()
    (tmp_path / "loose.jpg").touch()
    (tmp_path / ".cache").mkdir()
    photos = read_labelled_photos(tmp_path, CLASSES)
    assert [os.path.relpath(path, tmp_path) for path in photos.paths] == ["cat/a.PNG", "cat/b.jpg", "cat/deep/er/c.jpg"]
    assert photos.labels.tolist() == [0, 0, 0]
    assert photos.labels.dtype == np.int64


def test_links_are_followed_and_their_circles_end(tmp_path):
    make(tmp_path / "elsewhere", "photos")
    make(tmp_path / "data", "cat")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "photos")
    (tmp_path / "data" / "cat" / "self").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data" / "circle")
    photos = read_labelled_photos(tmp_path / "data", CLASSES)
    names = [os.path.relpath(path, tmp_path / "data") for path in photos.paths]
    assert names == ["cat/1.jpg", "cat/gone.jpg", "dog/1.jpg"]


@pytest.mark.parametrize("folders", [("train/dog", "val/cat"), ("val/cat",)])
def test_data_folder_stands_for_its_validation_photos(tmp_path, folders):
    make(tmp_path, *folders)
    photos = read_labelled_photos(tmp_path, CLASSES)
    assert photos.root == os.path.join(tmp_path, "val")
    assert dict(photos.folders) == {"cat": 0}


def test_class_may_be_called_like_a_split(tmp_path):
    make(tmp_path, "train", "cat")
    photos = read_labelled_photos(tmp_path, [ClassLabel("cat"), ClassLabel("train")])
    assert dict(photos.folders) == {"cat": 0, "train": 1}


@pytest.mark.parametrize(("data", "table"), [("", ""), ("val", ""), ("val", "val")])
def test_table_says_what_folders_are(tmp_path, data, table):
    make(tmp_path / "val", "cat", "kitten", "c", "0")
    (tmp_path / "train").mkdir()
    text = "folder,label,wnid\nkitten,cat,\nc,,n02084071\n0,Grand_Piano,n00000000\nabsent,cat,\ncat,dog,n02121620\n"
    (tmp_path / table / "classes.csv").write_text(text, "utf-8-sig")
    assert matched(tmp_path / data) == {"cat": "cat", "kitten": "cat", "c": "dog", "0": "grand piano"}


def test_table_beside_a_folder_that_is_no_split_is_not_read(tmp_path):
    make(tmp_path / "holiday", "cat")
    (tmp_path / "classes.csv").write_text("folder,label\ncat,dog\n")
    assert matched(tmp_path / "holiday") == {"cat": "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"folder;label\ncat;cat\n", "must have the columns folder and label"),
        (b"", "must have the columns folder and label"),
        (b"folder,label\n\xff,cat\n", "must be a table in CSV and UTF-8"),
        (b"folder,label\ncat,cat\ncat,dog\n", "Got two that differ for 'cat'"),
        (b"folder,label\ncat,unicorn\n", r"Got 'cat' \(classes\.csv says 'unicorn'\."),
        (b"folder,label\n" + b"x" * 200_000, "must be a table in CSV and UTF-8"),
    ],
)
def test_table_that_is_none_is_refused(tmp_path, text, message):
    make(tmp_path, "cat")
    (tmp_path / "classes.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_labelled_photos(tmp_path, CLASSES)


def test_missing_or_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="A data folder must be a folder"):
        read_labelled_photos(tmp_path / "missing", CLASSES)
    with pytest.raises(DataError, match="must hold one folder of photos per class"):
        read_labelled_photos(tmp_path, CLASSES)
    (tmp_path / "1.jpg").touch()
    with pytest.raises(DataError, match="must be a folder"):
        read_labelled_photos(tmp_path / "1.jpg", CLASSES)
    make(tmp_path, "dog")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"Every class folder must hold photos\. Got none in .*cat\."):
        read_labelled_photos(tmp_path, CLASSES)


def test_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    make(tmp_path, "cat", "cat/locked")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"must be readable\. Got .*locked: .*Permission denied\. Check its rights\."):
        read_labelled_photos(tmp_path, CLASSES)
