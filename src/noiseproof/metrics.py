"""Measures of a model on (possibly wrong) labels: plain arrays or tensors in, plain numbers out.

`predicted` are class numbers (N,), `labels` the labels to compare with, `clean_labels` the ground
truth where it is known. A measure that has no rows to be measured on is None, never 0 or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics as sk  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from noiseproof.errors import InputError

Values = NDArray[Any] | Tensor | Sequence[Any]


def accuracy(predicted: Values, labels: Values) -> float:
    """Compute the share of rows predicted as labelled.  (N,), (N,) -> number.

    >>> accuracy([0, 1, 1, 0], [0, 1, 0, 0])
    0.75
    """
    predicted_array, label_array = _columns(predicted=predicted, labels=labels)
    return float(sk.accuracy_score(label_array, predicted_array))


def macro_f1(predicted: Values, labels: Values) -> float:
    """Compute F1 averaged over the classes that occur, in labels or predictions.  -> number.

    Shapes (N,), (N,). A class that is predicted or labelled but never hit counts as 0.

    >>> round(macro_f1([0, 0, 0, 0], [0, 0, 0, 1]), 4)
    0.4286
    """
    predicted_array, label_array = _columns(predicted=predicted, labels=labels)
    return float(sk.f1_score(label_array, predicted_array, average="macro", zero_division=0))


def matthews(predicted: Values, labels: Values) -> float:
    """Compute the Matthews correlation of predictions and labels.  (N,), (N,) -> number.

    Between -1 and 1; 0 is what a constant answer gets, however unequal the classes are.

    >>> matthews([0, 0, 1, 1], [0, 0, 1, 1]), matthews([1, 1, 1, 1], [0, 1, 1, 1])
    (1.0, 0.0)
    """
    predicted_array, label_array = _columns(predicted=predicted, labels=labels)
    return float(sk.matthews_corrcoef(label_array, predicted_array))


def per_class(
    predicted: Values, labels: Values, num_classes: int | None = None
) -> dict[int, dict[str, float]]:
    """Compute precision, recall, f1 and support of every class.  (N,), (N,) -> dict by class.

    Classes are 0..num_classes-1, by default those that occur. An empty class has zeros.

    >>> per_class([0, 1, 1], [0, 1, 0])[1]
    {'precision': 0.5, 'recall': 1.0, 'f1': 0.6666666666666666, 'support': 1.0}
    """
    predicted_array, label_array = _columns(predicted=predicted, labels=labels)
    classes = np.union1d(predicted_array, label_array)
    if num_classes is not None:
        if classes.min() < 0 or classes.max() >= num_classes:
            raise InputError(
                f"classes must lie in 0..{num_classes - 1} (num_classes={num_classes}),"
                f" got {classes.min()}..{classes.max()}"
            )
        classes = np.arange(num_classes)
    columns = sk.precision_recall_fscore_support(
        label_array, predicted_array, labels=classes, zero_division=0
    )
    names = ("precision", "recall", "f1", "support")
    return {
        int(label): {name: float(column[i]) for name, column in zip(names, columns, strict=True)}
        for i, label in enumerate(classes)
    }


def expected_calibration_error(probabilities: Values, labels: Values, bins: int = 15) -> float:
    """Compute the mean gap between confidence and accuracy.  (N, C), (N,) -> number.

    Guo et al. 2017, eq. 5: equally wide bins (low, high] of the highest probability, each gap
    weighted by its share of rows.

    >>> round(expected_calibration_error([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 4)
    0.3
    """
    if bins < 1:
        raise InputError(f"bins must be >= 1, got {bins}; 15 is the usual choice")
    scores, label_array = _columns(probabilities=probabilities, labels=labels)
    confidence = scores.max(axis=1)  # (N,)
    hit = scores.argmax(axis=1) == label_array  # (N,)
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (N,) bin of the row
    surplus = np.bincount(number, weights=confidence - hit, minlength=bins)  # (bins,)
    return float(np.abs(surplus).sum() / len(hit))


def memorization(predicted: Values, labels: Values, clean_labels: Values) -> float | None:
    """Compute the share of wrongly labelled rows predicted as their given label.  -> number.

    Shapes (N,), (N,), (N,); None where no row is wrongly labelled.

    >>> memorization(predicted=[1, 0, 0], labels=[1, 1, 0], clean_labels=[0, 0, 0])
    0.5
    """
    predicted_array, given, true = _columns(
        predicted=predicted, labels=labels, clean_labels=clean_labels
    )
    return _share((predicted_array == given)[given != true])


def clean_fit(predicted: Values, labels: Values, clean_labels: Values) -> float | None:
    """Compute the share of rightly labelled rows predicted as labelled.  (N,) x 3 -> number.

    None where no row is rightly labelled.

    >>> clean_fit(predicted=[1, 0, 0], labels=[1, 0, 1], clean_labels=[1, 0, 1])
    0.6666666666666666
    """
    predicted_array, given, true = _columns(
        predicted=predicted, labels=labels, clean_labels=clean_labels
    )
    return _share((predicted_array == given)[given == true])


def recovery(predicted: Values, labels: Values, clean_labels: Values) -> float | None:
    """Compute the share of wrongly labelled rows predicted as their true class.  -> number.

    Shapes (N,), (N,), (N,). Tells "corrected" from merely "not memorised". Rows without a true
    class (clean label -1, a foreign input) cannot be recovered and do not count; None where no
    other row is wrongly labelled.

    >>> recovery(predicted=[0, 2], labels=[1, 1], clean_labels=[0, 0])
    0.5
    """
    predicted_array, given, true = _columns(
        predicted=predicted, labels=labels, clean_labels=clean_labels
    )
    return _share((predicted_array == true)[(given != true) & (true >= 0)])


def detection(
    score_wrong: Values, is_wrong: Values, flagged: Values | None = None
) -> dict[str, float | None]:
    """Measure how well a score finds the wrong labels.  (N,), (N,) bool -> dict.

    `auroc` and `ap` (average precision) are None unless both right and wrong rows exist. With
    `flagged` (N,) bool also `precision` (None if nothing is flagged) and `recall` (None if nothing
    is wrong).

    >>> detection([0.9, 0.8, 0.1], [True, False, False])
    {'auroc': 1.0, 'ap': 1.0}
    """
    scores, wrong = _columns(score_wrong=score_wrong, is_wrong=is_wrong)
    wrong = wrong.astype(bool)
    unusable = int((~np.isfinite(scores)).sum())
    if unusable:
        raise InputError(f"score_wrong must be finite, got {unusable} values that are not")
    both = bool(wrong.any() and not wrong.all())
    measured: dict[str, float | None] = {
        "auroc": float(sk.roc_auc_score(wrong, scores)) if both else None,
        "ap": float(sk.average_precision_score(wrong, scores)) if both else None,
    }
    if flagged is not None:
        flags = _columns(score_wrong=scores, flagged=flagged)[1].astype(bool)
        measured["precision"] = _share(wrong[flags])
        measured["recall"] = _share(flags[wrong])
    return measured


def detection_by_class(score_wrong: Values, is_wrong: Values, labels: Values) -> float | None:
    """Average over given classes how well a score finds wrong labels.  (N,) x 3 -> AUROC or None.

    A class counts if it has both right and wrong rows. Differences between classes, which help or
    hurt the AUROC of all rows together, do not enter.

    >>> detection_by_class([0.9, 0.1, 5.0, 3.0], [True, False, True, False], [0, 0, 1, 1])
    1.0
    """
    scores, wrong, given = _columns(score_wrong=score_wrong, is_wrong=is_wrong, labels=labels)
    parts = [detection(scores[given == one], wrong[given == one]) for one in np.unique(given)]
    found = [part["auroc"] for part in parts if part["auroc"] is not None]
    return float(np.mean(found)) if found else None


def selection(kept: Values, is_wrong: Values) -> dict[str, float | None]:
    """Judge the rows that a method trains on.  (N,) bool, (N,) bool -> dict.

    `precision`: share of right labels among them; 1 - precision is the noise that is left.
    `recall`: share of all right labels that they hold. None where no row can be measured on.

    >>> selection([True, True, False, False], [False, True, False, True])
    {'precision': 0.5, 'recall': 0.5}
    """
    keep, wrong = (column.astype(bool) for column in _columns(kept=kept, is_wrong=is_wrong))
    return {"precision": _share(~wrong[keep]), "recall": _share(keep[~wrong])}


def clean_probability(
    clean_prob: Values, is_wrong: Values, bins: int = 15
) -> dict[str, float | None]:
    """Judge an estimated probability that a label is right.  (N,), (N,) bool -> dict.

    `ece` is the mean gap between the probability and the share of right labels, in equally wide
    bins (low, high] weighted by their rows. `purity` is the share of right labels among the rows
    above 0.5 (None if there is none), `recall` the share of the right labels that lie there (None
    if no label is right).

    >>> clean_probability([0.9, 0.9, 0.1, 0.1], [False, False, True, False])
    {'ece': 0.25, 'purity': 1.0, 'recall': 0.6666666666666666}
    """
    if bins < 1:
        raise InputError(f"bins must be >= 1, got {bins}; 15 is the usual choice")
    chance, wrong = _columns(clean_prob=clean_prob, is_wrong=is_wrong)
    right = ~wrong.astype(bool)
    if not ((chance > -1e-6) & (chance < 1 + 1e-6)).all():  # but for rounding
        raise InputError(
            f"clean_prob must lie in [0, 1], got {chance.min():g} to {chance.max():g}; "
            "give probabilities, not scores"
        )
    number = np.clip(np.ceil(chance * bins).astype(int) - 1, 0, bins - 1)  # (N,) bin of the row
    surplus = np.bincount(number, weights=chance - right, minlength=bins)  # (bins,)
    chosen = chance > 0.5
    return {
        "ece": float(np.abs(surplus).sum() / len(right)),
        "purity": _share(right[chosen]),
        "recall": _share(chosen[right]),
    }


def detection_curves(
    score_wrong: Values, is_wrong: Values, points: int = 65
) -> dict[str, list[list[float]]]:
    """Draw how the wrong labels are found as the threshold falls.  (N,), (N,) bool -> dict.

    `roc` has points [false positive rate, true positive rate], `pr` [recall, precision], each at
    most `points` of them, evenly over the corners of the curve; empty unless both right and
    wrong rows exist.

    >>> detection_curves([0.9, 0.8, 0.1], [True, False, False], points=3)["roc"]
    [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    scores, wrong = _columns(score_wrong=score_wrong, is_wrong=is_wrong)
    wrong = wrong.astype(bool)
    if wrong.all() or not wrong.any():
        return {}
    false, true, _ = sk.roc_curve(wrong, scores)
    flagged = true * wrong.sum() + false * (~wrong).sum()  # rows above the threshold
    precision = np.where(flagged > 0, true * wrong.sum() / np.maximum(flagged, 1), 1.0)
    chosen = np.unique(np.linspace(0, len(true) - 1, points).round().astype(int))
    return {
        "roc": np.stack([false, true], axis=1)[chosen].round(4).tolist(),
        "pr": np.stack([true, precision], axis=1)[chosen].round(4).tolist(),
    }


def loss_histogram(
    losses: Values, is_wrong: Values, bins: int = 30
) -> dict[str, list[list[float]]]:
    """Count the losses of right and of wrong labels.  (N,), (N,) bool -> dict.

    `losses` has points [middle of a bin, share of the right rows, share of the wrong rows]; the
    bins are equally wide and end at the 99th percentile, the last holds all that is above. Empty
    unless both right and wrong rows exist.

    >>> loss_histogram([0.0, 1.0, 2.0, 2.0], [False, False, True, True], bins=2)["losses"]
    [[0.5, 0.5, 0.0], [1.5, 0.5, 1.0]]
    """
    values, wrong = _columns(losses=losses, is_wrong=is_wrong)
    wrong = wrong.astype(bool)
    if wrong.all() or not wrong.any():
        return {}
    low, high = float(values.min()), float(np.percentile(values, 99))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    parts = [
        np.histogram(values[rows].clip(max=edges[-1]), edges)[0] / rows.sum()
        for rows in (~wrong, wrong)
    ]
    return {
        "losses": np.stack([(edges[1:] + edges[:-1]) / 2, *parts], axis=1).round(4).tolist(),
    }


def confusion(predicted: Values, labels: Values, num_classes: int) -> NDArray[Any]:
    """Count rows by label (row) and prediction (column).  (N,), (N,) -> (C, C).

    >>> confusion([0, 1, 1], [0, 1, 0], num_classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    predicted_array, label_array = _columns(predicted=predicted, labels=labels)
    counts: NDArray[Any] = sk.confusion_matrix(
        label_array, predicted_array, labels=np.arange(num_classes)
    )
    return counts


def classification_metrics(logits: Values, labels: Values, num_classes: int) -> dict[str, float]:
    """Compute accuracy, macro_f1, mcc, ece and nll of logits.  (N, C), (N,) -> dict.

    >>> classification_metrics([[2.0, 0.0], [0.0, 2.0]], [0, 1], num_classes=2)["accuracy"]
    1.0
    """
    scores, label_array = _columns(logits=logits, labels=labels)
    if scores.ndim != 2 or scores.shape[1] != num_classes:
        raise InputError(f"logits must have shape (N, {num_classes}), got {scores.shape}")
    if label_array.min() < 0 or label_array.max() >= num_classes:
        raise InputError(
            f"labels must lie in 0..{num_classes - 1}, got {label_array.min()}..{label_array.max()}"
        )
    log_probabilities = torch.as_tensor(scores).double().log_softmax(dim=1).numpy()  # (N, C)
    predicted = scores.argmax(axis=1)
    return {
        "accuracy": accuracy(predicted, label_array),
        "macro_f1": macro_f1(predicted, label_array),
        "mcc": matthews(predicted, label_array),
        "ece": expected_calibration_error(np.exp(log_probabilities), label_array),
        "nll": float(-log_probabilities[np.arange(len(label_array)), label_array].mean()),
    }


def _columns(**columns: Values) -> list[NDArray[Any]]:
    """Turn tensors, lists and arrays into arrays with the same, positive number of rows."""
    arrays = [_array(column) for column in columns.values()]
    sizes = {name: len(array) for name, array in zip(columns, arrays, strict=True)}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"expected equally many rows, at least one, got {found}")
    return arrays


def _array(column: Values) -> NDArray[Any]:
    """Bring one column to the CPU as a numpy array."""
    if isinstance(column, Tensor):
        column = column.detach().cpu()
        return (column.float() if column.is_floating_point() else column).numpy()
    return np.asarray(column)


def _share(hits: NDArray[Any]) -> float | None:
    """Compute the mean of a bool array, None where it is empty."""
    return float(hits.mean()) if len(hits) else None
