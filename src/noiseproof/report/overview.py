"""What comes out of several runs: who is best, by how much, and how sure that is."""

from __future__ import annotations

from noiseproof.report.blocks import Cell, Column, Section, Table, bounds, percent
from noiseproof.report.cells import column, spread
from noiseproof.report.measures import VALIDATION, Grid, unfinished
from noiseproof.statistics import LEVEL, Difference, count


def verdict(grid: Grid) -> str:
    """Who is best, by how much, and how sure that is."""
    sentences = []
    found = {row: one for row in grid.rows if (one := grid.overall(row)) is not None}
    if found:
        best = max(found, key=lambda row: found[row][0].summary.mean)
        difference, settings = found[best]
        over = f" on average over {settings} settings" if settings > 1 else ""
        if grid.shared and settings == 1 < len(grid.cells):
            over = f" under {grid.name(grid.shared[0], short=True)}, which all methods share"
        if not grid.shared:
            over += ", each method over its own settings"
        mean, several = difference.summary.mean, len({grid.partners[row] for row in found}) > 1
        against = f"{grid.baseline}{' with the same adapters' if several else ''}{over}"
        among = f"None of {len(found)} methods is above {against}; nearest"
        if mean > 0:
            best_of = "Largest gain over" if several else f"Best of {len(found)} methods against"
            among = f"{best_of} {against}"
        if len(found) == 1:
            among = f"Against {against}"
        sentences.append(
            f"{among}: {best} ({percent(mean, signed=True)} points of {grid.judged_name}; "
            f"{_sure(difference)})."
        )
        ahead = [row for row, (one, _) in found.items() if one.verdict == "won"]
        if ahead and ahead != [best]:
            sentences.append(f"Ahead with an interval above 0: {'; '.join(ahead)}.")
    missing = [
        left for left in grid.found.left_out if unfinished(left) or left.status == "not started"
    ]
    if missing:
        done = len(grid.found.runs)
        sentences.append(f"{done} of {done + len(missing)} runs are done.")
    return " ".join(sentences)


def _sure(difference: Difference) -> str:
    """How sure a difference is, in words."""
    interval = difference.summary.interval
    if interval is None:
        return f"{bounds(difference.summary).strip('()')}: no claim"
    word = {"won": "ahead", "lost": "behind"}.get(difference.verdict, "open")
    low, high = percent(interval.low, signed=True), percent(interval.high, signed=True)
    return f"{interval.level:.0%} interval {low} to {high}: {word}"


def overview(grid: Grid) -> Section:
    """Accuracy in all settings, wins and losses."""
    section = Section("Overview")
    if grid.tested and len(grid.cells) > 1:
        section.blocks.append(_all_settings(grid))
    if any(grid.overall(row) for row in grid.rows):
        section.blocks.append(_wins(grid))
    return section


def _all_settings(grid: Grid) -> Table:
    """Accuracy of every method in every setting, the best on average first."""
    groups = list(grid.cells)
    columns = [Column("Method", numeric=False)]
    columns += [Column(grid.name(group, short=True), grid.name(group)) for group in groups]
    parts = [column(grid, group, grid.judged, grid.rows) for group in groups]
    order = list(range(len(grid.rows)))
    measure = "" if grid.judged is VALIDATION else f" ({grid.heads[0].title.lower()})"
    note = f"{grid.judged_name.capitalize()} in percent{measure}, {spread(grid)}."
    if grid.shared:
        means = grid.means
        best = percent(max(means.values()))
        columns.insert(1, Column("Mean", "Over the settings in which every method has a result."))
        parts.insert(0, [_mean_cell(means.get(row), best) for row in grid.rows])
        order.sort(key=lambda index: -means.get(grid.rows[index], -1.0))
        note += f" The mean is over {_count(grid)} in which every method has a result."
    rows = [[Cell(grid.rows[index]), *(part[index] for part in parts)] for index in order]
    return Table(columns, rows, note, "Accuracy in all settings")


def _mean_cell(mean: float | None, best: str) -> Cell:
    return Cell(percent(mean), value=mean, best=percent(mean) == best)


def _count(grid: Grid) -> str:
    number = len(grid.shared)
    return f"{number} settings" if number > 1 else "the setting"


def _wins(grid: Grid) -> Table:
    """How often each method beats the baseline, and by how much on average."""
    columns = [
        Column("Method", numeric=False),
        Column("Mean difference", "In points, seed by seed: the mean over settings."),
        Column("Won", "Settings in which the interval of the difference lies above 0."),
        Column("Open", "Settings in which it holds 0."),
        Column("Lost", "Settings in which it lies below 0."),
        Column("No claim", "Settings with a single seed in common, or equal differences."),
    ]
    rows = []
    for row in grid.rows:
        overall = grid.overall(row)
        if overall is None:
            continue
        summary, settings = overall[0].summary, overall[1]
        note = bounds(summary)
        if settings != len(grid.shared):
            note += f", {settings} setting{'s' * (settings != 1)}"
        found = [d for group in grid.cells if (d := grid.difference(group, row)) is not None]
        won = count(one.verdict for one in found)
        numbers = (won.won, won.open, won.lost, won.no_claim)
        cells = [Cell(str(number), value=number) for number in numbers]
        mean = Cell(percent(summary.mean, signed=True), note, summary.mean)
        rows.append([Cell(row), mean, *cells])
    rows.sort(key=lambda cells: -(cells[1].value or 0.0))
    over = f"over {_count(grid)} in which every method has a result" if grid.shared else (
        "over the settings of each method: no setting has them all"
    )  # fmt: skip
    note = (
        f"{grid.judged_name.capitalize()} against {grid.baseline}, paired over seeds: won or lost "
        f"where the {LEVEL:.0%} t interval of the difference leaves out 0. Of two equal methods "
        f"one seems better in one setting of twenty. The mean difference is {over}, averaged "
        "within a seed first."
    )
    if grid.judged is VALIDATION:
        note += " The labels of validation rows may be as wrong as those of the others."
    return Table(columns, rows, note, f"Won, open, lost against {grid.baseline}")
