"""The loss mixture against scikit-learn, by hand and at its guards."""

from __future__ import annotations

import doctest
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.mixture import GaussianMixture
from torch import Tensor

from noiseproof import mixture
from noiseproof.errors import InputError
from noiseproof.mixture import LossMixture, clean_posterior, fit_loss_mixture

STRICT = LossMixture(guard="off", monotone=False)
HAND = torch.tensor([0.1] * 6 + [0.2] * 6 + [3.0] * 4 + [3.4] * 4)


def two_bumps(rows: int = 400, seed: int = 0) -> Tensor:
    """Shuffled losses (N,): 60 % small, 40 % large."""
    generator = np.random.default_rng(seed)
    small = generator.gamma(1.5, 0.2, size=rows * 6 // 10)
    large = np.abs(generator.normal(3.0, 0.8, size=rows - len(small)))
    return torch.tensor(generator.permutation(np.concatenate([small, large])), dtype=torch.float32)


def data_sets() -> dict[str, np.ndarray]:
    """Ordinary losses: separate, unbalanced, skewed, overlapping, of GCE type, and many."""
    generator = np.random.default_rng(3)
    normal, exponential = generator.normal, generator.exponential
    return {
        "separate": np.r_[normal(0.3, 0.1, 300), normal(4, 0.5, 300)],
        "unbalanced": np.r_[normal(0.3, 0.1, 950), normal(3, 0.5, 50)],
        "skewed": np.r_[exponential(0.2, 600), normal(3, 1, 400)],
        "overlapping": np.r_[normal(1, 0.5, 500), normal(2.5, 0.7, 500)],
        "bounded": 1.4 - np.exp(-np.r_[exponential(0.3, 500), normal(4, 1, 300)]),
        "many": np.r_[generator.gamma(1, 0.2, 5000), normal(2.5, 0.6, 3000)],
    }


def by_scikit_learn(
    losses: np.ndarray, tol: float = 1e-3, max_iter: int = 100
) -> tuple[np.ndarray, GaussianMixture]:
    """Posterior (N,) of the low-mean component, as CleaR's released code computes it."""
    column = losses.astype(np.float32).astype(np.float64)[:, None]
    mixture = GaussianMixture(2, random_state=0, tol=tol, max_iter=max_iter)
    mixture.fit(np.sort(column, axis=0))
    return mixture.predict_proba(column)[:, mixture.means_.argmin()], mixture


# ---- the fit ----------------------------------------------------------------------------------


def test_the_hand_computed_mixture_is_found() -> None:
    fit = fit_loss_mixture(HAND, None, LossMixture())
    assert fit.label == [-1] and fit.converged == [True] and fit.fallback == [None]
    assert fit.means[0] == pytest.approx((0.15, 3.2), abs=1e-6)
    assert fit.variances[0] == pytest.approx((0.0025 + 1e-6, 0.04 + 1e-6), abs=1e-7)
    assert fit.weights[0] == pytest.approx((0.6, 0.4), abs=1e-9)
    assert fit.clean_prob.dtype == torch.float32
    torch.testing.assert_close(fit.clean_prob, torch.tensor([1.0] * 12 + [0.0] * 8))


@pytest.mark.parametrize("name", data_sets())
def test_posteriors_agree_with_scikit_learn(name: str) -> None:
    losses = data_sets()[name]
    expected, mixture = by_scikit_learn(losses)
    fit = fit_loss_mixture(torch.tensor(losses), None, STRICT)
    # on overlapping losses k-means starts beside the best split, and EM at tol 1e-3 stops early
    tolerance = 0.02 if name == "overlapping" else 1e-6
    np.testing.assert_allclose(fit.clean_prob.numpy(), expected, atol=tolerance, rtol=0)
    assert fit.converged == [mixture.converged_]
    assert 0.05 < expected.mean() < 0.99  # the comparison is about a real split


@pytest.mark.parametrize("name", data_sets())
def test_at_full_convergence_all_of_scikit_learns_parameters_are_found(name: str) -> None:
    losses = data_sets()[name]
    expected, mixture = by_scikit_learn(losses, tol=1e-9, max_iter=5000)
    exhaustive = LossMixture(guard="off", monotone=False, tol=1e-9, max_iter=5000)
    fit = fit_loss_mixture(torch.tensor(losses), None, exhaustive)
    np.testing.assert_allclose(fit.clean_prob.numpy(), expected, atol=1e-5, rtol=0)
    order = mixture.means_.ravel().argsort()
    assert fit.means[0] == pytest.approx(mixture.means_.ravel()[order], abs=1e-5)
    assert fit.variances[0] == pytest.approx(mixture.covariances_.ravel()[order], abs=1e-5)
    assert fit.weights[0] == pytest.approx(mixture.weights_[order], abs=1e-5)


@pytest.mark.parametrize("name", ["skewed", "overlapping", "many"])
def test_grouped_fits_agree_with_exact_fits(name: str) -> None:
    """Without the second moment the variances of grouped losses would shrink."""
    losses = torch.tensor(data_sets()[name])
    exact = fit_loss_mixture(losses, None, LossMixture(groups=10**6, tol=1e-7, max_iter=500))
    grouped = fit_loss_mixture(losses, None, LossMixture(groups=256, tol=1e-7, max_iter=500))
    assert grouped.means[0] == pytest.approx(exact.means[0], abs=0.02)
    assert grouped.variances[0] == pytest.approx(exact.variances[0], rel=0.03)
    torch.testing.assert_close(grouped.clean_prob, exact.clean_prob, atol=0.03, rtol=0)


def test_variance_inside_groups_is_not_lost() -> None:
    losses = torch.tensor(np.random.default_rng(0).normal(10, 2, 4000))
    fit = fit_loss_mixture(losses, None, LossMixture(groups=4, guard="off", max_iter=500))
    (low, high), (mean, other), (first, second) = fit.weights[0], fit.means[0], fit.variances[0]
    total = low * first + high * second + low * high * (other - mean) ** 2
    assert total == pytest.approx(losses.var(unbiased=False).item(), rel=1e-4)


def test_minmax_is_affine_and_so_gives_the_same_posteriors() -> None:
    losses = two_bumps()
    plain = fit_loss_mixture(losses, None, LossMixture(reg_covar=1e-12, tol=1e-8, max_iter=999))
    scaled = fit_loss_mixture(
        losses, None, LossMixture(transform="minmax", reg_covar=1e-12, tol=1e-8, max_iter=999)
    )
    torch.testing.assert_close(plain.clean_prob, scaled.clean_prob, atol=2e-4, rtol=0)
    assert 0 <= scaled.means[0][0] < scaled.means[0][1] <= 1


def test_log_transform_fits_the_logarithms() -> None:
    losses = two_bumps()
    logarithms = (losses.double() + 1e-8).log()
    by_transform = fit_loss_mixture(losses, None, LossMixture(transform="log", guard="off"))
    by_hand = fit_loss_mixture(logarithms, None, LossMixture(guard="off"))
    torch.testing.assert_close(by_transform.clean_prob, by_hand.clean_prob, atol=1e-4, rtol=0)
    assert by_transform.means[0][0] < 0


def test_log_transform_accepts_zero_and_refuses_negative_losses() -> None:
    zero = torch.cat([torch.zeros(5), two_bumps()])
    fit = fit_loss_mixture(zero, None, LossMixture(transform="log"))
    assert fit.fallback == [None] and bool(fit.clean_prob.isfinite().all())
    extremes = torch.tensor([-1e-7] * 20 + [1.0] * 20)  # rounding may leave a loss below 0
    fit = fit_loss_mixture(extremes, None, LossMixture(transform="log"))
    assert fit.means[0] == pytest.approx((math.log(1e-8), 0.0), abs=1e-6)
    with pytest.raises(InputError, match=r"transform='log' needs losses >= 0, got -1.0"):
        fit_loss_mixture(two_bumps() - 1.0 - two_bumps().min(), None, LossMixture(transform="log"))


def test_per_class_fits_are_the_global_fits_of_each_class() -> None:
    losses = torch.cat([two_bumps(seed=1), 5 * two_bumps(seed=2), two_bumps(seed=3) + 1])
    labels = torch.tensor([4, 0, 2]).repeat_interleave(400)
    mixed = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    losses, labels = losses[mixed], labels[mixed]
    fit = fit_loss_mixture(losses, labels, LossMixture(scope="per_class"))
    assert fit.label == [0, 2, 4]  # absent classes 1 and 3 have no fit
    for place, label in enumerate(fit.label):
        alone = fit_loss_mixture(losses[labels == label], None, LossMixture())
        assert torch.equal(fit.clean_prob[labels == label], alone.clean_prob)
        assert fit.means[place] == alone.means[0]


def test_class_numbers_beyond_sixteen_bits_are_kept_apart() -> None:
    losses = torch.cat([two_bumps(seed=1), two_bumps(seed=2)])
    labels = torch.tensor([1, 65537]).repeat_interleave(400)  # equal modulo 2^16
    assert fit_loss_mixture(losses, labels, LossMixture(scope="per_class")).label == [1, 65537]


@pytest.mark.parametrize("groups", [8192, 64])
@pytest.mark.parametrize("scope", ["global", "per_class"])
@pytest.mark.parametrize("with_entropies", [False, True])
def test_row_order_changes_no_bit(scope: str, groups: int, with_entropies: bool) -> None:
    """Loaders and process counts give other orders; each process must select the same rows."""
    losses = two_bumps(3001).round(decimals=2)  # many ties
    labels = torch.randint(3, (3001,), generator=torch.Generator().manual_seed(1))
    entropies = two_bumps(3001, seed=5) + losses if with_entropies else None
    mixture = LossMixture(scope=scope, groups=groups)  # type: ignore[arg-type]
    fit = fit_loss_mixture(losses, labels, mixture, ce_losses=entropies)
    for seed in range(3):
        mixed = torch.randperm(3001, generator=torch.Generator().manual_seed(seed))
        moved = fit_loss_mixture(
            losses[mixed],
            labels[mixed],
            mixture,
            ce_losses=None if entropies is None else entropies[mixed],
        )
        assert torch.equal(moved.clean_prob, fit.clean_prob[mixed])
        assert (moved.means, moved.variances) == (fit.means, fit.variances)


def test_tied_losses_are_grouped_alike_in_any_row_order() -> None:
    """Ties straddle two groups: their cross-entropies must not fall into them by row order."""
    losses = two_bumps(500).round(decimals=0).numpy()
    entropies = two_bumps(500, seed=5).numpy()
    points = mixture._reduce(losses, entropies, LossMixture(groups=32))
    mixed = np.random.default_rng(0).permutation(500)
    moved = mixture._reduce(losses[mixed], entropies[mixed], LossMixture(groups=32))
    for field, other in zip(points, moved, strict=True):
        np.testing.assert_array_equal(field, other)
    assert points.rows.sum() == 500 and len(points.rows) == 32


LOSS_ARRAYS = hnp.arrays(
    np.float32, st.integers(2, 80), elements=st.floats(0, 30, width=32, allow_subnormal=False)
)


@pytest.mark.filterwarnings("ignore:the loss mixture did not converge")
@settings(deadline=None, max_examples=80)
@given(LOSS_ARRAYS, st.sampled_from(["none", "minmax", "log"]), st.sampled_from([8, 8192]))
def test_clean_prob_lies_in_the_unit_interval_and_never_rises_with_the_loss(
    losses: np.ndarray, transform: str, groups: int
) -> None:
    mixture = LossMixture(transform=transform, groups=groups)  # type: ignore[arg-type]
    clean_prob = fit_loss_mixture(torch.from_numpy(losses), None, mixture).clean_prob.numpy()
    assert ((clean_prob >= 0) & (clean_prob <= 1)).all()
    in_order = clean_prob[np.argsort(losses, kind="stable")]
    assert (np.diff(in_order) <= 1e-6).all()


@pytest.mark.filterwarnings("ignore:the loss mixture did not converge")
@settings(deadline=None, max_examples=40)
@given(LOSS_ARRAYS, st.randoms(use_true_random=False))
def test_any_losses_in_any_order_give_the_same_result(losses: np.ndarray, random) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)
    values = torch.from_numpy(losses)
    fit = fit_loss_mixture(values, None, LossMixture())
    moved = fit_loss_mixture(values[order], None, LossMixture())
    assert torch.equal(moved.clean_prob, fit.clean_prob[order])
    assert moved.fallback == fit.fallback


