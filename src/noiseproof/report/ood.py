"""Test sets from elsewhere: tables of their own, which nothing averages with the test set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from noiseproof.report.blocks import Cell, Column, Table, percent, quantity
from noiseproof.report.measures import Measure
from noiseproof.report.runs import Run, as_number

SHOWN = (
    ("accuracy", "Accuracy", 1, True),
    ("macro_f1", "Macro F1", 1, True),
    ("mcc", "Matthews correlation", 1, True),
    ("ece", "ECE", -1, True),
    ("nll", "NLL", -1, False),
)
NOTE = "Each set is measured on its own; none counts in the measures of the test set."


def set_names(runs: Sequence[Run]) -> list[str]:
    """Names of the sets of some runs, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run.record.ood))


def measures_of(name: str) -> list[Measure]:
    """What a comparison shows of a set: accuracy and Matthews correlation."""
    return [
        Measure(
            name if key == "accuracy" else f"{name}: MCC",
            f"{title} on the test set {name!r}, which is from elsewhere.",
            _value(name, key),
            better,
        )
        for key, title, better, _ in SHOWN
        if key in ("accuracy", "mcc")
    ]


def table_of(run: Run) -> list[Table]:
    """All measures of one run, the test set first; nothing where there are no other sets."""
    names = set_names([run])
    if not names:
        return []
    columns = [Column("Test set", numeric=False), Column("Rows")]
    columns += [Column(title) for _, title, _, _ in SHOWN]
    size = as_number(run.record.data.get("test_rows"))
    rows = []
    if size:
        values = [run.metric(f"test_{key}") for key, *_ in SHOWN]
        rows.append([Cell("the test set"), Cell(quantity(size), value=size), *_cells(values)])
    for name in names:
        size = as_number(run.record.ood[name].get("rows"))
        values = [_value(name, key)(run) for key, *_ in SHOWN]
        rows.append([Cell(name), Cell(quantity(size), value=size), *_cells(values)])
    return [Table(columns, rows, f"Percent, but for NLL. {NOTE}", fixed=True)]


def _cells(values: Sequence[float | None]) -> list[Cell]:
    shown = [
        percent(value) if share else quantity(value, 3)
        for value, (*_, share) in zip(values, SHOWN, strict=True)
    ]
    return [Cell(text, value=value) for text, value in zip(shown, values, strict=True)]


def _value(name: str, key: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        found = run.record.ood.get(name)
        return as_number(found.get(key)) if isinstance(found, dict) else None

    return of
