"""The report on several runs: methods compared setting by setting, over the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from noiseproof import charts
from noiseproof.report import experts, figures, ood
from noiseproof.report.blocks import (
    MISSING,
    Cell,
    Column,
    Figures,
    Report,
    Section,
    Table,
    Text,
    percent,
    quantity,
)
from noiseproof.report.cells import column, difference_cell, seeds_cell, spread
from noiseproof.report.measures import (
    Grid,
    Measure,
    choose_baseline,
    noise_rate,
)
from noiseproof.report.overview import overview, verdict
from noiseproof.report.provenance import cost, facts, left_out, what_was_run
from noiseproof.report.runs import PLACES, Found, Group, Run, as_number, natural
from noiseproof.statistics import LEVEL, summarize

MOST_LINES = 6  # with a name, of a chart
QUIET = "Lines without a name are the other methods. "


def grid_report(found: Found, baseline: str | None, title: str | None) -> Report:
    """Compare methods over settings and seeds.

    Raises:
        InputError: The baseline is none of the methods.
    """
    chosen, why = choose_baseline(found, baseline)
    grid = Grid(found, chosen)
    sections = [overview(grid)]
    sections += [_setting(grid, group) for group in grid.cells if any(grid.cells[group].values())]
    sections += [_rates(grid), Section("Runs", facts(grid, why)), cost(grid), what_was_run(grid)]
    sections.append(left_out(found))
    heading = title or found.grid.get("title") or f"{len(found.runs)} runs"
    shown = [section for section in sections if section.blocks]
    return Report(heading, found.grid.get("description", ""), shown, verdict(grid))


def _setting(grid: Grid, group: Group) -> Section:
    """One setting: its table and its charts."""
    cells, runs = grid.cells[group], grid.runs(group)
    rows = sorted(cells, key=lambda row: -(grid.mean(group, row) or -1))
    link = grid.name(group, short=True) or "Results"
    section = Section(grid.name(group), [Text(_about(runs))], link=link)
    if group[PLACES.index("validation")].startswith("clean"):
        section.blocks.append(
            Text(
                "The validation rows had right labels. Whatever was chosen by them used knowledge "
                "that noisy data do not offer.",
                warning=True,
            )
        )
    section.blocks.append(_headline(grid, group, rows))
    section.blocks += _elsewhere(grid, group, rows)
    section.blocks += _modes(grid, group, rows)
    drawn = {row: cells[row] for row in grid.rows if cells.get(row)}
    styles = _loud(grid, [row for row in rows if row in drawn])
    quiet = QUIET if None in styles.values() else ""
    curves = figures.learning_curves(drawn, styles)
    dots = _dots(grid, group, rows)
    if dots or curves:
        seeds = "Means over seeds by epoch. " if curves else ""
        ring = (
            "A ring has no interval: one seed, or equal differences."
            if dots and "ring" in dots
            else ""
        )
        note = f"{seeds}{quiet if curves else ''}{ring}"
        section.blocks.append(Figures([*([dots] if dots else []), *curves], note.strip()))
    found = figures.detection_curves(drawn, styles)
    if found:
        note = f"Finding wrong labels among the training rows. {quiet}".strip()
        section.blocks.append(Figures(found, note))
    maps = _maps(grid, group, rows)
    if maps:
        note = f"Percent of each row. {figures.cut_note(runs)}".strip()
        section.blocks.append(Figures(maps, note))
    return section


def _headline(grid: Grid, group: Group, rows: Sequence[str]) -> Table:
    """The measures of every method in one setting."""
    columns = [Column("Method", numeric=False), Column("Seeds", "Finished runs.")]
    parts = [[Cell(row) for row in rows], [seeds_cell(grid, group, row) for row in rows]]
    for measure in grid.measures:
        columns.append(Column(measure.title, measure.meaning))
        parts.append(column(grid, group, measure, rows))
        if measure is grid.heads[-1] and any(grid.difference(group, row) for row in rows):
            columns.append(
                Column(f"Minus {grid.baseline}", f"Paired over seeds, {LEVEL:.0%} t interval.")
            )
            parts.append([difference_cell(grid, group, row) for row in rows])
            gaps = [grid.recovered(group, row) for row in rows]
            if any(gap is not None for gap in gaps):
                meaning = "(method - baseline) / (baseline without noise - baseline)"
                columns.append(Column("Recovered gap", meaning))
                parts.append(
                    [Cell("0" if grid.partners.get(row) == row else percent(gap), value=gap)
                     for row, gap in zip(rows, gaps, strict=True)]
                )  # fmt: skip
    shown = [index for index, part in enumerate(parts) if any(c.text != MISSING for c in part)]
    note = f"Percent, {spread(grid)}."
    if any(cell.best for part in parts for cell in part):
        note += " The best of a column is marked."
    return Table(
        [columns[index] for index in shown],
        [[parts[index][row] for index in shown] for row in range(len(rows))],
        note,
    )


def _elsewhere(grid: Grid, group: Group, rows: Sequence[str]) -> list[Table]:
    """The test sets from elsewhere of one setting, a table of their own."""
    names = ood.set_names(grid.runs(group))
    measures = [measure for name in names for measure in ood.measures_of(name)]
    note = f"Accuracy and Matthews correlation (MCC) in percent, {spread(grid)}. {ood.NOTE}"
    return _measured(grid, group, rows, measures, "Test sets from elsewhere", note)


def _modes(grid: Grid, group: Group, rows: Sequence[str]) -> list[Table]:
    """How methods with a poisoning expert answer in each mode, in one setting."""
    having = [
        row for row in rows if any(run.record.modes for run in grid.cells[group].get(row, ()))
    ]
    measures = experts.mode_measures(grid.runs(group))
    note = f"Accuracy in percent, {spread(grid)}. One training a run; only the inference differs."
    return _measured(grid, group, having, measures, "Inference modes", note)


def _measured(
    grid: Grid,
    group: Group,
    rows: Sequence[str],
    measures: Sequence[Measure],
    title: str,
    note: str,
) -> list[Table]:
    """A row per method and a column per measure; nothing without measures."""
    if not measures:
        return []
    parts = [column(grid, group, measure, rows) for measure in measures]
    columns = [Column(measure.title, measure.meaning) for measure in measures]
    return [
        Table(
            [Column("Method", numeric=False), *columns],
            [[Cell(row), *(part[index] for part in parts)] for index, row in enumerate(rows)],
            note,
            title,
        )
    ]


def _rates(grid: Grid) -> Section:
    """Accuracy over the rate of a kind of noise, wherever there is more than one rate."""
    section = Section("Accuracy over noise rate")
    drawn = []
    order = list(grid.rows)
    if grid.shared:
        means = grid.means
        order.sort(key=lambda row: -means.get(row, -1.0))
    styles = _loud(grid, order)
    for kind, rates in _kinds(grid).items():
        lines = []
        for row in grid.rows:
            points = {
                100 * rate: summary
                for rate, group in sorted(rates.items())
                if (summary := summarize(grid.values(group, row, grid.judged.of).values()))
            }
            if len(points) > 1:
                lines.append(figures.mean_line(row, points, styles[row]))
        drawn.append(
            charts.line_chart(
                lines,
                title=f"{grid.judged_name.capitalize()}, %: {kind}",
                x_label="noise rate asked for, %",
                x_ticks=sorted(100 * rate for rate in rates),
                y_range=_visible(lines),
            )
        )
    drawn = [chart for chart in drawn if chart]
    if drawn:
        note = (
            f"Means over seeds with {LEVEL:.0%} t intervals; none where there are fewer than "
            f"{figures.ENOUGH} seeds. {QUIET if None in styles.values() else ''}"
        )
        section.blocks.append(Figures(drawn, note.strip()))
    return section


def _loud(grid: Grid, order: Sequence[str]) -> dict[str, int | None]:
    """Styles for a chart: the first of an order and their baselines, the others without a name."""
    loud: list[str] = []
    for row in order:
        for one in (grid.partners.get(row, row), row):
            if one not in loud and one in order and len(loud) < MOST_LINES:
                loud.append(one)
    return {row: grid.styles[row] if row in loud else None for row in order}


# --- charts ---------------------------------------------------------------------------------------


def _dots(grid: Grid, group: Group, rows: Sequence[str]) -> str:
    found = {row: d.summary for row in rows if (d := grid.difference(group, row)) is not None}
    title = f"Accuracy minus {grid.baseline}, points"
    return figures.difference_dots(found, title, grid.styles)


def _maps(grid: Grid, group: Group, rows: Sequence[str]) -> list[str]:
    """Noise, and the confusions of the best method and of its baseline."""
    cells = grid.cells[group]
    others = [row for row in rows if grid.partners.get(row) != row and cells[row]]
    best = others[0] if others else rows[0]
    shown = dict.fromkeys([grid.partners.get(best, best), best])
    tests = {f"Test set, {row}": cells[row] for row in shown if cells.get(row)}
    return figures.class_maps(grid.runs(group), tests)


def _kinds(grid: Grid) -> dict[str, dict[float, Group]]:
    """Settings by kind of noise and rate, where a kind has several rates."""
    kinds: dict[tuple[str, Group], dict[float, Group]] = {}
    for group in grid.cells:
        runs = grid.runs(group)
        spec = str(runs[0].setting("noise") or "none") if runs else "none"
        name, _, settings = spec.partition(":")
        rate, _, more = settings.partition(",")
        try:
            share = float(rate)
        except ValueError:  # no noise, several at once, or a matrix
            continue
        rest = tuple(v for v, place in zip(group, PLACES, strict=True) if place != "noise")
        rates = kinds.setdefault((f"{name},{more}".strip(","), rest), {})
        rates[share] = group
        clean = grid.clean(group)
        if clean is not None:
            rates.setdefault(0.0, clean)
    titles = {}
    for (kind, _), rates in kinds.items():
        group = max(rates.items())[1]
        place = " · ".join(
            value
            for index, value in enumerate(group)
            if PLACES[index] != "noise" and len({other[index] for other in grid.cells}) > 1
        )
        if len(rates) > 1:
            titles[f"{place}, {kind}" if place else kind] = rates
    return titles


def _visible(lines: Sequence[charts.Series]) -> tuple[float, float] | None:
    """A range of y in which the means fill the chart: of two seeds an interval may be huge."""
    means = [value for line in lines for value in line.y]
    if not means:
        return None
    ends = [v for line in lines for v in (*line.low, *line.high) if v == v]
    room = max(5.0, 0.35 * (max(means) - min(means)))
    low = max(min([*ends, min(means)]), min(means) - room, 0.0)
    high = min(max([*ends, max(means)]), max(means) + room, 100.0)
    around = charts.ticks(low, high)
    return around[0], around[-1]


def _about(runs: Sequence[Run]) -> str:
    data = runs[0].record.data
    rates = [rate for run in runs if (rate := noise_rate(run)) is not None]
    seeds = ", ".join(sorted({run.seed for run in runs}, key=natural))
    classes = as_number(data.get("classes"))
    parts = [
        f"{quantity(as_number(data.get('rows')))} training rows",
        f"{quantity(classes)} classes" if classes != 1 else "",  # a response is no class
        (f"{percent(fmean(rates))} % wrong labels" if any(rates) else "no wrong labels")
        if rates
        else "",
        f"seeds {seeds}" if "," in seeds else f"seed {seeds}",
    ]
    return ", ".join(part for part in parts if part and not part.startswith(MISSING)) + "."
