"""Build Everyday-112, the data set of the embedded default model, from three public photo collections.

112 classes: `cat`, `dog`, the 100 categories of Caltech-101 (without `BACKGROUND_Google` and `Faces_easy`), the ten
of Imagenette. Nothing is downloaded here; each collection is given as a folder in its publisher's own layout (`--help`
says where they come from and on what terms).

What is kept, exactly:

- The order is cats, dogs, Caltech-101 (categories sorted by lower-case name), Imagenette (`train`, then `val`, wnids
  sorted); inside a folder by file name as plain text, so `10.jpg` comes before `2.jpg`.
- Photos are the files directly in a class folder whose name ends in `.jpg` or `.jpeg`, in either case.
- A photo is left out when Pillow cannot decode it whole (a truncated one counts as undecodable, and so does one over
  89 megapixels), when a side is under 60 px, or when a photo kept before, of any class, has the same bytes.
- Of the cats and of the dogs the first 3,000 that remain are kept.
- Imagenette keeps its own split. Elsewhere a photo is for validation when the first 32 bits of the SHA-256 of its
  file, as a big-endian number, modulo 100 are below 15.

This gives 21,585 photos for training and 6,051 for validation from the published collections. With `--all-pets` the
cats and dogs beyond the first 3,000 of each are kept too, all of them for training: 40,562 photos, and the same 6,051.

Overlaps that stay, since each class keeps its publisher's labels: Caltech-101's `dalmatian` shows dogs and its
`wild_cat` some house cats; Imagenette's English springer is a dog too; `lotus` has water lilies; `electric_guitar`
has acoustic ones; cougar, crocodile and flamingo have two classes each (body or whole, and head).

`everyday112_classes.csv`, beside this script, is the class table in class-index order. `folder` is the category in
lower case (Imagenette: the wnid), `wnid` the WordNet 3.0 noun of that thing, and `imagenet_index` the ImageNet-1000
index where an ImageNet class is that same noun: cannon and rooster have none, because WordNet calls ImageNet's by
another sense ("heavy gun fired from a tank", "adult male bird"). Left empty are ids of heads, of what WordNet has no
noun for, and of classes whose photos mix nouns (menorahs with seven and with nine branches, pyramids of any kind, bills
of any worth). Source: WordNet 3.0; the order of ImageNet's classes as in timm (Apache-2.0).
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from weightnet.errors import DataError, UsageError, WeightNetError

CLASS_TABLE = Path(__file__).with_name("everyday112_classes.csv")
SPLITS = ("train", "val")
EXPECTED_PHOTOS = {False: {"train": 21_585, "val": 6_051}, True: {"train": 40_562, "val": 6_051}}  # by --all-pets
SUFFIXES = (".jpg", ".jpeg")
MIN_SIDE_PX = 60
MAX_PETS = 3_000
VALIDATION_PERCENT = 15
PROCESSES = 2
CHUNK_PHOTOS = 256  # photos handed to the pool at once: bounds memory, and what is read beyond the 3,000th cat

SOURCES_HELP = """\
where the photos come from, and their terms:
  --pets        Asirra, as Microsoft Research's "Kaggle Cats and Dogs Dataset": the folder PetImages, which holds Cat/
                and Dog/. Research use. https://www.microsoft.com/en-us/download/details.aspx?id=54765
  --caltech     Caltech-101: the folder 101_ObjectCategories, which holds one folder for each category. CC BY 4.0.
                https://doi.org/10.22002/D1.20086
  --imagenette  Imagenette v2 by fast.ai, in any of its sizes: the folder that holds train/ and val/. The photos fall
                under ImageNet's terms (non-commercial research and education). https://github.com/fastai/imagenette
