"""Data folders, whole and broken."""

from pathlib import Path

import pytest

from weightnet.errors import DataError
from weightnet.images.labels import ClassLabel
from weightnet.train.folders import read_folders


def make(root: Path, *names: str) -> Path:
    """Make a data folder of empty files, by "class/photo", in both splits."""
    for name in names:
        for split in ("train", "val"):
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make(tmp_path, "dog/1.jpg", "dog/2.PNG", "cat/3.webp")


def test_read_folders_sorts_by_class_then_name(data: Path) -> None:
    make(data, "cat/20.jpg", "cat/10.jpg")
    train, val = read_folders(data)
    assert train.files == ("cat/10.jpg", "cat/20.jpg", "cat/3.webp", "dog/1.jpg", "dog/2.PNG")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.classes == (ClassLabel("cat"), ClassLabel("dog"))
    assert train.source(1) == f"{data}/train/cat/20.jpg"
    assert val.name(4) == "val/dog/2.PNG"
    assert len(val) == 5


def test_read_folders_passes_over_hidden_and_other_files(data: Path) -> None:
    make(data, "cat/.hidden.jpg", "cat/notes.txt", ".ipynb_checkpoints/1.jpg")
    (data / "train" / "README").touch()
    assert len(read_folders(data)[0]) == 3


def test_read_folders_knows_wordnet_ids(tmp_path: Path) -> None:
    make(tmp_path, "n02123045/1.jpg", "things/1.jpg")
    assert read_folders(tmp_path)[0].classes == (ClassLabel("tabby", "n02123045", 281), ClassLabel("things"))


def test_read_folders_takes_names_and_order_from_a_table(data: Path) -> None:
    table = "folder,label,wnid,imagenet_index\r\ndog,Hund,n02084071,\r\ncat,Katze,,281\r\n"
    (data / "classes.csv").write_text(table, encoding="utf-8-sig")  # as spreadsheets save it
    train, val = read_folders(data)
    assert train.classes == val.classes == (ClassLabel("Hund", "n02084071"), ClassLabel("Katze", None, 281))
    assert train.files == ("dog/1.jpg", "dog/2.PNG", "cat/3.webp")
    assert train.labels.tolist() == [0, 0, 1]


def test_digest_is_of_names_and_classes_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    here, elsewhere = read_folders(data)[0], read_folders(make(tmp_path_factory.mktemp("b"), *_names(data)))[0]
    assert here.digest() == elsewhere.digest()
    make(data, "cat/4.jpg")
    assert read_folders(data)[0].digest() != here.digest()
    (data / "train" / "cat" / "4.jpg").rename(data / "train" / "dog" / "4.jpg")
    assert read_folders(data)[0].digest() != here.digest()


def _names(data: Path) -> list[str]:
    return [str(path.relative_to(data / "train")) for path in (data / "train").rglob("*.*")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_read_folders_wants_both_splits(data: Path, split: str) -> None:
    (data / split).rename(data / "other")
    with pytest.raises(DataError, match=f"without {split}/"):
        read_folders(data)


def test_read_folders_wants_two_classes(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg")
    with pytest.raises(DataError, match=r"at least two classes\. Got 1"):
        read_folders(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_read_folders_refuses_an_empty_class(data: Path, split: str) -> None:
    (data / split / "cat" / "3.webp").unlink()
    with pytest.raises(DataError, match=f"Got none in .*{split}/cat"):
        read_folders(data)


def test_read_folders_takes_photos_at_any_depth_but_hidden_ones(data: Path) -> None:
    for folder in ("a", "a/b", ".hidden"):
        (data / "train" / "cat" / folder).mkdir()
        (data / "train" / "cat" / folder / "0.png").touch()
    train, _ = read_folders(data)
    assert [name for name in train.files if name.startswith("cat/")] == ["cat/3.webp", "cat/a/0.png", "cat/a/b/0.png"]


def test_read_folders_follows_links_once(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "9.jpg").touch()
    (elsewhere / "back").symlink_to(data / "train" / "cat")
    (data / "train" / "cat" / "more").symlink_to(elsewhere)
    train, _ = read_folders(data)
    assert [name for name in train.files if name.startswith("cat/")] == ["cat/3.webp", "cat/more/9.jpg"]


def test_read_folders_refuses_different_classes(data: Path) -> None:
    for index in range(7):
        make(data, f"more{index}/1.jpg")
        (data / "val" / f"more{index}" / "1.jpg").unlink()
        (data / "val" / f"more{index}").rmdir()
    with pytest.raises(DataError, match=r"'more0', .*'more4' and 2 more in one of them only"):
        read_folders(data)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("folder,label\ncat,a\ndog,b\ncat,c\n", "repeated rows: 'cat'"),
        ("folder,label\ncat,a\n", "missing.* rows: 'dog'"),
        ("folder,label\ncat,a\ndog,b\nfox,c\n", "unknown.* rows: 'fox'"),
        ("folder,label\ncat,a\n,b\n", "rows: '', 'dog'"),
        ("folder,name\ncat,a\ndog,b\n", "Got columns='folder', 'name'"),
        ("folder;label\ncat;a\ndog;b\n", "between commas"),
        ("", "must have the columns"),
        ("folder,label\ncat,a\ndog,a\n", "no two the same. Got 'a'"),
        ("folder,label\ncat,a\ndog\n", "1 to 200 printable characters"),
        ('folder,label\ncat,a\ndog,"b\nc"\n', r"Got 'b\\nc'"),
        (f"folder,label\ncat,a\ndog,{'b' * 201}\n", "1 to 200 printable characters"),
        ("folder,label,imagenet_index\ncat,a,281\ndog,b,two\n", "Got 'two' for dog"),
        ("folder,label,imagenet_index\ncat,a,281\ndog,b,1000\n", "Got '1000' for dog"),
        ("folder,label,imagenet_index\ncat,a,281\ndog,b,-1\n", "Got '-1' for dog"),
        (f"folder,label,imagenet_index\ncat,a,281\ndog,b,{'1' * 5000}\n", "a number from 0 to 999"),
        ("folder,label,imagenet_index\ncat,a,281\ndog,b,1.0\n", r"Got '1\.0' for dog"),
        ("folder,label,wnid\ncat,a,\ndog,b,\x07\n", "wnid must be empty"),
        ("folder,label\ncat,a\ndog,\0\n", "printable|NUL"),
        (f'folder,label\ncat,a\ndog,"{"b" * 200_000}"\n', "CSV and UTF-8"),
    ],
)
def test_read_folders_refuses_a_bad_table(data: Path, table: str, problem: str) -> None:
    (data / "classes.csv").write_text(table, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=problem):
        read_folders(data)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_read_folders_refuses_a_table_in_another_encoding(data: Path, encoding: str) -> None:
    (data / "classes.csv").write_text("folder,label\ncat,chäte\ndog,b\n", encoding=encoding)
    with pytest.raises(DataError, match="CSV and UTF-8"):
        read_folders(data)


def test_read_folders_refuses_a_table_that_is_a_folder(data: Path) -> None:
    (data / "classes.csv").mkdir()
    with pytest.raises(DataError, match="must be readable"):
        read_folders(data)


def test_read_folders_refuses_folder_names_that_a_card_cannot_hold(data: Path) -> None:
    make(data, "a\nb/1.jpg")
    with pytest.raises(DataError, match="printable characters"):
        read_folders(data)
