"""Metrics against hand counts, slow loops and scikit-learn."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from noiseproof import metrics
from noiseproof.errors import InputError
from noiseproof.metrics import (
    accuracy,
    classification_metrics,
    clean_fit,
    clean_probability,
    detection,
    expected_calibration_error,
    macro_f1,
    memorization,
    per_class,
    recovery,
)

PREDICTED = [0, 1, 2, 1, 0, 2]
GIVEN = [0, 1, 1, 1, 2, 0]
CLEAN = [0, 1, 2, 0, 0, 1]  # rows 2..5 are wrongly labelled


def test_memorization_clean_fit_and_recovery_count_the_right_rows() -> None:
    assert memorization(PREDICTED, GIVEN, CLEAN) == 0.25  # row 3 of rows 2..5
    assert clean_fit(PREDICTED, GIVEN, CLEAN) == 1.0  # rows 0 and 1
    assert recovery(PREDICTED, GIVEN, CLEAN) == 0.5  # rows 2 and 4


def test_foreign_rows_can_be_memorised_but_not_recovered() -> None:
    """Open-set noise: no class is right (-1), so no prediction can be the true one."""
    clean = [0, 1, 2, 0, -1, -1]
    assert memorization(PREDICTED, GIVEN, clean) == 0.25  # row 3 of rows 2..5
    assert recovery(PREDICTED, GIVEN, clean) == 0.5  # row 2 of rows 2 and 3
    assert recovery([0, 1], [0, 1], [0, -1]) is None


def test_tensors_arrays_and_lists_give_the_same_numbers() -> None:
    columns = (PREDICTED, GIVEN, CLEAN)
    for convert in (np.array, torch.tensor):
        assert memorization(*map(convert, columns)) == memorization(*columns)
    scores = torch.tensor([0.9, 0.1, 0.4], dtype=torch.bfloat16, requires_grad=True)
    assert detection(scores, torch.tensor([True, False, False]))["auroc"] == 1.0


def test_measures_without_rows_are_none() -> None:
    """0 would read as "nothing memorised" on a set that has no wrong label at all."""
    assert memorization(PREDICTED, CLEAN, CLEAN) is None
    assert recovery(PREDICTED, CLEAN, CLEAN) is None
    assert clean_fit([0, 0], [1, 1], [0, 0]) is None


def test_accuracy_and_macro_f1_by_hand() -> None:
    assert accuracy(PREDICTED, GIVEN) == 0.5
    # class 0: 1 hit of 2 predicted, 2 labelled; class 1: 2 of 2, 3; class 2: 0 of 2, 1
    assert macro_f1(PREDICTED, GIVEN) == pytest.approx((0.5 + 0.8 + 0.0) / 3)


def test_per_class_has_every_class_even_the_empty_ones() -> None:
    table = per_class(PREDICTED, GIVEN, num_classes=4)
    assert list(table) == [0, 1, 2, 3]
    assert table[1] == {
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "support": 3.0,
    }
    assert table[3] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0.0}
    assert list(per_class([5, 7], [5, 5])) == [5, 7]
    json.dumps(table)


def test_calibration_error_equals_a_slow_loop_over_bins() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.6] * 4, size=500)
    labels = generator.integers(4, size=500)
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += abs(confidence[inside].mean() - hit[inside].mean()) * inside.mean()
    assert expected > 0.1
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_calibration_error_of_certain_predictions_is_their_error_rate() -> None:
    certain = np.eye(2)[[0, 0, 1, 1]]
    assert expected_calibration_error(certain, [0, 0, 1, 1]) == 0.0
    assert expected_calibration_error(certain, [0, 1, 1, 1]) == 0.25
    assert expected_calibration_error(certain, [1, 1, 0, 0], bins=1) == 1.0


def test_calibration_gaps_of_different_bins_do_not_cancel_and_an_edge_belongs_below() -> None:
    probabilities = [[0.5, 0.5], [0.8, 0.2]]  # too sure by 0.5 in (0, 0.5], too timid by 0.2 above
    error = expected_calibration_error(probabilities, [1, 0], bins=2)
    assert error == pytest.approx((0.5 + 0.2) / 2)


def test_detection_equals_scikit_learn_and_counts_flags() -> None:
    generator = np.random.default_rng(1)
    wrong = generator.random(300) < 0.3
    scores = generator.normal(size=300) + wrong
    found = detection(scores, wrong, flagged=scores > 1)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(wrong, scores))
    assert found["ap"] == pytest.approx(sk.average_precision_score(wrong, scores))
    assert found["precision"] == pytest.approx(sk.precision_score(wrong, scores > 1))
    assert found["recall"] == pytest.approx(sk.recall_score(wrong, scores > 1))
    assert set(detection(scores, wrong)) == {"auroc", "ap"}


def test_detection_ranks_high_scores_as_wrong() -> None:
    assert detection([0.9, 0.1], [True, False])["auroc"] == 1.0
    assert detection([0.9, 0.1], [False, True])["auroc"] == 0.0
    assert detection([0.5, 0.5], [False, True])["auroc"] == 0.5


@pytest.mark.parametrize("wrong", [True, False])
def test_detection_is_none_where_only_one_kind_of_row_exists(wrong: bool) -> None:
    found = detection([0.1, 0.2], [wrong, wrong], flagged=[False, False])
    assert found["auroc"] is None and found["ap"] is None and found["precision"] is None
    assert found["recall"] == (0.0 if wrong else None)


def test_classification_metrics_bundle_equals_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    bundle = classification_metrics(logits, labels, num_classes=5)
    predicted = logits.argmax(1)
    assert bundle["accuracy"] == pytest.approx((predicted == labels).float().mean().item())
    assert bundle["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert bundle["ece"] == pytest.approx(
        expected_calibration_error(logits.double().softmax(1), labels), abs=1e-6
    )
    assert bundle["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert list(bundle) == ["accuracy", "macro_f1", "mcc", "ece", "nll"]
    json.dumps(bundle)


def test_classification_metrics_stay_finite_at_extreme_logits() -> None:
    bundle = classification_metrics(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), [0, 1], 2)
    assert bundle["nll"] == 1e4 and bundle["ece"] == 0.5


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_row_measures_are_shares_and_ignore_the_order_of_rows(rows, random) -> None:
    columns = list(zip(*rows, strict=True))
    shuffled = rows.copy()
    random.shuffle(shuffled)
    for measure in (memorization, clean_fit, recovery):
        value = measure(*columns)
        assert value is None or 0 <= value <= 1
        assert measure(*zip(*shuffled, strict=True)) == value
    memorized, recovered = memorization(*columns), recovery(*columns)
    if memorized is not None and recovered is not None:
        assert memorized + recovered <= 1 + 1e-12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accuracy([0, 1], [0]), "predicted 2, labels 1"),
        (lambda: accuracy([], []), "at least one, got predicted 0"),
        (lambda: memorization([0], [0], [0, 1]), "clean_labels 2"),
        (lambda: per_class([3], [0], num_classes=3), r"0\.\.2.*got 0\.\.3"),
        (lambda: expected_calibration_error([[1.0]], [0], bins=0), "bins must be >= 1, got 0"),
        (lambda: detection([float("nan"), 1.0], [True, False]), "got 1 values that are not"),
        (lambda: classification_metrics([[0.0, 1.0]], [0], 3), r"\(N, 3\), got \(1, 2\)"),
        (lambda: classification_metrics([[0.0, 1.0]], [2], 2), r"0\.\.1, got 2\.\.2"),
    ],
)
def test_wrong_input_is_named_with_what_came(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_the_docstring_examples_are_true() -> None:
    failed, attempted = doctest.testmod(metrics)
    assert failed == 0 and attempted >= 9


def test_detection_curves_are_those_of_all_thresholds() -> None:
    """Points of scikit-learn's curves, from the strictest threshold to the loosest."""
    random = np.random.default_rng(0)
    wrong = random.random(500) < 0.3
    scores = random.normal(size=500) + wrong
    curves = metrics.detection_curves(scores, wrong, points=33)
    roc, pr = np.array(curves["roc"]), np.array(curves["pr"])
    assert roc.shape == pr.shape == (33, 2)
    assert roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1]
    assert (np.diff(roc, axis=0) >= 0).all()
    area = float(np.trapezoid(roc[:, 1], roc[:, 0]))
    assert area == pytest.approx(metrics.detection(scores, wrong)["auroc"], abs=0.01)
    assert pr[-1].tolist() == [1, pytest.approx(wrong.mean(), abs=1e-4)]
    every = np.stack(sk.precision_recall_curve(wrong, scores)[1::-1], axis=1)  # recall, precision
    for point in pr[1:]:
        assert np.abs(every - point).max(axis=1).min() < 1e-3
    assert metrics.detection_curves([0.1, 0.2], [True, True]) == {}


