"""Build the data set on which the embedded models are pre-trained: Everyday-112 and photos of other ImageNet classes.

    python scripts/build_pretraining.py --everyday data/everyday112_pets --photos mini tiny --out data/pretraining

Each folder after `--photos` holds small photos of ImageNet classes, at any depth below folders named by wnid, such as
mini-ImageNet (60,000 photos at 84 px, 100 classes; a copy with images: github.com/Deo0330/split_minidataset) and
Tiny-ImageNet (64 px). All splits are used. Left out are photos whose bytes came before, and the classes of Imagenette,
whose folders in Everyday-112 are named by wnid too: its validation photos may be anywhere in ImageNet.

Their photos go to the class folder of their wnid, or to that of Everyday-112 whose label is the same; 2 of 100, by the
SHA-256 of the file, to `val`. Photos of Everyday-112 keep their class and split. Files are hard links, so the folders
must be on one disk.
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


def build(everyday: Path, collections: list[Path], out: Path) -> Counter[str]:
    """Write the data set into a new folder, whole or not at all, and return how many photos it has by split.

    Raises: DataError where the folder exists, or photos are not as described above.
    """
    partial = out.with_name(out.name + ".partial")
    for folder in (out, partial):
        if folder.exists():
            raise DataError(f"The data set must be written into a new folder. Got {folder}, which exists. Remove it.")
    try:
        kept = fill(partial, everyday, collections)
        partial.rename(out)
    except BaseException:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return kept


def fill(out: Path, everyday: Path, collections: list[Path]) -> Counter[str]:
    """Write the data set into a folder, and return how many photos it has by split."""
    rows = read_class_table(everyday / "classes.csv")[1]
    folder_of = {row["label"]: row["folder"] for row in rows}
    imagenette = {row["folder"] for row in rows if WNID.fullmatch(row["folder"])}
    wnid_to_folder = {label.wnid: folder_of.get(label.label, label.wnid) for label in imagenet_classes()}
    kept: Counter[str] = Counter()
    for split in SPLITS:
        for photo in sorted((everyday / split).rglob("*")):
            if photo.suffix.lower() in SUFFIXES:
                link(photo, out / split / photo.relative_to(everyday / split))
                kept[split] += 1
    seen = set()
    for place, collection in enumerate(collections):
        for photo in sorted(collection.rglob("*")):
            if photo.suffix.lower() not in SUFFIXES or (wnid := class_of(photo)) in imagenette:
                continue
            if wnid not in wnid_to_folder:
                raise DataError(f"A photo must be of an ImageNet class. Got {photo}. Take it out.")
            digest = hashlib.sha256(photo.read_bytes()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            split = "val" if int(digest[:8], 16) % 100 < VALIDATION_PERCENT else "train"
            link(photo, out / split / str(wnid_to_folder[wnid]) / f"{place}_{photo.name}")
            kept[split] += 1
    return kept


def main() -> None:
    """Build the data set and print how many photos it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everyday", type=Path, required=True, help="Everyday-112 (scripts/build_everyday112.py)")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of photos of ImageNet classes")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    try:
        kept = build(options.everyday, options.photos, options.out)
    except (WeightNetError, OSError) as error:
        sys.exit(f"build_pretraining.py: {error}")
    print(", ".join(f"{split}: {kept[split]:,} photos" for split in SPLITS))


if __name__ == "__main__":
    main()
