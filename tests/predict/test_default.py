"""The embedded default on photos from neither source of its own: as many as it named when it was embedded."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from weightnet.predict.classifier import Classifier

# Which of the labelled photos in ../shared show a class of the default: itself, a breed of dog, or another kind of it.
TABLE = Path(__file__).parents[1] / "data" / "shared_photos_classes.csv"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_names_classes_of_the_default(rows):
    known = {entry.label for entry in Classifier().card.classes}
    assert {row["label"] for row in rows} <= known
    assert Counter(row["is"] for row in rows) == {"itself": 8, "a breed": 9, "a kind": 5}


def test_default_names_as_many_photos_from_elsewhere_as_it_did(rows, shared):
    predictions = Classifier()([shared / "data" / "photos" / row["photo"] for row in rows], k=1)
    assert [prediction.error for prediction in predictions] == [None] * len(rows)
    said = [prediction.top[0].label for prediction in predictions]
    wrong = [
        f"{row['photo']}: {row['label']}, not {label}"
        for row, label in zip(rows, said, strict=True)
        if label != row["label"]
    ]
    right = Counter(row["is"] for row, label in zip(rows, said, strict=True) if label == row["label"])
    assert right["itself"] + right["a breed"] >= 14, wrong  # of 17
    assert right.total() >= 14, wrong  # of 22
