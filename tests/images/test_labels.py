"""ImageNet's class names: complete, unique, in the usual order, and made by the script that says so."""

import csv
import importlib.resources
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from weightnet.images.labels import ClassLabel, imagenet_classes

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_imagenet_labels.py"


def test_imagenet_classes_are_a_thousand_unique_labels_in_order() -> None:
    classes = imagenet_classes()
    assert [entry.imagenet_index for entry in classes] == list(range(1000))
    assert len({entry.label for entry in classes}) == len({entry.wnid for entry in classes}) == 1000
    assert [entry.wnid for entry in classes] == sorted(entry.wnid or "" for entry in classes)
    assert all(entry.label == entry.label.strip() != "" for entry in classes)


def test_imagenet_classes_know_well_known_ones() -> None:
    classes = imagenet_classes()
    assert classes[0] == ClassLabel("tench", "n01440764", 0)
    assert [classes[index].label for index in (285, 967, 999)] == ["Egyptian cat", "espresso", "toilet tissue"]


def test_imagenet_classes_tell_shared_names_apart() -> None:
    labels = [imagenet_classes()[index].label for index in (134, 517, 638, 639)]
    assert labels == ["crane (bird)", "crane (machine)", "maillot (tights)", "maillot (swimsuit)"]


def test_imagenet_classes_agree_with_the_original_index_by_index(shared: Path) -> None:
    original = json.loads((shared / "reference" / "imagenet_class_info.json").read_text())
    assert len(original) == 1000
    for index, entry in enumerate(imagenet_classes()):
        wnid, name = original[str(index)]
        assert entry.wnid == wnid
        assert entry.label.split(" (")[0] == name.replace("_", " ")


def test_make_imagenet_labels_writes_the_table_of_the_package(tmp_path: Path) -> None:
    table = (importlib.resources.files("weightnet.images") / "imagenet_classes.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    wheel, output = tmp_path / "timm.whl", tmp_path / "table.csv"
    with zipfile.ZipFile(wheel, "w") as archive:  # laid out as timm's wheel is
        folder = "timm/data/_info/"
        archive.writestr(folder + "imagenet_synsets.txt", "\n".join(row["wnid"] for row in rows))
        lemmas = [f"{row['wnid']}\t{row['label'].split(' (')[0]}, another name\n" for row in rows]
        archive.writestr(folder + "imagenet_synset_to_lemma.txt", "".join(lemmas))
    subprocess.run([sys.executable, SCRIPT, wheel, "--output", output], check=True, capture_output=True)
    assert output.read_text(encoding="utf-8") == table
