"""What the pages of several studies show alike: means as lines, dots, cells and words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from noiseproof.charts import Dot, Series, dot_chart
from noiseproof.report.blocks import MISSING, Cell, percent
from noiseproof.statistics import LEVEL, Interval, Summary, summarize
from noiseproof.study.estimates import Estimate


def mean_line(
    name: str,
    points: Mapping[int, Summary] | Mapping[float, Summary],
    style: int,
    scale: float = 100,
) -> Series:
    """Means over seeds by position, with t intervals where there are several.

    Args:
        name: Of the line.
        points: What was found, by position.
        style: Of the line.
        scale: Factor of the values.
    """
    ends = [point.interval for point in points.values()]
    return Series(
        name,
        list(points),
        [scale * point.mean for point in points.values()],
        style,
        [scale * end.low if end else math.nan for end in ends],
        [scale * end.high if end else math.nan for end in ends],
    )


def summaries(points: Mapping[float, Iterable[float]]) -> dict[float, Summary]:
    """Values of the seeds summed up by position, in order; positions without any are left out."""
    return {x: found for x, values in sorted(points.items()) if (found := summarize(values))}


def estimate_dots(
    named: Mapping[str, Estimate], title: str, styles: Mapping[str, int], style: int = 0
) -> str:
    """A chart with a row per name: the mean, with its interval; names without a style have one."""
    dots = []
    for name, one in named.items():
        low = 100 * one.interval.low if one.interval else None
        high = 100 * one.interval.high if one.interval else None
        dots.append(Dot(name, 100 * one.mean, low, high, styles.get(name, style)))
    return dot_chart(dots, title=title, x_label=f"with {LEVEL:.0%} interval")


def mean_cell(values: Iterable[float]) -> Cell:
    """Mean and standard deviation of shares over seeds, in percent."""
    return summary_cell(summarize(values))


def summary_cell(found: Summary | None) -> Cell:
    """Mean and standard deviation of shares, in percent."""
    if found is None:
        return Cell(MISSING)
    note = "" if found.sd is None else f"± {percent(found.sd)}"
    return Cell(percent(found.mean), note, found.mean)


def number_cell(values: Iterable[float], decimals: int = 2) -> Cell:
    """Mean and standard deviation of plain numbers over seeds."""
    found = summarize(values)
    if found is None:
        return Cell(MISSING)
    note = "" if found.sd is None else f"± {found.sd:.{decimals}f}"
    text = f"{found.mean:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return Cell(text, note, found.mean)


def estimate_cell(one: Estimate | None) -> Cell:
    """Mean and interval of a difference, in points."""
    if one is None:
        return Cell(MISSING)
    text, _, note = told(one.mean, one.interval).partition(" ")
    return Cell(text, note, one.mean)


def told(mean: float, interval: Interval | None) -> str:
    """A difference of shares in points with its interval, in words.

    >>> told(0.5, None)
    '+50.0 (one seed)'
    """
    text = percent(mean, signed=True)
    if interval is None:
        return f"{text} (one seed)"
    low, high = interval.low, interval.high
    return f"{text} ({percent(low, signed=True)} to {percent(high, signed=True)})"