"""


@dataclasses.dataclass(frozen=True)
class PhotoClass:
    """A row of the class table; an empty string where an id does not exist."""

    folder: str
    label: str
    wnid: str
    imagenet_index: str

    @property
    def source(self) -> str:
        """The collection the class is taken from: `pets`, `caltech` or `imagenette`."""
        if self.folder in ("cat", "dog"):
            return "pets"
        return "imagenette" if self.folder == self.wnid else "caltech"


@dataclasses.dataclass(frozen=True)
class PhotoFolder:
    """A folder of a collection: its photos belong to one class and, in Imagenette, to one split.

    Photos beyond the limit are left out or, where the rest is for training, kept for that.
    """

    photo_class: PhotoClass
    path: Path
    split: str | None = None
    limit: int | None = None
    rest_trains: bool = False


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at a file found: the reason to leave it out, or None and the SHA-256 of its bytes."""

    path: Path
    sha256: str
    fault: str | None


@dataclasses.dataclass(frozen=True)
class Totals:
    """The photos kept, by (source, split), and those left out, by reason."""

    kept: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)


def read_class_table() -> list[PhotoClass]:
    """Return the classes in class-index order."""
    with CLASS_TABLE.open(newline="", encoding="utf-8") as file:
        return [PhotoClass(**row) for row in csv.DictReader(file)]


def subfolders(root: Path, option: str) -> dict[str, Path]:
    """Return the folders in `root` by lower-case name.

    Raises:
        UsageError: `root` is no folder.
    """
    if not root.is_dir():
        raise UsageError(f"{option} must lead to a folder. Got {root}, which is none. See --help for the layout.")
    return {path.name.lower(): path for path in root.iterdir() if path.is_dir()}


def photo_folders(
    classes: list[PhotoClass], pets: Path, caltech: Path, imagenette: Path, *, all_pets: bool
) -> list[PhotoFolder]:
    """Return every folder to read, in the order in which first photos are told from repeats.

    Raises:
        UsageError: a collection is no folder.
        DataError: folders of the published layout are missing.
    """
    found = {"pets": subfolders(pets, "--pets"), "caltech": subfolders(caltech, "--caltech")}
    found |= {split: subfolders(imagenette / split, "--imagenette") for split in SPLITS}
    wanted = [(row, row.source) for row in classes if row.source != "imagenette"]
    wanted += [(row, split) for split in SPLITS for row in classes if row.source == "imagenette"]
    missing = [f"{place}/{row.folder}" for row, place in wanted if row.folder not in found[place]]
    if missing:
        raise DataError(
            f"The collections must have the folders of their publishers. Got {len(missing)} missing folders "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}). See --help for the folders to give."
        )
    return [
        PhotoFolder(
            row,
            found[place][row.folder],
            split=place if place in SPLITS else None,
            limit=MAX_PETS if place == "pets" else None,
            rest_trains=all_pets,
        )
        for row, place in wanted
    ]


def look_at(path: Path) -> Look:
    """Read one file and decode it whole."""
    from PIL import Image

    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) < MIN_SIDE_PX:
                    return Look(path, sha256, "small")
                image.convert("RGB")
    # Pillow's ways to report a damaged picture, then a huge one
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return Look(path, sha256, "undecodable")
    return Look(path, sha256, None)


def photos_in(folder: Path) -> list[Path]:
    """Return the photos directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def kept_photos(folder: PhotoFolder, pool: Executor, seen: set[str], left_out: Counter[str]) -> Iterator[Look]:
    """Yield the photos of a folder that are kept; note them in `seen`, the others in `left_out`."""
    paths, kept = photos_in(folder.path), 0
    for start in range(0, len(paths), CHUNK_PHOTOS):
        for look in pool.map(look_at, paths[start : start + CHUNK_PHOTOS], chunksize=16):
            if kept == folder.limit and not folder.rest_trains:
                return
            fault = look.fault or ("repeated" if look.sha256 in seen else None)
            if fault is not None:
                left_out[fault] += 1
                continue
            seen.add(look.sha256)
            kept += 1
            yield look


def split_of(sha256: str) -> str:
    """Return the split of a photo whose collection has none.

    >>> split_of("0000000e" + "0" * 56), split_of("0000000f" + "0" * 56)
    ('val', 'train')
    """
    return "val" if int(sha256[:8], 16) % 100 < VALIDATION_PERCENT else "train"


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system cannot link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_class_table(path: Path, classes: list[PhotoClass]) -> None:
    """Write the class table, in class-index order."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(field.name for field in dataclasses.fields(PhotoClass))
        table.writerows(dataclasses.astuple(row) for row in classes)


