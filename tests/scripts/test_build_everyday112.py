"""The builder of Everyday-112, on a made-up source tree of small random pictures."""

import csv
import hashlib
import importlib.util
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from weightnet.errors import DataError, UsageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_everyday112.py"
PUBLISHED_NAMES = {"faces": "Faces", "leopards": "Leopards", "motorbikes": "Motorbikes"}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("build_everyday112", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_everyday112"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_everyday112"]


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def picture(seed: int, *, width_px: int = 64, height_px: int = 60) -> bytes:
    """A JPEG file that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=30)
    return file.getvalue()


@dataclass
class Sources:
    """The three collections: every folder that the builder wants, without photos until `add`."""

    root: Path
    script: ModuleType
    options: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.options = {name: self.root / name for name in ("pets", "caltech", "imagenette")}
        for row in self.script.read_class_table():
            if row.source == "pets":
                self.path("pets", row.folder.capitalize()).mkdir(parents=True)
            elif row.source == "caltech":
                self.path("caltech", PUBLISHED_NAMES.get(row.folder, row.folder)).mkdir(parents=True)
            else:
                for split in ("train", "val"):
                    self.path("imagenette", split, row.folder).mkdir(parents=True)

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def add(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)

    def build(self, out: Path, pool: Executor, *, all_pets: bool = False) -> list[dict[str, str]]:
        """Build into `out` and return the rows of `photos.csv`."""
        self.script.build(**self.options, out=out, pool=pool, all_pets=all_pets)
        with (out / "photos.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def sources(tmp_path: Path, script: ModuleType) -> Sources:
    return Sources(tmp_path / "sources", script)


def kept_paths(rows: list[dict[str, str]]) -> list[str]:
    return [row["source_path"] for row in rows]


def test_class_table_has_112_classes_in_the_stated_order(script: ModuleType) -> None:
    classes = script.read_class_table()
    folders = [row.folder for row in classes]
    assert len(set(folders)) == len({row.label for row in classes}) == len(folders) == 112
    assert folders[:2] == ["cat", "dog"]
    assert Counter(row.source for row in classes) == {"pets": 2, "caltech": 100, "imagenette": 10}
    assert [row.source for row in classes[2:]] == ["caltech"] * 100 + ["imagenette"] * 10
    assert folders[2:102] == sorted(folders[2:102])
    assert folders[102:] == sorted(folders[102:])


def test_class_table_gives_an_id_to_one_class_only(script: ModuleType) -> None:
    classes = script.read_class_table()
    for column in ("wnid", "imagenet_index"):
        ids = [getattr(row, column) for row in classes if getattr(row, column)]
        assert len(set(ids)) == len(ids)
    assert all(row.wnid for row in classes if row.imagenet_index)


def test_class_table_ids_are_those_of_imagenet(script: ModuleType, shared: Path) -> None:
    import json

    names = json.loads((shared / "reference" / "imagenet_class_info.json").read_text())
    indices = {wnid: index for index, (wnid, _) in names.items()}
    for row in script.read_class_table():
        assert row.imagenet_index == indices.get(row.wnid, "")


def test_build_writes_photos_under_split_and_class(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    contents = {
        "pets/Cat/1.jpg": picture(0),
        "caltech/Faces/image_0001.jpg": picture(1),
        "imagenette/train/n01440764/a.JPEG": picture(2),
        "imagenette/val/n01440764/b.JPEG": picture(3),
    }
    for path, content in contents.items():
        sources.add(path, content)
    rows = sources.build(tmp_path / "out", pool)
    assert [(row["source"], row["folder"], row["file"]) for row in rows] == [
        ("pets", "cat", "cat_1.jpg"),
        ("caltech", "faces", "faces_image_0001.jpg"),
        ("imagenette", "n01440764", "a.JPEG"),
        ("imagenette", "n01440764", "b.JPEG"),
    ]
    assert [f"{row['source']}/{row['source_path']}" for row in rows] == list(contents)
    for row, content in zip(rows, contents.values(), strict=True):
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert (tmp_path / "out" / row["split"] / row["folder"] / row["file"]).read_bytes() == content


def test_build_copies_the_class_table(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    sources.build(tmp_path / "out", pool)
    assert (tmp_path / "out" / "classes.csv").read_bytes() == SCRIPT.with_name("everyday112_classes.csv").read_bytes()


def test_build_makes_every_class_folder_in_both_splits(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    sources.build(tmp_path / "out", pool)
    folders = {row.folder for row in sources.script.read_class_table()}
    for split in ("train", "val"):
        assert {path.name for path in (tmp_path / "out" / split).iterdir()} == folders


def test_build_splits_by_the_hash_of_the_file(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    for seed in range(40):
        sources.add(f"pets/Dog/{seed}.jpg", picture(seed))
    rows = sources.build(tmp_path / "out", pool)
    assert len(rows) == 40
    assert {row["split"] for row in rows} == {"train", "val"}
    for row in rows:
        first_32_bits = int.from_bytes(bytes.fromhex(row["sha256"])[:4], "big")
        assert (row["split"] == "val") == (first_32_bits % 100 < 15)


@pytest.mark.parametrize(("first_32_bits", "split"), [(14, "val"), (15, "train"), (114, "val"), (99, "train")])
def test_split_of_validates_below_15_modulo_100(script: ModuleType, first_32_bits: int, split: str) -> None:
    assert script.split_of(f"{first_32_bits:08x}" + "f" * 56) == split


def test_build_keeps_the_split_of_imagenette(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    for seed in range(20):
        sources.add(f"imagenette/{'train' if seed < 10 else 'val'}/n03028079/{seed}.JPEG", picture(seed))
    rows = sources.build(tmp_path / "out", pool)
    assert Counter(row["split"] for row in rows) == {"train": 10, "val": 10}
    assert all(row["source_path"].startswith(row["split"]) for row in rows)


def test_build_leaves_repeats_out_across_collections(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    for path in ("pets/Cat/2.jpg", "pets/Cat/10.jpg", "pets/Dog/1.jpg", "caltech/ant/image_0001.jpg"):
        sources.add(path, picture(0))
    for path in ("imagenette/val/n01440764/a.JPEG", "imagenette/train/n03888257/b.JPEG"):
        sources.add(path, picture(1))
    rows = sources.build(tmp_path / "out", pool)
    assert kept_paths(rows) == ["Cat/10.jpg", "train/n03888257/b.JPEG"]  # the first in the stated order


def test_build_leaves_out_what_cannot_be_decoded_whole(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    whole = picture(0)
    sources.add("caltech/crab/image_0001.jpg", whole[: len(whole) // 2])
    sources.add("caltech/crab/image_0002.jpg", b"")
    sources.add("caltech/crab/image_0003.jpg", b"<html></html>")
    sources.add("caltech/crab/image_0004.jpg", whole)
    assert kept_paths(sources.build(tmp_path / "out", pool)) == ["crab/image_0004.jpg"]


@pytest.mark.parametrize(("width_px", "height_px", "kept"), [(60, 60, True), (59, 80, False), (80, 59, False)])
def test_look_at_wants_60_px_a_side(
    script: ModuleType, tmp_path: Path, width_px: int, height_px: int, kept: bool
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0, width_px=width_px, height_px=height_px))
    assert script.look_at(tmp_path / "a.jpg").fault == (None if kept else "small")


def test_look_at_refuses_a_picture_that_is_too_large(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 60 - 1)
    (tmp_path / "a.jpg").write_bytes(picture(0))
    assert script.look_at(tmp_path / "a.jpg").fault == "undecodable"


def test_build_reads_jpeg_names_only(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    for seed, name in enumerate(("Thumbs.db", "a.png", "b.JPG", "c.jpeg", "d")):
        sources.add(f"pets/Cat/{name}", picture(seed))
    sources.path("pets", "Cat", "folder.jpg").mkdir()
    assert kept_paths(sources.build(tmp_path / "out", pool)) == ["Cat/b.JPG", "Cat/c.jpeg"]


def test_build_ignores_categories_that_are_not_classes(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    for seed, folder in enumerate(("caltech/BACKGROUND_Google", "caltech/Faces_easy", "pets/cleaned")):
        sources.add(f"{folder}/image_0001.jpg", picture(seed))
    assert sources.build(tmp_path / "out", pool) == []


def test_build_stops_at_the_limit_of_kept_pets(
    sources: Sources, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.script, "MAX_PETS", 3)
    monkeypatch.setattr(sources.script, "CHUNK_PHOTOS", 2)
    for name, seed in (("1", 0), ("2", 0), ("3", 1), ("4", 2), ("5", 3)):  # 2 repeats 1, and does not count
        sources.add(f"pets/Cat/{name}.jpg", picture(seed))
    for seed in range(4, 9):
        sources.add(f"pets/Dog/{seed}.jpg", picture(seed))
        sources.add(f"caltech/ant/{seed}.jpg", picture(10 + seed))
    rows = sources.build(tmp_path / "out", pool)
    assert kept_paths(rows)[:6] == ["Cat/1.jpg", "Cat/3.jpg", "Cat/4.jpg", "Dog/4.jpg", "Dog/5.jpg", "Dog/6.jpg"]
    assert len(rows) == 6 + 5  # Caltech has no limit


def test_build_keeps_all_pets_for_training(
    sources: Sources, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.script, "MAX_PETS", 20)
    for seed in range(60):
        sources.add(f"pets/Cat/{seed:02}.jpg", picture(seed))
    (tmp_path / "few").mkdir()
    (tmp_path / "all").mkdir()
    few = sources.build(tmp_path / "few" / "out", pool)
    every = sources.build(tmp_path / "all" / "out", pool, all_pets=True)
    assert (len(few), len(every)) == (20, 60)
    assert every[:20] == few
    assert any(row["split"] == "val" for row in few)
    assert {row["split"] for row in every[20:]} == {"train"}


def test_build_links_and_does_not_copy(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    sources.add("pets/Cat/1.jpg", picture(0))
    (row,) = sources.build(tmp_path / "out", pool)
    assert (tmp_path / "out" / row["split"] / "cat" / "cat_1.jpg").samefile(sources.path("pets/Cat/1.jpg"))


def test_build_follows_symbolic_links(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    (tmp_path / "store").write_bytes(picture(0))
    sources.path("pets/Cat/1.jpg").symlink_to(tmp_path / "store")
    (row,) = sources.build(tmp_path / "out", pool)
    assert not (tmp_path / "out" / row["split"] / "cat" / "cat_1.jpg").is_symlink()


def test_build_copies_where_it_cannot_link(
    sources: Sources, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(sources.script.os, "link", refuse)
    sources.add("pets/Cat/1.jpg", picture(0))
    (row,) = sources.build(tmp_path / "out", pool)
    copy = tmp_path / "out" / row["split"] / "cat" / "cat_1.jpg"
    assert copy.read_bytes() == picture(0)
    assert not copy.samefile(sources.path("pets/Cat/1.jpg"))


def test_build_leaves_nothing_when_interrupted(
    sources: Sources, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.script, "link_or_copy", interrupt)
    sources.add("pets/Cat/1.jpg", picture(0))
    with pytest.raises(KeyboardInterrupt):
        sources.build(tmp_path / "new" / "out", pool)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_build_touches_no_folder_that_exists(sources: Sources, tmp_path: Path, pool: Executor, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"--out must be new\. Got .*" + name):
        sources.build(tmp_path / "out", pool)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["mine.txt"]


def test_build_names_missing_folders(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    sources.path("caltech", "Leopards").rmdir()
    sources.path("imagenette", "val", "n01440764").rmdir()
    with pytest.raises(DataError, match=r"2 missing folders \(caltech/leopards, val/n01440764\)"):
        sources.build(tmp_path / "out", pool)
    assert not (tmp_path / "out.partial").exists()


def test_build_wants_folders(sources: Sources, tmp_path: Path, pool: Executor) -> None:
    sources.options["pets"] = tmp_path / "nowhere"
    with pytest.raises(UsageError, match="--pets must lead to a folder"):
        sources.build(tmp_path / "out", pool)


def test_summary_warns_of_other_totals_only(script: ModuleType) -> None:
    totals = script.Totals()
    totals.kept.update({("pets", "train"): 21_585, ("imagenette", "val"): 6_051})
    assert "warning" not in script.summary(totals)
    totals.kept["pets", "val"] += 1
    assert "warning: the published collections give 21585 and 6051 photos" in script.summary(totals)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_command_builds_and_prints_the_totals(sources: Sources, tmp_path: Path) -> None:
    sources.add("pets/Cat/1.jpg", picture(0))
    sources.add("pets/Cat/2.jpg", picture(0))
    sources.add("imagenette/val/n01440764/a.JPEG", picture(1))
    options = [part for name, path in sources.options.items() for part in (f"--{name}", path)]
    done = run(*options, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "imagenette         0       1\n" in done.stdout
    assert "left out: 1 repeated, 0 undecodable, 0 small\n" in done.stdout
    assert "warning" in done.stdout
    assert (tmp_path / "out" / "photos.csv").is_file()


def test_command_reports_an_error_in_one_line(sources: Sources, tmp_path: Path) -> None:
    options = [part for name in sources.options for part in (f"--{name}", tmp_path / "nowhere")]
    done = run(*options, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --pets must lead to a folder. Got ")
    assert done.stderr.count("\n") == 1


def test_command_help_names_sources_and_terms() -> None:
    done = run("--help")
    for words in ("https://doi.org/10.22002/D1.20086", "CC BY 4.0", "Research use", "non-commercial"):
        assert words in done.stdout
