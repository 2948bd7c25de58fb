"""Set from which probability on an embedded model's answer counts, and write it into the model's card.

    python scripts/set_known.py default --good data/everyday112 --unknown data/unknown

GOOD has the photos of the model's classes, by class, in `val/`; UNKNOWN has photos of none of them, as
`scripts/build_unknown.py` selects them. A photo whose best class is less probable than the limit shows nothing that the
model knows. The limit is set on one half of each, chosen by a hash of the names: of all limits that lose at most 5% of
the photos that the model names rightly, it is the one by which the share of unknown photos that it catches exceeds the
share of these that it loses by most. The card's figures are those of the other halves.
"""

import argparse
import dataclasses
import hashlib
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightnet import Classifier
from weightnet.errors import DataError, WeightNetError
from weightnet.predict.inputs import find_images
from weightnet.predict.labelled import read_labelled_photos
from weightnet.zoo.cards import EMBEDDED, read_card, write_card

MAX_LOST = 0.05
NOTE = (
    "shares called unknown: caught, of photos of none of the classes; lost, of the validation photos; lost_right, of "
    "those that are named rightly; caught_wrong, of those that are not; all of photos that the limit was not set on"
)

Probabilities = npt.NDArray[np.float64]


def choose_limit(good_N: Probabilities, unknown_M: Probabilities, *, max_lost: float = MAX_LOST) -> float:
    """Return the limit to which the probability of a photo's best class is held.

    Args:
        good_N: that probability for photos that are named rightly.
        unknown_M: the same for photos of none of them.
        max_lost: the largest share of the good ones that may lie below the limit.

    Example:
        >>> choose_limit(np.array([0.5, 0.6, 0.9, 0.9]), np.array([0.1, 0.2, 0.55, 0.56]), max_lost=0.25)
        0.6
    """
    limits = np.unique(np.concatenate([good_N, unknown_M]))
    lost, caught = (np.searchsorted(np.sort(sure), limits) / len(sure) for sure in (good_N, unknown_M))
    gain = np.where(lost <= max_lost, caught - lost, -1)
    return float(limits[gain.argmax()])


def sets_the_limit(name: str) -> bool:
    """Return whether a photo is of the half that the limit is set on, by the hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def look(classifier: Classifier, paths: Sequence[str]) -> tuple[Probabilities, npt.NDArray[np.int64]]:
    """Return the probability and the index of each photo's best class.

    Raises: DataError where a photo cannot be read.
    """
    sure, best = [], []
    for row in classifier.stream(paths, k=1):
        if row.status != "ok":
            raise DataError(f"Every photo must be readable. Got {row.path}: {row.error}")
        sure.append(row.top[0].probability)
        best.append(row.top[0].index)
    return np.array(sure), np.array(best)


def set_known(card_path: Path, good: Path, unknown: Path, *, own_command: str) -> dict[str, Any]:
    """Write the limit and what it gives into a card beside whose weights it lies, and return both.

    Raises:
        DataError: a folder has too few photos, or one that cannot be read.
        WeightsError: the model cannot be read.
    """
    card = read_card(card_path)
    classifier = Classifier(card_path.with_suffix(".onnx"))
    val = read_labelled_photos(good / "val", card.classes)
    others = list(find_images([str(unknown)], report=lambda message: None))
    sets_N = np.array([sets_the_limit("/".join(Path(path).parts[-2:])) for path in val.paths], bool)
    sets_M = np.array([sets_the_limit(Path(path).name) for path in others], bool)
    if not (sets_N.any() and sets_M.any() and not sets_N.all() and not sets_M.all()):
        raise DataError(f"GOOD and UNKNOWN must hold dozens of photos. Got {len(val)} and {len(others)}. Add some.")
    sure_N, best_N = look(classifier, val.paths)
    sure_M = look(classifier, others)[0]
    right_N = best_N == val.labels
    if not right_N[sets_N].any():
        raise DataError(
            f"The model must name photos of {good / 'val'} rightly. Got none. Train it, or name its classes."
        )
    limit = choose_limit(sure_N[sets_N & right_N], sure_M[sets_M])
    limit = math.floor(limit * 1e4) / 1e4  # down: the photo that gave it is not below it
    lost_N = sure_N < limit
    figures = {
        "unknown_photos": int(np.sum(~sets_M)),
        "caught": float(np.mean(sure_M[~sets_M] < limit)),
        "lost": float(np.mean(lost_N[~sets_N])),
        "lost_right": float(np.mean(lost_N[~sets_N & right_N])),
        "caught_wrong": float(np.mean(lost_N[~sets_N & ~right_N])),
    }
    figures = {name: round(value, 4) for name, value in figures.items()}
    commands = [text for text in card.made_by.get("commands", []) if not text.startswith("python scripts/set_known.py")]
    card = dataclasses.replace(
        card,
        known_from=limit,
        measured={**card.measured, "known": figures},
        made_by={**card.made_by, "commands": [*commands, own_command]},
        notes={**card.notes, "known": NOTE},
    )
    write_card(card, card_path)
    return {"known_from": limit, **figures}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Set from which probability on an embedded model's answer counts.")
    parser.add_argument("name", metavar="NAME", help="what the embedded model is called")
    parser.add_argument("--good", type=Path, required=True, help="folder with val/, by class")
    parser.add_argument("--unknown", type=Path, required=True, help="folder of photos of none of the classes")
    parser.add_argument("--models", type=Path, default=EMBEDDED, help="folder of the model (default: in the package)")
    given = parser.parse_args(argv)
    own = ["python", "scripts/set_known.py", given.name, "--good", str(given.good), "--unknown", str(given.unknown)]
    try:
        figures = set_known(given.models / f"{given.name}.json", given.good, given.unknown, own_command=shlex.join(own))
    except (WeightNetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in figures.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
