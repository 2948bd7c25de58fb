import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.predict.inputs import find_images, stands_for_many


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*inputs: str) -> list[str]:
    """The paths found, with / between their parts; nothing must be reported."""
    reports: list[str] = []
    paths = [path.replace(os.sep, "/") for path in find_images(inputs, report=reports.append)]
    assert not reports
    return paths


def test_find_images_gives_named_files_as_they_are(here):
    make("a.txt", ".hidden")
    assert found("a.txt", "missing.jpg", ".hidden", "a.txt", "") == ["a.txt", "missing.jpg", ".hidden", "a.txt", ""]


def test_find_images_walks_a_folder_in_order(here):
    make("p/b.jpg", "p/a.PNG", "p/z/1.webp", "p/c/d/2.tiff", "p/c/1.gif", "p/notes.txt", "p/jpg", "p/10.bmp", "p/9.bmp")
    expected = ["p/10.bmp", "p/9.bmp", "p/a.PNG", "p/b.jpg", "p/c/1.gif", "p/c/d/2.tiff", "p/z/1.webp"]
    assert found("p") == found("p/") == expected
    assert found("./p/c") == ["./p/c/1.gif", "./p/c/d/2.tiff"]


def test_find_images_leaves_out_what_is_hidden(here):
    make("p/.a.jpg", "p/.thumbs/b.jpg", "p/c.jpg", "p/._c.jpg")
    assert found("p") == found("p/*") == found("p/**/*") == found("**/*.jpg") == ["p/c.jpg"]
    assert found("p/.thumbs", "p/.*.jpg") == ["p/.thumbs/b.jpg", "p/._c.jpg", "p/.a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["1.jpg", "2.jpg"]),
        ("[2-3].jpg", ["2.jpg"]),
        ("?.txt", ["1.txt"]),
        ("*", ["1.jpg", "1.txt", "2.jpg", "a/1.jpg", "a/x/1.jpg", "a/x/y/3.png", "b/1.jpg"]),
        ("a*", ["a/1.jpg", "a/x/1.jpg", "a/x/y/3.png"]),
        ("*/1.jpg", ["a/1.jpg", "b/1.jpg"]),
        ("*/x", ["a/x/1.jpg", "a/x/y/3.png"]),
        ("**/1.jpg", ["1.jpg", "a/1.jpg", "a/x/1.jpg", "b/1.jpg"]),
        ("**/x/*.jpg", ["a/x/1.jpg"]),
        ("a/**", ["a/1.jpg", "a/1.txt", "a/x/1.jpg", "a/x/y/3.png"]),
        ("**/*", ["1.jpg", "1.txt", "2.jpg", "a/1.jpg", "a/1.txt", "a/x/1.jpg", "a/x/y/3.png", "b/1.jpg"]),
        ("**/**/[3]*", ["a/x/y/3.png"]),
        ("./[a]/*.jpg", ["./a/1.jpg"]),
        ("a/../[b]/1.jpg", ["a/../b/1.jpg"]),
    ],
)
def test_find_images_expands_patterns(here, pattern, expected):
    make("1.jpg", "2.jpg", "1.txt", "a/1.jpg", "a/1.txt", "a/x/1.jpg", "a/x/y/3.png", "b/1.jpg")
    assert found(pattern) == expected


def test_find_images_expands_patterns_of_absolute_paths(here):
    make("a/1.jpg")
    assert found(f"{here}/[a]/*.jpg") == [f"{here}/a/1.jpg".replace(os.sep, "/")]


def test_find_images_takes_an_existing_name_with_brackets_literally(here):
    make("[1].jpg", "1.jpg", "[x]/2.jpg")
    assert found("[1].jpg", "[x]") == ["[1].jpg", "[x]/2.jpg"]


def test_find_images_reports_inputs_without_a_photo(here):
    make("empty/notes.txt", "a.jpg")
    reports: list[str] = []
    assert list(find_images(["empty", "*.png", "a.jpg"], report=reports.append)) == ["a.jpg"]
    assert reports == ["empty: no photo is in this folder.", "*.png: no photo matches this pattern."]


def test_find_images_walks_linked_folders_once(here):
    make("p/a/1.jpg", "elsewhere/2.jpg")
    os.symlink("..", "p/a/up")
    os.symlink(".", "p/self")
    os.symlink("../elsewhere", "p/else")
    os.symlink("../elsewhere", "p/else_again")
    for inputs in ("p", "p/**/*.jpg", "p/**"):
        assert found(inputs) == ["p/a/1.jpg", "p/else/2.jpg"]


def test_find_images_ends_on_links_that_lead_in_circles(here):
    make("p/1.jpg")
    os.symlink("b.jpg", "p/a.jpg")
    os.symlink("a.jpg", "p/b.jpg")
    os.symlink("nowhere", "p/c.jpg")
    assert found("p") == ["p/1.jpg", "p/a.jpg", "p/b.jpg", "p/c.jpg"]


def test_find_images_leaves_pipes_alone(here):
    make("p/1.jpg")
    os.mkfifo("p/2.jpg")
    assert found("p") == found("p/*.jpg") == ["p/1.jpg"]


def test_find_images_reports_a_folder_that_cannot_be_listed_once(here, monkeypatch):
    make("p/1.jpg", "p/secret/2.jpg", "p/z.jpg", "p/z/3.jpg")
    scandir = os.scandir

    def scandir_or_fail(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_or_fail)
    for inputs in ("p", "p/**/*.jpg"):
        reports: list[str] = []
        assert len(list(find_images([inputs], report=reports.append))) == 3
        assert reports == [f"{Path('p/secret')}: this folder cannot be listed: Permission denied."]


def test_find_images_lists_a_folder_only_when_it_comes_to_it(here, monkeypatch):
    make(*(f"p/{folder}/{file}.jpg" for folder in "abcdefgh" for file in range(3)))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    paths = find_images(["p"], report=pytest.fail)
    next(paths)
    assert not [path for path in listed if str(path).endswith("b")]
    assert len(list(paths)) == 23


def test_find_images_follows_a_thousand_nested_folders(here):
    deep = Path(*"p" + "d" * 900)
    os.makedirs(deep)
    (deep / "1.jpg").touch()
    assert found("p") == [f"{deep.as_posix()}/1.jpg"]
    assert found("p/**/*.jpg") == [f"{deep.as_posix()}/1.jpg"]


names = st.sampled_from(["a", "b.jpg", "c.png", ".d", "e f", "[g]", "h\n.jpg", "*"])


@settings(deadline=None, max_examples=40)
@given(tree=st.lists(st.lists(names, min_size=1, max_size=4), max_size=12))
def test_find_images_gives_what_a_plain_walk_gives(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree")
    for parts in tree:
        path = root.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except (FileExistsError, NotADirectoryError):
            continue  # a folder and a file of one name
    expected = set()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        expected |= {os.path.join(folder, name) for name in files if name[0] != "." and name.endswith((".jpg", ".png"))}
    paths = list(find_images([str(root)], report=lambda _: None))
    assert len(paths) == len(set(paths))
    assert set(paths) == expected
    assert set(find_images([f"{root}/**/*.[jp][pn]g"], report=lambda _: None)) == expected


def test_stands_for_many_knows_folders_and_patterns(here):
    make("[1].jpg", "p/1.jpg")
    assert [stands_for_many(text) for text in ("p", "*.jpg", "[1].jpg", "1.jpg", "-")] == [
        True,
        True,
        False,
        False,
        False,
    ]