def test_losses_and_previous_are_left_as_they_were() -> None:
    losses, previous = two_bumps(), torch.full((400,), 0.25)
    before = losses.clone()
    fit_loss_mixture(losses, None, LossMixture(groups=16), previous=previous)
    assert torch.equal(losses, before) and bool((previous == 0.25).all())


def test_an_unfinished_fit_is_used_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"did not converge in mixture.max_iter=1"):
        fit = fit_loss_mixture(two_bumps(), None, LossMixture(max_iter=1))
    assert fit.converged == [False] and fit.fallback == [None]
    assert 0.3 < fit.clean_prob.mean().item() < 0.8


def test_summary_is_flat_finite_and_counts_the_fallbacks() -> None:
    whole = fit_loss_mixture(HAND, None, LossMixture()).summary()
    assert whole["clean_share"] == 0.6 and whole["clean_prob_mean"] == pytest.approx(0.6)
    assert whole["mean_noisy"] == pytest.approx(3.2) and whole["weight_clean"] == pytest.approx(0.6)
    labels = torch.tensor([0] * 20 + [1] * 3)
    losses = torch.cat([HAND, torch.ones(3)])
    classes = fit_loss_mixture(losses, labels, LossMixture(scope="per_class")).summary()
    assert classes["groups"] == 2.0 and classes["groups_fallback"] == 1.0
    assert "mean_clean" not in classes
    empty = fit_loss_mixture(torch.ones(9), None, LossMixture()).summary()  # parameters are NaN
    for summary in (whole, classes, empty):
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


