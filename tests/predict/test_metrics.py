import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from weightnet.errors import UsageError
from weightnet.predict import metrics


@st.composite
def scored_photos(draw):
    """Scores with many ties, and a true class for each row."""
    photos, classes = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    elements = st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0])
    scores = draw(arrays.arrays(np.float32, (photos, classes), elements=elements))
    return scores, draw(arrays.arrays(np.int64, photos, elements=st.integers(0, classes - 1)))


@settings(deadline=None)
@given(scored_photos(), st.integers(1, 10))
def test_topk_accuracy_is_the_plain_recount(scored, k):
    scores, labels = scored
    hits = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranking = sorted(range(len(row)), key=lambda index: (-row[index], index))
        hits += label in ranking[:k]
    assert metrics.topk_accuracy(scores, labels, k) == pytest.approx(hits / len(labels))


@settings(deadline=None)
@given(scored_photos())
def test_topk_accuracy_at_1_is_that_of_argmax(scored):
    scores, labels = scored
    assert metrics.topk_accuracy(scores, labels) == pytest.approx(np.mean(scores.argmax(1) == labels))


def test_topk_accuracy_counts_a_row_with_a_nan_as_wrong():
    assert metrics.topk_accuracy(np.array([[0.0, np.nan], [0.0, 1.0]]), np.array([0, 1]), k=2) == 0.5


@settings(deadline=None)
@given(scored_photos(), st.integers(0, 3))
def test_class_averaged_accuracy_is_the_plain_recount(scored, absent):
    scores, labels = scored
    predicted = scores.argmax(1)
    by_class = {}
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        by_class.setdefault(label, []).append(label == guess)
    expected = sum(sum(hits) / len(hits) for hits in by_class.values()) / len(by_class)
    got = metrics.class_averaged_accuracy(predicted, labels, scores.shape[1] + absent)
    assert got == pytest.approx(expected)


@settings(deadline=None)
@given(scored_photos())
def test_cross_entropy_is_the_plain_recount(scored):
    logits, labels = scored
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    assert metrics.cross_entropy(logits, labels) == pytest.approx(sum(losses) / len(losses), abs=1e-12)


def test_cross_entropy_of_huge_logits_is_finite():
    assert metrics.cross_entropy(np.array([[1e30, -1e30]]), np.array([1])) == pytest.approx(2e30)


@settings(deadline=None)
@given(scored_photos())
def test_softmax_rows_are_probabilities_in_the_order_of_the_logits(scored):
    logits, _ = scored
    probabilities = metrics.softmax(logits)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(1), 1)
    order = np.argsort(logits, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(probabilities, order, 1)) >= 0).all()


@settings(deadline=None)
@given(scored_photos(), st.integers(1, 20))
def test_calibration_error_is_the_plain_recount(scored, bins):
    logits, labels = scored
    probabilities = metrics.softmax(logits)
    members = [[] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        members[max(0, math.ceil(confidence * bins) - 1)].append((confidence, row.index(confidence) == label))
    expected = 0.0
    for photos in filter(None, members):
        confidence = sum(c for c, _ in photos) / len(photos)
        accuracy = sum(right for _, right in photos) / len(photos)
        expected += len(photos) / len(labels) * abs(confidence - accuracy)
    got = metrics.expected_calibration_error(probabilities, labels, bins=bins)
    assert got == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(scored_photos(), st.integers(1, 20))
def test_reliability_explains_the_calibration_error(scored, bins):
    logits, labels = scored
    probabilities = metrics.softmax(logits)
    rows = metrics.reliability(probabilities, labels, bins=bins)
    confidences = probabilities.max(1)
    for row in rows:
        inside = (confidences > row.above) & (confidences <= row.up_to)
        assert row.photos == inside.sum()
        if row.photos:
            assert row.confidence == pytest.approx(confidences[inside].mean())
            assert row.accuracy == pytest.approx((probabilities.argmax(1) == labels)[inside].mean())
        else:
            assert row.confidence is row.accuracy is None
    gaps = [row.photos * abs(row.confidence - row.accuracy) for row in rows if row.photos]
    expected = metrics.expected_calibration_error(probabilities, labels, bins=bins)
    assert sum(gaps) / len(labels) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(scored_photos())
def test_summary_is_the_single_figures(scored):
    logits, labels = scored
    assert metrics.summary(logits, labels) == {
        "top1": metrics.topk_accuracy(logits, labels),
        "top5": metrics.topk_accuracy(logits, labels, k=5),
        "class_averaged_top1": metrics.class_averaged_accuracy(logits.argmax(1), labels, logits.shape[1]),
        "loss": metrics.cross_entropy(logits, labels),
        "ece": metrics.expected_calibration_error(metrics.softmax(logits), labels),
    }


def test_calibration_error_of_a_right_and_sure_network_is_0():
    assert metrics.expected_calibration_error(np.eye(3, dtype=np.float32), np.arange(3)) == 0


ONE_PHOTO, ONE_LABEL = np.array([[0.5, 0.5]]), np.array([0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.topk_accuracy(ONE_PHOTO, ONE_LABEL, k=0), "k must be a whole number of at least 1. Got k=0"),
        (lambda: metrics.topk_accuracy(ONE_PHOTO[0], ONE_LABEL), "scores must have shape"),
        (lambda: metrics.topk_accuracy(np.empty((0, 2)), np.empty(0, int)), "at least one of each"),
        (lambda: metrics.topk_accuracy(ONE_PHOTO, np.array([0, 1])), "labels must be 1 whole numbers"),
        (lambda: metrics.topk_accuracy(ONE_PHOTO, np.array([0.0])), "labels must be 1 whole numbers"),
        (lambda: metrics.topk_accuracy(ONE_PHOTO, np.array([2])), "labels must be from 0 to 1. Got labels from 2 to 2"),
        (lambda: metrics.cross_entropy(ONE_PHOTO, np.array([-1])), "labels must be from 0 to 1"),
        (lambda: metrics.class_averaged_accuracy(np.empty(0, int), np.empty(0, int), 2), "at least one photo"),
        (lambda: metrics.class_averaged_accuracy(ONE_LABEL, np.array([5]), 5), "labels must be from 0 to 4"),
        (lambda: metrics.expected_calibration_error(ONE_PHOTO * 3, ONE_LABEL), "probabilities must be from 0 to 1"),
        (lambda: metrics.expected_calibration_error(ONE_PHOTO, ONE_LABEL, bins=0), "bins must be a whole number"),
    ],
)
def test_metrics_refuse_what_they_cannot_measure(call, message):
    with pytest.raises(UsageError, match=message):
        call()
