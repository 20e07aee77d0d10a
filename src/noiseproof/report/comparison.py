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
from noiseproof.report.measures import (
    Grid,
    Measure,
    choose_baseline,
    noise_rate,
    unfinished,
)
from noiseproof.report.provenance import cost, facts, left_out, what_was_run
from noiseproof.report.runs import PLACES, Found, Group, Run, as_number, natural
from noiseproof.statistics import LEVEL, bootstrap_interval, count, summarize

ENOUGH_SETTINGS = 5  # for a bootstrap interval over settings


def grid_report(found: Found, baseline: str | None, title: str | None) -> Report:
    """Compare methods over settings and seeds.

    Raises:
        InputError: The baseline is none of the methods.
    """
    chosen, why = choose_baseline(found, baseline)
    grid = Grid(found, chosen)
    sections = [_overview(grid, why)]
    sections += [_setting(grid, group) for group in grid.cells if any(grid.cells[group].values())]
    sections += [
        section
        for section in (_rates(grid), cost(grid), what_was_run(grid), left_out(found))
        if section.blocks
    ]
    heading = title or found.grid.get("title") or f"{len(found.runs)} runs"
    return Report(heading, found.grid.get("description", ""), sections)


def _overview(grid: Grid, why: str) -> Section:
    """What was run in a few lines, accuracy in all settings, wins and losses."""
    section = Section("Overview", [facts(grid, why)])
    if grid.tested and len(grid.cells) > 1:
        section.blocks.append(_all_settings(grid))
    if grid.tested and grid.baseline is not None and len(grid.rows) > 1:
        section.blocks.append(_wins(grid))
    return section


def _all_settings(grid: Grid) -> Table:
    """Accuracy of every method in every setting."""
    groups = list(grid.cells)
    columns = [Column("Method", numeric=False)]
    columns += [Column(grid.name(group, short=True), grid.name(group)) for group in groups]
    parts = [_column(grid, group, grid.measures[0], grid.rows) for group in groups]
    rows = [
        [Cell(row), *(part[index] for part in parts)] for index, row in enumerate(grid.rows)
    ]  # fmt: skip
    note = f"Test accuracy in percent ({grid.measures[0].title.lower()}), {_spread(grid)}."
    return Table(columns, rows, note, "Accuracy in all settings")


def _wins(grid: Grid) -> Table:
    """How often each method beats the baseline, and by how much on average."""
    columns = [
        Column("Method", numeric=False),
        Column("Won", "Settings in which the interval of the difference lies above 0."),
        Column("Tied", "Settings in which it holds 0."),
        Column("Lost", "Settings in which it lies below 0."),
        Column("No claim", "Settings with a single seed in common: no interval, no claim."),
        Column("Mean difference", "Mean of the differences over settings, in points."),
    ]
    rows = []
    for row in grid.rows:
        if row == grid.baseline:
            continue
        found = [d for group in grid.cells if (d := grid.difference(group, row)) is not None]
        won = count(difference.verdict for difference in found)
        means = [difference.summary.mean for difference in found]
        mean = fmean(means) if means else None
        note = f"{len(means)} setting{'s' * (len(means) != 1)}" if means else ""
        if len(means) >= ENOUGH_SETTINGS and (interval := bootstrap_interval(means)):
            note = _bounds(interval.low, interval.high)
        numbers = (won.won, won.tied, won.lost, won.no_claim)
        cells = [Cell(str(number), value=number) for number in numbers]
        rows.append([Cell(row), *cells, Cell(percent(mean, signed=True), note, mean)])
    note = (
        f"Test accuracy against {grid.baseline}, paired over seeds: won or lost where the "
        f"{LEVEL:.0%} t interval of the difference leaves out 0. Of two equal methods one seems "
        "better in one setting of twenty. In brackets a bootstrap interval over the settings, "
        f"where there are at least {ENOUGH_SETTINGS}."
    )
    return Table(columns, rows, note, f"Won, tied, lost against {grid.baseline}")


def _setting(grid: Grid, group: Group) -> Section:
    """One setting: its table and its charts."""
    cells, runs = grid.cells[group], grid.runs(group)
    rows = sorted(cells, key=lambda row: -(_mean(grid, group, row) or -1))
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
    curves = figures.learning_curves(drawn, grid.styles)
    dots = _dots(grid, group, rows)
    if dots or curves:
        seeds = "Means over seeds by epoch. " if curves else ""
        ring = "A ring is a difference from one seed." if dots and "ring" in dots else ""
        section.blocks.append(Figures([*([dots] if dots else []), *curves], (seeds + ring).strip()))
    found = figures.detection_curves(drawn, grid.styles)
    if found:
        section.blocks.append(Figures(found, "Finding wrong labels among the training rows."))
    maps = _maps(grid, group, rows)
    if maps:
        note = f"Percent of each row. {figures.cut_note(runs)}".strip()
        section.blocks.append(Figures(maps, note))
    return section


