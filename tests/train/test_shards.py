"""Tests of training on tar shards."""

from pathlib import Path

import pytest
import torch

from weightnet.errors import DataError, ImageError
from weightnet.images.labels import ClassLabel, imagenet_classes
from weightnet.train.folders import PhotoFolder, read_folders
from weightnet.train.loop import fit
from weightnet.train.shards import PhotoShards, read_photos, read_shards

from ..conftest import write_tar
from .conftest import MakeConfig


def pack(folder: PhotoFolder, split: Path, shards: int = 3) -> None:
    """Pack a split's photos, in their order, into some shards."""
    bounds = [len(folder) * part // shards for part in range(shards + 1)]
    for part in range(shards):
        members: dict[str, bytes] = {}
        for index in range(bounds[part], bounds[part + 1]):
            name = f"{index:06}"
            members[f"{name}.cls"] = str(folder.labels[index]).encode()
            members[f"{name}.png"] = Path(str(folder.source(index))).read_bytes()
        write_tar(split / f"{part:03}.tar", members)


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """The photos of `photos`, in shards."""
    root = tmp_path / "shards"
    for folder, split in zip(read_folders(photos), ("train", "val"), strict=True):
        pack(folder, root / split)
    (root / "classes.csv").write_text("label\nblue\ngreen\nred\n")
    return root


def test_read_shards_gives_what_was_packed(photos: Path, shards: Path) -> None:
    for packed, folder in zip(read_photos(shards), read_photos(photos), strict=True):
        assert isinstance(packed, PhotoShards)
        assert not isinstance(folder, PhotoShards)
        assert packed.labels.tolist() == folder.labels.tolist()
        assert packed.classes == folder.classes == (ClassLabel("blue"), ClassLabel("green"), ClassLabel("red"))
        for index in range(len(folder)):
            assert packed.source(index) == Path(str(folder.source(index))).read_bytes()
    assert packed.name(0) == "val/000.tar/000000.png"
    assert packed.digest() != folder.digest()


@pytest.mark.parametrize("cache", [0, 48])
def test_fit_on_shards_equals_fit_on_folders(shards: Path, make_config: MakeConfig, tmp_path: Path, cache: int) -> None:
    for name, data in (("of_folders", make_config().data), ("of_shards", str(shards))):
        fit(make_config(data=data, out=str(tmp_path / name), cache=cache))
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("of_folders", "of_shards")
    )
    assert first["history"] == second["history"]
    assert all(torch.equal(value, second["network"][name]) for name, value in first["network"].items())


def test_fit_counts_photos_that_a_shard_does_not_hold_whole(shards: Path, make_config: MakeConfig) -> None:
    write_tar(shards / "train" / "003.tar", {"a.cls": b"0", "a.jpg": b"no photo"})
    config = make_config(data=str(shards))
    fit(config)
    assert "train/003.tar/a.jpg" in Path(config.out, "unreadable.csv").read_text()


def test_photo_of_a_shard_that_has_gone_is_an_image_error(shards: Path) -> None:
    train, _ = read_shards(shards)
    (shards / "train" / "000.tar").unlink()
    with pytest.raises(ImageError, match="shard must be a readable file"):
        train.source(0)


def test_read_shards_refuses_a_table_that_is_a_folder(shards: Path) -> None:
    (shards / "classes.csv").unlink()
    (shards / "classes.csv").mkdir()
    with pytest.raises(DataError, match="must be readable"):
        read_shards(shards)


def test_read_shards_without_a_table_numbers_classes(shards: Path) -> None:
    (shards / "classes.csv").unlink()
    assert [entry.label for entry in read_shards(shards)[0].classes] == ["class 0", "class 1", "class 2"]


def test_read_shards_of_a_thousand_classes_are_imagenets(tmp_path: Path) -> None:
    for split in ("train", "val"):
        members = {f"{i}.{kind}": str(i).encode() for i in range(1000) for kind in ("jpg", "cls")}
        write_tar(tmp_path / split / "a.tar", members)
    assert read_shards(tmp_path)[0].classes == imagenet_classes()


@pytest.mark.parametrize(
    ("split", "members", "table", "problem"),
    [
        ("train", {"a.jpg": b""}, "", r"class number beside it, as KEY.cls. Got a.jpg in .*9.tar without one"),
        ("train", {"a.jpg": b"", "a.cls": b"one"}, "", "Got a.jpg in .*9.tar without one"),
        ("train", {"a.jpg": b"", "a.cls": b"-1"}, "", "Got a.jpg in .*9.tar without one"),
        ("train", {"a.jpg": b"", "a.cls": b"9000000"}, "", "at most 1000000. Got 9000000"),
        ("train", {"a.jpg": b"", "a.cls": b"4"}, "", r"Got 5 classes, without photos: \[3\]"),
        ("val", {"a.jpg": b"", "a.cls": b"3"}, "", "one of the 3 in training, counted from 0. Got 3"),
        ("train", {}, "label\na\nb\n", "Got 2 rows and the class number 2"),
        ("train", {}, "label\na\nb\nc\nd\n", r"Got 4 classes, without photos: \[3\]"),
        ("train", {}, "label\na\nb\nb\n", "no two the same. Got 'b'"),
        ("train", {}, "name\na\nb\nc\n", "must have the columns label"),
        ("train", {}, "label,imagenet_index\na,1\nb,x\nc,3\n", "Got 'x' for b"),
    ],
)
def test_read_shards_refuses(shards: Path, split: str, members: dict[str, bytes], table: str, problem: str) -> None:
    write_tar(shards / split / "9.tar", members)
    if table:
        (shards / "classes.csv").write_text(table)
    else:
        (shards / "classes.csv").unlink()
    with pytest.raises(DataError, match=problem):
        read_shards(shards)


def test_read_shards_refuses_a_split_without_photos(shards: Path) -> None:
    for shard in (shards / "val").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="Got 0 shards without any"):
        read_photos(shards)


def test_read_shards_refuses_a_shard_that_is_cut_off(shards: Path) -> None:
    shard = shards / "train" / "001.tar"
    shard.write_bytes(shard.read_bytes()[:-11000])
    with pytest.raises(DataError, match="whole, undamaged tar file"):
        read_photos(shards)
