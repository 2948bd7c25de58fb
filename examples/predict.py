"""Classify photos from Python: `python examples/predict.py [PHOTO ...]`, by default the cat beside this file."""

import sys
from pathlib import Path

import weightnet

CAT = Path(__file__).with_name("cat.png")


def main() -> None:
    """Print the most probable class of each photo, or what is wrong with it."""
    classifier = weightnet.Classifier()  # the embedded default model, on the CPU
    for prediction in classifier.stream(sys.argv[1:] or [str(CAT)], k=1):
        if prediction.status == "ok":
            best = prediction.top[0]
            print(f"{prediction.path}: {best.label} ({best.probability:.0%})")
        else:
            print(f"{prediction.path}: {prediction.error}")


if __name__ == "__main__":
    main()
