"""Regularisers: values known by hand, gradients against formulas, and batches that degenerate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from noiseproof.errors import InputError
from noiseproof.regularizers import (
    covariance_penalty,
    feature_consistency,
    singular_value_penalty,
)

SHAPES = [(5, 8), (8, 5), (6, 6), (7, 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=9))[0]


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, at, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def plain_penalty(rows: Tensor, k: int) -> Tensor:
    """The singular value term as it is written down."""
    values = torch.linalg.svdvals(rows)
    return -(values[:k] / values.sum()).sum() / k


# --- values known by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["auto", "gram", "direct"])
def test_covariance_of_two_opposite_rows(route: str) -> None:
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    loss = covariance_penalty(rows, route)
    assert loss.item() == pytest.approx(4.0)
    wanted = torch.tensor([[4.0, 4.0], [-4.0, -4.0]])
    torch.testing.assert_close(gradient(loss, rows), wanted)


@pytest.mark.parametrize("route", ["gram", "svdvals"])
def test_singular_values_of_a_diagonal_matrix(route: str) -> None:
    rows = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)).requires_grad_()
    loss = singular_value_penalty(rows, k=1, route=route)
    assert loss.item() == pytest.approx(-0.75)
    wanted = torch.diag(torch.tensor([-1 / 16, 3 / 16], dtype=torch.float64))
    torch.testing.assert_close(gradient(loss, rows), wanted)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_singular_values_have_equal_shares(k: int) -> None:
    assert singular_value_penalty(torch.eye(4), k).item() == pytest.approx(-1 / 4)


def test_one_direction_has_the_whole_share() -> None:
    rows = draw(6, 1) @ draw(1, 9)
    assert singular_value_penalty(rows, k=1).item() == pytest.approx(-1, abs=1e-6)
    assert singular_value_penalty(rows, k=5).item() == pytest.approx(-1 / 5, abs=1e-6)


def test_more_leading_values_than_there_are_have_the_whole_share() -> None:
    assert singular_value_penalty(draw(3, 8), k=5).item() == pytest.approx(-1 / 5)


def test_consistency_is_two_minus_two_cosines() -> None:
    features = draw(6, 10)
    assert feature_consistency(3 * features, features).item() == pytest.approx(0, abs=1e-30)
    assert feature_consistency(-features, features).item() == pytest.approx(4 / 10)
    assert feature_consistency(-features, features, "row_sum").item() == pytest.approx(4)
    other = draw(6, 10, seed=1)
    cosine = torch.nn.functional.cosine_similarity(other, features)
    wanted = (2 - 2 * cosine).mean()
    torch.testing.assert_close(feature_consistency(other, features, "row_sum"), wanted)
    torch.testing.assert_close(feature_consistency(other, features), wanted / 10)


def test_independent_entries_have_the_covariance_of_chance() -> None:
    """E = (D - 1) v^2 / (n - 1) for entries with variance v; mean of 200 draws."""
    rows = 2 * draw(200, 20, 30, seed=4)
    mean = torch.stack([covariance_penalty(part) for part in rows]).mean().item()
    assert mean == pytest.approx(29 * 16 / 19, rel=0.05)


def test_the_two_weightings_of_consistency_are_equal_at_a_hundred_dimensions() -> None:
    """1.0 on the mean over elements and 0.01 on the sum over a row are different objectives."""
    new, old = draw(8, 100), draw(8, 100, seed=1)
    code, paper = feature_consistency(new, old), 0.01 * feature_consistency(new, old, "row_sum")
    torch.testing.assert_close(code, paper)


# --- against formulas, finite differences and plain forms ----------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree_with_finite_differences(shape: tuple[int, int]) -> None:
    rows, other = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    check = torch.autograd.gradcheck
    for reduction in ("element_mean", "row_sum"):
        assert check(lambda z, r=reduction: feature_consistency(z, other, r), rows)
    for route in ("gram", "direct"):
        assert check(lambda z, r=route: covariance_penalty(z, r), rows)
    for route in ("gram", "svdvals"):
        for center in (False, True) if shape[0] > shape[1] else (False,):
            assert check(
                lambda z, r=route, c=center: singular_value_penalty(z, 1, route=r, center=c), rows
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree_with_the_closed_forms(shape: tuple[int, int]) -> None:
    rows = draw(*shape).requires_grad_()
    (count, width), k = shape, 2
    left, values, right = torch.linalg.svd(rows.detach(), full_matrices=False)
    total, leading = values.sum(), left[:, :k] @ right[:k]
    wanted = -(leading / total - values[:k].sum() / total**2 * (left @ right)) / k
    found = gradient(singular_value_penalty(rows, k), rows)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)

    centred = rows.detach() - rows.detach().mean(0)
    covariance = centred.T @ centred / (count - 1)
    apart = covariance - torch.diag(covariance.diagonal())
    wanted = 4 / (width * (count - 1)) * centred @ apart
    for route in ("gram", "direct"):
        torch.testing.assert_close(gradient(covariance_penalty(rows, route), rows), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_cheap_forms_are_the_plain_forms(
    shape: tuple[int, int], kind: torch.dtype, tolerance: float
) -> None:
    rows = draw(*shape).to(kind)
    close = {"rtol": tolerance, "atol": tolerance}
    wanted = torch.cov(rows.T)
    wanted = (wanted.square().sum() - wanted.diagonal().square().sum()) / shape[1]
    for route in ("auto", "gram", "direct"):
        torch.testing.assert_close(covariance_penalty(rows, route), wanted, **close)
    for k in (1, 2, 5):
        torch.testing.assert_close(singular_value_penalty(rows, k), plain_penalty(rows, k), **close)
        wanted = plain_penalty(rows - rows.mean(0), k)
        found = singular_value_penalty(rows, k, center=True)
        torch.testing.assert_close(found, wanted, rtol=tolerance * 10, atol=tolerance * 10)


# --- invariances ---------------------------------------------------------------------------------


def test_what_turning_and_scaling_change_and_what_they_do_not() -> None:
    rows, other = draw(7, 5), draw(7, 5, seed=1)
    share, spread = singular_value_penalty(rows, 2), covariance_penalty(rows)
    for turned in (rotation(7) @ rows, rows @ rotation(5)):
        torch.testing.assert_close(singular_value_penalty(turned, 2), share)
        assert abs(covariance_penalty(turned) - spread) > 1e-3
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(singular_value_penalty(rows[order], 2), share)
    torch.testing.assert_close(covariance_penalty(rows[order]), spread)
    for scale in (0.1, 10.0):
        torch.testing.assert_close(singular_value_penalty(scale * rows, 2), share)
        torch.testing.assert_close(covariance_penalty(scale * rows), scale**4 * spread)
        near = feature_consistency(scale * rows, other / scale)
        torch.testing.assert_close(near, feature_consistency(rows, other))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_share_stays_in_its_range(shape: tuple[int, int]) -> None:
    for k in range(1, min(shape) + 1):
        for seed in range(5):
            share = singular_value_penalty(draw(*shape, seed=seed), k).item()
            assert -1 / k <= share <= -1 / min(shape) + 1e-12


def test_the_original_features_are_no_target_to_move() -> None:
    new, old = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    feature_consistency(new, old).backward()
    assert old.grad is None and new.grad is not None


# --- batches that degenerate ---------------------------------------------------------------------


def every_term(rows: Tensor) -> dict[str, Tensor]:
    original = torch.ones_like(rows)
    return {
        "consistency": feature_consistency(rows, original),
        "covariance": covariance_penalty(rows),
        "covariance, gram": covariance_penalty(rows, "gram"),
        "covariance, direct": covariance_penalty(rows, "direct"),
        "leading": singular_value_penalty(rows, 2),
        "leading, centred": singular_value_penalty(rows, 2, center=True),
    }


DEGENERATE = {
    "one row": torch.tensor([[1.0, 2.0, 3.0]]),
    "no variance": torch.ones(6, 4),
    "zero": torch.zeros(5, 3),
    "equal rows": draw(2, 6).float().repeat(4, 1),
    "one direction": (draw(6, 1) @ draw(1, 4)).float(),
    "equal singular values": torch.eye(4),
    "one zero row": torch.cat([torch.zeros(1, 5), draw(6, 5).float()]),
    "one dimension": draw(6, 1).float(),
    "tiny": 1e-15 * draw(4, 4).float(),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_values_and_gradients_stay_finite(name: str) -> None:
    rows = DEGENERATE[name].clone().requires_grad_()
    for term, loss in every_term(rows).items():
        assert loss.shape == () and math.isfinite(loss.item()), term
        assert bool(torch.isfinite(gradient(loss, rows)).all()), term


def test_a_single_row_or_dimension_has_no_covariance() -> None:
    for rows in (torch.randn(1, 4), torch.randn(6, 1)):
        for route in ("auto", "gram", "direct"):
            assert covariance_penalty(rows, route).item() == 0


@pytest.mark.parametrize("route", ["gram", "svdvals"])
def test_features_of_zero_have_no_share_and_no_gradient(route: str) -> None:
    rows = torch.zeros(5, 3, requires_grad=True)
    loss = singular_value_penalty(rows, 2, route=route)
    assert loss.item() == 0 and bool((gradient(loss, rows) == 0).all())


@pytest.mark.parametrize("side", ["new", "old"])
def test_a_zero_row_contributes_nothing_to_consistency(side: str) -> None:
    """Divided by a tiny norm instead, its gradient would be a million times the others'."""
    new, old = draw(4, 3), draw(4, 3, seed=1)
    rest = feature_consistency(new[1:], old[1:]) * 3 / 4
    (new if side == "new" else old)[0] = 0
    new.requires_grad_()
    loss = feature_consistency(new, old)
    torch.testing.assert_close(loss, rest)
    assert bool((gradient(loss, new)[0] == 0).all())


