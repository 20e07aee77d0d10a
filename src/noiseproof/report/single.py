"""The report on one run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable

from noiseproof.charts import Series, line_chart
from noiseproof.report import experts, figures, ood
from noiseproof.report.blocks import (
    MISSING,
    Block,
    Cell,
    Column,
    Facts,
    Figures,
    Report,
    Section,
    Table,
    Text,
    percent,
    quantity,
)
from noiseproof.report.measures import RESPONSES, Grid, choose_baseline, noise_rate
from noiseproof.report.provenance import COSTS, left_out, search_table, versions
from noiseproof.report.runs import Found, Run, as_number, flat

MOST_SUSPECTS = 20
LONGEST_TEXT = 300
MORE = {
    "test_mcc": "Matthews correlation on the test set; 0 is what a constant answer gets.",
    "test_nll": "Negative log-likelihood of the test labels.",
    "recovery": "Wrongly labelled training rows predicted as their true label.",
    "detection_precision": "Of the rows called suspicious, those whose label is wrong.",
    "detection_recall": "Of the rows whose label is wrong, those called suspicious.",
}
CURVES = (
    ("test_accuracy", "test accuracy"),
    ("validation_accuracy", "validation accuracy"),
    ("test_token_accuracy", "test token accuracy"),
    ("validation_token_accuracy", "validation token accuracy"),
    ("memorization", "memorised"),
    ("clean_fit", "clean fit"),
    ("recovery", "recovered"),
)

LOSSES = (("loss", "loss"), ("test_loss", "test loss"), ("validation_loss", "validation loss"))


def single_report(found: Found, baseline: str | None, title: str | None) -> Report:
    """Show one finished run: how good, by class, by epoch, what it suspects, what it cost.

    Raises:
        InputError: A baseline was asked for that is not this run.
    """
    choose_baseline(found, baseline)
    (run,) = found.runs
    grid = Grid(found, None)
    sections = [
        Section("Overview", [_facts(run), _metrics(run, grid)]),
        Section("Test sets from elsewhere", [*ood.table_of(run)]),
        Section("Inference modes", experts.modes_table(run)),
        Section("Poisoning expert", experts.router_blocks(run)),
        Section("By epoch", _epochs(run)),
        Section("By class", _classes(run)),
        Section("Suspicious rows", [*_detection(run), *_suspects(run)]),
        Section("Cost", [_cost(run)]),
        Section("Settings", [_settings(run)], folded=True),
        Section("Versions", [Facts(versions([run]))], folded=True),
        left_out(found),
    ]
    search = search_table([run])
    if search:
        names = [section.title for section in sections]
        sections.insert(names.index("Settings"), Section("Search", [search]))
    heading = title or found.grid.get("title") or f"{run.row} on {run.names['data']}"
    shown = [section for section in sections if section.blocks]
    return Report(heading, found.grid.get("description", ""), shown)


def _facts(run: Run) -> Facts:
    data, model, rate = run.record.data, run.record.model, noise_rate(run)
    names = (("rows", "training"), ("validation_rows", "validation"), ("test_rows", "test"))
    rows = [f"{quantity(size)} {name}" for key, name in names
            if (size := as_number(data.get(key)))]  # fmt: skip
    sizes = [as_number(model.get(key)) for key in ("parameters", "trained_parameters")]
    noise = str(run.setting("noise") or "none added")
    noise += f"; {percent(rate)} % of the training labels are wrong" if rate is not None else ""
    kinds = {
        "none": "none",
        "noisy": "rows with noisy labels",
        "clean": "rows with right labels: knowledge that noisy data do not offer",
    }
    classes = as_number(data.get("classes"))
    chosen = "the best on validation" if run.setting("train.select") == "best" else "the last"
    items = [
        ("Data", run.names["data"]),
        ("Rows", ", ".join(rows)),
        ("Classes", quantity(classes) if classes != 1 else ""),  # a response is no class
        ("Noise", noise),
        ("Method", run.row),
        ("Model", run.names["model"]),
        ("Parameters", f"{quantity(sizes[0])}, {quantity(sizes[1])} trained" if all(sizes) else ""),
        ("Epochs", str(run.setting("train.epochs", ""))),
        ("Deployed epoch", chosen),
        ("Validation", kinds.get(run.names["validation"], run.names["validation"])),
        ("Seeds", ", ".join(f"{name} {seed}" for name, seed in run.record.seeds.items())),
        ("Folder", str(run.folder)),
    ]
    return Facts([(name, value) for name, value in items if value and value != MISSING])


def _metrics(run: Run, grid: Grid) -> Table:
    """Every measure of the run with its meaning."""
    rows = []
    for measure in grid.measures:
        if measure is RESPONSES:  # for comparisons: one of the others by another name
            continue
        value = measure.of(run)
        shown = f"{percent(value)} %" if measure.share else quantity(value)
        rows.append([Cell(measure.title), Cell(shown, value=value), Cell(measure.meaning)])
    for name, meaning in MORE.items():
        value = run.metric(name)
        if value is not None:
            shown = quantity(value, 3) if name == "test_nll" else f"{percent(value)} %"
            title = name.replace("test_nll", "test NLL").replace("test_mcc", "test MCC")
            title = title.replace("_", " ")
            rows.append([Cell(title[0].upper() + title[1:], "", None), Cell(shown, value=value),
                         Cell(meaning)])  # fmt: skip
    columns = [Column("Measure", numeric=False), Column("Value"), Column("Meaning", numeric=False)]
    return Table(columns, rows, fixed=True)


def _epochs(run: Run) -> list[Block]:
    stages = [row.get("stage") for row in run.history]
    borders = [i + 0.5 for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    warmup = as_number(run.setting("method.warmup_epochs")) or 0
    warm = not borders and 0 < warmup < len(stages)
    drawn = []
    for title, shown, scale in (("Shares, %", CURVES, 100), ("Training loss", LOSSES, 1)):
        curves = {name: curve for column, name in shown if (curve := run.curve(column))}
        lines = [
            Series(name, list(range(1, len(curve) + 1)), [scale * value for value in curve], index)
            for index, (name, curve) in enumerate(curves.items(), start=1)
        ]
        drawn.append(
            line_chart(
                lines,
                title="Loss" if shown is LOSSES and len(lines) > 1 else title,
                x_label="epoch",
                x_ticks=figures.epoch_ticks(lines),
                verticals=[warmup + 0.5] if warm else borders,
            )
        )
    drawn = [chart for chart in drawn if chart]
    notes = []
    if borders:
        notes.append("Dashed lines stand between stages.")
    if warm:
        notes.append(f"The dashed line is the end of the warm-up of {quantity(warmup)} epochs.")
    if run.curve("loss"):
        notes.append(
            "The training loss is what the method minimises, all its terms together: where it "
            "starts to select or to route rows, or to add a term, it jumps."
        )
    return [Figures(drawn, " ".join(notes))] if drawn else []


def _classes(run: Run) -> list[Block]:
    blocks: list[Block] = []
    measures = ("precision", "recall", "f1", "support")
    rows = []
    for name, values in run.record.per_class.items():
        numbers = [as_number(values.get(key)) if isinstance(values, dict) else None
                   for key in measures]  # fmt: skip
        shown = [*map(percent, numbers[:3]), quantity(numbers[3])]
        cells = [Cell(text, value=value) for text, value in zip(shown, numbers, strict=True)]
        rows.append([Cell(str(name)), *cells])
    if rows:
        columns = [Column("Class", numeric=False), Column("Precision"), Column("Recall"),
                   Column("F1"), Column("Test rows")]  # fmt: skip
        blocks.append(Table(columns, rows, "Percent, on the test set."))
    maps = figures.class_maps([run], {"Test set": [run]})
    if maps:
        blocks.append(Figures(maps, f"Percent of each row. {figures.cut_note([run])}".strip()))
    return blocks


def _detection(run: Run) -> list[Block]:
    blocks: list[Block] = []
    number = as_number(run.record.metrics.get("suspicious"))
    rows = as_number(run.record.data.get("rows"))
    if number is not None:
        share = f" ({percent(number / rows)} %)" if rows else ""
        of = f" of {quantity(rows)}" if rows else ""
        blocks.append(Text(f"{quantity(number)}{of} training rows look wrongly labelled{share}."))
    curves = figures.detection_curves({run.row: [run]}, {run.row: 1})
    if curves:
        blocks.append(Figures(curves, "Finding wrong labels among the training rows."))
    return blocks


def _suspects(run: Run) -> Iterable[Table]:
    """The first rows of ``suspects.csv``, where there is one."""
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    try:
        with (run.folder / "suspects.csv").open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = [name for name in reader.fieldnames or () if name]
            for row, _ in zip(reader, range(MOST_SUSPECTS), strict=False):
                rows.append({name: str(row.get(name) or "") for name in columns})
    except (OSError, ValueError, csv.Error):
        return
    if not rows:
        return
    yield Table(
        [Column(name, numeric=all(_number(row[name]) is not None for row in rows))
         for name in columns],
        [[_suspect(row[name]) for name in columns] for row in rows],
        "The file suspects.csv has all of them, worst first.",
        f"The first {len(rows)}",
    )  # fmt: skip


def _suspect(text: str) -> Cell:
    value = _number(text)
    if value is not None and "." in text:
        return Cell(f"{value:.3f}", value=value)
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return Cell(cut, value=value)


def _number(text: str) -> float | None:
    try:
        return as_number(float(text))
    except ValueError:
        return None


def _cost(run: Run) -> Table:
    rows = []
    for title, meaning, of in COSTS:
        value = of(run)
        if value is not None:
            rows.append([Cell(title), Cell(quantity(value), value=value), Cell(meaning)])
    columns = [Column("Cost", numeric=False), Column("Value"), Column("Meaning", numeric=False)]
    return Table(columns, rows, fixed=True)


def _settings(run: Run) -> Table:
    rows = [
        [Cell(name), Cell(value if isinstance(value, str) else json.dumps(value))]
        for name, value in flat(run.record.spec).items()
    ]
    return Table([Column("Setting", numeric=False), Column("Value", numeric=False)], rows)