def fill(out: Path, folders: list[PhotoFolder], pool: Executor) -> Totals:
    """Put the kept photos of all folders, and `photos.csv`, into the folder `out`."""
    totals = Totals()
    seen: set[str] = set()
    with (out / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("split", "folder", "file", "source", "source_path", "sha256"))
        for folder in folders:
            name, source = folder.photo_class.folder, folder.photo_class.source
            for number, look in enumerate(kept_photos(folder, pool, seen, totals.left_out)):
                is_rest = folder.limit is not None and number >= folder.limit
                split = folder.split or ("train" if is_rest else split_of(look.sha256))
                file_name = look.path.name if source == "imagenette" else f"{name}_{look.path.name}"
                link_or_copy(look.path, out / split / name / file_name)
                source_path = "/".join(look.path.parts[-3 if folder.split else -2 :])
                table.writerow((split, name, file_name, source, source_path, look.sha256))
                totals.kept[source, split] += 1
    return totals


def build(pets: Path, caltech: Path, imagenette: Path, out: Path, *, pool: Executor, all_pets: bool = False) -> Totals:
    """Build the data set beside `out` and put it there when it is whole.

    Raises:
        UsageError: a collection is no folder, or `out` or `out` + ".partial" exists.
        DataError: a collection has not its publisher's layout.
    """
    classes = read_class_table()
    folders = photo_folders(classes, pets, caltech, imagenette, all_pets=all_pets)
    partial = out.with_name(out.name + ".partial")
    for path in (out, partial):
        if path.exists():
            raise UsageError(f"--out must be new. Got {path}, which exists. Remove it or choose another folder.")
    partial.mkdir(parents=True)
    try:
        for split in SPLITS:
            for photo_class in classes:
                (partial / split / photo_class.folder).mkdir(parents=True)
        write_class_table(partial / "classes.csv", classes)
        totals = fill(partial, folders, pool)
        partial.rename(out)
    except BaseException:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return totals


def summary(totals: Totals, *, all_pets: bool = False) -> str:
    """Return the totals as text, with a warning where they are not those of the published collections."""
    lines = [f"{'source':<12}{'train':>8}{'val':>8}"]
    lines += [
        f"{source:<12}{totals.kept[source, 'train']:>8}{totals.kept[source, 'val']:>8}"
        for source in ("pets", "caltech", "imagenette")
    ]
    photos = {split: sum(n for (_, of), n in totals.kept.items() if of == split) for split in SPLITS}
    lines.append(f"{'all':<12}{photos['train']:>8}{photos['val']:>8}")
    reasons = ("repeated", "undecodable", "small")
    lines.append("left out: " + ", ".join(f"{totals.left_out[reason]} {reason}" for reason in reasons))
    expected = EXPECTED_PHOTOS[all_pets]
    if photos != expected:
        lines.append(
            f"warning: the published collections give {expected['train']} and {expected['val']} photos. "
            "These copies differ from them, so an accuracy measured on them may differ too."
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Build Everyday-112 (112 classes of everyday things) from three public photo collections.",
        epilog=SOURCES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, folders in (
        ("pets", "Cat/ and Dog/"),
        ("caltech", "the categories"),
        ("imagenette", "train/ and val/"),
    ):
        parser.add_argument(f"--{option}", type=Path, required=True, metavar="DIR", help=f"the folder of {folders}")
    parser.add_argument(
        "--all-pets", action="store_true", help="keep all cats and dogs, those beyond the first 3,000 for training"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder; its photos are hard links where possible"
    )
    arguments = parser.parse_args(argv)
    try:
        with ProcessPoolExecutor(PROCESSES) as pool:
            sources: tuple[Path, Path, Path] = (arguments.pets, arguments.caltech, arguments.imagenette)
            totals = build(*sources, arguments.out, pool=pool, all_pets=arguments.all_pets)
        print(summary(totals, all_pets=arguments.all_pets))
    except (WeightNetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
