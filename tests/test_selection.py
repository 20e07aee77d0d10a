"""Shares of low scores, anchor points, the confident joint."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from noiseproof import selection
from noiseproof.errors import InputError
from noiseproof.selection import (
    best_first,
    candidates,
    class_quota,
    confident_class,
    draw_per_class,
    estimate_transition,
    held_out_scores,
    kappa,
    lowest,
    place_in_class,
)

# ---- lowest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "kept"), [(0.001, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_lowest_marks_the_share_and_at_least_one_row(share: float, kept: int) -> None:
    scores = torch.tensor([5.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0])
    mask = lowest(scores, share)
    assert mask.dtype == torch.bool and sorted(scores[mask].tolist()) == list(range(1, kept + 1))


def test_lowest_takes_the_first_of_equal_scores() -> None:
    assert lowest(torch.zeros(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("share", [0.0, 1.5, math.nan])
def test_a_share_out_of_range_is_named(share: float) -> None:
    with pytest.raises(InputError, match=rf"share must lie in \(0, 1\], got {share}"):
        lowest(torch.zeros(4), share)


# ---- transition and confident joint -----------------------------------------------------------

TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]])


def soft_clean(rows: int = 600) -> tuple[Tensor, Tensor]:
    """True class probabilities (N, 3), every tenth row an anchor, and true classes (N,)."""
    generator = np.random.default_rng(0)
    clean = generator.dirichlet([0.5] * 3, size=rows)
    clean[::10] = np.eye(3)[np.arange(rows // 10) % 3]
    return torch.tensor(clean, dtype=torch.float32), torch.tensor(clean.argmax(1))


def test_anchor_points_give_back_the_transition_of_a_perfect_model() -> None:
    clean, true = soft_clean()
    noisy = clean @ TRANSITION  # what a perfect model of the given labels predicts
    torch.testing.assert_close(estimate_transition(noisy, percentile=100), TRANSITION)
    torch.testing.assert_close(estimate_transition(noisy, percentile=97), TRANSITION)
    torch.testing.assert_close(estimate_transition(noisy, true, percentile=97), TRANSITION)


def test_the_percentile_passes_over_an_outlier() -> None:
    clean, _ = soft_clean()
    noisy = clean @ TRANSITION
    noisy[5] = torch.tensor([1.0, 0.0, 0.0])  # an over-confident row
    assert estimate_transition(noisy, percentile=100)[0].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(estimate_transition(noisy, percentile=97), TRANSITION)


def test_given_labels_find_the_anchors_of_small_classes() -> None:
    """A class with 1 % of the rows has none of them at the 97th percentile of all rows."""
    probabilities = torch.full((1000, 3), 0.05)
    labels = torch.arange(1000) % 2
    labels[-10:] = 2
    probabilities[torch.arange(1000), labels] = 0.9
    assert estimate_transition(probabilities)[2].argmax() != 2
    assert estimate_transition(probabilities, labels)[2].tolist() == pytest.approx(
        [0.05, 0.05, 0.9]
    )


def test_a_class_never_predicted_gets_the_identity_row() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    for labels in (None, torch.tensor([0, 1])):
        transition = estimate_transition(probabilities, labels, percentile=100)
        assert transition[2].tolist() == [0.0, 0.0, 1.0]
        torch.testing.assert_close(transition[:2], probabilities)


def test_a_class_never_given_gets_the_identity_row() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
    transition = estimate_transition(probabilities, torch.tensor([0, 0]), percentile=100)
    torch.testing.assert_close(transition, torch.tensor([[0.6, 0.4], [0.0, 1.0]]))


def test_transition_rows_sum_to_one_even_if_the_probabilities_do_not() -> None:
    scores = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    expected = torch.tensor([[2 / 3, 1 / 3], [0.25, 0.75]])
    torch.testing.assert_close(estimate_transition(scores, percentile=100), expected)


def slow_confident_class(probabilities: np.ndarray, labels: np.ndarray) -> list[int]:
    """Algorithm of Northcutt et al. 2021 as a loop."""
    present = [c for c in range(probabilities.shape[1]) if (labels == c).any()]
    threshold = {c: probabilities[labels == c, c].mean() for c in present}
    found = []
    for row in probabilities:
        over = [c for c in present if row[c] >= threshold[c] - 1e-6]
        found.append(max(over, key=lambda c: row[c]) if over else -1)
    return found


@pytest.mark.parametrize("absent", [None, 3])
def test_the_confident_class_equals_the_slow_loop(absent: int | None) -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(4, size=500)
    if absent is not None:
        labels[labels == absent] = 0
    probabilities = generator.dirichlet([1.0] * 4, size=500)
    probabilities[np.arange(500), labels] += 0.5
    probabilities /= probabilities.sum(1, keepdims=True)
    found = confident_class(torch.tensor(probabilities), torch.tensor(labels))
    assert found.dtype == torch.int64 and 0 < int((found >= 0).sum()) < 500
    assert found.tolist() == slow_confident_class(probabilities, labels)


def test_rows_of_equal_confidence_have_a_confident_class() -> None:
    """The mean of 7 times 0.913 rounds above 0.913: without slack no row would reach it."""
    assert sum([0.913] * 7) / 7 > 0.913
    rows = [[0.913, 0.087]] * 7 + [[0.087, 0.913]] * 7
    probabilities = torch.tensor(rows, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 7)
    assert confident_class(probabilities, labels).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: estimate_transition(torch.ones(3)), r"\(N, C\).*got \(3,\)"),
        (lambda: estimate_transition(torch.ones(2, 2), percentile=101), "got 101"),
        (lambda: confident_class(torch.ones(2, 2), torch.zeros(3).long()), r"\(2,\), got \(3,\)"),
        (lambda: confident_class(torch.ones(2, 2), torch.tensor([0, 2])), r"0\.\.1, got 0\.\.2"),
    ],
)
def test_wrong_probabilities_are_named(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


# ---- selection by class -----------------------------------------------------------------------


def random_rows(seed: int, rows: int = 200, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors with ties, losses, labels of classes of very different size."""
    random = torch.Generator().manual_seed(seed)
    clean = (torch.rand(rows, generator=random) * 8).round() / 8
    labels = (torch.rand(rows, generator=random) ** 3 * classes).long()
    return clean, torch.rand(rows, generator=random), labels


