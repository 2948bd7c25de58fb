"""Write the table of ImageNet's 1,000 classes that the package carries, from the lists inside a timm wheel.

    pip download --no-deps timm==1.0.31
    python scripts/make_imagenet_labels.py timm-1.0.31-py3-none-any.whl

Source: timm (Apache-2.0), `timm/data/_info/imagenet_synsets.txt` (order) and `imagenet_synset_to_lemma.txt` (WordNet's
names). A label is the first name; the two names that occur twice are told apart by hand below.
"""

import argparse
import csv
import zipfile
from collections import Counter
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "src" / "weightnet" / "images" / "imagenet_classes.csv"
FOLDER = "timm/data/_info/"
UNIQUE_LABELS = {
    "n02012849": "crane (bird)",
    "n03126707": "crane (machine)",
    "n03710637": "maillot (tights)",
    "n03710721": "maillot (swimsuit)",
}


def read_labels(wheel_path: Path) -> dict[str, str]:
    """Return WordNet id to label for the 1,000 classes, in the order of a network's outputs."""
    with zipfile.ZipFile(wheel_path) as wheel:
        wnids = wheel.read(FOLDER + "imagenet_synsets.txt").decode().split()
        lemma_lines = wheel.read(FOLDER + "imagenet_synset_to_lemma.txt").decode().splitlines()
    lemmas = dict(line.split("\t") for line in lemma_lines)
    labels = {wnid: UNIQUE_LABELS.get(wnid, lemmas[wnid].split(",")[0].strip()) for wnid in wnids}
    repeated = [label for label, count in Counter(labels.values()).items() if count > 1]
    if len(labels) != 1000 or repeated:
        raise SystemExit(f"there must be 1000 classes with unique labels. Got {len(labels)}, repeated: {repeated}.")
    return labels


def main() -> None:
    """Read the wheel named on the command line and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a timm wheel")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the table to write (default: the package's own)")
    options = parser.parse_args()
    labels = read_labels(options.wheel)  # before the table, so that a wrong wheel leaves that as it was
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["wnid", "label"])
        writer.writerows(labels.items())
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