# ---- the monotone posterior -------------------------------------------------------------------


def test_the_correction_holds_the_posterior_at_its_vertex() -> None:
    parameters = ((1.0, 3.0), (1.0, 0.25), (0.5, 0.5))  # vertex at 1 + 2 * 1 / (1 - 0.25)
    values = np.array([11 / 3, 5.0, 6.0])
    raw = clean_posterior(values, *parameters, monotone=False)
    np.testing.assert_allclose(raw, [0.0336, 0.3333, 0.9919], atol=5e-5)
    np.testing.assert_allclose(clean_posterior(values, *parameters), [0.0336] * 3, atol=5e-5)


def test_a_narrow_clean_component_keeps_the_very_small_losses_clean() -> None:
    parameters = ((1.0, 3.0), (0.01, 1.0), (0.5, 0.5))
    values = np.array([-2.0, 0.9])
    assert clean_posterior(values, *parameters, monotone=False)[0] < 0.01
    assert (clean_posterior(values, *parameters) > 0.97).all()


def test_equal_variances_need_no_correction() -> None:
    parameters = ((1.0, 3.0), (0.5, 0.5), (0.3, 0.7))
    values = np.linspace(-5, 10, 50)
    raw = clean_posterior(values, *parameters, monotone=False)
    np.testing.assert_array_equal(raw, clean_posterior(values, *parameters))