@pytest.mark.parametrize(
    ("settings", "quota"),
    [
        ({}, [3, 3, 3]),
        ({"ratio": 2.0}, [5, 3, 6]),
        ({"balance": "none"}, [5, 3, 8]),
        ({"balance": "auto", "min_keep": 9 / 16}, [3, 3, 3]),
        ({"balance": "auto", "min_keep": 9.1 / 16}, [5, 3, 8]),
    ],
    ids=str,
)
def test_a_class_may_keep_as_many_rows_as_the_smallest(settings: dict, quota: list[int]) -> None:
    assert class_quota(torch.tensor([5, 3, 8]), **settings).tolist() == quota


def test_a_class_without_candidates_is_no_minimum() -> None:
    """Else one missing class would leave nothing of all the others."""
    assert class_quota(torch.tensor([5, 0, 8])).tolist() == [5, 0, 5]
    assert class_quota(torch.tensor([0, 0])).tolist() == [0, 0]
    with pytest.raises(InputError, match="balance must be auto, min or none, got 'max'"):
        class_quota(torch.tensor([1]), "max")


def test_the_floor_is_a_share_of_the_class_rounded_up() -> None:
    """100 rows of which none is above the threshold keep 5 % of them: the 5 with the best
    posteriors, of equal ones those with lower losses, of equal ones the first.
    """
    clean = torch.full((100,), 0.2)
    clean[[90, 91, 92]] = 0.3
    losses = torch.full((100,), 2.0)
    losses[50] = 1.0
    rows = torch.zeros(100, dtype=torch.long)
    marked = candidates(clean, losses, rows, 0.6, 0.05)
    assert marked.nonzero().flatten().tolist() == [0, 50, 90, 91, 92]
    for size, kept in ((1, 1), (20, 1), (21, 2), (140, 7)):  # 0.05 x 140 is a little above 7
        flat = torch.zeros(size)
        assert int(candidates(flat, flat, flat.long(), 0.6, 0.05).sum()) == kept
    assert not candidates(clean, losses, rows, 0.6).any()


