"""How good predictions are: accuracy, loss and calibration, in NumPy.

Shape suffixes: N photos, C classes, B bins of probability.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (the calibration error); the rest is textbook.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError

Scores = npt.NDArray[np.floating[Any]]
Classes = npt.NDArray[np.integer[Any]]


def softmax(logits_NC: Scores) -> npt.NDArray[np.float64]:
    """Return probabilities, in float64.

    Shape: (N, C) -> (N, C); a row with a NaN or +inf becomes NaN.

    Example:
        >>> softmax(np.array([[0.0, np.log(3.0)]])).round(6).tolist()
        [[0.25, 0.75]]
    """
    scores_NC = _scores(logits_NC).astype(np.float64)  # a copy; worked on in place, for 50,000 x 1,000 take 400 MB
    with np.errstate(invalid="ignore"):  # inf - inf
        scores_NC -= scores_NC.max(axis=1, keepdims=True)
    np.exp(scores_NC, out=scores_NC)
    scores_NC /= scores_NC.sum(axis=1, keepdims=True)
    return scores_NC


def topk_accuracy(scores_NC: Scores, labels_N: Classes, k: int = 1) -> float:
    """Return the fraction of photos whose class is among the k best scores.

    Equal scores rank by class number, as predictions do; a row with a NaN is wrong.

    Args:
        scores_NC: logits or probabilities.
        labels_N: the true classes, 0 to C - 1.
        k: how many of the best count, at least 1.

    Shape: (N, C), (N,) -> a number from 0 to 1.

    Raises:
        UsageError: no photos, shapes that do not fit, a class out of range or a k below 1.

    Example:
        >>> scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
        >>> topk_accuracy(scores, np.array([1, 2])), topk_accuracy(scores, np.array([1, 2]), k=2)
        (0.5, 1.0)
    """
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k must be a whole number of at least 1. Got k={k!r}. Use 1 for plain accuracy.")
    scores_NC = _scores(scores_NC)
    labels_N = _labels(labels_N, *scores_NC.shape)
    own_N1 = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)
    better_NC = scores_NC > own_N1
    tied_before_NC = (scores_NC == own_N1) & (np.arange(scores_NC.shape[1]) < labels_N[:, None])
    rank_N = (better_NC | tied_before_NC).sum(axis=1)
    return float(np.mean((rank_N < k) & ~np.isnan(scores_NC).any(axis=1)))


def class_averaged_accuracy(predicted_N: Classes, labels_N: Classes, num_classes: int) -> float:
    """Return the mean over classes of each class's accuracy: every class counts alike, however many photos it has.

    Args:
        predicted_N: the predicted classes.
        labels_N: the true classes, 0 to num_classes - 1; classes without a photo are left out of the mean.
        num_classes: how many classes there are.

    Shape: (N,), (N,) -> a number from 0 to 1.

    Raises:
        UsageError: no photos, shapes that do not fit or a class out of range.

    Example:
        >>> class_averaged_accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]), num_classes=3)
        0.5
    """
    predicted_N = np.asarray(predicted_N)
    if predicted_N.ndim != 1 or not len(predicted_N):
        raise UsageError(
            f"predicted must be one class for each of at least one photo. Got shape={predicted_N.shape}. "
            "Use argmax(axis=1) of the scores."
        )
    labels_N = _labels(labels_N, len(predicted_N), num_classes)
    photos_C = np.bincount(labels_N, minlength=num_classes)
    correct_C = np.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    occurs_C = photos_C > 0
    return float(np.mean(correct_C[occurs_C] / photos_C[occurs_C]))


def cross_entropy(logits_NC: Scores, labels_N: Classes) -> float:
    """Return the mean cross-entropy loss, without label smoothing.

    Args:
        logits_NC: logits.
        labels_N: the true classes, 0 to C - 1.

    Shape: (N, C), (N,) -> a number, in nats.

    Raises:
        UsageError: no photos, shapes that do not fit or a class out of range.

    Example:
        >>> round(cross_entropy(np.zeros((2, 4)), np.array([0, 3])), 6)  # ln 4
        1.386294
    """
    shifted_NC = _scores(logits_NC).astype(np.float64)  # in place, as in softmax
    labels_N = _labels(labels_N, *shifted_NC.shape)
    with np.errstate(invalid="ignore"):  # inf - inf
        shifted_NC -= shifted_NC.max(axis=1, keepdims=True)
    own_N = np.take_along_axis(shifted_NC, labels_N[:, None], axis=1)[:, 0]
    log_sum_N = np.log(np.exp(shifted_NC, out=shifted_NC).sum(axis=1))
    return float(np.mean(log_sum_N - own_N))


def expected_calibration_error(probabilities_NC: Scores, labels_N: Classes, *, bins: int = 15) -> float:
    """Return how far the probability of the best class is from how often that class is right.

    The photos are sorted into equally wide bins of that probability; the result is the mean over photos of the
    distance, in their bin, of mean probability from accuracy. 0 is perfect.

    Args:
        probabilities_NC: probabilities, each row summing to 1.
        labels_N: the true classes, 0 to C - 1.
        bins: how many bins there are from 0 to 1; each has its upper end.

    Shape: (N, C), (N,) -> a number from 0 to 1.

    Raises:
        UsageError: no photos, shapes that do not fit, a class or a probability out of range, or no bins.

    Example:
        >>> sure_but_half_wrong = np.array([[0.9, 0.1], [0.9, 0.1]])
        >>> round(expected_calibration_error(sure_but_half_wrong, np.array([0, 1])), 6)
        0.4
    """
    confidence_N, correct_N, bin_N = _by_confidence(probabilities_NC, labels_N, bins)
    gap_B = np.bincount(bin_N, weights=confidence_N - correct_N, minlength=bins)
    return float(np.abs(gap_B).sum() / len(confidence_N))


class Bin(NamedTuple):
    """The photos whose best class has a probability in one range.

    Args:
        above: lower end of the range, itself not in it (but 0 in the first).
        up_to: upper end, itself in it.
        photos: how many there are.
        confidence: mean probability of their best class; None without a photo.
        accuracy: how often that class is right, as a fraction; None without a photo.
    """

    above: float
    up_to: float
    photos: int
    confidence: float | None
    accuracy: float | None


def reliability(probabilities_NC: Scores, labels_N: Classes, *, bins: int = 15) -> list[Bin]:
    """Return, per range of the best class's probability, how sure the predictions are and how often they are right.

    Args, shape and errors are those of `expected_calibration_error`, which is the mean distance of the two.

    Example:
        >>> reliability(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]), bins=2)[1]
        Bin(above=0.5, up_to=1.0, photos=2, confidence=0.75, accuracy=0.5)
    """
    confidence_N, correct_N, bin_N = _by_confidence(probabilities_NC, labels_N, bins)
    photos_B = np.bincount(bin_N, minlength=bins)
    confidence_B, right_B = (np.bincount(bin_N, weights=w, minlength=bins) for w in (confidence_N, correct_N))
    rows = []
    for index, photos in enumerate(photos_B.tolist()):
        means = (float(sums[index] / photos) if photos else None for sums in (confidence_B, right_B))
        rows.append(Bin(index / bins, (index + 1) / bins, photos, *means))
    return rows


def summary(logits_NC: Scores, labels_N: Classes) -> dict[str, float]:
    """Return the figures that every evaluation states.

    Args:
        logits_NC: logits.
        labels_N: the true classes, 0 to C - 1.

    Shape: (N, C), (N,) -> `top1`, `top5`, `class_averaged_top1` (over the classes that occur) and the calibration error
        `ece`, as fractions of 1, and `loss`, in nats.

    Raises:
        UsageError: no photos, shapes that do not fit or a class out of range.

    Example:
        >>> summary(np.array([[2.0, 0.0], [2.0, 0.0]]), np.array([0, 1]))["top1"]
        0.5
    """
    classes = _scores(logits_NC).shape[1]
    return {
        "top1": topk_accuracy(logits_NC, labels_N, 1),
        "top5": topk_accuracy(logits_NC, labels_N, min(5, classes)),
        "class_averaged_top1": class_averaged_accuracy(logits_NC.argmax(1), labels_N, classes),
        "loss": cross_entropy(logits_NC, labels_N),
        "ece": expected_calibration_error(softmax(logits_NC), labels_N),
    }


def _by_confidence(
    probabilities_NC: Scores, labels_N: Classes, bins: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return each photo's best probability, whether that class is right, and the bin of the probability."""
    if not isinstance(bins, (int, np.integer)) or bins < 1:
        raise UsageError(f"bins must be a whole number of at least 1. Got bins={bins!r}. 15 is usual.")
    probabilities_NC = _scores(probabilities_NC).astype(np.float64, copy=False)
    labels_N = _labels(labels_N, *probabilities_NC.shape)
    if not ((probabilities_NC >= 0) & (probabilities_NC <= 1 + 1e-6)).all():  # float32 rounds 1 up
        raise UsageError("probabilities must be from 0 to 1. Got others. Use softmax(logits).")
    confidence_N = probabilities_NC.max(axis=1)
    correct_N = probabilities_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    return confidence_N, correct_N, bin_N


def _scores(scores_NC: Scores) -> Scores:
    scores_NC = np.asarray(scores_NC)
    if scores_NC.ndim != 2 or 0 in scores_NC.shape:
        raise UsageError(
            f"scores must have shape (photos, classes), at least one of each. Got shape={scores_NC.shape}. "
            "Stack one row per photo."
        )
    return scores_NC


def _labels(labels_N: Classes, photos: int, classes: int) -> Classes:
    labels_N = np.asarray(labels_N)
    if labels_N.shape != (photos,) or labels_N.dtype.kind not in "iu":
        raise UsageError(
            f"labels must be {photos} whole numbers, one per photo. Got shape={labels_N.shape}, "
            f"dtype={labels_N.dtype}. Give the class of each photo."
        )
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise UsageError(
            f"labels must be from 0 to {classes - 1}. Got labels from {labels_N.min()} to {labels_N.max()}. "
            "Check the number of classes."
        )
    return labels_N
