"""Closed forms, limits and stability of the losses."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noiseproof import losses
from noiseproof.errors import InputError
from noiseproof.losses import (
    backward_correction,
    bootstrapping,
    consistency,
    cross_entropy,
    early_learning_regularizer,
    forward_correction,
    generalized_cross_entropy,
    label_smoothing,
    marginal_cross_entropy,
    mean_absolute_error,
    soft_cross_entropy,
    symmetric_cross_entropy,
)

NOISE = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.6, 0.4], [0.3, 0.0, 0.7]])  # row = true class
RowLoss = Callable[[Tensor, Tensor], Tensor]

ROW_LOSSES: dict[str, RowLoss] = {
    "cross_entropy": cross_entropy,
    "soft_cross_entropy": lambda z, y: soft_cross_entropy(z, F.one_hot(y, z.shape[1]).float()),
    "label_smoothing": lambda z, y: label_smoothing(z, y, 0.1),
    "gce": lambda z, y: generalized_cross_entropy(z, y, 0.7),
    "gce_small_q": lambda z, y: generalized_cross_entropy(z, y, 1e-6),
    "sce": lambda z, y: symmetric_cross_entropy(z, y, 0.1, 1.0),
    "mae": mean_absolute_error,
    "bootstrapping_soft": lambda z, y: bootstrapping(z, y, 0.95, hard=False),
    "bootstrapping_hard": lambda z, y: bootstrapping(z, y, 0.8, hard=True),
    "forward": lambda z, y: forward_correction(z, y, NOISE),
    "marginal": lambda z, y: marginal_cross_entropy(z, NOISE.T[y]),
    "backward": lambda z, y: backward_correction(z, y, NOISE),
    "consistency": lambda z, y: consistency(z, z.detach().flip(1), 0.5),
    "elr": lambda z, y: early_learning_regularizer(
        z.float().softmax(1), F.one_hot(y, z.shape[1]).float()
    ),
}


def random_rows(rows: int = 40, classes: int = 3, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and labels (B,) from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def logits_of(probability: float) -> Tensor:
    """Two-class logits (1, 2) whose first class has the given probability."""
    return torch.tensor([[math.log(probability), math.log1p(-probability)]])


@pytest.mark.parametrize("loss", ROW_LOSSES.values(), ids=ROW_LOSSES)
def test_every_loss_is_finite_with_finite_gradients_at_extreme_logits(loss: RowLoss) -> None:
    """One infinite row would turn the whole batch, then the weights, into NaN."""
    extremes = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4], [1e4, 0.0, 1e4]]
    )
    for label in range(3):
        logits = extremes.clone().requires_grad_()
        rows = loss(logits, torch.full((5,), label))
        rows.sum().backward()
        assert rows.isfinite().all()
        assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", ROW_LOSSES.values(), ids=ROW_LOSSES)
def test_every_loss_gives_one_fp32_value_per_row_in_any_precision(
    loss: RowLoss, dtype: torch.dtype
) -> None:
    logits, labels = random_rows()
    rounded = logits.to(dtype)
    rows = loss(rounded, labels)
    assert rows.shape == (40,) and rows.dtype == torch.float32
    torch.testing.assert_close(rows, loss(rounded.float(), labels))


@pytest.mark.parametrize("loss", ROW_LOSSES.values(), ids=ROW_LOSSES)
def test_every_loss_treats_rows_independently(loss: RowLoss) -> None:
    logits, labels = random_rows()
    one_by_one = torch.cat([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(loss(logits, labels), one_by_one)


def test_cross_entropy_and_label_smoothing_equal_torch() -> None:
    logits, labels = random_rows()
    torch.testing.assert_close(
        cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    )
    hard = F.one_hot(labels, 3).float()
    expected = soft_cross_entropy(logits, 0.8 * hard + 0.2 / 3)
    torch.testing.assert_close(label_smoothing(logits, labels, 0.2), expected)
    assert torch.equal(label_smoothing(logits, labels, 0.0), cross_entropy(logits, labels))


def test_soft_cross_entropy_equals_torch_with_soft_targets() -> None:
    logits, _ = random_rows()
    target = logits.flip(0).softmax(1)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)


@pytest.mark.parametrize(
    ("q", "probability", "value"),
    [
        (0.7, 0.5, 0.549183),
        (0.7, 0.25, 0.887244),
        (0.7, 0.01, 1.371699),
        (1e-6, 0.5, 0.693147),
        (1.0, 0.25, 0.75),
    ],
)
def test_gce_has_the_values_of_the_formula(q: float, probability: float, value: float) -> None:
    loss = generalized_cross_entropy(logits_of(probability), torch.tensor([0]), q)
    assert loss.item() == pytest.approx(value, abs=2e-6)


def test_gce_of_an_impossible_class_is_its_bound() -> None:
    loss = generalized_cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([0]), 0.7)
    assert loss.item() == pytest.approx(1.428571, abs=1e-6)


def test_gce_gradient_is_the_damped_gradient_of_cross_entropy() -> None:
    even = torch.zeros(1, 2, requires_grad=True)
    generalized_cross_entropy(even, torch.tensor([0]), 0.7).sum().backward()
    assert even.grad is not None
    torch.testing.assert_close(even.grad, torch.tensor([[-0.307786, 0.307786]]), atol=1e-6, rtol=0)
    logits, labels = random_rows()
    logits.requires_grad_()
    generalized_cross_entropy(logits, labels, 0.7).sum().backward()
    p = logits.detach().softmax(1)
    damping = p.gather(1, labels[:, None]) ** 0.7
    torch.testing.assert_close(logits.grad, damping * (p - F.one_hot(labels, 3)))


def test_gce_is_cross_entropy_for_q_to_zero_and_half_the_mae_for_q_one() -> None:
    logits, labels = random_rows()
    torch.testing.assert_close(
        generalized_cross_entropy(logits, labels, 1e-7), cross_entropy(logits, labels)
    )
    torch.testing.assert_close(
        generalized_cross_entropy(logits, labels, 1.0), mean_absolute_error(logits, labels) / 2
    )


def test_symmetric_cross_entropy_equals_both_terms_written_out() -> None:
    logits, labels = random_rows()
    p = logits.softmax(1)
    log_onehot = torch.where(F.one_hot(labels, 3) == 1, 0.0, -6.0)
    expected = 0.3 * cross_entropy(logits, labels) - 2.0 * (p * log_onehot).sum(1)
    torch.testing.assert_close(
        symmetric_cross_entropy(logits, labels, 0.3, 2.0, log_zero=-6.0), expected
    )
    plain = symmetric_cross_entropy(logits, labels, alpha=1.0, beta=0.0)
    torch.testing.assert_close(plain, cross_entropy(logits, labels))


def test_mean_absolute_error_is_the_distance_to_the_one_hot_label() -> None:
    logits, labels = random_rows()
    expected = (F.one_hot(labels, 3) - logits.softmax(1)).abs().sum(1)
    torch.testing.assert_close(mean_absolute_error(logits, labels), expected)


def test_mean_absolute_error_summed_over_classes_is_constant() -> None:
    """This symmetry is what makes MAE robust to symmetric noise (Ghosh et al. 2017)."""
    logits, labels = random_rows()
    total = sum(mean_absolute_error(logits, torch.full_like(labels, c)) for c in range(3))
    torch.testing.assert_close(total, torch.full((40,), 4.0))  # 2 (C - 1)


@pytest.mark.parametrize("hard", [False, True])
def test_bootstrapping_trusts_labels_at_one_and_the_model_at_zero(hard: bool) -> None:
    logits, labels = random_rows()
    torch.testing.assert_close(
        bootstrapping(logits, labels, 1.0, hard), cross_entropy(logits, labels)
    )
    own = logits.softmax(1)
    entropy = -(own * own.log()).sum(1)
    expected = cross_entropy(logits, logits.argmax(1)) if hard else entropy
    torch.testing.assert_close(bootstrapping(logits, labels, 0.0, hard), expected)


def test_bootstrapping_sends_no_gradient_through_its_target() -> None:
    """With the target attached the soft loss would lower its entropy instead of following it."""
    logits, labels = random_rows()
    logits.requires_grad_()
    bootstrapping(logits, labels, 0.6, hard=False).sum().backward()
    p = logits.detach().softmax(1)
    target = 0.6 * F.one_hot(labels, 3) + 0.4 * p
    torch.testing.assert_close(logits.grad, p - target)


def test_forward_correction_is_the_loss_of_the_noisy_prediction() -> None:
    logits, labels = random_rows()
    noisy = logits.softmax(1) @ NOISE  # (B, C): p(given) = sum over true p(true) T[true, given]
    expected = -noisy.gather(1, labels[:, None]).squeeze(1).log()
    torch.testing.assert_close(forward_correction(logits, labels, NOISE), expected)


def test_the_chances_of_a_label_may_differ_from_row_to_row() -> None:
    logits, labels = random_rows(2)
    other = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    likelihood = torch.stack([NOISE[:, labels[0]], other[:, labels[1]]])
    expected = [
        forward_correction(logits[row : row + 1], labels[row : row + 1], matrix).item()
        for row, matrix in enumerate((NOISE, other))
    ]
    assert marginal_cross_entropy(logits, likelihood).tolist() == expected


def test_both_corrections_without_noise_are_cross_entropy() -> None:
    logits, labels = random_rows(scale=30.0)
    plain = cross_entropy(logits, labels)
    torch.testing.assert_close(forward_correction(logits, labels, torch.eye(3)), plain)
    torch.testing.assert_close(backward_correction(logits, labels, torch.eye(3)), plain)


def test_backward_correction_is_unbiased_over_the_noise() -> None:
    logits, true = random_rows()
    every_given = [backward_correction(logits, torch.full_like(true, c), NOISE) for c in range(3)]
    mean = (NOISE[true] * torch.stack(every_given, dim=1)).sum(1)  # over given ~ T[true]
    torch.testing.assert_close(mean, cross_entropy(logits, true), atol=1e-4, rtol=1e-4)


def test_an_impossible_label_costs_a_finite_but_unmissable_amount() -> None:
    transition = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # label 1 is never given
    loss = forward_correction(torch.zeros(1, 2), torch.tensor([1]), transition)
    assert loss.item() == pytest.approx(1e30)


@pytest.mark.parametrize(
    ("temperature", "squared", "student", "value"),
    [
        (1.0, True, 0.0, 0.693147),
        (1.0, True, 2.0, 1.126928),
        (0.5, False, 2.0, 2.018150),
        (0.5, True, 2.0, 0.504537),
    ],
)
def test_consistency_has_the_values_of_the_specification(
    temperature: float, squared: bool, student: float, value: float
) -> None:
    logits = torch.tensor([[student, 0.0]])
    loss = consistency(logits, torch.zeros(1, 2), temperature, squared)
    assert loss.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("temperature", "slope"), [(1.0, 0.380797), (0.5, 0.964028)])
def test_consistency_gradient_is_the_difference_over_the_temperature(
    temperature: float, slope: float
) -> None:
    student = torch.tensor([[2.0, 0.0]], requires_grad=True)
    teacher = torch.zeros(1, 2, requires_grad=True)
    consistency(student, teacher, temperature, squared=False).sum().backward()
    assert student.grad is not None
    assert student.grad[0, 0].item() == pytest.approx(slope, abs=1e-6)
    assert teacher.grad is None


def test_consistency_gradient_vanishes_for_a_student_equal_up_to_a_constant() -> None:
    teacher, _ = random_rows()
    student = (teacher + 5.0).requires_grad_()
    consistency(student, teacher, 0.7).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros(40, 3), atol=1e-6, rtol=0)


def test_early_learning_regularizer_equals_the_formula_and_its_gradient_raises_agreement() -> None:
    logits, _ = random_rows(scale=1.0)
    target = logits.flip(0).softmax(1)
    logits.requires_grad_()
    p = logits.softmax(1)
    rows = early_learning_regularizer(p, target)
    torch.testing.assert_close(rows, (1 - (p * target).sum(1)).log())
    rows.sum().backward()
    assert logits.grad is not None
    moved = early_learning_regularizer((logits - 0.1 * logits.grad).softmax(1), target)
    assert bool((moved < rows).all())


def test_early_learning_regularizer_of_full_agreement_is_clamped() -> None:
    certain = torch.tensor([[1.0, 0.0]])
    assert early_learning_regularizer(certain, certain).item() == pytest.approx(math.log(1e-4))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    st.floats(0.01, 1.0),
    st.floats(-100, 100),
)
def test_gce_lies_in_its_range_and_ignores_a_shift_of_the_logits(
    row: list[float], q: float, shift: float
) -> None:
    logits, label = torch.tensor([row]), torch.tensor([0])
    loss = generalized_cross_entropy(logits, label, q)
    assert 0 <= loss.item() <= (1 + 1e-6) / q
    assert loss.item() <= cross_entropy(logits, label).item() * (1 + 1e-5) + 1e-6
    shifted = generalized_cross_entropy(logits + shift, label, q)
    torch.testing.assert_close(loss, shifted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, y: generalized_cross_entropy(z, y, 0.0), "q must lie in .0, 1., got 0.0"),
        (lambda z, y: generalized_cross_entropy(z, y, 1.5), "got 1.5"),
        (lambda z, y: label_smoothing(z, y, -0.1), "smoothing must lie in .0, 1., got -0.1"),
        (lambda z, y: bootstrapping(z, y, 1.1, hard=True), "beta must lie in .0, 1., got 1.1"),
        (lambda z, y: consistency(z, z, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda z, y: symmetric_cross_entropy(z, y, 1, 1, log_zero=0.0), "log_zero must be neg"),
        (lambda z, y: forward_correction(z, y, torch.eye(2)), r"shape \(3, 3\).*got \(2, 2\)"),
        (lambda z, y: backward_correction(z, y, torch.eye(4)), r"shape \(3, 3\).*got \(4, 4\)"),
        (lambda z, y: backward_correction(z, y, torch.ones(3, 3) / 3), "singular"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(call: RowLoss, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(*random_rows())


def test_the_docstring_examples_are_true() -> None:
    failed, attempted = doctest.testmod(losses)
    assert failed == 0 and attempted >= 13