def test_the_corrected_posterior_never_rises_on_random_parameters() -> None:
    generator = np.random.default_rng(0)
    values = np.linspace(-20, 40, 601)
    rising = 0
    for _ in range(1000):
        low, gap = generator.normal(), generator.exponential(3) + 1e-3
        variances = tuple(np.exp(generator.normal(0, 2, 2)))
        weight = generator.uniform(0.01, 0.99)
        parameters = ((low, low + gap), variances, (weight, 1 - weight))
        assert (np.diff(clean_posterior(values, *parameters)) <= 1e-6).all()
        rising += (np.diff(clean_posterior(values, *parameters, monotone=False)) > 1e-3).any()
    assert rising > 500  # the raw posterior does rise: the correction had work to do


def test_the_raw_posterior_equals_bayes_rule_from_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.linspace(0, 6, 40)
    clean, noisy = 0.7 * stats.norm(1, 0.5).pdf(values), 0.3 * stats.norm(3, 1).pdf(values)
    posterior = clean_posterior(values, (1, 3), (0.25, 1.0), (0.7, 0.3), monotone=False)
    np.testing.assert_allclose(posterior, clean / (clean + noisy), atol=1e-6)


# ---- guards -----------------------------------------------------------------------------------

FALLBACKS: dict[str, tuple[Tensor, str]] = {
    "constant": (torch.full((50,), 0.7), "constant"),
    "nearly_constant": (0.5 + 1e-9 * torch.arange(50).double(), "constant"),
    "five_rows": (torch.tensor([0.1, 0.1, 0.2, 3.0, 3.1]), "min_samples"),
    "one_row": (torch.tensor([0.3]), "min_samples"),
    "no_noise": (torch.rand(300, generator=torch.Generator().manual_seed(0)) * 0.05, "min_gap"),
    "one_outlier": (torch.cat([torch.linspace(0, 0.1, 999), torch.tensor([50.0])]), "min_weight"),
}


