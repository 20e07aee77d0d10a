"""The page of the study: two verdicts, and what they rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from noiseproof import charts
from noiseproof.report import figures
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
    quantity,
)
from noiseproof.report.figures import mean_line
from noiseproof.report.measures import Grid
from noiseproof.report.provenance import cost, facts, left_out, what_was_run
from noiseproof.report.runs import Found, Run, as_number
from noiseproof.statistics import LEVEL, summarize
from noiseproof.study.estimates import Estimate, Values, Verdict, estimate
from noiseproof.study.peft_under_noise.analysis import Claim, Records, Seen, values
from noiseproof.study.peft_under_noise.families import FULL, PROBE, STYLES
from noiseproof.study.showing import estimate_cell, estimate_dots, loss_chart, mean_cell


def drop(run: Run) -> float | None:
    """What the test accuracy lost between its best epoch and the last one."""
    best, last = run.metric("test_accuracy_best"), run.metric("test_accuracy")
    return None if best is None or last is None else best - last


def head_share(run: Run) -> float | None:
    """Share of head and pooler among the trained parameters; older runs do not tell."""
    outer, every = (as_number(run.record.model.get(f"trained_{part}parameters"))
                    for part in ("head_", ""))  # fmt: skip
    return outer / every if outer is not None and every else None


SAID: dict[str, dict[Verdict, str]] = {
    "capacity": {
        "holds": "Smaller adapters memorise less",
        "contradicted": "Smaller adapters memorise more",
        "open": "Capacity makes no clear difference to what is memorised",
        "no claim": "Memorisation over capacity: too few runs for a claim",
    },
    "interference": {
        "holds": "Wrong labels disturb adapters more than full fine-tuning",
        "contradicted": "Wrong labels disturb adapters less than full fine-tuning",
        "open": "Wrong labels disturb adapters and full fine-tuning alike, as far as one can see",
        "no claim": "Interference: too few runs for a claim",
    },
    "full": {
        "holds": "Adapters memorise less than full fine-tuning",
        "contradicted": "Adapters memorise more than full fine-tuning",
        "open": "Adapters and full fine-tuning memorise alike, as far as one can see",
        "no claim": "Adapters against full fine-tuning: too few runs for a claim",
    },
}
RESULTS = (
    ("Memorised", "memorization", "Wrongly labelled rows predicted as their wrong label."),
    ("Clean fit", "clean_fit", "Rightly labelled rows predicted as their label."),
    ("Recovered", "recovery", "Wrongly labelled rows predicted as their true label."),
    ("Test, last epoch", "test_accuracy", "Test accuracy after the last epoch."),
    ("Test, late mean", "test_accuracy_late", "Mean over the last half of the epochs."),
    ("Test, best (oracle)", "test_accuracy_best", "Best epoch by the test set; no result."),
    ("Drop", drop, "Best test epoch minus the last."),
    ("Head's share", head_share, "Head and pooler among the parameters that train."),
)
SEPARATION = (
    ("AUROC", "detection_auroc", "How well the loss ranks wrong labels first; 50 is chance."),
    ("AP", "detection_ap", "Average precision; chance is the noise rate."),
    ("ECE of p", "clean_prob_ece", "Calibration error of the probability that a label is right."),
    ("Purity", "clean_prob_purity", "Right labels among the rows with p above 0.5."),
    ("Recall", "clean_prob_recall", "Right labels that have p above 0.5."),
)
GRADIENTS = (
    ("Encoder", "gradient_encoder_share", "Share of wrong rows in the sum of gradient norms."),
    ("Head", "gradient_head_share", "The same on the head."),
    ("Encoder, means", "gradient_encoder_mean_share", "The same of mean gradients: rows cancel."),
    ("Head, means", "gradient_head_mean_share", "The same on the head."),
)
Columns = Sequence[tuple[str, str | Callable[[Run], float | None], str]]


def page(found: Found, title: str) -> Report:
    """Everything that the records of a study say.

    Args:
        found: Its runs.
        title: Of the page.
    """
    records = Records(found)
    grid = Grid(found, FULL)
    capacity, interference = records.capacity_claim(), records.interference_claim()
    sections = [
        _verdicts(records, capacity, interference),
        _capacity(records, capacity),
        _interference(records, interference),
        _epochs(records),
        _random_labels(records),
        _separation(records),
        _gradients(records),
        _gates(records),
        Section("All results", [*_table(records, RESULTS)]),
        Section("Runs", facts(grid, "full fine-tuning")),
        cost(grid),
        what_was_run(grid),
        left_out(found),
    ]
    subtitle = (
        f"{SAID['capacity'][capacity.verdict]}. {SAID['interference'][interference.verdict]}."
    )
    return Report(title, subtitle, [section for section in sections if section.blocks])


# --- verdicts -------------------------------------------------------------------------------------


def _verdicts(records: Records, capacity: Claim, interference: Claim) -> Section:
    """The two claims, and the one that the first explains, with their numbers."""
    claims = (
        ("Memorisation per doubling of the capacity", "capacity", capacity),
        ("Interference of adapters minus that of full fine-tuning", "interference", interference),
        ("Memorised by full fine-tuning minus by adapters", "full", records.full_claim()),
    )
    columns = [Column("Number, in points", numeric=False), Column("Verdict", numeric=False),
               Column("Mean of the families"), Column("Seeds"),
               Column("Kinds of noise")]  # fmt: skip
    rows, missing = [], []
    for name, kind, one in claims:
        overall = one.overall
        sizes = (overall.summary.n, overall.settings) if overall else (None, None)
        rows.append(
            [
                Cell(name),
                Cell(SAID[kind][one.verdict]),
                estimate_cell(overall),
                *(Cell(quantity(size), value=size) for size in sizes),
            ]
        )
        if one.missing:
            missing.append(f"{name}: nothing to compare for {', '.join(one.missing)}.")
    note = (
        f"Means with {LEVEL:.0%} t intervals over seeds, paired: the same rows, wrong labels and "
        "order. Kinds of noise are averaged within a seed first. A claim holds where the interval "
        "lies above 0, is contradicted where it lies below, and open where it holds 0. From a "
        "single seed nothing is claimed, nor where all values are equal. "
        "Interference is the fit of right labels when trained on them alone, with as many steps, "
        "minus the fit of the same rows when the wrong ones are there too."
    )
    blocks: list[Block] = [Table(columns, rows, note, fixed=True)]
    blocks += _by_family(records, {name: one for name, _, one in claims})
    blocks += [Text(text, warning=True) for text in missing]
    dots = [
        _dots(capacity, "Memorised, points per doubling of capacity"),
        _dots(interference, "Interference minus that of full, points"),
    ]
    drawn = [chart for chart in dots if chart]
    if drawn:
        blocks.append(Figures(drawn, "A ring has no interval: one seed, or equal differences."))
    return Section("The two claims", blocks)


def _by_family(records: Records, claims: Mapping[str, Claim]) -> list[Table]:
    """The same numbers for each family; nothing where there are none."""
    rows = [
        [Cell(family), *(estimate_cell(one.families.get(family)) for one in claims.values())]
        for family in records.families
        if any(family in one.families for one in claims.values())
    ]
    columns = [Column("Family", numeric=False), *map(Column, claims)]
    return [Table(columns, rows, title="By family, in points")] if rows else []


def _dots(one: Claim, title: str) -> str:
    named = dict(one.families)
    if one.overall is not None and len(named) > 1:
        named["mean of the families"] = one.overall
    return estimate_dots(named, title, STYLES)


# --- what they rest on ----------------------------------------------------------------------------


def _capacity(records: Records, claim: Claim) -> Section:
    """Memorisation, clean fit and test accuracy over the capacity of each family."""
    drawn = [
        _over_capacity(records, metric, title)
        for metric, title in (
            ("memorization", "Memorised wrong labels, %"),
            ("clean_fit", "Fit of right labels, %"),
            ("test_accuracy", "Test accuracy, %"),
        )
    ]
    drawn = [chart for chart in drawn if chart]
    if not drawn:
        return Section("Capacity")
    note = (
        f"{records.closer}: means over seeds by rank, bottleneck or prompt length, "
        f"with {LEVEL:.0%} t intervals from three seeds on. Grey is full fine-tuning."
    )
    title = SAID["capacity"][claim.verdict]
    return Section(title, [Figures(drawn, note)], link="Capacity")


def _over_capacity(records: Records, metric: str, title: str) -> str:
    lines, sizes = [], set()
    for family in records.families:
        by_size: dict[int, list[Seen]] = {}
        for one in records.pick(family, noise=records.closer, resized=None):
            if one.capacity:
                by_size.setdefault(one.capacity, []).append(one)
        points = {size: found for size, runs in sorted(by_size.items())
                  if (found := summarize(values(runs, metric).values()))}  # fmt: skip
        if len(points) < 2:
            continue
        sizes |= set(points)
        lines.append(mean_line(family, points, STYLES[family]))
    for name in (FULL, PROBE) if lines else ():
        level = summarize(values(records.pick(name, noise=records.closer), metric).values())
        if level is not None:
            ends_of = [min(sizes), max(sizes)]
            lines.append(charts.Series(name, ends_of, [100 * level.mean] * 2, STYLES[name]))
    return charts.line_chart(lines, title=title, x_label="capacity", doubling=True)


def _interference(records: Records, claim: Claim) -> Section:
    """What wrong labels cost each family, in fit and in test accuracy."""
    drawn = []
    for metric, title in (
        ("clean_fit", "Cost of wrong labels in clean fit, points"),
        ("test_accuracy", "Cost of wrong labels in test accuracy, points"),
    ):
        drawn.append(estimate_dots(_estimates(records.interference(metric)), title, STYLES))
    drawn = [chart for chart in drawn if chart]
    note = (
        "Trained on the right rows alone, with as many steps, minus trained on all rows: above 0 "
        "the wrong labels do damage. Means over seeds and kinds of noise."
    )
    blocks: list[Block] = [Figures(drawn, note)] if drawn else []
    return Section(SAID["interference"][claim.verdict], blocks, link="Interference")


def _estimates(by_family: Mapping[str, Values]) -> dict[str, Estimate]:
    return {family: estimate(found) for family, found in by_family.items() if found}


def _epochs(records: Records) -> Section:
    """Curves of every family under the noise of the closer looks, and fit against memory."""
    runs = _named(records, records.closer)
    drawn = figures.learning_curves(runs, _styles(runs))
    lines = []
    for name, found in runs.items():
        fit = 100 * figures.mean_curve([run.curve("clean_fit") for run in found])
        memory = 100 * figures.mean_curve([run.curve("memorization") for run in found])
        if len(fit) and len(fit) == len(memory):
            lines.append(charts.Series(name, fit.tolist(), memory.tolist(), _style(name)))
    trade = charts.line_chart(
        lines, title="Memorised, % at the same fit", x_label="fit of right labels, %"
    )
    drawn += [trade] if trade else []
    note = (
        f"{records.closer}, means over seeds. In the last chart every point is an epoch: of two "
        "lines at the same fit of right labels the lower one has memorised less."
    )
    return Section(
        "How it comes about, epoch by epoch", [Figures(drawn, note)] if drawn else [], link="Epochs"
    )


def _named(records: Records, noise: str | None) -> dict[str, list[Run]]:
    """Runs at the usual capacity by name: plain families, then CleaR on them."""
    found: dict[str, list[Run]] = {}
    for routed in (False, True):
        for family in (FULL, PROBE, *records.families):
            runs = [one.run for one in records.pick(family, noise=noise, routed=routed)]
            if runs:
                found[f"CleaR {family}" if routed else family] = runs
    return found


def _style(name: str) -> int:
    """Number of the colour: that of the family, dashed for CleaR."""
    family = name.removeprefix("CleaR ")
    return STYLES[family] + (charts.COLOURS if family != name else 0)


def _styles(names: Mapping[str, object]) -> dict[str, int]:
    return {name: _style(name) for name in names}


def _random_labels(records: Records) -> Section:
    """How much of random labels each family learns by heart."""
    rows = []
    for family in (FULL, PROBE, *records.families):
        found = values(records.pick(family, random=True), "memorization")
        if found:
            rows.append([Cell(family), mean_cell(found.values())])
    columns = [Column("Family", numeric=False), Column("Memorised, %")]
    note = "All labels were drawn at random: whatever is fitted is learned by heart."
    return Section("Random labels", [Table(columns, rows, note)] if rows else [])


def _separation(records: Records) -> Section:
    """How far losses of right and wrong labels lie apart, drawn and in numbers."""
    runs = _named(records, records.closer)
    shown = [FULL, *records.families[:1], *(f"CleaR {name}" for name in records.families[:1])]
    drawn = [chart for name in shown if (chart := loss_chart(name, runs.get(name, [])))]
    note = f"{records.closer}, after training, first seed. Apart is good: a cut tells them."
    blocks: list[Block] = [Figures(drawn, note)] if drawn else []
    return Section("Which rows look wrong", [*blocks, *_table(records, SEPARATION)])


def _gates(records: Records) -> Section:
    """How often CleaR's gates were open for right and for wrong rows, layer by layer."""
    rows = []
    for name, runs in _named(records, records.closer).items():
        told = [gates for run in runs if (gates := run.record.findings.get("gates"))]
        for kind in ("right", "wrong") if told else ():
            layers = zip(*(gates[kind] for gates in told), strict=False)
            rows.append([Cell(name), Cell(kind), *map(mean_cell, layers)])
    width = max(map(len, rows), default=0)
    for row in rows:
        row += [Cell(MISSING)] * (width - len(row))
    columns = [Column("Method", numeric=False), Column("Labels", numeric=False)]
    columns += [Column(f"Layer {layer}") for layer in range(1, width - 1)]
    note = f"{records.closer}, last epoch: rows whose gate was open, in percent; mean of the seeds."
    return Section("Which rows pass the gates", [Table(columns, rows, note)] if rows else [])


