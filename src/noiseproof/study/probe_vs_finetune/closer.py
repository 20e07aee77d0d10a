"""A closer look at single rates: losses row by row, memorisation and selection epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from noiseproof import charts
from noiseproof.report.blocks import MISSING, Cell, Column, Table, percent, quantity
from noiseproof.report.figures import epoch_ticks, mean_curve
from noiseproof.report.runs import Run
from noiseproof.study.probe_vs_finetune.analysis import APPROACHES, Records, tuned
from noiseproof.study.showing import loss_chart

USUAL_RATE = 0.4  # losses are shown at the rate that is nearest
SHOWN = ("LP-GCE", "FT-CE", "TURN")  # approaches whose losses are shown, where they were run
SIZES = ("selected_min", "selected_median", "selected_max")


def wrong_noises(records: Records, kind: str) -> list[str]:
    """The noises of a kind that change labels, from low to high."""
    return [noise for noise in records.kinds[kind] if records.rates[noise]]


def loss_charts(records: Records, kind: str) -> tuple[list[str], str]:
    """Losses of right and wrong labels after training, a chart per approach, and at which rate."""
    noises = wrong_noises(records, kind)
    if not noises:
        return [], ""
    noise = min(noises, key=lambda noise: abs(records.rates[noise] - USUAL_RATE))
    drawn = [loss_chart(name, records.pick(name, noise)) for name in SHOWN]
    return [chart for chart in drawn if chart], percent(records.rates[noise])


def memorization_charts(records: Records, kind: str) -> list[str]:
    """Wrong labels predicted as given, by epoch of fine-tuning, a chart per rate."""
    drawn = []
    for noise in wrong_noises(records, kind):
        lines = []
        for name in records.approaches:
            curves = [_of_tuning(run, "memorization") for run in records.pick(name, noise)]
            curve = 100 * mean_curve(curves)
            if len(curve):
                epochs = list(range(1, len(curve) + 1))
                lines.append(charts.Series(name, epochs, curve.tolist(), APPROACHES[name].style))
        alone = f"{lines[0].name}: " if len(lines) == 1 else ""  # a lone line bears no name
        title = f"{alone}Memorised at {percent(records.rates[noise])} % of wrong labels, %"
        drawn.append(charts.line_chart(lines, title=title, x_label="epoch of fine-tuning",
                                       x_ticks=epoch_ticks(lines)))  # fmt: skip
    return [chart for chart in drawn if chart]


def _of_tuning(run: Run, column: str) -> list[float]:
    """A column of the history without the epochs of a probe (epochs,)."""
    return [value for row, value in zip(run.history, run.curve(column), strict=False)
            if row.get("stage") != "probe"]  # fmt: skip


def selection_table(records: Records, kind: str) -> Table | None:
    """F1 of the rows kept, and rows of a class that look right and may be kept, rate by rate."""
    rows = []
    for noise in records.kinds[kind]:
        runs = [run for run in records.pick("TURN", noise) if tuned(run, SIZES[0])]
        if not runs:
            continue
        rate = records.rates[noise]
        cells = [Cell(percent(rate), noise, rate)]
        cells += [_cell(_f1(runs, place), share=True) for place in (0, -1)]
        cells += [_cell(_last(runs, column)) for column in (*SIZES, "balance_cap")]
        rows.append(cells)
    if not rows:
        return None
    columns = [
        Column("Wrong labels, %"),
        Column("F1, first epoch", "Of the rows kept, for finding right labels, in percent."),
        Column("F1, last epoch"),
        Column("Fewest", "Rows that look right in the class that has fewest, in the last epoch."),
        Column("Median"),
        Column("Most"),
        Column("Cap", "Most rows that a class may keep."),
    ]
    note = (
        "Means over the seeds of TURN. Fewest, median and most: rows of a class that look right in "
        f"the last epoch; a class keeps as many as the cap says, all where it is {MISSING}."
    )
    return Table(columns, rows, note)


def _f1(runs: Sequence[Run], place: int) -> list[float]:
    found = []
    for run in runs:
        pairs = list(
            zip(tuned(run, "selection_precision"), tuned(run, "selection_recall"), strict=False)
        )
        if pairs and sum(pairs[place]) > 0:
            precision, recall = pairs[place]
            found.append(2 * precision * recall / (precision + recall))
    return found


def _last(runs: Sequence[Run], column: str) -> list[float]:
    """The values that the last selection of each run logged; without a value it logged none."""
    rows = [[row for row in run.history if row.get("stage") == "tune"
             and isinstance(row.get(SIZES[0]), int | float)][-1] for run in runs]  # fmt: skip
    return [float(value) for row in rows if isinstance(value := row.get(column), int | float)]


def _cell(values: Sequence[float], *, share: bool = False) -> Cell:
    if not values:
        return Cell(MISSING)
    mean = fmean(values)
    return Cell(percent(mean) if share else quantity(mean), value=mean)