@pytest.mark.parametrize("seed", range(20))
def test_candidates_and_draws_equal_a_slow_loop(seed: int) -> None:
    clean, losses, labels = random_rows(seed)
    marked = candidates(clean, losses, labels, 0.6, 0.3)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    quota = class_quota(torch.bincount(labels[marked]), ratio=1.5)
    keep = draw_per_class(marked, labels, quota, order)
    for label in labels.unique().tolist():
        rows = [row for row in range(len(labels)) if labels[row] == label]
        wanted = [row for row in rows if clean[row] > 0.6]
        floor = max(1, math.ceil(0.3 * len(rows) - 1e-9))
        if len(wanted) < floor:
            wanted = sorted(rows, key=lambda row: (-clean[row], losses[row], row))[:floor]
        assert sorted(wanted) == [row for row in rows if marked[row]]
        drawn = [row for row in order.tolist() if row in wanted][: int(quota[label])]
        assert sorted(drawn) == [row for row in rows if keep[row]]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rows_does_not_matter(seed: int) -> None:
    clean, losses, labels = random_rows(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))

    def kept(clean: Tensor, losses: Tensor, labels: Tensor) -> Tensor:
        marked = candidates(clean, losses, labels, 0.6, 0.2)
        quota = class_quota(torch.bincount(labels[marked]))
        return draw_per_class(marked, labels, quota, best_first(clean, losses))

    straight = kept(clean, losses, labels)
    assert torch.equal(kept(clean[order], losses[order], labels[order]), straight[order])


def test_places_count_within_their_class() -> None:
    classes = torch.tensor([2, 2, 0, 2, 0])
    assert place_in_class(classes).tolist() == [0, 1, 0, 2, 1]
    assert place_in_class(torch.tensor([], dtype=torch.long)).tolist() == []


def test_a_smaller_quota_keeps_a_part_of_the_larger() -> None:
    """A fixed order is nested: a row that is dropped does not come back with fewer places."""
    _, _, labels = random_rows(0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    marked = torch.ones(len(labels), dtype=torch.bool)
    last = marked
    for size in (20, 7, 3, 1, 0):
        keep = draw_per_class(marked, labels, torch.full((7,), size), order)
        assert bool((keep & ~last).sum() == 0)
        assert int(torch.bincount(labels[keep], minlength=7).max()) <= size
        last = keep


# ---- held-out agreement -----------------------------------------------------------------------


def held_out_agreement(features: Tensor, labels: Tensor, classes: int) -> float:
    return kappa(held_out_scores(features, labels, classes).argmax(1), labels)


def test_held_out_agreement_is_one_for_features_that_tell_and_zero_for_noise() -> None:
    """Measured on the rows it was trained on, 60 columns fit 100 random labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    useful = torch.nn.functional.one_hot(labels, 5) + 0.05 * torch.randn(300, 5, generator=random)
    assert held_out_agreement(useful * 100 + 7, labels, 5) == 1
    useless = torch.randn(100, 60, generator=random)
    assert abs(held_out_agreement(useless, labels[:100], 5)) < 0.15
    both = [held_out_agreement(torch.randn(300, 20, generator=random), labels, 5) for _ in range(9)]
    assert abs(sum(both) / 9) < 0.03


def test_held_out_agreement_falls_with_the_noise_and_bears_constant_columns() -> None:
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % 4
    features = torch.nn.functional.one_hot(labels, 4).float()
    features = torch.cat([features, torch.ones(400, 3)], dim=1)
    noisy = labels.clone()
    wrong = torch.randperm(400, generator=random)[:160]
    noisy[wrong] = (labels[wrong] + 1 + torch.randint(3, (160,), generator=random)) % 4
    assert held_out_agreement(features, noisy, 4) == pytest.approx((0.6 - 0.25) / 0.75, abs=0.02)
    assert held_out_agreement(features, torch.zeros(400, dtype=torch.long), 4) == 0


def test_the_docstring_examples_are_true() -> None:
    failed, attempted = doctest.testmod(selection)
    assert failed == 0 and attempted >= 4
