"""The loss mixture: which rows look clean, by two Gaussians on the per-row losses.

CleaR and TURN: right labels are learned before wrong ones, so the per-row losses are modelled by
two 1-D Gaussians, and the posterior of the low-loss one is `clean_prob`. The fit is our own EM,
because scikit-learn's depends on a k-means seed, is slow on millions of rows, and has no guards for
losses that do not split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noiseproof.errors import InputError, check_types

Array = NDArray[np.float64]

CHUNK = 1 << 17  # rows per posterior step: a few float64 copies of this size stay in cache
SMALLEST_SPREAD = 1e-6  # losses closer together than this are one and the same loss


@dataclass(frozen=True)
class LossMixture:
    """Settings of the two-component mixture on per-row losses.

    Attributes:
        scope: One fit over all rows (global), or one per given class (per_class).
        transform: Of the losses before the fit: none, minmax (per fitted group), log(l + 1e-8).
        max_iter: Most EM iterations.
        tol: EM stops once the mean log-likelihood changes by less.
        reg_covar: Added to both variances.
        monotone: Correct the posterior so that it never rises with the loss.
        guard: fallback leaves rows of a fit that means nothing at their previous value, else 1; off
            takes every fit as it is and raises where there is none.
        min_samples: Guard: fewer rows are not fitted.
        min_gap: Guard: least difference in nats of cross-entropy between the components.
        min_weight: Guard: least weight of either component.
        groups: Largest number of points in EM; more rows are reduced to this many groups of
            (almost) equal size.

    >>> LossMixture(tol=0.0)
    Traceback (most recent call last):
        ...
    noiseproof.errors.InputError: mixture.tol must be > 0, got 0.0
    """

    scope: Literal["global", "per_class"] = "global"
    transform: Literal["none", "minmax", "log"] = "none"
    max_iter: int = 100
    tol: float = 1e-3
    reg_covar: float = 1e-6
    monotone: bool = True
    guard: Literal["fallback", "off"] = "fallback"
    min_samples: int = 8
    min_gap: float = 0.1
    min_weight: float = 0.01
    groups: int = 8192

    def __post_init__(self) -> None:
        """Refuse settings of another type or outside their range."""
        check_types(self, "mixture.")
        checks = (
            ("scope", "be 'global' or 'per_class'", self.scope in ("global", "per_class")),
            (
                "transform",
                "be 'none', 'minmax' or 'log'",
                self.transform in ("none", "minmax", "log"),
            ),
            ("guard", "be 'fallback' or 'off'", self.guard in ("fallback", "off")),
            ("max_iter", "lie in [1, 1000000]", 1 <= self.max_iter <= 1_000_000),
            ("tol", "be > 0", self.tol > 0),
            ("reg_covar", "be > 0", self.reg_covar > 0),
            ("min_samples", "be >= 2", self.min_samples >= 2),
            ("min_gap", "be >= 0", self.min_gap >= 0),
            ("min_weight", "lie in [0, 0.5)", 0 <= self.min_weight < 0.5),
            ("groups", "lie in [2, 10000000]", 2 <= self.groups <= 10_000_000),
        )
        for name, rule, holds in checks:
            if not holds:
                raise InputError(f"mixture.{name} must {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class MixtureFit:
    """What a loss mixture found; the lists have one entry per fitted group.

    Pairs are (low-loss component, other component), on the scale of the transform, and NaN where
    a guard stopped before the fit. `fallback` names the guard that fired: "min_samples",
    "constant", "not_finite", "min_weight", "min_gap", or None for a fit that was used.
    """

    clean_prob: Tensor  # (N,) float32, on the device of the losses
    label: list[int]  # the given class, -1 for the global fit
    means: list[tuple[float, float]]
    variances: list[tuple[float, float]]
    weights: list[tuple[float, float]]
    converged: list[bool]
    fallback: list[str | None]

    def summary(self) -> dict[str, float]:
        """Summarise the fit in finite numbers for a log or a record.

        >>> fit = fit_loss_mixture(torch.ones(20), None, LossMixture())
        >>> fit.summary()["groups_fallback"], fit.fallback
        (1.0, ['constant'])
        """
        numbers = {
            "clean_prob_mean": float(self.clean_prob.double().mean()),
            "clean_share": float((self.clean_prob > 0.5).double().mean()),
            "groups": float(len(self.label)),
            "groups_fallback": float(sum(reason is not None for reason in self.fallback)),
            "groups_converged": float(sum(self.converged)),
        }
        if self.label == [-1]:
            for name, pairs in (
                ("mean", self.means),
                ("variance", self.variances),
                ("weight", self.weights),
            ):
                numbers[f"{name}_clean"], numbers[f"{name}_noisy"] = pairs[0]
        return {name: number for name, number in numbers.items() if np.isfinite(number)}

    def table(self) -> list[dict[str, Any]]:
        """One entry of JSON values per fitted group; what a group does not have is left out.

        >>> fit_loss_mixture(torch.ones(20), None, LossMixture()).table()
        [{'label': -1, 'fallback': 'constant'}]
        """
        entries: list[dict[str, Any]] = []
        for place, label in enumerate(self.label):
            entry: dict[str, Any] = {"label": label}
            for name, pairs in (
                ("means", self.means),
                ("variances", self.variances),
                ("weights", self.weights),
            ):
                if np.isfinite(pairs[place]).all():
                    entry[name] = [float(f"{number:.4g}") for number in pairs[place]]
            if "means" in entry:
                entry["converged"] = self.converged[place]
            if self.fallback[place] is not None:
                entry["fallback"] = self.fallback[place]
            entries.append(entry)
        return entries


def fit_loss_mixture(
    losses: Tensor,
    labels: Tensor | None,
    settings: LossMixture,
    previous: Tensor | None = None,
    ce_losses: Tensor | None = None,
    names: Callable[[Sequence[int]], str] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MixtureFit:
    """Estimate how likely each given label is right.  (N,), (N,) -> (N,) and parameters.

    CleaR (Kim et al. 2024) and TURN (Ahn et al. 2024). EM as in scikit-learn's `GaussianMixture`
    (same updates, convergence rule and reg_covar), in float64 on the sorted losses, started at the
    best split of the line into two clusters. That split is exact, has no seed and needs no
    restarts; it replaces scikit-learn's k-means start. Above `settings.groups` rows EM runs on
    groups of neighbouring losses, whose inner variance enters the update of the variances. The
    result does not depend on the order of the rows, bit for bit.

    Args:
        losses: per-row losses (N,), read as float32.
        labels: given labels (N,); needed for scope "per_class" only.
        settings: see `LossMixture`.
        previous: `clean_prob` (N,) of the last fit, kept where a guard fires or a loss is not
            finite; 1 without it.
        ce_losses: cross-entropies (N,), where `losses` are something else; measures the gap.
        names: what messages call these classes; None calls them by number.
        warn: is told of fits that did not converge; None issues a `RuntimeWarning`.

    Raises:
        FloatingPointError: more than one loss and more than 1 % of them are not finite.
        InputError: shapes do not match, or guard="off" and there is nothing to fit.

    >>> losses = torch.tensor([0.1, 0.2] * 6 + [3.0, 3.4] * 4)
    >>> fit = fit_loss_mixture(losses, None, LossMixture())
    >>> [round(mean, 2) for mean in fit.means[0]], fit.clean_prob.round().int().tolist()[10:14]
    ([0.15, 3.2], [1, 1, 0, 0])
    """
    _check_columns(losses, labels=labels, previous=previous, ce_losses=ce_losses)
    values = losses.detach().cpu().float().numpy()  # (N,)
    entropies = None if ce_losses is None else ce_losses.detach().cpu().float().numpy()
    usable = np.isfinite(values)
    if entropies is not None:
        usable &= np.isfinite(entropies)
    named = names or _numbered
    _check_finite(usable, labels, settings, named)
    if previous is None:
        clean_prob = np.ones(len(values), dtype=np.float32)
    else:
        clean_prob = previous.detach().cpu().float().numpy().copy()
    fits = []
    for label, rows in _groups(usable, labels, settings):
        entropy = None if entropies is None else entropies[rows]
        fit, posterior = _fit_group(label, values[rows], entropy, settings, named)
        fits.append(fit)
        if posterior is not None:
            clean_prob[rows] = posterior
    unfinished = [fit.label for fit in fits if fit.fallback is None and not fit.converged]
    if unfinished:
        of = "" if unfinished == [-1] else f" of {named(unfinished)}"
        message = (
            f"the loss mixture{of} did not converge in mixture.max_iter={settings.max_iter} "
            "iterations; the last iteration is used"
        )
        if warn is None:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            warn(message)
    return MixtureFit(
        clean_prob=torch.from_numpy(clean_prob).to(losses.device),
        label=[fit.label for fit in fits],
        means=[_pair(fit.gaussians.mean) for fit in fits],
        variances=[_pair(fit.gaussians.variance) for fit in fits],
        weights=[_pair(fit.gaussians.weight) for fit in fits],
        converged=[fit.converged for fit in fits],
        fallback=[fit.fallback for fit in fits],
    )


def clean_posterior(
    values: NDArray[np.floating],
    means: tuple[float, float],
    variances: tuple[float, float],
    weights: tuple[float, float],
    monotone: bool = True,
) -> NDArray[np.float32]:
    """Compute the posterior of the first of two Gaussians, the one with the lower mean.  -> (N,).

    With unequal variances the raw posterior is not monotone: the wider component wins far out on
    both sides. Its log-odds are a quadratic in the value, so `monotone` evaluates it at the vertex
    for every value beyond the vertex; the result never rises with the value.

    >>> clean_posterior(np.array([5.0]), (1, 3), (1, 0.25), (0.5, 0.5), monotone=False).round(4)
    array([0.3333], dtype=float32)
    >>> clean_posterior(np.array([5.0]), (1, 3), (1, 0.25), (0.5, 0.5)).round(4)
    array([0.0336], dtype=float32)
    """
    low, high = -np.inf, np.inf
    if monotone and means[0] < means[1] and variances[0] != variances[1]:
        step = (means[1] - means[0]) * variances[0] / (variances[0] - variances[1])
        if step < 0:
            low = means[0] + step
        else:
            high = means[0] + step
    posterior = np.empty(len(values), dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):  # infinite odds are a posterior of 0 or 1
        log_scale = np.log(weights) - 0.5 * np.log(variances)  # (2,)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK].astype(np.float64).clip(low, high)
            odds = (part - means[0]) ** 2 * (-0.5 / variances[0])
            odds += (part - means[1]) ** 2 * (0.5 / variances[1])
            odds += log_scale[0] - log_scale[1]  # log-odds of the first component
            posterior[start : start + CHUNK] = 1 / (1 + np.exp(-odds))
    return posterior


class _Gaussians(NamedTuple):
    """Two weighted Gaussians, each field (2,)."""

    mean: Array
    variance: Array
    weight: Array


class _Points(NamedTuple):
    """Sorted losses as G weighted points, each field (G,)."""

    rows: Array  # how many the point stands for
    mean: Array  # of the transformed losses
    spread: Array  # variance inside the point
    entropy: Array  # mean cross-entropy


class _GroupFit(NamedTuple):
    """The fit of one group of rows."""

    label: int
    gaussians: _Gaussians
    converged: bool
    fallback: str | None


def _check_columns(losses: Tensor, **columns: Tensor | None) -> None:
    """Refuse columns that are not one value for each of the N >= 1 rows."""
    if losses.ndim != 1 or len(losses) == 0:
        raise InputError(f"losses must have shape (N,) with N >= 1, got {tuple(losses.shape)}")
    for name, column in columns.items():
        if column is not None and column.shape != losses.shape:
            raise InputError(
                f"{name} must have one value per loss, shape ({len(losses)},),"
                f" got {tuple(column.shape)}"
            )


def _numbered(labels: Sequence[int], most: int = 5) -> str:
    """The first of these classes by number, and how many more."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(f"class {label}" for label in labels[:most]) + more


