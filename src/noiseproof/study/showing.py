"""What the pages of several studies show alike: means as dots, cells and words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from noiseproof import charts
from noiseproof.report.blocks import MISSING, Cell, bounds, percent
from noiseproof.report.figures import difference_dots
from noiseproof.report.runs import Run
from noiseproof.statistics import Summary, summarize
from noiseproof.study.estimates import Estimate


def summaries(points: Mapping[float, Iterable[float]]) -> dict[float, Summary]:
    """Values of the seeds summed up by position, in order; positions without any are left out."""
    return {x: found for x, values in sorted(points.items()) if (found := summarize(values))}


def estimate_dots(
    named: Mapping[str, Estimate], title: str, styles: Mapping[str, int], style: int = 0
) -> str:
    """A chart with a row per name: the mean, with its interval; names without a style have one."""
    drawn = {name: one.summary for name, one in named.items()}
    return difference_dots(drawn, title, {name: styles.get(name, style) for name in named})


def loss_chart(name: str, runs: Iterable[Run]) -> str:
    """Losses of right and wrong labels after training; nothing where no run holds them.

    Bins differ from run to run, so the chart is that of one run, the first that has any.
    """
    for run in runs:
        # a point is (loss, share of right rows, share of wrong rows)
        points = [point for point in run.record.curves.get("losses") or [] if len(point) == 3]
        if points:
            middles = [point[0] for point in points]
            lines = [
                charts.Series(label, middles, [100 * point[place] for point in points], style)
                for place, label, style in ((1, "right labels", 1), (2, "wrong labels", 2))
            ]
            return charts.line_chart(lines, title=f"{name}: rows by their loss, %",
                                     x_label="loss", marks=False, legend=True)  # fmt: skip
    return ""


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
    return Cell(percent(one.summary.mean, signed=True), bounds(one.summary), one.summary.mean)


def told(found: Summary) -> str:
    """A difference of shares in points with its interval, in words.

    >>> from noiseproof.statistics import summarize
    >>> told(summarize([0.5]))
    '+50.0 (one seed)'
    """
    return f"{percent(found.mean, signed=True)} {bounds(found)}"
