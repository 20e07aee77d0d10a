"""What the pages of several studies show alike: means as lines, dots, cells and words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from noiseproof.charts import Dot, Series, dot_chart
from noiseproof.report.blocks import MISSING, Cell, percent
from noiseproof.statistics import LEVEL, Summary, summarize


def mean_line(
    name: str, points: Mapping[float, Iterable[float]], style: int, scale: float = 100
) -> Series:
    """Means over seeds by position, with t intervals where there are several.

    Args:
        name: Of the line.
        points: Values of the seeds by position; positions without any are left out.
        style: Of the line.
        scale: Factor of the values.
    """
    found = {x: summary for x, values in sorted(points.items()) if (summary := summarize(values))}
    ends = [summary.interval for summary in found.values()]
    return Series(
        name,
        list(found),
        [scale * summary.mean for summary in found.values()],
        style,
        [scale * end.low if end else math.nan for end in ends],
        [scale * end.high if end else math.nan for end in ends],
    )


def interval_dots(
    named: Mapping[str, Sequence[float]],
    title: str,
    styles: Mapping[str, int] | None = None,
    scale: float = 100,
) -> str:
    """A chart with a row per name: mean over seeds, with its interval."""
    dots = []
    for name, values in named.items():
        found = summarize(values)
        if found is None:
            continue
        low = scale * found.interval.low if found.interval else None
        high = scale * found.interval.high if found.interval else None
        dots.append(Dot(name, scale * found.mean, low, high, (styles or {}).get(name, 1)))
    return dot_chart(dots, title=title, x_label=f"with {LEVEL:.0%} interval")


def mean_cell(values: Iterable[float], *, signed: bool = False) -> Cell:
    """Mean and standard deviation of shares, in percent."""
    found = summarize(values)
    if found is None:
        return Cell(MISSING)
    note = "" if found.sd is None else f"± {percent(found.sd)}"
    return Cell(percent(found.mean, signed=signed), note, found.mean)


def number_cell(values: Iterable[float], decimals: int = 2) -> Cell:
    """Mean and standard deviation of plain numbers."""
    found = summarize(values)
    if found is None:
        return Cell(MISSING)
    note = "" if found.sd is None else f"± {found.sd:.{decimals}f}"
    text = f"{found.mean:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return Cell(text, note, found.mean)


def told(found: Summary, *, signed: bool = False) -> str:
    """A mean of shares in percent with its interval, in words.

    >>> told(Summary(1, 0.5, None, None))
    '50.0 (one seed)'
    """
    mean = percent(found.mean, signed=signed)
    if found.interval is None:
        return f"{mean} (one seed)"
    low, high = found.interval.low, found.interval.high
    return f"{mean} ({percent(low, signed=signed)} to {percent(high, signed=signed)})"