def _check_finite(
    usable: NDArray[np.bool_],
    labels: Tensor | None,
    settings: LossMixture,
    named: Callable[[Sequence[int]], str],
) -> None:
    """Accept a lone loss that is not finite; more than 1 % mean that training is lost."""
    unusable = len(usable) - int(usable.sum())
    if unusable > max(1, len(usable) / 100):
        raise FloatingPointError(
            f"training diverged: {unusable} of {len(usable)} losses are not finite (at most 1 % may"
            " be); lower the learning rate or clip gradients"
        )
    if unusable and settings.guard == "off":
        of = ""
        if labels is not None:
            of = f" (of {named(sorted(set(labels.cpu()[torch.from_numpy(~usable)].tolist())))})"
        raise InputError(
            f"{unusable} of {len(usable)} losses are not finite{of} and mixture.guard='off' repairs"
            " nothing; mixture.guard='fallback' leaves such rows out"
        )


def _groups(
    usable: NDArray[np.bool_], labels: Tensor | None, settings: LossMixture
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Give the rows of each fit: all, or those of each given class that occurs."""
    rows = np.flatnonzero(usable)
    if settings.scope == "global":
        yield -1, rows
        return
    if labels is None or labels.is_floating_point() or int(labels.min()) < 0:
        found = "none" if labels is None else f"{labels.dtype} with minimum {labels.min()}"
        raise InputError(f"mixture.scope='per_class' needs labels as integers >= 0, got {found}")
    given = labels.detach().cpu().numpy()[rows]
    if not len(given):
        return
    if given.max() < 1 << 16:
        given = given.astype(np.uint16)  # numpy sorts 16-bit keys by radix, 10 times as fast
    order = rows[np.argsort(given, kind="stable")]
    counts = np.bincount(given)
    ends = counts.cumsum()
    for label in np.flatnonzero(counts):
        yield int(label), order[ends[label] - counts[label] : ends[label]]


def _fit_group(
    label: int,
    losses: NDArray[np.float32],
    entropies: NDArray[np.float32] | None,
    settings: LossMixture,
    named: Callable[[Sequence[int]], str],
) -> tuple[_GroupFit, NDArray[np.float32] | None]:
    """Fit one group; its posterior (n,), or None where a guard fires.  (n,), (n,) -> fit, (n,)."""
    nothing = _Gaussians(*np.full((3, 2), np.nan))
    guarded = settings.guard == "fallback"
    reason = _unfit(losses, settings)
    if reason is not None and guarded:
        return _GroupFit(label, nothing, False, reason), None
    if reason is None:
        points = _reduce(losses, entropies, settings)
        gaussians, converged = _expectation_maximization(points, settings)
        reason = _doubt(gaussians, points, settings)
        if reason is None:
            posterior = _posterior(_transform(losses, settings), gaussians, settings.monotone)
            return _GroupFit(label, gaussians, converged, None), posterior
        if guarded:
            return _GroupFit(label, gaussians, converged, reason), None
    name = "the training set" if label < 0 else named([label])
    raise InputError(
        f"a mixture needs two or more rows with finite, different losses; {name} has"
        f" {len(losses)} ({reason}); mixture.guard='fallback' continues"
    )


def _unfit(losses: NDArray[np.float32], settings: LossMixture) -> str | None:
    """Name the guard that forbids a fit.  (n,) -> name or None."""
    guarded = settings.guard == "fallback"
    if len(losses) < (settings.min_samples if guarded else 2):
        return "min_samples"
    spread = float(losses.max()) - float(losses.min())
    if spread < SMALLEST_SPREAD if guarded else spread == 0:
        return "constant"
    return None


def _doubt(gaussians: _Gaussians, points: _Points, settings: LossMixture) -> str | None:
    """Name the guard that rejects a fit.  -> name or None."""
    if not all(np.isfinite(field).all() for field in gaussians):
        return "not_finite"
    if settings.guard == "off":
        return None
    if gaussians.weight.min() < settings.min_weight:
        return "min_weight"
    low = points.rows * _posterior(points.mean, gaussians, settings.monotone)  # (G,)
    high = points.rows - low
    if low.sum() == 0 or high.sum() == 0:
        return "min_gap"
    gap = high @ points.entropy / high.sum() - low @ points.entropy / low.sum()
    return "min_gap" if gap < settings.min_gap else None


def _transform(losses: NDArray[np.float32], settings: LossMixture) -> NDArray[np.floating]:
    """Bring the losses of one group to the scale of the fit.  (n,) -> (n,)."""
    if settings.transform == "none":
        return losses
    low, high = np.float64(losses.min()), np.float64(losses.max())
    if settings.transform == "minmax":
        return (losses - low) / (high - low)
    if low < -SMALLEST_SPREAD:  # rounding may leave a loss a little below 0
        raise InputError(f"mixture.transform='log' needs losses >= 0, got {low}; use 'minmax'")
    return np.log(losses.clip(min=0) + np.float64(1e-8))


def _reduce(
    losses: NDArray[np.float32], entropies: NDArray[np.float32] | None, settings: LossMixture
) -> _Points:
    """Sort the losses and reduce them to points with two moments.  (n,), (n,) -> (G,) fields."""
    if entropies is None:
        losses = np.sort(losses)
        entropies = losses
    else:
        order = np.lexsort((entropies, losses))  # both keys: equal losses in a fixed order too
        losses, entropies = losses[order], entropies[order]
    values = _transform(losses, settings).astype(np.float64)
    if len(values) <= settings.groups:
        ones = np.ones(len(values))
        return _Points(ones, values, np.zeros(len(values)), entropies.astype(np.float64))
    starts = np.arange(settings.groups) * len(values) // settings.groups
    count = np.diff(starts, append=len(values))
    mean = np.add.reduceat(values, starts) / count
    entropy = np.add.reduceat(entropies, starts, dtype=np.float64) / count
    values -= np.repeat(mean, count)  # centred: the second moment then loses no digits
    spread = np.add.reduceat(np.square(values, out=values), starts) / count
    return _Points(count.astype(np.float64), mean, spread, entropy)


def _expectation_maximization(points: _Points, settings: LossMixture) -> tuple[_Gaussians, bool]:
    """Fit two Gaussians, lower mean first, and say whether EM converged."""
    share = _two_means(points)
    bound = -np.inf
    converged = False
    with np.errstate(all="ignore"):  # what is not finite is found by its guard
        gaussians = _maximize(points, share, settings.reg_covar)
        for _ in range(settings.max_iter):
            previous = bound
            share, bound = _expect(points, gaussians)
            gaussians = _maximize(points, share, settings.reg_covar)
            converged = bool(abs(bound - previous) < settings.tol)
            if converged:
                break
    order = np.argsort(gaussians.mean, kind="stable")
    return _Gaussians(*(field[order] for field in gaussians)), converged


def _two_means(points: _Points) -> Array:
    """Split sorted points where two clusters leave least variance.  (G,) -> (2, G) of 0 and 1."""
    centred = points.mean - points.rows @ points.mean / points.rows.sum()
    size = points.rows.cumsum()[:-1]  # (G-1,) rows left of each split
    total = (points.rows * centred).cumsum()[:-1]  # (G-1,) minus the sum on the right
    best = int(np.argmax(total**2 / size + total**2 / (points.rows.sum() - size)))
    left = np.arange(len(centred)) <= best
    return np.stack([left, ~left]).astype(np.float64)


def _expect(points: _Points, gaussians: _Gaussians) -> tuple[Array, float]:
    """E-step at the means of the points: shares (2, G) and mean log-likelihood."""
    mean, variance, weight = (field[:, None] for field in gaussians)  # (2, 1)
    log_joint = (points.mean - mean) ** 2 / (-2 * variance)
    log_joint += np.log(weight) - 0.5 * np.log(2 * np.pi * variance)  # (2, G)
    log_norm = np.logaddexp(log_joint[0], log_joint[1])  # (G,)
    bound = float(points.rows @ log_norm / points.rows.sum())
    return np.exp(log_joint - log_norm), bound


def _maximize(points: _Points, share: Array, reg_covar: float) -> _Gaussians:
    """M-step on both moments, so no variance inside a point is lost.  (2, G) -> (2,) fields."""
    mass = share * points.rows  # (2, G)
    size = mass.sum(axis=1) + 10 * np.finfo(np.float64).eps  # as scikit-learn
    mean = mass @ points.mean / size
    scatter = (points.mean - mean[:, None]) ** 2 + points.spread  # (2, G)
    variance = (mass * scatter).sum(axis=1) / size + reg_covar
    return _Gaussians(mean, variance, size / size.sum())


def _posterior(
    values: NDArray[np.floating], gaussians: _Gaussians, monotone: bool
) -> NDArray[np.float32]:
    """Compute `clean_posterior` of a fit.  (n,) -> (n,)."""
    mean, variance, weight = (_pair(field) for field in gaussians)
    return clean_posterior(values, mean, variance, weight, monotone)


def _pair(field: Array) -> tuple[float, float]:
    """Unpack one field of two Gaussians."""
    return float(field[0]), float(field[1])
