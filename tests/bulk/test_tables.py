"""Photos come out of Parquet files as they went in, as many as the file has rows, also where it is damaged."""

import numpy as np
import pyarrow as pa
import pytest

from weightnet.bulk.tables import ParquetPhotos
from weightnet.errors import DataError, ImageError, UsageError

from .conftest import png, table

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = [png(seed) for seed in range(90)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("group", [1, 7, 50, 1000])
def test_ranges_are_the_cells(tmp_path, kind, group):
    path = table(tmp_path / "t.parquet", CELLS, kind, group=group)
    photos = ParquetPhotos.open(path, "image")
    assert len(photos) == 90
    for start, stop in ((0, 90), (0, 1), (6, 8), (31, 34), (40, 90), (89, 90), (5, 5)):
        expected = [(f"{path}#{row}", CELLS[row]) for row in range(start, stop)]
        assert list(photos.photos(start, stop)) == expected


def test_group_is_not_read_as_a_whole(tmp_path):
    photos = [np.random.default_rng(seed).bytes(10_000) for seed in range(6000)]
    listed = ParquetPhotos.open(table(tmp_path / "t.parquet", photos, pa.binary(), group=len(photos)), "image")
    before = pa.total_allocated_bytes()
    reading = listed.photos(0, len(photos))
    assert next(reading)[1] == photos[0]
    assert pa.total_allocated_bytes() - before < 25e6, "of 60 MB: two pages of 1,024 photos"
    assert sum(1 for _ in reading) == len(photos) - 1


def test_cells_of_hugging_face_are_bytes_or_else_a_path(tmp_path):
    cells = [{"bytes": b"a", "path": "x.jpg"}, {"bytes": None, "path": "x.jpg"}, {"bytes": None, "path": None}, None]
    photos = ParquetPhotos.open(table(tmp_path / "t.parquet", cells, HUGGING_FACE), "image")
    first, second, *others = (source for _, source in photos.photos(0, 4))
    assert (first, second) == (b"a", "x.jpg")
    assert all(isinstance(source, ImageError) and "empty cell" in str(source) for source in others)


def test_column_may_have_another_name(tmp_path):
    path = table(tmp_path / "t.parquet", CELLS[:1], pa.binary(), name="picture")
    assert next(ParquetPhotos.open(path, "picture").photos(0, 1))[1] == CELLS[0]


@pytest.mark.parametrize("column", ["image", "number"])
def test_column_that_holds_no_photos_is_refused_with_those_there_are(tmp_path, column):
    path = table(tmp_path / "t.parquet", CELLS[:1], pa.binary(), name="picture")
    with pytest.raises(UsageError, match=r"number \(int64\), picture \(binary\)"):
        ParquetPhotos.open(path, column)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_file_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match="A Parquet file must be readable"):
        ParquetPhotos.open(str(tmp_path / "t.parquet"), "image")


def test_damaged_pages_give_errors_for_their_rows_alone(tmp_path):
    path = tmp_path / "t.parquet"
    cells = [bytes([seed]) * 3000 for seed in range(60)]
    photos = ParquetPhotos.open(table(path, cells, pa.binary(), group=20), "image")
    data = bytearray(path.read_bytes())
    with pa.parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
        begin = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found = list(photos.photos(0, 60))
    assert [name for name, _ in found] == [f"{path}#{row}" for row in range(60)]
    assert [source for _, source in found[:20]] == cells[:20]
    assert all(isinstance(source, ImageError) for _, source in found[20:40])
    assert [source for _, source in found[40:]] == cells[40:]


def test_file_that_changes_after_it_was_listed_gives_as_many_rows(tmp_path):
    path = tmp_path / "t.parquet"
    photos = ParquetPhotos.open(table(path, CELLS[:9], pa.binary()), "image")
    table(path, CELLS[:4], pa.binary())
    found = list(photos.photos(2, 9))
    assert [source for _, source in found[:2]] == CELLS[2:4]
    assert all(isinstance(source, ImageError) for _, source in found[2:])
    assert len(found) == 7
    path.unlink()
    assert len(list(photos.photos(2, 9))) == 7


@pytest.mark.parametrize("content", [b"", b"PAR1" + b"x" * 100])
def test_file_that_is_cut_off_after_it_was_listed_gives_as_many_rows(tmp_path, content):
    path = tmp_path / "t.parquet"
    photos = ParquetPhotos.open(table(path, CELLS[:9], pa.binary()), "image")
    path.write_bytes(content)
    found = list(photos.photos(2, 9))
    assert [name for name, _ in found] == [f"{path}#{row}" for row in range(2, 9)]
    assert all(isinstance(source, ImageError) for _, source in found)
