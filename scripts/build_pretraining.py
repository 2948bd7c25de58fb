"""Build the data set on which the embedded models are pre-trained: Everyday-112 and photos of other ImageNet classes.

    python scripts/build_pretraining.py --everyday data/everyday112_pets --photos mini tiny --out data/pretraining

Each folder after `--photos` holds small photos of ImageNet classes, at any depth below folders named by wnid, such as
mini-ImageNet (60,000 photos at 84 px, 100 classes; a copy with images: github.com/Deo0330/split_minidataset) and
Tiny-ImageNet (64 px). All splits are used. Left out are photos whose bytes came before, and the classes of Imagenette,
whose folders in Everyday-112 are named by wnid too: its validation photos may be anywhere in ImageNet.

Their photos go to the class folder of their wnid, or to that of Everyday-112 whose label is the same; 2 of 100, by the
SHA-256 of the file, to `val`. Photos of Everyday-112 keep their class and split. Files are hard links, so the folders
must be on one disk.

With `--kinds N` the classes stay those of Everyday-112: added are the first N photos of each ImageNet class that is a
kind of one of them by `everyday112_in_imagenet.csv` (any breed of dog is a dog), all to `train`.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from weightnet.errors import DataError, WeightNetError
from weightnet.images.labels import imagenet_classes, read_class_table

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg")
VALIDATION_PERCENT = 2
WNID = re.compile(r"n\d{8}")
KINDS = Path(__file__).with_name("everyday112_in_imagenet.csv")
# Of that table, what may show the class, but is none or rarely shows it: alligators, wolves, hunting dogs, dining
# tables, domes and street signs.
NO_KINDS = {50, 269, 270, 271, 272, 273, 274, 275, 532, 538, 919}


def class_of(photo: Path) -> str:
    """Return the wnid of the nearest folder that is named by one."""
    for folder in reversed(photo.parent.parts):
        if WNID.fullmatch(folder):
            return folder
    raise DataError(f"A photo must lie below a folder named by its wnid. Got {photo}. Move it.")


def link(photo: Path, target: Path) -> None:
    """Put a photo into the data set."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(photo, target)


def build(everyday: Path, collections: list[Path], out: Path, kinds: int | None = None) -> Counter[str]:
    """Write the data set into a new folder, whole or not at all, and return how many photos it has by split.

    Raises: DataError where the folder exists, or photos are not as described above.
    """
    partial = out.with_name(out.name + ".partial")
    for folder in (out, partial):
        if folder.exists():
            raise DataError(f"The data set must be written into a new folder. Got {folder}, which exists. Remove it.")
    try:
        kept = fill(partial, everyday, collections, kinds)
        partial.rename(out)
    except BaseException:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return kept


def fill(out: Path, everyday: Path, collections: list[Path], kinds: int | None) -> Counter[str]:
    """Write the data set into a folder, and return how many photos it has by split."""
    folder_of = class_folders(everyday) if kinds is None else kind_folders(everyday)
    known = {entry.wnid for entry in imagenet_classes()}
    kept: Counter[str] = Counter()
    for split in SPLITS:
        for photo in sorted((everyday / split).rglob("*")):
            if photo.suffix.lower() in SUFFIXES:
                link(photo, out / split / photo.relative_to(everyday / split))
                kept[split] += 1
    if kinds is not None:
        shutil.copy(everyday / "classes.csv", out / "classes.csv")
    seen = set()
    taken: Counter[str] = Counter()
    for place, collection in enumerate(collections):
        for photo in sorted(collection.rglob("*")):
            if photo.suffix.lower() not in SUFFIXES:
                continue
            wnid = class_of(photo)
            if wnid not in known:
                raise DataError(f"A photo must be of an ImageNet class. Got {photo}. Take it out.")
            if wnid not in folder_of or taken[wnid] == kinds:
                continue
            digest = hashlib.sha256(photo.read_bytes()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            taken[wnid] += 1
            split = "val" if kinds is None and int(digest[:8], 16) % 100 < VALIDATION_PERCENT else "train"
            link(photo, out / split / folder_of[wnid] / f"{place}_{photo.name}")
            kept[split] += 1
    return kept


def class_folders(everyday: Path) -> dict[str, str]:
    """Return the folder of each ImageNet class but Imagenette's: its own, or that of the same label in Everyday-112."""
    own, imagenette = own_folders(everyday)
    return {
        str(entry.wnid): own.get(entry.label, str(entry.wnid))
        for entry in imagenet_classes()
        if entry.wnid not in imagenette
    }


def kind_folders(everyday: Path) -> dict[str, str]:
    """Return the folder of each ImageNet class, but Imagenette's, that is a kind of a class of Everyday-112."""
    own, imagenette = own_folders(everyday)
    kind_of = {int(row["imagenet_index"]): row["label"] for row in read_class_table(KINDS)[1]}
    return {
        str(entry.wnid): own[kind_of[index]]
        for index, entry in enumerate(imagenet_classes())
        if kind_of.get(index) in own and index not in NO_KINDS and entry.wnid not in imagenette
    }


def own_folders(everyday: Path) -> tuple[dict[str, str], set[str]]:
    """Return the folder of each label of Everyday-112, and the folders of Imagenette, which are named by wnid."""
    folder_of = {row["label"]: row["folder"] for row in read_class_table(everyday / "classes.csv")[1]}
    return folder_of, {folder for folder in folder_of.values() if WNID.fullmatch(folder)}


def main() -> None:
    """Build the data set and print how many photos it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everyday", type=Path, required=True, help="Everyday-112 (scripts/build_everyday112.py)")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of photos of ImageNet classes")
    parser.add_argument("--kinds", type=int, metavar="N", help="keep to Everyday-112's classes, N photos of each kind")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    try:
        kept = build(options.everyday, options.photos, options.out, options.kinds)
    except (WeightNetError, OSError) as error:
        sys.exit(f"build_pretraining.py: {error}")
    print(", ".join(f"{split}: {kept[split]:,} photos" for split in SPLITS))


if __name__ == "__main__":
    main()
