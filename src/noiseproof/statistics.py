"""Statistics of a handful of runs: intervals, paired differences, wins and losses, recovered gap.

Plain numbers in, frozen dataclasses out. Values belong to seeds, so n is small: intervals are
Student's t, and one value has no interval at all. Nothing is claimed from a single seed, nor where
all values are equal: the spread was not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from noiseproof.errors import InputError

LEVEL = 0.95
Verdict = Literal["won", "open", "lost", "no claim"]


@dataclass(frozen=True)
class Interval:
    """A confidence interval [low, high] at a level such as 0.95."""

    low: float
    high: float
    level: float = LEVEL

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Summary:
    """Mean and spread of n values.

    Attributes:
        n: Number of values.
        mean: Arithmetic mean.
        sd: Standard deviation with n - 1 below the line; None for one value.
        interval: t interval of the mean; None for one value and for equal ones.
    """

    n: int
    mean: float
    sd: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """A method minus its baseline, seed by seed.

    Attributes:
        seeds: The seeds that both have, sorted.
        values: One difference per seed.
        summary: Mean, spread and t interval of the differences.
        verdict: won, open or lost; no claim from a single seed or equal differences.
    """

    seeds: tuple[str, ...]
    values: tuple[float, ...]
    summary: Summary
    verdict: Verdict


@dataclass(frozen=True)
class Counts:
    """In how many settings a method won and lost, where that is open or nothing can be claimed."""

    won: int = 0
    open: int = 0
    lost: int = 0
    no_claim: int = 0


def summarize(values: Iterable[float], level: float = LEVEL) -> Summary | None:
    """Mean, standard deviation and t interval.  (n,) -> Summary; None of no values.

    >>> summarize([0.5])
    Summary(n=1, mean=0.5, sd=None, interval=None)
    >>> round(summarize([1.0, 2.0, 3.0]).interval.high, 4)
    4.4841
    """
    array = _finite(values)
    if not len(array):
        return None
    sd = float(array.std(ddof=1)) if len(array) > 1 else None
    return Summary(len(array), float(array.mean()), sd, t_interval(array, level))


def t_interval(values: Iterable[float], level: float = LEVEL) -> Interval | None:
    """Student's interval of the mean.  (n,) -> Interval; None of fewer than two different values.

    mean ± t(n - 1, (1 + level) / 2) · sd / √n. Of equal values it would have no width: the spread
    that the formula needs was not seen.
    """
    from scipy import stats

    array, level = _finite(values), _level(level)
    if len(array) < 2 or not np.ptp(array):
        return None
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return Interval(float(array.mean() - half), float(array.mean() + half), level)


def compare(
    method: Mapping[str, float], baseline: Mapping[str, float], level: float = LEVEL
) -> Difference | None:
    """Paired difference over the seeds that both have.  Seed -> value; None without such seeds.

    Pairing removes what the two share: the same wrong labels and the same order of rows. The
    verdict is won (lost) where the t interval lies above (below) 0, open where it holds 0, and no
    claim where there is none: from a single seed, or of equal differences.

    >>> compare({"0": 0.9, "1": 0.92}, {"0": 0.8, "2": 0.7}).verdict
    'no claim'
    >>> compare({"0": 0.9, "1": 0.92, "2": 0.91}, {"0": 0.8, "1": 0.81, "2": 0.82}).verdict
    'won'
    """
    seeds = tuple(sorted(method.keys() & baseline.keys(), key=_natural))
    # Rounded, so that 0.3 minus (0.1 + 0.2) is 0 and no win by rounding error.
    values = tuple(round(method[seed] - baseline[seed], 12) for seed in seeds)
    summary = summarize(values, level)
    if summary is None:
        return None
    return Difference(seeds, values, summary, _verdict(summary.interval))


def mean_over(
    settings: Sequence[Mapping[str, float]], level: float = LEVEL
) -> tuple[Difference, int] | None:
    """Mean over settings of differences, seed by seed.  Seed -> value in each; None without any.

    Settings of one seed share rows, order and initial weights: they are one value and not several.
    The settings are those that the seed with most of them has, the seeds those that have all these.

    Returns:
        The difference over seeds, and over how many settings it is a mean.

    >>> found, settings = mean_over([{"0": 0.1, "1": 0.2}, {"0": 0.3, "1": 0.6}, {"0": 0.2}])
    >>> found.values, settings
    ((0.2,), 3)
    """
    seeds = sorted({seed for values in settings for seed in values}, key=_natural)
    if not seeds:
        return None
    fullest = max(seeds, key=lambda seed: sum(seed in values for values in settings))
    shared = [values for values in settings if fullest in values]
    means = {
        seed: fmean(values[seed] for values in shared)
        for seed in seeds
        if all(seed in values for values in shared)
    }
    found = compare(means, dict.fromkeys(means, 0.0), level)
    assert found is not None
    return found, len(shared)


def count(verdicts: Iterable[Verdict]) -> Counts:
    """Number of settings by verdict.

    >>> count(["won", "won", "no claim"])
    Counts(won=2, open=0, lost=0, no_claim=1)
    """
    found = list(verdicts)
    names: tuple[Verdict, ...] = ("won", "open", "lost", "no claim")
    return Counts(*(found.count(name) for name in names))


def slope(x: Iterable[float], y: Iterable[float]) -> float | None:
    """Slope of the least-squares line.  (n,), (n,) -> number; None of fewer than two different x.

    >>> slope([0.0, 1.0, 2.0], [1.0, 2.0, 6.0])
    2.5
    """
    xs, ys = _finite(x), _finite(y)
    if len(xs) != len(ys):
        raise InputError(f"x and y must have equally many values, got {len(xs)} and {len(ys)}")
    if len(set(xs.tolist())) < 2:
        return None
    centred = xs - xs.mean()
    return float((centred * (ys - ys.mean())).sum() / (centred**2).sum())


def recovered_gap(
    method: float, plain: float, clean: float, *, smallest: float = 0.01
) -> float | None:
    """Share of the damage by noise that a method undoes: (method - plain) / (clean - plain).

    1 is as good as plain fine-tuning on right labels, 0 no better than plain fine-tuning on the
    wrong ones. None where noise costs plain fine-tuning less than ``smallest``: the ratio of two
    small numbers says nothing.

    >>> round(recovered_gap(method=0.9, plain=0.8, clean=0.95), 4)
    0.6667
    """
    gap = clean - plain
    if not math.isfinite(method) or not gap >= max(smallest, 1e-12):
        return None
    return (method - plain) / gap


def _verdict(interval: Interval | None) -> Verdict:
    if interval is None:
        return "no claim"
    return "open" if 0 in interval else "won" if interval.low > 0 else "lost"


def _natural(seed: str) -> tuple[bool, int, str]:
    """Order of seeds: numbers by value, then names."""
    return (not seed.isdecimal(), int(seed) if seed.isdecimal() else 0, seed)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}; 0.95 is usual")
    return level


def _finite(values: Iterable[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.array(list(values), dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"values must be finite, got {array.tolist()}")
    return array