def test_equal_rows_get_the_gradient_without_the_directions_of_zero() -> None:
    rows = draw(3, 8).repeat(2, 1).requires_grad_()
    left, values, right = torch.linalg.svd(rows.detach(), full_matrices=False)
    left, values, right = left[:, :3], values[:3], right[:3]  # rank 3
    total = values.sum()
    wanted = -(left[:, :1] @ right[:1] / total - values[0] / total**2 * (left @ right))
    found = gradient(singular_value_penalty(rows, 1), rows)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_passed_on(value: float) -> None:
    """A decomposition that raises would hide which step of the training went wrong."""
    rows = draw(4, 3).float()
    rows[1, 1] = value
    for route in ("gram", "svdvals"):
        assert not math.isfinite(singular_value_penalty(rows, 1, route=route).item())
    assert not math.isfinite(covariance_penalty(rows).item())


def test_products_that_overflow_are_passed_on() -> None:
    """The rows themselves are finite, and the decomposition would raise on their products."""
    rows = 1e20 * draw(4, 3).float()
    assert math.isnan(singular_value_penalty(rows, 1).item())
    assert math.isfinite(singular_value_penalty(rows, 1, route="svdvals").item())


def test_low_precision_is_computed_in_fp32() -> None:
    rows = draw(8, 16).bfloat16()
    for term, loss in every_term(rows).items():
        assert loss.dtype == torch.float32, term
        torch.testing.assert_close(loss, every_term(rows.float())[term])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(covariance_penalty(rows), every_term(rows)["covariance"])
        torch.testing.assert_close(singular_value_penalty(rows, 2), every_term(rows)["leading"])


def test_what_is_no_batch_of_features_is_refused() -> None:
    with pytest.raises(InputError, match="same shape"):
        feature_consistency(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"shape \(n, D\)"):
        covariance_penalty(torch.ones(3))
    with pytest.raises(InputError, match="k must be at least 1"):
        singular_value_penalty(torch.ones(2, 2), 0)
    with pytest.raises(InputError, match="route must be one of gram, svdvals"):
        singular_value_penalty(torch.ones(2, 2), 1, route="svd")