@pytest.mark.parametrize(("losses", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_a_fit_that_means_nothing_keeps_previous_else_every_row(
    losses: Tensor, reason: str
) -> None:
    """Fresh p = 1 means that warm-up goes on; after memorisation it would readmit wrong labels."""
    fit = fit_loss_mixture(losses, None, LossMixture())
    assert fit.fallback == [reason]
    assert bool((fit.clean_prob == 1).all())
    previous = torch.linspace(0, 1, len(losses))
    kept = fit_loss_mixture(losses, None, LossMixture(), previous=previous)
    assert torch.equal(kept.clean_prob, previous)


def test_a_fit_that_is_not_finite_falls_back() -> None:
    fit = fit_loss_mixture(HAND, None, LossMixture(reg_covar=math.inf))
    assert fit.fallback == ["not_finite"] and bool((fit.clean_prob == 1).all())
    with pytest.raises(InputError, match="not_finite"):
        fit_loss_mixture(HAND, None, LossMixture(reg_covar=math.inf, guard="off"))


def test_an_empty_component_counts_as_no_gap() -> None:
    """0 / 0 is NaN, and NaN passes every comparison with the least gap."""
    points = mixture._reduce(HAND.numpy(), None, LossMixture())
    far = mixture._Gaussians(np.array([0.1, 1e6]), np.array([100.0, 1e-6]), np.array([0.5, 0.5]))
    assert mixture._doubt(far, points, LossMixture()) == "min_gap"


def test_without_guards_few_rows_and_small_spreads_are_fitted() -> None:
    few = fit_loss_mixture(torch.tensor([0.1, 3.0]), None, STRICT)
    assert few.clean_prob.tolist() == pytest.approx([1.0, 0.0]) and few.fallback == [None]
    near = torch.tensor([0.0, 5e-7] * 10)
    assert fit_loss_mixture(near, None, LossMixture()).fallback == ["constant"]
    assert fit_loss_mixture(near, None, STRICT).fallback == [None]


def test_each_guard_yields_to_its_setting() -> None:
    few = FALLBACKS["five_rows"][0]
    assert fit_loss_mixture(few, None, LossMixture(min_samples=5)).fallback == [None]
    calm = FALLBACKS["no_noise"][0]
    assert fit_loss_mixture(calm, None, LossMixture(min_gap=0.0)).fallback == [None]
    outlier = FALLBACKS["one_outlier"][0]
    assert fit_loss_mixture(outlier, None, LossMixture(min_weight=0.0)).fallback == [None]
    assert fit_loss_mixture(HAND, None, LossMixture(min_weight=0.45)).fallback == ["min_weight"]
    assert fit_loss_mixture(HAND, None, LossMixture(min_gap=3.0)).fallback == [None]
    assert fit_loss_mixture(HAND, None, LossMixture(min_gap=3.1)).fallback == ["min_gap"]


def test_the_gap_is_measured_on_cross_entropies() -> None:
    """Bounded losses crowd together: on them the gap of a clear split would look like nothing."""
    bounded = HAND * 0.02
    assert fit_loss_mixture(bounded, None, LossMixture()).fallback == ["min_gap"]
    fit = fit_loss_mixture(bounded, None, LossMixture(), ce_losses=HAND)
    assert fit.fallback == [None] and fit.clean_prob[0] > 0.99 and fit.clean_prob[-1] < 0.01
    stretched = fit_loss_mixture(HAND * 9, None, LossMixture(), ce_losses=bounded)
    assert stretched.fallback == ["min_gap"]
    grouped = LossMixture(groups=10)
    assert fit_loss_mixture(bounded, None, grouped, ce_losses=HAND).fallback == [None]


def test_the_gap_is_measured_before_any_transform() -> None:
    tiny = HAND / 1000  # logarithms differ by 3, cross-entropies by 0.003
    assert fit_loss_mixture(tiny, None, LossMixture(transform="log")).fallback == ["min_gap"]
    assert fit_loss_mixture(tiny, None, LossMixture(transform="minmax")).fallback == ["min_gap"]
    assert fit_loss_mixture(HAND, None, LossMixture(transform="minmax")).fallback == [None]


def test_only_the_degenerate_class_falls_back() -> None:
    losses = torch.cat([HAND, torch.tensor([2.0]), torch.full((30,), 1.0)])
    labels = torch.tensor([2] * 20 + [0] + [1] * 30)
    previous = torch.full((51,), 0.3)
    fit = fit_loss_mixture(losses, labels, LossMixture(scope="per_class"), previous)
    assert fit.label == [0, 1, 2] and fit.fallback == ["min_samples", "constant", None]
    torch.testing.assert_close(fit.clean_prob[:20], torch.tensor([1.0] * 12 + [0.0] * 8))
    assert torch.equal(fit.clean_prob[20:], previous[20:])


def test_losses_that_are_all_high_are_still_split_or_kept() -> None:
    """All labels wrong: nothing says so in the losses, and nothing may break."""
    losses = 8 + torch.randn(500, generator=torch.Generator().manual_seed(0))
    fit = fit_loss_mixture(losses, None, LossMixture())
    assert bool(fit.clean_prob.isfinite().all())
    assert fit.fallback == [None] and 0 < fit.clean_prob.mean() < 1


def test_guards_that_do_not_fire_change_no_bit() -> None:
    losses = two_bumps()
    guarded = fit_loss_mixture(losses, None, LossMixture(monotone=False))
    assert torch.equal(guarded.clean_prob, fit_loss_mixture(losses, None, STRICT).clean_prob)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lone_loss_that_is_not_finite_is_left_out(bad: float) -> None:
    losses = two_bumps()
    losses[7] = bad
    rest = torch.arange(400) != 7
    fit = fit_loss_mixture(losses, None, LossMixture())
    alone = fit_loss_mixture(losses[rest], None, LossMixture())
    assert fit.clean_prob[7] == 1.0
    assert torch.equal(fit.clean_prob[rest], alone.clean_prob) and fit.means == alone.means
    kept = fit_loss_mixture(losses, None, LossMixture(), previous=torch.full((400,), 0.2))
    assert kept.clean_prob[7].item() == pytest.approx(0.2)
    assert torch.equal(kept.clean_prob[rest], alone.clean_prob)


def test_a_cross_entropy_that_is_not_finite_counts_like_a_loss() -> None:
    losses, entropies = two_bumps(), two_bumps()
    entropies[3] = math.inf
    fit = fit_loss_mixture(losses, None, LossMixture(), ce_losses=entropies)
    assert fit.fallback == [None] and fit.clean_prob[3] == 1.0


def test_a_lone_bad_loss_of_few_rows_is_no_divergence() -> None:
    losses = HAND.clone()
    losses[0] = math.nan  # 5 % of 20 rows
    assert fit_loss_mixture(losses, None, LossMixture()).fallback == [None]


def test_a_class_that_has_only_a_bad_loss_keeps_its_row() -> None:
    losses = torch.cat([two_bumps(), torch.tensor([math.nan])])
    labels = torch.cat([torch.zeros(400, dtype=torch.long), torch.tensor([1])])
    fit = fit_loss_mixture(losses, labels, LossMixture(scope="per_class"))
    assert fit.label == [0] and fit.clean_prob[400] == 1.0


@pytest.mark.parametrize("guard", ["fallback", "off"])
def test_more_than_one_percent_of_bad_losses_is_divergence(guard: str) -> None:
    losses = two_bumps()
    losses[:5] = math.nan
    with pytest.raises(FloatingPointError, match=r"training diverged: 5 of 400 losses"):
        fit_loss_mixture(losses, None, LossMixture(guard=guard))  # type: ignore[arg-type]
    losses[4] = 0.1  # four of 400 is one percent: not more
    if guard == "fallback":
        assert fit_loss_mixture(losses, None, LossMixture()).fallback == [None]


@pytest.mark.parametrize(
    ("losses", "labels", "words"),
    [
        (torch.tensor([0.3]), None, "the training set has 1"),
        (torch.cat([HAND, torch.ones(1)]), torch.tensor([3] * 20 + [5]), "class 5 has 1"),
        (torch.ones(30), None, r"has 30 \(constant\)"),
        (torch.cat([HAND, torch.tensor([math.nan])]), None, "1 of 21 losses are not finite"),
    ],
)
def test_without_guards_a_mixture_that_cannot_be_fitted_is_an_error(
    losses: Tensor, labels: Tensor | None, words: str
) -> None:
    """scikit-learn answers 0.5, 0 or 1 on constant losses, by rounding: a silent empty set."""
    mixture = LossMixture(scope="per_class" if labels is not None else "global", guard="off")
    with pytest.raises(InputError, match=words):
        fit_loss_mixture(losses, labels, mixture)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"losses": torch.zeros(0)}, r"N >= 1, got \(0,\)"),
        ({"losses": torch.zeros(4, 2)}, r"got \(4, 2\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must .* \(20,\), got \(3,\)"),
        ({"previous": torch.zeros(3)}, "previous must have one value per loss"),
        ({"ce_losses": torch.zeros(3)}, "ce_losses must have one value per loss"),
    ],
)
def test_columns_of_another_length_are_named(arguments: dict[str, Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit_loss_mixture(**({"losses": HAND, "labels": None} | arguments), settings=LossMixture())


@pytest.mark.parametrize(
    "labels", [None, torch.full((20,), -1), torch.ones(20)], ids=["none", "negative", "float"]
)
def test_per_class_fits_need_class_numbers(labels: Tensor | None) -> None:
    with pytest.raises(InputError, match="scope='per_class' needs labels"):
        fit_loss_mixture(HAND, labels, LossMixture(scope="per_class"))


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("scope", "class", "be 'global' or 'per_class'"),
        ("transform", "sqrt", "be 'none', 'minmax' or 'log'"),
        ("guard", "on", "be 'fallback' or 'off'"),
        ("max_iter", 0, r"lie in \[1, 1000000\]"),
        ("tol", 0.0, "be > 0"),
        ("tol", math.nan, "be > 0"),
        ("reg_covar", -1e-6, "be > 0"),
        ("min_samples", 1, "be >= 2"),
        ("min_gap", -0.1, "be >= 0"),
        ("min_weight", 0.5, r"lie in \[0, 0.5\)"),
        ("groups", 1, r"lie in \[2, 10000000\]"),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: object, rule: str) -> None:
    with pytest.raises(InputError, match=rf"mixture\.{setting} must {rule}, got {value!r}"):
        LossMixture(**{setting: value})  # type: ignore[arg-type]


def test_the_docstring_examples_are_true() -> None:
    failed, attempted = doctest.testmod(mixture)
    assert failed == 0 and attempted >= 8