def test_losses_of_right_and_of_wrong_labels_are_counted_apart() -> None:
    """A few huge losses must not squeeze all others into one bin: the last holds them."""
    losses = np.concatenate([np.linspace(0, 1, 500), np.linspace(2, 3, 500), [1e6]])
    wrong = np.arange(1001) >= 500
    found = np.array(metrics.loss_histogram(losses, wrong, bins=12)["losses"])
    assert found.shape == (12, 3) and np.allclose(found[:, 1:].sum(axis=0), 1, atol=1e-3)
    assert found[-1, 0] < 3 and found[-1, 2] > 0.1
    assert not found[found[:, 0] > 1.2, 1].any() and not found[found[:, 0] < 1.8, 2].any()
    assert metrics.loss_histogram([0.1, 0.2], [True, True]) == {}
    assert len(metrics.loss_histogram([1.0, 1.0], [True, False])["losses"]) == 30  # all equal


def test_confusion_counts_every_row_once() -> None:
    table = metrics.confusion([0, 1, 1, 2], [0, 0, 1, 1], num_classes=4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


# --- the clean probability -----------------------------------------------------------------------


def test_a_clean_probability_is_judged_by_its_bins_and_at_one_half() -> None:
    """Bins of 0.25: (0.2, 0.2) with 0 right of 2, 0.6 with 1 of 1, (0.9, 0.9) with 1 of 2."""
    judged = clean_probability([0.2, 0.2, 0.6, 0.9, 0.9], [1, 1, 0, 0, 1], bins=4)
    assert judged["ece"] == pytest.approx((0.4 + 0.4 + abs(1.8 - 1)) / 5)
    assert judged["purity"] == pytest.approx(2 / 3) and judged["recall"] == 1.0


def test_a_perfect_clean_probability_has_no_error() -> None:
    assert clean_probability([1.0, 0.0, 1.0], [False, True, False]) == {
        "ece": 0.0, "purity": 1.0, "recall": 1.0,
    }  # fmt: skip


def test_a_clean_probability_without_chosen_or_right_rows_has_no_shares() -> None:
    assert clean_probability([0.1, 0.5], [True, False])["purity"] is None
    assert clean_probability([0.1, 0.9], [True, True])["recall"] is None


def test_a_clean_probability_must_be_one() -> None:
    with pytest.raises(InputError, match=r"must lie in \[0, 1\], got 0.5 to 3"):
        clean_probability([0.5, 3.0], [True, False])
    with pytest.raises(InputError, match="bins must be >= 1"):
        clean_probability([0.5], [True], bins=0)


def test_the_auroc_by_class_ignores_differences_between_classes() -> None:
    """Right rows of the hard class lose more than wrong rows of the easy one."""
    loss = [0.1, 0.2, 5.0, 6.0]
    wrong = [False, True, False, True]
    assert metrics.detection(loss, wrong)["auroc"] == 0.75
    assert metrics.detection_by_class(loss, wrong, [0, 0, 1, 1]) == 1.0
    assert metrics.detection_by_class(loss, [False] * 4, [0, 0, 1, 1]) is None


def test_a_selection_has_precision_and_recall() -> None:
    found = metrics.selection([True, True, True, False], [False, False, True, False])
    assert found == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert metrics.selection([False, False], [True, True]) == {"precision": None, "recall": None}