def _gradients(records: Records) -> Section:
    """Share of wrong rows in the gradients, by epoch and at the end."""
    runs = _named(records, records.closer)
    drawn = []
    for metric, title in (
        ("gradient_encoder_share", "Wrong rows in the gradient of the encoder, %"),
        ("gradient_head_share", "Wrong rows in the gradient of the head, %"),
    ):
        lines = []
        for name, found in runs.items():
            curve = 100 * figures.mean_curve([run.curve(metric) for run in found])
            if len(curve):
                epochs = list(range(1, len(curve) + 1))
                lines.append(charts.Series(name, epochs, curve.tolist(), _style(name)))
        drawn.append(charts.line_chart(lines, title=title, x_label="epoch",
                                       x_ticks=figures.epoch_ticks(lines)))  # fmt: skip
    drawn = [chart for chart in drawn if chart]
    if not drawn:
        return Section("Gradients")
    note = (
        "Share of wrong rows in the sum of gradient norms over all rows, with the method's own "
        "loss and gates. Encoder is what trains inside it: the adapters, or all of it."
    )
    blocks: list[Block] = [Figures(drawn, note), *_table(records, GRADIENTS)]
    return Section("What wrong rows write into the model", blocks, link="Gradients")


def _table(records: Records, columns: Columns) -> list[Table]:
    """A row per kind of noise and method, means over seeds; nothing where no run has a metric."""
    heads = [Column("Method", numeric=False), Column("Noise", numeric=False), Column("Runs")]
    heads += [Column(title, meaning) for title, _, meaning in columns]
    groups: dict[tuple[str, str], list[Seen]] = {}
    for one in records.all:
        name = one.run.row + (", right rows alone" if one.control else "")
        groups.setdefault((name, one.noise), []).append(one)
    rows = []
    for (name, noise), group in groups.items():
        cells = [mean_cell(values(group, metric).values()) for _, metric, _ in columns]
        if any(cell.value is not None for cell in cells):
            count = Cell(str(len(group)), value=len(group))
            rows.append([Cell(name), Cell(noise), count, *cells])
    note = "Percent, after the last epoch; mean ± standard deviation over seeds."
    return [Table(heads, rows, note)] if rows else []
