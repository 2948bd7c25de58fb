"""A listing is the same photos in the same order, in ranges or whole, whatever they lie in."""

import gzip
import io
import os

import pytest

from weightnet.bulk import sources
from weightnet.bulk.sources import Files, Listing, list_photos
from weightnet.errors import ImageError, UsageError
from weightnet.images.shards import index_shard

from .conftest import png, shard, table


@pytest.fixture
def listed(tmp_path):
    def run(*inputs, reports=None, **options) -> Listing:
        return list_photos(
            map(str, inputs), cache=str(tmp_path), report=pytest.fail if reports is None else reports.append, **options
        )

    return run


def paths(listing: Listing) -> list[str]:
    return [path for path, _ in listing.photos(0, len(listing))]


@pytest.fixture
def everything(tmp_path):
    """A folder with four files, a shard of three photos and a table of three."""
    (tmp_path / "all/sub").mkdir(parents=True)
    for name in ("a.png", "z.jpg", "sub/b.PNG", "sub/c.webp"):
        (tmp_path / "all" / name).write_bytes(png(1))
    (tmp_path / "all/notes.md").write_text("no photo")
    shard(tmp_path / "all/m.tar", {f"{seed}.png": png(seed) for seed in range(3)} | {"0.cls": b"1"})
    table(tmp_path / "all/n.parquet", [png(seed) for seed in range(3)], "binary", group=2)
    return tmp_path / "all"


def test_folder_lists_photos_shards_and_tables_by_name(listed, everything):
    listing = listed(everything)
    found = [path.removeprefix(f"{everything}/") for path in paths(listing)]
    assert found == [
        *("a.png", "m.tar/0.png", "m.tar/1.png", "m.tar/2.png", "n.parquet#0", "n.parquet#1", "n.parquet#2"),
        *("z.jpg", "sub/b.PNG", "sub/c.webp"),
    ]


def test_folder_with_the_signs_of_a_pattern_in_its_name_is_a_folder(listed, tmp_path):
    (tmp_path / "a[1]*").mkdir()
    (tmp_path / "a[1]*/x.png").write_bytes(b"")
    assert paths(listed(tmp_path / "a[1]*")) == [f"{tmp_path}/a[1]*/x.png"]


def test_every_range_is_a_part_of_the_whole(listed, everything):
    listing = listed(everything)
    whole = list(listing.photos(0, len(listing)))
    assert len(whole) == len(listing) == 10
    for start in range(11):
        for stop in range(start, 11):
            assert list(listing.photos(start, stop)) == whole[start:stop]


def test_contents_of_shards_and_tables_are_their_bytes(listed, everything):
    contents = dict(listed(everything).photos(1, 7))
    for seed in range(3):
        assert contents[f"{everything}/m.tar/{seed}.png"] == png(seed)
        assert contents[f"{everything}/n.parquet#{seed}"] == png(seed)


def test_pattern_lists_what_it_matches(listed, everything):
    assert paths(listed(everything / "*.png")) == [f"{everything}/a.png"]
    assert paths(listed(everything / "m.*")) == [f"{everything}/m.tar/{seed}.png" for seed in range(3)]


def test_list_names_files_and_shards_as_it_is_written(listed, everything, tmp_path):
    text = f"\ufeff{everything}/z.jpg\r\n\r\n{everything}/m.tar\nwith space .png\n*.jpg".encode()
    (tmp_path / "list.txt").write_bytes(text)
    expected = [f"{everything}/z.jpg", *(f"{everything}/m.tar/{n}.png" for n in range(3)), "with space .png", "*.jpg"]
    assert paths(listed(tmp_path / "list.txt")) == expected
    assert paths(listed("-", stdin=io.BytesIO(text))) == expected


def test_list_that_is_missing_is_refused(listed, tmp_path):
    with pytest.raises(UsageError, match="A list of photos must be a readable file"):
        listed(tmp_path / "list.txt")


def test_shard_that_is_damaged_is_one_photo_with_an_error(listed, everything):
    (everything / "m.tar").write_bytes(b"x" * 1000)
    reports: list[str] = []
    listing = listed(everything, reports=reports)
    assert len(listing) == 8
    path, source = next(listing.photos(1, 2))
    assert path == f"{everything}/m.tar"
    assert isinstance(source, ImageError)
    assert "A shard must be a whole, undamaged tar file" in str(source)
    assert len(reports) == 1


@pytest.mark.parametrize("name", ["m.tar.gz", "m.tgz", "M.TAR.XZ"])
def test_shard_that_is_compressed_is_said_to_be(listed, everything, name):
    (everything / name).write_bytes(gzip.compress(b"x"))
    reports: list[str] = []
    ((path, source),) = listed(everything / name, reports=reports).photos(0, 1)
    assert path == str(everything / name)
    assert "compressed by gzip" in str(source)
    assert len(reports) == 1


def test_index_of_a_shard_is_read_once_for_all_its_partitions(listed, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(sources, "index_shard", lambda *args, **kept: read.append(args) or index_shard(*args, **kept))
    photos = listed(shard(tmp_path / "s.tar", {f"{seed}.png": png(seed) for seed in range(6)}))
    read.clear()
    names = [photo.path for start in range(0, 6, 2) for photo in photos.photos(start, start + 2)]
    assert len(names) == 6
    assert len(read) == 1


def test_shard_that_shrinks_after_it_was_listed_gives_errors(listed, tmp_path):
    path = shard(tmp_path / "s.tar", {f"{seed}.png": png(seed) for seed in range(4)})
    listing = listed(path)
    shard(tmp_path / "s.tar", {"0.png": png(0)})
    os.utime(path, ns=(1, 1))
    first, *rest = listing.photos(0, 4)
    assert first.source == png(0)
    assert len(rest) == 3
    assert all(isinstance(source, ImageError) for _, source in rest)
    os.unlink(path)
    assert [path for path, source in listing.photos(1, 3) if isinstance(source, ImageError)] == [
        f"{path}#1",
        f"{path}#2",
    ]


@pytest.mark.parametrize("change", ["path", "order", "shard", "table", "column"])
def test_digest_changes_with_the_photos(listed, everything, change):
    names = [everything / "a.png", everything / "z.jpg", everything / "m.tar", everything / "n.parquet"]
    before = listed(*names)
    assert listed(*names).digest() == before.digest()
    if change == "path":
        names[0] = everything / "b.png"
    elif change == "order":
        names[:2] = names[1::-1]
    elif change == "shard":
        shard(everything / "m.tar", {f"{seed}.png": png(seed + 1) for seed in range(3)})
        os.utime(everything / "m.tar", ns=(1, 1))
    elif change == "table":
        os.utime(everything / "n.parquet", ns=(1, 1))
    else:
        table(everything / "n.parquet", [png(seed) for seed in range(3)], "binary", name="picture")
    column = "picture" if change == "column" else "image"
    assert listed(*names, image_column=column).digest() != before.digest()


def test_paths_take_little_more_memory_than_their_text():
    files = Files()
    for number in range(100_000):
        files.add(f"/data/photos/{number:08d}.jpg")
    assert len(files) == 100_000
    held = len(files._text) + files._ends.itemsize * len(files._ends)
    assert held < 100_000 * (len("/data/photos/00000000.jpg") + 9)
    assert next(files.photos(99_999, 100_000)).path == "/data/photos/00099999.jpg"
