"""Measure the mean and covariance of the 3x3 patches of photos, which tell what pixels a checkpoint was trained on.

Every photo is read and cropped as on the hub page (short edge 256, centre crop 224, blue-green-red, 0..255); every 3x3
patch inside the crop counts once. The 27 numbers of a patch are in the order of a convolution's weight: channel (blue,
green, red), row, column. Only these aggregates are written, nothing of any photo.

The statistics in the package were made from every tenth training photo of Imagenette (fast.ai; 224 px crops of
ImageNet photos):

    python scripts/make_patch_statistics.py imagenette/train --every 10 --source "Imagenette, train, every 10th photo"
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightnet.images.decode import read_image
from weightnet.images.transforms import Preprocess

OUT = Path(__file__).parents[1] / "src/weightnet/zoo/patch_statistics.json"
SUFFIXES = {".jpg", ".jpeg", ".png"}


def patches_of(crop_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return every 3x3 patch of a crop, one per row.

    Shape: (H, W, 3) -> ((H - 2) * (W - 2), 27)
    """
    windows_HW3kk = np.lib.stride_tricks.sliding_window_view(crop_HW3, (3, 3), axis=(0, 1))
    return windows_HW3kk.reshape(-1, 27).astype(np.float64)


def measure(photos: list[Path]) -> dict[str, object]:
    """Return the pooled statistics of all patches of all photos."""
    count, total, products = 0, np.zeros(27), np.zeros((27, 27))
    for photo in photos:
        patches = patches_of(Preprocess().crop_uint8(read_image(photo)))
        count += len(patches)
        total += patches.sum(axis=0)
        products += patches.T @ patches  # integers below 2^53: exact
    mean = total / count
    covariance = products / count - np.outer(mean, mean)
    return {
        "photos": len(photos),
        "patches": count,
        "mean": [round(float(value), 4) for value in mean],
        "covariance": [[round(float(value), 3) for value in row] for row in covariance],
    }


def to_json(statistics: dict[str, object]) -> str:
    """Return JSON with a line for each field and for each row of the covariance."""
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in statistics.items()]
    return "{\n " + ",\n ".join(fields).replace("], [", "],\n  [") + "\n}\n"


def main() -> None:
    """Measure a folder's photos and write the package's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of photos, searched with its subfolders")
    parser.add_argument("--every", type=int, default=1, help="use every n-th photo in the order of their paths")
    parser.add_argument("--source", required=True, help="what the photos are, for the file")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write (default: the package's own file)")
    options = parser.parse_args()
    photos = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:: options.every]
    if not photos:
        parser.error(f"the folder must hold photos. Got {options.folder}. Give one with JPEG or PNG files.")
    statistics = {
        "what": "mean and covariance of the 3x3 patches of photos cropped as on the hub page, raw 0..255 values",
        "order": "channel (blue, green, red), row, column, as in a convolution's weight",
        "source": options.source,
        "made_by": "scripts/make_patch_statistics.py",
        **measure(photos),
    }
    options.out.write_text(to_json(statistics))
    print(f"{statistics['photos']} photos, {statistics['patches']} patches -> {options.out}")


if __name__ == "__main__":
    main()