def _headline(grid: Grid, group: Group, rows: Sequence[str]) -> Table:
    """The measures of every method in one setting."""
    columns = [Column("Method", numeric=False), Column("Seeds", "Finished runs.")]
    parts = [[Cell(row) for row in rows], [_seeds(grid, group, row) for row in rows]]
    for index, measure in enumerate(grid.measures):
        columns.append(Column(measure.title, measure.meaning))
        parts.append(_column(grid, group, measure, rows))
        if index == 0 and any(grid.difference(group, row) for row in rows):
            columns.append(
                Column(f"Minus {grid.baseline}", f"Paired over seeds, {LEVEL:.0%} t interval.")
            )
            parts.append([_difference(grid, group, row) for row in rows])
            gaps = [grid.recovered(group, row) for row in rows]
            if any(gap is not None for gap in gaps):
                meaning = "(method - baseline) / (baseline without noise - baseline)"
                columns.append(Column("Recovered gap", meaning))
                parts.append(
                    [Cell("0" if row == grid.baseline else percent(gap), value=gap)
                     for row, gap in zip(rows, gaps, strict=True)]
                )  # fmt: skip
    shown = [index for index, part in enumerate(parts) if any(c.text != MISSING for c in part)]
    note = f"Percent, {_spread(grid)}."
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
    note = f"Accuracy and Matthews correlation (MCC) in percent, {_spread(grid)}. {ood.NOTE}"
    return _measured(grid, group, rows, measures, "Test sets from elsewhere", note)


def _modes(grid: Grid, group: Group, rows: Sequence[str]) -> list[Table]:
    """How methods with a poisoning expert answer in each mode, in one setting."""
    having = [
        row for row in rows if any(run.record.modes for run in grid.cells[group].get(row, ()))
    ]
    measures = experts.mode_measures(grid.runs(group))
    note = f"Accuracy in percent, {_spread(grid)}. One training a run; only the inference differs."
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
    parts = [_column(grid, group, measure, rows) for measure in measures]
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
    for kind, rates in _kinds(grid).items():
        lines = []
        for row in grid.rows:
            points = [
                (rate, summary)
                for rate, group in sorted(rates.items())
                if (summary := summarize(grid.values(group, row, grid.judged.of).values()))
            ]
            if len(points) < 2:
                continue
            nan = float("nan")
            intervals = [point.interval for _, point in points]
            lines.append(
                charts.Series(
                    row,
                    [100 * rate for rate, _ in points],
                    [100 * point.mean for _, point in points],
                    grid.styles[row],
                    [100 * i.low if i else nan for i in intervals],
                    [100 * i.high if i else nan for i in intervals],
                )
            )
        drawn.append(
            charts.line_chart(
                lines,
                title=f"Test accuracy, %: {kind}",
                x_label="noise rate asked for, %",
                x_ticks=sorted(100 * rate for rate in rates),
                y_range=_visible(lines),
            )
        )
    drawn = [chart for chart in drawn if chart]
    if drawn:
        note = (
            f"Means over seeds with {LEVEL:.0%} t intervals; no interval where there is one seed."
        )
        section.blocks.append(Figures(drawn, note))
    return section


# --- cells ----------------------------------------------------------------------------------------


def _column(grid: Grid, group: Group, measure: Measure, rows: Sequence[str]) -> list[Cell]:
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


def _difference(grid: Grid, group: Group, row: str) -> Cell:
    if row == grid.baseline:
        return Cell("0", "baseline", 0.0)
    difference = grid.difference(group, row)
    if difference is None:
        return Cell(MISSING)
    summary = difference.summary
    note = "one seed"
    if summary.interval is not None:
        note = _bounds(summary.interval.low, summary.interval.high)
    return Cell(percent(summary.mean, signed=True), note, summary.mean)


def _bounds(low: float, high: float) -> str:
    return f"({percent(low, signed=True)} to {percent(high, signed=True)})"


def _seeds(grid: Grid, group: Group, row: str) -> Cell:
    done = len(grid.cells[group][row])
    missing = sum(
        unfinished(left) and left.run is not None and (left.run.group, left.run.row) == (group, row)
        for left in grid.found.left_out
    )
    return Cell(f"{done} of {done + missing}" if missing else str(done), value=done)


def _mean(grid: Grid, group: Group, row: str) -> float | None:
    summary = summarize(grid.values(group, row, grid.judged.of).values())
    return summary.mean if summary else None


def _spread(grid: Grid) -> str:
    several = any(len(runs) > 1 for cells in grid.cells.values() for runs in cells.values())
    return "mean ± standard deviation over seeds" if several else "one seed, so no spread"


# --- charts ---------------------------------------------------------------------------------------


def _dots(grid: Grid, group: Group, rows: Sequence[str]) -> str:
    dots = []
    for row in rows:
        difference = grid.difference(group, row)
        if difference is not None:
            mean, interval = difference.summary.mean, difference.summary.interval
            low, high = (100 * interval.low, 100 * interval.high) if interval else (None, None)
            dots.append(charts.Dot(row, 100 * mean, low, high, grid.styles[row]))
    title = f"Accuracy minus {grid.baseline}, points"
    return charts.dot_chart(dots, title=title, x_label=f"difference with {LEVEL:.0%} interval")


def _maps(grid: Grid, group: Group, rows: Sequence[str]) -> list[str]:
    """Noise, and the confusions of the baseline and of the best other method."""
    cells = grid.cells[group]
    others = [row for row in rows if row != grid.baseline and cells[row]]
    shown = [row for row in (grid.baseline, *others[:1]) if row is not None and cells.get(row)]
    maps = [figures.transition_map(grid.runs(group), "What noise made of the labels")]
    maps += [figures.confusion_map(cells[row], f"Test set, {row}") for row in shown]
    return [chart for chart in maps if chart]


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
