"""Shards are read as tar itself reads them, and damaged or hostile ones are refused."""

import gzip
import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from weightnet.errors import DataError, ImageError
from weightnet.images import shards
from weightnet.images.shards import index_shard, read_member

from ..conftest import write_tar

MEMBERS = {
    "a/0001.jpg": b"first photo",
    "a/0001.cls": b"7\n",
    "a/0002.jpeg": b"second",
    "a/0002.json": b'{"label": 3, "text": "x"}',
    "a/0003.PNG": b"",
    "a/0003.cls": b"cat",
    "b.c/0001.seg.webp": b"fourth",
    "b.c/0001.cls": b"0",
    "a/notes.txt": b"no photo",
    "a/._0001.jpg": b"a Mac's shadow",
}


def patched_header(path: Path, offset: int, size_field: bytes) -> None:
    """Write another size into a header, with the checksum that makes it valid."""
    raw = bytearray(path.read_bytes())
    header = raw[offset : offset + 512]
    header[124:136] = size_field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[offset : offset + 512] = header
    path.write_bytes(raw)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "s.tar", MEMBERS)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_index_finds_the_photos_with_their_keys_and_labels(tmp_path, format):
    index = index_shard(write_tar(tmp_path / "s.tar", MEMBERS, format=format))
    assert index.names == ("a/0001.jpg", "a/0002.jpeg", "a/0003.PNG", "b.c/0001.seg.webp")
    assert index.keys == ("a/0001", "a/0002", "a/0003", "b.c/0001")
    assert index.labels.tolist() == [7, 3, -1, 0]
    assert len(index) == 4


def test_index_without_labels_has_none(tmp_path):
    assert index_shard(write_tar(tmp_path / "s.tar", {"x.jpg": b"x"})).labels is None


def test_index_of_an_empty_archive_is_empty(tmp_path):
    index = index_shard(write_tar(tmp_path / "s.tar", {}))
    assert len(index) == 0
    assert index.offsets.shape == (0,)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_index_reads_long_names_and_bytes_that_are_not_text(tmp_path, format):
    name = "d" * 90 + "/" + "e" * 200 + "ü\udcff.jpg"
    path = write_tar(tmp_path / "s.tar", {name: b"photo"}, format=format)
    index = index_shard(path)
    assert index.names == (name,)
    assert index_shard(path).names == (name,)  # the kept one
    assert read_member(path, int(index.offsets[0]), int(index.sizes[0])) == b"photo"


def test_index_takes_a_hard_link_for_the_photo_it_names(tmp_path):
    path = tmp_path / "s.tar"
    (tmp_path / "x.jpg").write_bytes(b"photo")
    os.link(tmp_path / "x.jpg", tmp_path / "y.jpg")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "x.jpg", "x.jpg")
        tar.add(tmp_path / "y.jpg", "y.jpg")
    index = index_shard(path)
    assert index.names == ("x.jpg", "y.jpg")
    assert [read_member(path, int(o), int(n)) for o, n in zip(index.offsets, index.sizes, strict=True)] == [
        b"photo"
    ] * 2


def test_members_read_are_those_that_tar_reads(shard):
    index = index_shard(shard)
    with tarfile.open(shard) as tar:
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            assert read_member(shard, int(offset), int(size)) == tar.extractfile(name).read()


def test_index_is_kept_and_used_again(shard, monkeypatch):
    first = index_shard(shard)
    monkeypatch.setattr(shards, "_Walk", None)
    again = index_shard(shard)
    assert again.names == first.names
    assert again.keys == first.keys
    np.testing.assert_array_equal(again.offsets, first.offsets)
    np.testing.assert_array_equal(again.sizes, first.sizes)
    np.testing.assert_array_equal(again.labels, first.labels)


def test_index_kept_in_a_folder_leaves_the_shards_own_alone(shard, tmp_path):
    (tmp_path / "kept").mkdir()
    index_shard(shard, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert list(tmp_path.glob(".*")) == []


def test_index_of_a_changed_shard_is_made_again(shard):
    index_shard(shard)
    write_tar(shard, {"new.jpg": b"x"})
    os.utime(shard, ns=(0, time.time_ns() + 10**9))
    assert index_shard(shard).names == ("new.jpg",)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 10**5])
def test_kept_index_that_is_damaged_is_made_again(shard, content):
    index_shard(shard)
    shard.with_name(".s.tar.index.json").write_bytes(content)
    assert len(index_shard(shard)) == 4


def test_index_needs_no_place_to_be_kept(shard, tmp_path):
    assert len(index_shard(shard, cache=tmp_path / "missing")) == 4


def test_index_refuses_compression_by_name(shard):
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match="by gzip"):
        index_shard(shard)


@pytest.mark.parametrize("keep", [0, 100, 600, 512 * 3, 512 * 6, 512 * 7 + 3])
def test_index_refuses_a_shard_that_is_cut_off(shard, keep):
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match="whole, undamaged tar"):
        index_shard(shard)


def test_index_refuses_a_damaged_header_in_the_middle(shard):
    raw = bytearray(shard.read_bytes())
    raw[1024] ^= 255
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="damaged header at byte 1024"):
        index_shard(shard)


def test_index_refuses_joined_archives(shard):
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(DataError, match="after its end"):
        index_shard(shard)


def test_index_refuses_a_photo_named_twice(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, {"x.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"), io.BytesIO())
    with pytest.raises(DataError, match=r"name each photo once. Got 'x\.jpg'"):
        index_shard(path)


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",  # eight gigabytes
        b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,  # nearly 2^63
        b"\xff" + b"\xff" * 9 + b"\xfc\x00",  # -1024: it would lead back
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"5"])
def test_index_refuses_impossible_sizes(shard, size, kind):
    raw = bytearray(shard.read_bytes())
    raw[1024 + 156 : 1024 + 157] = kind
    shard.write_bytes(raw)
    patched_header(shard, 1024, size)
    with pytest.raises(DataError, match="whole, undamaged tar"):
        index_shard(shard)


def test_index_refuses_a_header_that_fills_the_memory(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"x" * 200 + ".jpg": b"1"}, format=tarfile.GNU_FORMAT)
    patched_header(path, 0, b"%011o\0" % (2 << 30))
    os.truncate(path, 3 << 30)
    with pytest.raises(DataError, match="header of 2147483648 bytes"):
        index_shard(path)


def test_index_refuses_a_sparse_photo(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"x.jpg": b"1"}, format=tarfile.GNU_FORMAT)
    raw = bytearray(path.read_bytes())
    raw[156:157] = b"S"
    path.write_bytes(raw)
    patched_header(path, 0, raw[124:136])
    with pytest.raises(DataError, match="sparse"):
        index_shard(path)


def test_index_refuses_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.tar", "a\0b"):
        with pytest.raises(DataError, match="readable file"):
            index_shard(path)


def test_member_beyond_the_end_is_an_error_of_the_photo(shard):
    size = shard.stat().st_size
    with pytest.raises(ImageError, match="Got 10 of 20 bytes"):
        read_member(shard, size - 10, 20)


def test_member_larger_than_any_photo_is_refused_unread(shard):
    with pytest.raises(ImageError, match="at most 100 MB"):
        read_member(shard, 0, 10**12)


def test_member_of_a_missing_shard_is_an_error_of_the_photo(tmp_path):
    with pytest.raises(ImageError, match="readable file"):
        read_member(tmp_path / "missing.tar", 0, 1)
