"""The figures of an evaluation against a plain recount."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from weightnet.errors import DataError
from weightnet.predict.classifier import Classifier
from weightnet.predict.evaluate import Evaluation, evaluate
from weightnet.predict.labelled import read_labelled_photos
from weightnet.predict.metrics import softmax

FOLDERS = {"cat": 7, "dog": 1, "Fox": 12, "house": 5}  # the model knows trees too


@pytest.fixture(scope="module")
def classifier(tiny_network):
    return Classifier(tiny_network, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures in class folders, two of which are not pictures."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder, count in FOLDERS.items():
        (root / folder).mkdir()
        for number in range(count):
            small = rng.integers(0, 256, (4, 5, 3), np.uint8)
            cv2.imwrite(str(root / folder / f"{number}.png"), cv2.resize(small, (60, 48), interpolation=2))
    (root / "cat" / "text.jpg").write_text("no photo")
    (root / "house" / "empty.png").touch()
    return root


@pytest.fixture(scope="module")
def evaluation(classifier, data) -> Evaluation:
    return evaluate(classifier, read_labelled_photos(data, classifier.card.classes))


def test_evaluate_agrees_with_a_recount_of_every_photo(classifier, data, evaluation):
    labels = [entry.label for entry in classifier.card.classes]
    confusion = np.zeros((len(FOLDERS), len(labels)), int)
    losses, rights, sure, top5 = [], [], [], []
    failed = []
    for row, folder in enumerate(FOLDERS):
        for path in sorted((data / folder).iterdir()):
            (prediction,) = classifier(path, k=len(labels))
            if prediction.status == "error":
                failed.append((str(path), prediction.error))
                continue
            best, own = prediction.top[0], next(s for s in prediction.top if s.label == folder.lower())
            confusion[row, best.index] += 1
            losses.append(-math.log(own.probability))
            rights.append(best.index == own.index)
            sure.append(best.probability)
            top5.append(own in prediction.top[:5])
    result = evaluation.to_dict()
    assert 0.1 < np.mean(rights) < 0.9
    assert (result["images"], result["unreadable"]) == (25, 2)
    assert sorted(evaluation.unreadable) == sorted(failed)
    assert result["confusion"] == confusion.tolist()
    assert result["top1"] == np.mean(rights)
    assert result["top5"] == np.mean(top5)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    own_column = [labels.index(folder.lower()) for folder in FOLDERS]
    per_class = confusion[range(len(FOLDERS)), own_column] / confusion.sum(1)
    assert result["class_averaged_top1"] == pytest.approx(per_class.mean())
    assert [row["top1"] for row in result["classes"]] == pytest.approx(per_class)
    assert [row["images"] for row in result["classes"]] == list(FOLDERS.values())
    assert [row["predicted"] for row in result["classes"]] == confusion.sum(0)[own_column].tolist()
    gap = 0.0
    for number in range(15):
        inside = [index for index, p in enumerate(sure) if number / 15 < p <= (number + 1) / 15]
        gap += abs(sum(sure[index] - rights[index] for index in inside)) / len(sure)
        bin_ = result["reliability"][number]
        assert bin_["photos"] == len(inside)
        if inside:
            assert bin_["accuracy"] == pytest.approx(np.mean([rights[index] for index in inside]))
    assert result["ece"] == pytest.approx(gap, abs=1e-6)


def test_evaluation_keeps_photos_and_logits_together(classifier, evaluation):
    for index in (0, 7, 24):
        ((_, logits),) = classifier.stream_logits(evaluation.paths[index])
        np.testing.assert_allclose(evaluation.logits[index], logits, rtol=1e-4, atol=1e-4)
        folder = Path(evaluation.paths[index]).parent.name.lower()
        assert classifier.card.classes[evaluation.labels[index]].label == folder


def test_evaluate_counts_the_photos_that_the_model_knows_nothing_of(tiny_network, data, evaluation):
    sure = softmax(evaluation.logits).max(1)
    network = copy.copy(tiny_network)
    network.card = dataclasses.replace(tiny_network.card, known_from=float(np.sort(sure)[9]) - 1e-6)
    classifier = Classifier(network, device="cpu", batch_size=4)
    assert evaluate(classifier, read_labelled_photos(data, classifier.card.classes)).to_dict()["unknown"] == 9 / 25
    assert "unknown" not in evaluation.to_dict()


def test_evaluation_is_plain_json(evaluation):
    assert json.loads(json.dumps(evaluation.to_dict())) == evaluation.to_dict()
    assert list(evaluation.to_dict())[:9] == [
        "name",
        "data",
        "images",
        "unreadable",
        "top1",
        "top5",
        "class_averaged_top1",
        "loss",
        "ece",
    ]


def test_evaluate_measures_at_other_sizes(tiny_network, data, evaluation):
    classifier = Classifier(tiny_network, device="cpu", resize=80, crop=64)
    larger = evaluate(classifier, read_labelled_photos(data, classifier.card.classes))
    assert larger.to_dict()["preprocess"]["crop"] == 64
    assert not np.allclose(larger.logits, evaluation.logits, atol=1e-2)


def test_evaluate_does_not_depend_on_the_batch(tiny_network, data, evaluation):
    classifier = Classifier(tiny_network, device="cpu", batch_size=100)
    other = evaluate(classifier, read_labelled_photos(data, classifier.card.classes))
    np.testing.assert_allclose(other.logits, evaluation.logits, rtol=1e-4, atol=1e-4)
    assert other.to_dict()["confusion"] == evaluation.to_dict()["confusion"]
    assert other.unreadable == evaluation.unreadable


def test_evaluate_counts_folders_of_one_class_together(classifier, data, tmp_path):
    for name in ("CAT", "cat", "_cat"):
        (tmp_path / name).symlink_to(data / ("dog" if name == "CAT" else "cat"))
    advanced = []
    evaluation = evaluate(
        classifier,
        read_labelled_photos(tmp_path, classifier.card.classes),
        advance=lambda: advanced.append(1),
    )
    (result,) = evaluation.classes
    assert (result.label, result.folders, result.images) == ("cat", ("CAT", "_cat", "cat"), 15)
    assert evaluation.confusion().shape == (1, 5)
    assert evaluation.figures["class_averaged_top1"] == evaluation.figures["top1"] == result.top1
    assert len(advanced) == 17


def test_class_of_unreadable_photos_has_no_accuracy(classifier, data, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.jpg").write_text("no photo")
    (tmp_path / "dog" / "1.png").write_bytes((data / "dog" / "0.png").read_bytes())
    photos = read_labelled_photos(tmp_path, classifier.card.classes)
    evaluation = evaluate(classifier, photos)
    assert [(result.images, result.top1 is None) for result in evaluation.classes] == [(0, True), (1, False)]
    assert evaluation.confusion().sum(1).tolist() == [0, 1]
    (tmp_path / "dog" / "1.png").write_text("no photo")
    with pytest.raises(
        DataError, match=r"must hold photos that can be read\. Got none among 2: a photo must be a JPEG"
    ):
        evaluate(classifier, photos)


def test_evaluate_leaves_photos_out_whose_output_is_not_finite(tiny_network, data, monkeypatch):
    classifier = Classifier(tiny_network, device="cpu")
    run = classifier._engine.run_outputs

    def run_badly(x_BCHW, names):
        outputs = run(x_BCHW, names)
        outputs["logits"][0, 0] = np.nan
        return outputs

    monkeypatch.setattr(classifier._engine, "run_outputs", run_badly)
    evaluation = evaluate(classifier, read_labelled_photos(data, classifier.card.classes))
    assert len(evaluation.unreadable) == 4
    assert any("must be finite" in error for _, error in evaluation.unreadable)
    assert np.isfinite(evaluation.logits).all()
    assert all(math.isfinite(value) for value in evaluation.figures.values())


def test_confusion_of_many_classes_is_the_recount(evaluation):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 4], 200)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    classes = tuple(result for result in evaluation.classes if result.index in (0, 2, 4))
    larger = dataclasses.replace(evaluation, labels=labels, logits=logits, classes=classes)
    expected = np.zeros((3, 5), int)
    for label, row in zip(labels, logits, strict=True):
        expected[[0, 2, 4].index(label), int(np.argmax(row))] += 1
    np.testing.assert_array_equal(larger.confusion(), expected)
