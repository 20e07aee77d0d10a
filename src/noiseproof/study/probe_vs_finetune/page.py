"""The page of the study: one figure per question, every sentence computed from the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean

from noiseproof import charts
from noiseproof.report.blocks import (
    MISSING,
    Block,
    Cell,
    Column,
    Figures,
    Report,
    Section,
    Table,
    Text,
    bounds,
    percent,
    quantity,
)
from noiseproof.report.figures import epoch_ticks, mean_curve, mean_line
from noiseproof.report.measures import Grid
from noiseproof.report.provenance import cost as time_and_memory
from noiseproof.report.provenance import facts, left_out, what_was_run
from noiseproof.report.runs import Found, Run
from noiseproof.statistics import LEVEL, Difference, Summary
from noiseproof.study.probe_vs_finetune.analysis import (
    APPROACHES,
    BASELINE,
    PAIRS,
    Crossing,
    Of,
    Records,
    cost,
    passes_of,
    tuned,
)
from noiseproof.study.probe_vs_finetune.closer import (
    loss_charts,
    memorization_charts,
    selection_table,
)
from noiseproof.study.showing import summary_cell

WRONG = "wrong labels, %"
TOLD = {"won": ", ahead", "lost": ", behind", "open": ", open", "no claim": ""}
DISTORTION: tuple[tuple[str, str, float], ...] = (
    ("distortion_probe", "Linear re-probe with true labels, %", 100),
    ("distortion_knn", "Nearest neighbours with true labels, %", 100),
    ("distortion_parameters", "Distance of the parameters, % of their norm", 100),
    ("distortion_cka", "Linear CKA to the pre-trained features", 1),
)
SEPARATION = (
    ("detection_auroc", "AUROC of the losses, all rows, %"),
    ("detection_auroc_by_class", "AUROC of the losses, mean over classes, %"),
    ("detection_ap", "Average precision of the losses, all rows, %"),
)
Number = Callable[[Run], float | None]


def page(found: Found, title: str) -> Report:
    """Everything that the records of a study say.

    Args:
        found: Its runs.
        title: Of the page.
    """
    records = Records(found)
    grid = Grid(found, BASELINE if BASELINE in records.approaches else None)
    sections: list[Section] = []
    for kind in records.kinds:
        sections += [
            _accuracy(records, kind),
            _distortion(records, kind),
            _separation(records, kind),
            _memorization(records, kind),
            _selection(records, kind),
            _cost(records, kind),
        ]
    sections += [
        Section("Runs", facts(grid, "full fine-tuning with cross-entropy")),
        time_and_memory(grid),
        what_was_run(grid),
        left_out(found),
    ]
    told = [_headline(records, kind) for kind in records.kinds]
    return Report(title, " ".join(told), [section for section in sections if section.blocks])


def _named(records: Records, kind: str, title: str) -> str:
    return f"{title}, {kind} noise" if len(records.kinds) > 1 else title


# --- accuracy and crossing -----------------------------------------------------------------------


def _headline(records: Records, kind: str) -> str:
    """Where the first pair that was run crosses."""
    for probe, tuning in PAIRS:
        found = records.crossing(probe, tuning, kind)
        if found is not None:
            return f"{_crossing_told(found, probe, tuning)} ({kind} noise)."
    return f"Too few runs under {kind} noise to say where probe and fine-tuning cross."


def _crossing_told(found: Crossing, probe: str, tuning: str) -> str:
    """Where two approaches cross, in words.

    >>> from noiseproof.statistics import summarize
    >>> _crossing_told(Crossing({"0": 0.6}, summarize([0.6]), 1, 0, 0), "LP-GCE", "FT-CE")
    'LP-GCE and FT-CE cross at 60.0 % of wrong labels (one seed)'
    """
    ends = []
    if found.probe_ahead:
        ends.append(f"{probe} is at least as good at every rate in {found.probe_ahead}")
    if found.tuning_ahead:
        ends.append(f"{tuning} is still better at the highest rate in {found.tuning_ahead}")
    of = f"of {found.seeds} seeds" if found.seeds > 1 else "of one seed"
    if found.summary is None:
        return f"{probe} and {tuning} do not cross: {' and '.join(ends)} {of}"
    where = f"{probe} and {tuning} cross at {percent(found.summary.mean)} % of wrong labels"
    if not ends:
        return f"{where} ({_within(found.summary)})"
    return f"{where} in {len(found.rates)} {of} ({_within(found.summary)}); {' and '.join(ends)}"


def _accuracy(records: Records, kind: str) -> Section:
    """Accuracy against noise, and the rates where probe and fine-tuning cross."""
    drawn = _over_rates(records, kind, records.approaches, "test_accuracy", "Test accuracy, %")
    crossings = {
        pair: found for pair in PAIRS if (found := records.crossing(*pair, kind)) is not None
    }
    blocks: list[Block] = [
        Text(f"{_crossing_told(found, *pair)}.") for pair, found in crossings.items()
    ]
    if drawn:
        blocks.append(Figures([drawn], _note("after the last epoch")))
    rows = []
    for noise in records.kinds[kind]:
        cells = [summary_cell(records.mean(name, noise, "test_accuracy"))
                 for name in records.approaches]  # fmt: skip
        differences = [
            _difference_cell(records.ahead(tuning, probe, noise, "test_accuracy"))
            for probe, tuning in crossings
        ]
        rows.append([_rate_cell(records, noise), *cells, *differences])
    columns = [
        Column("Wrong labels, %", "As counted after the noise was made."),
        *map(Column, records.approaches),
        *(Column(f"{tuning} \N{MINUS SIGN} {probe}") for probe, tuning in crossings),
    ]
    note = (
        f"Test accuracy in percent, mean ± standard deviation over seeds; differences in points, "
        f"seed by seed, with {LEVEL:.0%} t intervals. The rate of a crossing lies on straight "
        "lines between the rates that were run, for each seed; its interval is that of the "
        "seeds, cut at 0 and 100 %."
    )
    blocks.append(Table(columns, rows, note, fixed=True))
    title = _named(records, kind, "Probe or fine-tune")
    return Section(title, blocks if drawn else [])


# --- distortion ----------------------------------------------------------------------------------


def _distortion(records: Records, kind: str) -> Section:
    """What fine-tuning makes of the features."""
    moving = [name for name in records.approaches if not name.startswith("LP-") or name == "LP-FT"]
    drawn = []
    for metric, title, scale in DISTORTION:
        lines = [_line(records, kind, name, metric, scale) for name in moving]
        before = f"{metric}_before"
        lines.append(_line(records, kind, records.approaches[0], before, scale, "pre-trained"))
        drawn.append(_chart(records, kind, [line for line in lines if line], title))
    drawn = [chart for chart in drawn if chart]
    if not drawn or not moving:
        return Section("Features")
    blocks: list[Block] = [
        Text(text) for name in moving if (text := _bent_told(records, kind, name))
    ]
    note = _note(
        "the deployed encoder; the re-probe (ridge) and the 20 nearest neighbours learn the true "
        "labels of the training rows and answer the test rows; probes leave the encoder as it was"
    )
    blocks.append(Figures(drawn, note))
    title = _named(records, kind, "What becomes of the features")
    return Section(title, blocks, link=_named(records, kind, "Features"))


def _bent_told(records: Records, kind: str, approach: str) -> str:
    """What a re-probe gains or loses at the lowest and the highest rate."""
    found = {noise: one for noise in records.kinds[kind] if (one := records.bent(approach, noise))}
    if not found:
        return ""
    ends = list(dict.fromkeys([next(iter(found)), list(found)[-1]]))
    parts = [
        f"{percent(found[noise].summary.mean, signed=True)} points "
        f"{bounds(found[noise].summary)} at {percent(records.rates[noise])} % of wrong labels"
        for noise in ends
    ]
    return f"Re-probe after {approach} against the pre-trained features: {', '.join(parts)}."


# --- separation ----------------------------------------------------------------------------------


def _separation(records: Records, kind: str) -> Section:
    """How well losses tell wrong labels from right ones."""
    drawn = [_over_rates(records, kind, records.approaches, metric, title)
             for metric, title in SEPARATION]  # fmt: skip
    drawn = [chart for chart in drawn if chart]
    if not drawn:
        return Section("Separation")
    blocks: list[Block] = []
    for metric, title in SEPARATION:
        means = {name: fmean(found) for name in records.approaches
                 if (found := [one.mean for noise in records.kinds[kind]
                               if (one := records.mean(name, noise, metric))])}  # fmt: skip
        if means:
            order = sorted(means, key=lambda name: -means[name])
            told = ", ".join(f"{name} {percent(means[name])}" for name in order)
            blocks.append(Text(f"{title.removesuffix(', %')}, mean over the rates: {told}."))
    note = _note(
        "how well the loss after training ranks wrong labels first, by chance 50 (AUROC) or the "
        "share of wrong labels (average precision); of TURN the loss by which it selected last"
    )
    blocks.append(Figures(drawn, note))
    losses, rate = loss_charts(records, kind)
    if losses:
        note = (
            f"The same losses at {rate} % of wrong labels, one seed: right labels and wrong labels "
            "by their loss, each 100 % together. The last point holds all losses beyond it."
        )
        blocks.append(Figures(losses, note))
    return Section(_named(records, kind, "Which rows look wrong"), blocks,
                   link=_named(records, kind, "Separation"))  # fmt: skip


def _memorization(records: Records, kind: str) -> Section:
    """What is memorised in every epoch of fine-tuning."""
    drawn = memorization_charts(records, kind)
    title = _named(records, kind, "What is memorised")
    note = (
        "Wrong labels that are predicted as they were given, by epoch of fine-tuning, means over "
        "seeds; a chart per rate. Probes have epochs of their own and are left out."
    )
    blocks: list[Block] = [Figures(drawn, note)] if drawn else []
    return Section(title, blocks, link=_named(records, kind, "Memorisation"))


# --- selection -----------------------------------------------------------------------------------


def _selection(records: Records, kind: str) -> Section:
    """What TURN keeps, epoch by epoch."""
    numbers: tuple[tuple[str, int, Callable[[Run], list[float]]], ...] = (
        ("Right labels among the rows kept, %", 1, lambda run: tuned(run, "selection_precision")),
        ("Right labels that are kept, %", 1, lambda run: tuned(run, "selection_recall")),
        ("Wrong labels among the rows kept, %", 1,
         lambda run: [1 - value for value in tuned(run, "selection_precision")]),
        ("Rows kept, % of all", 1, lambda run: tuned(run, "kept_share")),
        ("Overlap with the rows of the epoch before, %", 2, lambda run: tuned(run, "kept_again")),
    )  # fmt: skip
    drawn = []
    for title, first, of in numbers:
        lines = []
        for place, noise in enumerate(records.kinds[kind]):
            curve = 100 * mean_curve([of(run) for run in records.pick("TURN", noise)])
            if len(curve):
                name = f"{percent(records.rates[noise])} % wrong"
                epochs = list(range(first, len(curve) + first))
                lines.append(charts.Series(name, epochs, curve.tolist(), place))
        drawn.append(charts.line_chart(lines, title=title, x_label="epoch of fine-tuning",
                                       x_ticks=epoch_ticks(lines)))  # fmt: skip
    drawn = [chart for chart in drawn if chart]
    if not drawn:
        return Section("Selection")
    blocks: list[Block] = [
        Text(text) for noise in records.kinds[kind] if (text := _kept_told(records, noise))
    ]
    note = (
        "What TURN trains on, by epoch, means over seeds, a line per rate. Overlap is that of "
        "Jaccard: rows kept in both epochs among those kept in either."
    )
    blocks.append(Figures(drawn, note))
    table = selection_table(records, kind)
    blocks += [] if table is None else [table]
    return Section(_named(records, kind, "What TURN selects"), blocks,
                   link=_named(records, kind, "Selection"))  # fmt: skip


def _kept_told(records: Records, noise: str) -> str:
    """Noise before the selection and in its last epoch."""
    if not records.rates[noise]:
        return ""
    ends = [curve[-1] for run in records.pick("TURN", noise)
            if (curve := tuned(run, "selection_precision"))]  # fmt: skip
    sizes = [
        curve[-1] for run in records.pick("TURN", noise) if (curve := tuned(run, "kept_share"))
    ]
    if not ends or not sizes:
        return ""
    return (
        f"Of {percent(records.rates[noise])} % wrong labels {percent(1 - fmean(ends))} % are left "
        f"in the rows of the last epoch, {percent(fmean(sizes))} % of all rows."
    )


# --- cost ----------------------------------------------------------------------------------------


def _forward(run: Run) -> float | None:
    found = passes_of(run)
    return None if found is None else found.forward


def _backward(run: Run) -> float | None:
    found = passes_of(run)
    return None if found is None else found.backward


def _seconds(run: Run, stages: Sequence[str]) -> float | None:
    """Wall-clock of the stages of these names; None where the record does not tell."""
    found = [value for stage in stages if (value := run.timing(f"stage_{stage}_s")) is not None]
    return sum(found) if found else None


def _cost(records: Records, kind: str) -> Section:
    """Passes of the encoder."""
    title = "Passes over the training rows (backward counts two)"
    drawn = _over_rates(records, kind, records.approaches, cost, title, scale=1)
    if not drawn:
        return Section("Passes")
    rows = []
    for name in records.approaches:
        cells = []
        for of in (_forward, _backward, cost):
            found = _all(records, kind, name, of)
            cells.append(
                Cell(quantity(fmean(found)), value=fmean(found)) if found else Cell(MISSING)
            )
        shares = [one.mean / base.mean for noise in records.kinds[kind]
                  if (one := records.mean(name, noise, cost))
                  and (base := records.mean(BASELINE, noise, cost)) and base.mean]  # fmt: skip
        share = Cell(f"{fmean(shares):.2f}", value=fmean(shares)) if shares else Cell(MISSING)
        for stages in (("probe",), ("tune", "train")):
            seconds = _all(records, kind, name, partial(_seconds, stages=stages))
            shown = Cell(quantity(fmean(seconds)), value=fmean(seconds)) if seconds else None
            cells.append(shown or Cell(MISSING))
        rows.append([Cell(name), *cells[:3], share, *cells[3:]])
    columns = [Column("Approach", numeric=False), Column("Forward"), Column("Backward"),
               Column("Together", "In forward passes; a backward pass counts two."),
               Column(f"Over {BASELINE}", "Mean of the ratio over the rates."),
               Column("Probe, s", "Wall-clock, encoding and measuring included."),
               Column("Tuning, s", "Wall-clock, scoring and measuring included.")]  # fmt: skip
    note = (
        "Passes of the encoder over all training rows, counted from the rows of every epoch; means "
        "over rates and seeds. A probe takes one pass for its features, as heads that read cached "
        "features do; a selection takes a scoring pass an epoch, except right after a probe. "
        "Measuring is left out, but for the seconds."
    )
    blocks: list[Block] = [Figures([drawn], _note("counted from the history"))]
    blocks.append(Table(columns, rows, note))
    title = _named(records, kind, "What it costs")
    return Section(title, blocks, link=_named(records, kind, "Passes"))


def _all(records: Records, kind: str, approach: str, of: Number) -> list[float]:
    return [value for noise in records.kinds[kind]
            for value in records.values(approach, noise, of).values()]  # fmt: skip


# --- parts ---------------------------------------------------------------------------------------


def _over_rates(
    records: Records, kind: str, names: Iterable[str], of: Of, title: str, scale: float = 100
) -> str:
    lines = [line for name in names if (line := _line(records, kind, name, of, scale))]
    return _chart(records, kind, lines, title)


def _line(
    records: Records, kind: str, approach: str, of: Of, scale: float, name: str = ""
) -> charts.Series | None:
    """An approach over the rates; named otherwise it is grey."""
    points: dict[float, Summary] = {}
    for noise in records.kinds[kind]:
        found = records.mean(approach, noise, of)
        if found is not None:
            points[100 * records.rates[noise]] = found
    if not points:
        return None
    style = 0 if name else APPROACHES[approach].style
    return mean_line(name or approach, points, style, scale)


def _chart(records: Records, kind: str, lines: list[charts.Series], title: str) -> str:
    rates = [100 * records.rates[noise] for noise in records.kinds[kind]]
    return charts.line_chart(lines, title=title, x_label=WRONG, x_range=(min(rates), max(rates)),
                             legend=len(lines) > 4)  # fmt: skip


def _note(what: str) -> str:
    return f"Means over seeds with {LEVEL:.0%} t intervals from three seeds on: {what}."


def _rate_cell(records: Records, noise: str) -> Cell:
    return Cell(percent(records.rates[noise]), noise, records.rates[noise])


def _difference_cell(found: Difference | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    mean, note = found.summary.mean, bounds(found.summary) + TOLD[found.verdict]
    return Cell(percent(mean, signed=True), note, mean)


def _within(found: Summary) -> str:
    """The interval of a rate, as far as it lies between 0 and 100 %.

    >>> from noiseproof.statistics import summarize
    >>> _within(summarize([0.1, 0.2]))
    '95% interval 0.0 to 78.5'
    """
    if found.interval is None:
        return bounds(found).strip("()")
    low, high = max(found.interval.low, 0.0), min(found.interval.high, 1.0)
    return f"{LEVEL:.0%} interval {percent(low)} to {percent(high)}"
