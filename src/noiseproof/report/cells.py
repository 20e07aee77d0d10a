"""Cells of a comparison: a method in a setting, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from noiseproof.report.blocks import MISSING, Cell, bounds, percent, quantity
from noiseproof.report.measures import Grid, Measure, unfinished
from noiseproof.report.runs import Group
from noiseproof.statistics import summarize


def column(grid: Grid, group: Group, measure: Measure, rows: Sequence[str]) -> list[Cell]:
    """A measure of several methods, the best marked."""
    found = [summarize(grid.values(group, row, measure.of).values()) for row in rows]
    show = percent if measure.share else quantity
    texts = [show(summary.mean if summary else None) for summary in found]
    means = [summary.mean for summary in found if summary]
    best = ""
    if measure.better and len(means) > 1:
        best = show(max(means) if measure.better > 0 else min(means))
    return [
        Cell(
            text,
            f"± {show(summary.sd)}" if summary and summary.sd is not None else "",
            summary.mean if summary else None,
            text == best,
        )
        for text, summary in zip(texts, found, strict=True)
    ]


def difference_cell(grid: Grid, group: Group, row: str) -> Cell:
    """A method minus its baseline in one setting."""
    if grid.partners.get(row) == row:
        return Cell("0", "baseline", 0.0)
    difference = grid.difference(group, row)
    if difference is None:
        return Cell(MISSING)
    summary = difference.summary
    return Cell(percent(summary.mean, signed=True), bounds(summary), summary.mean)


def seeds_cell(grid: Grid, group: Group, row: str) -> Cell:
    """Finished runs of a method in one setting, and how many there should be."""
    done = len(grid.cells[group][row])
    missing = sum(
        unfinished(left) and left.run is not None and (left.run.group, left.run.row) == (group, row)
        for left in grid.found.left_out
    )
    return Cell(f"{done} of {done + missing}" if missing else str(done), value=done)


def spread(grid: Grid) -> str:
    """What the numbers of a table are, in words."""
    several = any(len(runs) > 1 for cells in grid.cells.values() for runs in cells.values())
    return "mean ± standard deviation over seeds" if several else "one seed, so no spread"
