"""Select photos that show none of an embedded model's classes, from 1,000 whose ImageNet class is known.

    python scripts/build_unknown.py default --photos dataset --out data/unknown

PHOTOS is the folder `dataset` of the GitHub repository `ZhengyuZhao/Targeted-Transfer` (commit 2e0b6d0): the 1,000
photos of the NIPS 2017 competition on adversarial examples by Google Brain, 299 x 299 pixels, each CC BY 2.0 with its
author in `images.csv`, where `TrueLabel` is an ImageNet class counted from 1. Nothing is downloaded.

Left out are the ImageNet classes of the model's card, and those that `scripts/everyday112_in_imagenet.csv` says may
rightly be called by one of the model's labels: every breed of dog, every kind of car, and so on. People, whose faces a
model may know, are in many of the photos that stay.
"""

import argparse
import csv
import sys
from pathlib import Path

from weightnet.errors import DataError, WeightNetError
from weightnet.zoo.cards import EMBEDDED, Card, read_card

TABLE = Path(__file__).with_name("everyday112_in_imagenet.csv")


def shown_classes(card: Card) -> set[int]:
    """Return the ImageNet classes whose photos show a class of the model."""
    labels = {entry.label for entry in card.classes}
    own = {entry.imagenet_index for entry in card.classes if entry.imagenet_index is not None}
    return own | {int(row["imagenet_index"]) for row in _rows(TABLE) if row["label"] in labels}


def select(card: Card, photos: Path, out: Path) -> int:
    """Link the photos that show none of the model's classes into a new folder; return how many there are.

    Raises: DataError where PHOTOS is not that folder, or OUT exists.
    """
    shown = shown_classes(card)
    try:
        rows = [row for row in _rows(photos / "images.csv") if int(row["TrueLabel"]) - 1 not in shown]
        sources = [(photos / "images" / f"{row['ImageId']}.png").resolve(strict=True) for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"PHOTOS must hold images.csv and images/. Got {photos}: {error}. See --help.") from error
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise DataError(f"OUT must not exist. Got {out}. Name another folder, or remove it.") from error
    for source in sources:
        (out / source.name).symlink_to(source)
    return len(sources)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="what the embedded model is called")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the 1,000 photos")
    parser.add_argument("--out", type=Path, required=True, help="folder of links to the selected ones; new")
    given = parser.parse_args(argv)
    try:
        count = select(read_card(EMBEDDED / f"{given.name}.json"), given.photos, given.out)
    except (WeightNetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {count} photos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
