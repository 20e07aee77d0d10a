"""Intervals, differences and verdicts: known values, closed forms, and no claim from one seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from noiseproof.errors import InputError
from noiseproof.statistics import (
    Counts,
    Interval,
    compare,
    count,
    mean_over,
    recovered_gap,
    summarize,
    t_interval,
)

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


# Quantiles of Student's t from printed tables: t(n - 1, 0.975) for n = 2, 3, 5, 10.
@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_the_t_interval_has_the_printed_quantiles(n: int, t: float) -> None:
    values = [0.0] * (n - 1) + [1.0]  # mean 1/n, variance 1/n with n - 1 below the line
    interval = t_interval(values)
    assert interval is not None
    half = t * math.sqrt(1 / n) / math.sqrt(n)
    assert interval.low == pytest.approx(1 / n - half, abs=1e-3)
    assert interval.high == pytest.approx(1 / n + half, abs=1e-3)


def test_a_summary_by_hand() -> None:
    summary = summarize([0.8, 0.9, 1.0])
    assert summary is not None
    assert summary.n == 3
    assert summary.mean == pytest.approx(0.9)
    assert summary.sd == pytest.approx(0.1)
    assert summary.interval is not None
    assert summary.interval.high == pytest.approx(0.9 + 4.30265 * 0.1 / math.sqrt(3), abs=1e-5)


def test_one_value_has_no_spread_and_no_values_no_summary() -> None:
    """An interval from one seed would be an invention."""
    one = summarize([0.7])
    assert one is not None and one.mean == 0.7 and one.sd is None and one.interval is None
    assert summarize([]) is None
    assert t_interval([0.7]) is None


@given(NUMBERS)
def test_an_interval_holds_the_mean(values: list[float]) -> None:
    assume(len(set(values)) > 1)
    mean, slack = float(np.mean(values)), 1e-9 * (1 + max(map(abs, values)))
    interval = t_interval(values)
    assert interval is not None and interval.low - slack <= mean <= interval.high + slack


@given(NUMBERS, st.floats(-100, 100))
def test_the_interval_moves_with_the_values_and_grows_with_the_level(
    values: list[float], shift: float
) -> None:
    moved = [value + shift for value in values]
    assume(len(set(values)) > 1 and len(set(moved)) > 1)
    one, two = t_interval(values), t_interval(moved)
    wide = t_interval(values, level=0.99)
    assert one and two and wide
    assert two.low == pytest.approx(one.low + shift, rel=1e-6, abs=1e-6)
    assert wide.low <= one.low + 1e-9 and one.high <= wide.high + 1e-9


def test_differences_are_paired_over_common_seeds() -> None:
    """Seeds differ by 20 points here, methods by one: only pairing sees it."""
    method = {"0": 0.61, "1": 0.81, "2": 0.712, "7": 0.0}
    baseline = {"0": 0.60, "1": 0.80, "2": 0.70, "10": 1.0}
    difference = compare(method, baseline)
    assert difference is not None
    assert difference.seeds == ("0", "1", "2")
    assert difference.values == pytest.approx((0.01, 0.01, 0.012))
    assert difference.verdict == "won"
    other = compare(baseline, method)
    assert other is not None and other.verdict == "lost"


def test_verdicts() -> None:
    assert compare({"0": 0.9}, {"0": 0.1}).verdict == "no claim"  # type: ignore[union-attr]
    found = compare({"0": 0.9, "1": 0.7}, {"0": 0.8, "1": 0.8})
    assert found is not None and found.verdict == "open" and found.summary.mean == 0
    assert compare({"0": 0.9}, {"1": 0.9}) is None


@pytest.mark.parametrize("ahead", [0.0, 0.2])
def test_equal_differences_have_no_interval_and_claim_nothing(ahead: float) -> None:
    """An interval of no width would call every difference certain, and rounding a win."""
    found = compare({"0": 0.1 + 0.2 + ahead, "1": 0.5 + ahead}, {"0": 0.3, "1": 0.5})
    assert found is not None and found.verdict == "no claim"
    assert found.summary.interval is None and found.summary.sd == 0


def test_settings_of_one_seed_are_one_value() -> None:
    """Six runs of two seeds are two values: the three settings of a seed share its rows."""
    tables = [{"0": 0.1, "1": 0.2}, {"0": 0.3, "1": 0.5}, {"0": 0.2, "1": 0.2}]
    found, settings = mean_over(tables)  # type: ignore[misc]
    assert settings == 3 and found.summary.n == 2
    assert found.values == pytest.approx((0.2, 0.3))
    assert found.verdict == "open", "of six independent values it would have been won"


def test_a_seed_that_lacks_a_setting_is_left_out_of_the_mean_over_settings() -> None:
    found, settings = mean_over([{"0": 1.0, "1": 9.0}, {"0": 3.0}, {"2": 5.0}])  # type: ignore[misc]
    assert (found.seeds, found.values, settings) == (("0",), (2.0,), 2)
    assert found.verdict == "no claim" and mean_over([]) is None and mean_over([{}]) is None


def test_seeds_are_sorted_by_value() -> None:
    values = {"10": 0.1, "2": 0.2, "x": 0.3}
    difference = compare(values, values)
    assert difference is not None and difference.seeds == ("2", "10", "x")


def test_counts() -> None:
    assert count(["won", "open", "open", "lost", "no claim"]) == Counts(1, 2, 1, 1)
    assert count([]) == Counts()


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_the_recovered_gap_is_linear(share: float, plain: float, gap: float) -> None:
    found = recovered_gap(plain + share * gap, plain, plain + gap, smallest=0.001)
    assert found == pytest.approx(share, abs=1e-6)


def test_no_recovered_gap_without_damage() -> None:
    """Noise that costs half a point makes a ratio of two rounding errors."""
    assert recovered_gap(0.9, 0.95, 0.955) is None
    assert recovered_gap(0.9, 0.95, 0.9) is None
    assert recovered_gap(0.9, 0.9, 0.9, smallest=0) is None


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf]])
def test_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match="finite"):
        summarize(values)


def test_a_level_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="level must lie between 0 and 1, got 95"):
        t_interval([1, 2], level=95)
    assert 0.5 in Interval(0, 1) and 2 not in Interval(0, 1)
