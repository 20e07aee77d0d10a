"""The page of the study: every ordering with its verdict, and one figure per question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

from noiseproof import charts
from noiseproof.experts.mixing import MODES
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
    percent,
)
from noiseproof.report.figures import mean_line
from noiseproof.report.measures import Grid
from noiseproof.report.provenance import cost, facts, left_out, what_was_run
from noiseproof.report.runs import Found, Run, as_number
from noiseproof.statistics import LEVEL
from noiseproof.study.estimates import Values, Verdict
from noiseproof.study.lope_ablation.analysis import (
    HYDRA,
    LOPE,
    LORA,
    ORDERINGS,
    RATES,
    SETS,
    Records,
    data_rate,
    key_of,
    mode_accuracy,
    set_accuracy,
)
from noiseproof.study.showing import (
    estimate_cell,
    estimate_dots,
    mean_cell,
    summaries,
)

QUESTIONS = {
    "Noise": "Which noise does the poisoning expert need?",
    "Inference": "Does it help to leave the poisoning expert out?",
    "Experts": "How many experts of each kind?",
    "Rate": "How much noise in the stage poison?",
    "Compute": "Is it the method, or its compute?",
    "Noisier data": "What if the data are noisier?",
    "Other noise": "What if the data have noise of another kind?",
}
SHOWN = (("Test", "test"), ("Corrupted test", "corrupted"))
SUMMED: dict[Verdict, str] = {
    "holds": "hold",
    "contradicted": "fail",
    "open": "are open",
    "no claim": "without a claim: too few runs",
}
STYLES = {LOPE: 1, HYDRA: 2, LORA: 0}


def page(found: Found, title: str) -> Report:
    """Everything that the records of the study say.

    Args:
        found: Its runs.
        title: Of the page.
    """
    records, grid = Records(found), Grid(found, HYDRA)
    sections = [_orderings(records)]
    for question, heading in QUESTIONS.items():
        drawn = {"Rate": _rates, "Noisier data": _over_data}.get(question)
        chart = drawn(records) if drawn else _dots(records, question)
        if chart:
            note = _note(drawn is not None)
            sections.append(Section(heading, [Figures([chart], note)], link=question))
    sections += [
        _router(found),
        Section("All results", [_results(found), *_modes(records)]),
        Section("Runs", facts(grid, "as many epochs, no poisoning expert")),
        cost(grid),
        what_was_run(grid),
        left_out(found),
    ]
    return Report(title, _subtitle(records), [one for one in sections if one.blocks])


def _subtitle(records: Records) -> str:
    verdicts = [one.verdict(records) for group in ORDERINGS.values() for one in group]
    counts = Counter(verdicts)
    told = [f"{counts[name]} {said}" for name, said in SUMMED.items() if counts[name]]
    return f"Of {len(verdicts)} orderings: {', '.join(told)}."


# --- orderings ------------------------------------------------------------------------------------


def _orderings(records: Records) -> Section:
    """Every ordering, with what the paper says of it."""
    columns = [Column("Ordering", numeric=False), Column("Verdict", numeric=False),
               *(Column(f"{title}, points") for title, _ in SHOWN), Column("Seeds"),
               Column("Paper", numeric=False)]  # fmt: skip
    rows = []
    for question, group in ORDERINGS.items():
        for one in group:
            found = [one.tested(records, name) for _, name in SHOWN]
            verdict = {"contradicted": "fails"}.get(one.verdict(records), one.verdict(records))
            number = str(found[0].summary.n) if found[0] else MISSING
            rows.append([Cell(one.name, question), Cell(verdict), *map(estimate_cell, found),
                         Cell(number), Cell(one.source or MISSING)])  # fmt: skip
    note = (
        f"Differences of test accuracy with {LEVEL:.0%} t intervals over seeds, paired: the same "
        "rows, noise and order; several noises or data of a seed are averaged first. An ordering "
        "holds where the interval on the test set lies above 0, fails where it lies below, and is "
        "open where it holds 0. From a single seed nothing is claimed, nor where all differences "
        "are equal. "
        f"{len(rows)} intervals are looked at: of equal methods one in twenty seems to differ. "
        "The paper's numbers are points of other tasks and a model of 7 billion parameters."
    )
    return Section("The orderings of the paper", [Table(columns, rows, note, fixed=True)])


def _dots(records: Records, question: str) -> str:
    tested = ((one, one.tested(records)) for one in ORDERINGS[question])
    named = {one.short or one.name: found for one, found in tested if found is not None}
    return estimate_dots(named, "Difference of test accuracy, points", {}, style=1)


def _note(lines: bool) -> str:
    if lines:
        return f"Test accuracy, means over seeds with {LEVEL:.0%} t intervals from three seeds on."
    return (
        "Above 0 the ordering is that of the claim. "
        "A ring has no interval: one seed, or equal differences."
    )


# --- lines ----------------------------------------------------------------------------------------


def _rates(records: Records) -> str:
    """Accuracy over the rate of the noise in the stage poison; the default rate is 5 %."""
    rated = {
        run.names["method"]: as_number(run.setting("method.noise_rate"))
        for run in records.found.runs
        if run.names.get("part") == RATES
    }
    points = {rate: records.accuracy(name, part=RATES) for name, rate in rated.items() if rate}
    noises = {key.rpartition("\t")[2] for table in points.values() for key in table}
    own = {k: v for k, v in records.accuracy(LOPE).items() if k.rpartition("\t")[2] in noises}
    line = _line(LOPE, points | {0.05: own})
    lines = [line] if line else []
    x_label = "rate and amplitude of the noise, %"
    return charts.line_chart(lines, title="Test accuracy, %", x_label=x_label)


def _over_data(records: Records) -> str:
    """Accuracy of LoPE, HydraLoRA and LoRA over the noise of the data."""
    lines = []
    for method in (LOPE, HYDRA, LORA):
        over = records.over_data(method)
        line = _line(method, {data_rate(noise) or 0.0: table for noise, table in over.items()})
        if line:
            lines.append(line)
    return charts.line_chart(lines, title="Test accuracy, %", x_label="corrupted rows, %")


def _line(name: str, points: Mapping[float, Values]) -> charts.Series | None:
    """Means by rate; None of fewer than two rates."""
    found = summaries({100 * rate: table.values() for rate, table in points.items()})
    return mean_line(name, found, STYLES[name]) if len(found) > 1 else None


# --- tables ---------------------------------------------------------------------------------------


def _router(found: Found) -> Section:
    """Whether the router knows noise, by method: the weight of the poisoning experts."""
    groups: dict[str, list[Mapping[str, object]]] = {}
    for run in found.runs:
        own = run.record.findings.get("experts")
        if isinstance(own, Mapping):
            groups.setdefault(f"{run.row}\t{run.names['noise']}", []).append(own)
    shown = (("Weight", "poison_weight", "Mean weight of the poisoning experts."),
             ("Even share", "even_share", "Their share if all experts counted alike."),
             ("Clean", "weight_clean", "Mean weight on some rows as they are."),
             ("Corrupted", "weight_corrupted", "The same on corrupted copies of these rows."),
             ("Raised", "raised_share", "Copies with a higher weight than their row."),
             ("AUROC", "noise_auroc", "That weight as a mark of corrupted texts; 50 is chance."),
             )  # fmt: skip
    rows, auroc = [], []
    for name, runs in groups.items():
        cells = []
        for _, key, _ in shown:
            values = [value for one in runs if (value := as_number(one.get(key))) is not None]
            cells.append(mean_cell(values))
            auroc += values if key == "noise_auroc" else []
        method, _, noise = name.partition("\t")
        rows.append([Cell(method), Cell(noise), Cell(str(len(runs)), value=len(runs)), *cells])
    if not rows:
        return Section("The router")
    columns = [Column("Method", numeric=False), Column("Noise", numeric=False), Column("Runs")]
    columns += [Column(title, meaning) for title, _, meaning in shown]
    blocks: list[Block] = []
    if auroc:
        blocks.append(
            Text(
                f"Over {len(auroc)} runs the weight of the poisoning experts tells corrupted texts "
                f"from clean ones with a mean AUROC of {percent(fmean(auroc))} "
                f"({percent(min(auroc))} to {percent(max(auroc))}). Where it is 50 the router does "
                "not know noise, and masking takes from all texts alike."
            )
        )
    blocks.append(Table(columns, rows, "Percent; mean ± standard deviation over seeds."))
    return Section("Does the router know noise?", blocks, link="Router")


def _results(found: Found) -> Table:
    """A row per part, noise and method."""
    columns = [Column("Method", numeric=False), Column("Part", numeric=False),
               Column("Noise", numeric=False), Column("Runs")]  # fmt: skip
    columns += [Column(title) for title, _ in SHOWN] + [Column("Macro F1")]
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in found.runs:
        groups.setdefault((run.row, run.names["part"], run.names["noise"]), []).append(run)
    rows = []
    for names, runs in groups.items():
        of_sets = [[set_accuracy(run, name) for run in runs] for _, name in SHOWN]
        of_sets.append([run.metric("test_macro_f1") for run in runs])
        cells = [mean_cell([value for value in values if value is not None]) for values in of_sets]
        rows.append([*map(Cell, names), Cell(str(len(runs)), value=len(runs)), *cells])
    return Table(columns, rows, "Percent; mean ± standard deviation over seeds.")


def _modes(records: Records) -> list[Table]:
    """LoPE in every inference mode, from the same runs."""
    runs = [run for run in records.found.runs if run.record.modes and run.names["method"] == LOPE]
    if not runs:
        return []
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=key_of):
        groups.setdefault(run.names["noise"], []).append(run)
    rows = []
    for noise, own in groups.items():
        more = {mode for run in own for mode in run.record.modes} - set(MODES)
        for mode in (*MODES, *sorted(more)):
            values = [[mode_accuracy(run, mode, name) for run in own] for name in SETS]
            cells = [mean_cell([v for v in some if v is not None]) for some in values]
            rows.append([Cell(mode), Cell(noise), Cell(str(len(own)), value=len(own)), *cells])
    columns = [Column("Mode", numeric=False), Column("Noise", numeric=False), Column("Runs")]
    columns += [Column(title) for title, _ in SHOWN]
    note = "Percent; mean ± standard deviation over seeds. One training a run."
    return [Table(columns, rows, note, "LoPE by inference mode")]
