"""The page of spectra, every sentence computed from the record."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from noiseproof import charts
from noiseproof.report.blocks import (
    MISSING,
    Cell,
    Column,
    Facts,
    Figures,
    Report,
    Section,
    Table,
    Text,
)

MOST_POINTS = 120
COLUMNS = ("name", "M", "D", "rank", "sve", "lsvr", "p1", "topk", "skewness", "kurtosis")
Model = Mapping[str, Any]


def page(values: Mapping[str, Any], title: str) -> Report:
    """One figure that compares the models, the measures in a table, and what was looked at.

    Args:
        values: The record.
        title: Of the page.
    """
    models: list[Model] = values["models"]
    styles = {one["name"]: place for place, one in enumerate(models)}
    compared = told(models)
    note = (
        "Left: the logarithm of the share of each singular value in the sum of all, by its number. "
        "Singular value entropy is 0 for one direction; the largest singular value ratio is minus "
        "the logarithm of the largest share. Both are in nats and higher for flatter spectra; they "
        "can be compared where rows, features and pre-processing are the same."
    )
    drawn = [_curves(models, styles), _dots(models, styles, "sve", "Singular value entropy"),
             _dots(models, styles, "lsvr", "Largest singular value ratio")]  # fmt: skip
    sections = [
        Section("How many directions the features use",
                [*map(Text, compared), Figures(drawn, note), _table(models)], link="Spectra"),
        Section("What was looked at", [Facts(_facts(values))]),
    ]  # fmt: skip
    return Report(title, compared[0], sections)


def told(models: Sequence[Model]) -> list[str]:
    """A sentence on each measure for models with equally many features, and on those alone.

    >>> told([{"name": "a", "D": 8, "sve": 1.0, "lsvr": 0.5}])
    ['a (8 features): entropy 1.00, largest ratio 0.50.']
    """
    widths: dict[int, list[Model]] = {}
    for one in models:
        widths.setdefault(one["D"], []).append(one)
    found = []
    for width, some in widths.items():
        if len(some) == 1:
            one = some[0]
            found.append(
                f"{one['name']} ({width} features): entropy {one['sve']:.2f}, largest ratio "
                f"{one['lsvr']:.2f}."
            )
            continue
        for measure, word in (("sve", "Singular value entropy"),
                              ("lsvr", "Largest singular value ratio")):  # fmt: skip
            order = sorted(some, key=lambda one: one[measure])
            order_told = ", ".join(f"{one['name']} {one[measure]:.2f}" for one in order)
            found.append(f"{word} with {width} features, from low to high: {order_told}.")
    return found


def as_table(values: Mapping[str, Any]) -> str:
    """The measures as CSV, one row per model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "preprocess", "largest_angle"])
    for one in values["models"]:
        largest = max(one["angles"]) if one["angles"] else ""
        writer.writerow([*(one[name] for name in COLUMNS), one["preprocess"], largest])
    return text.getvalue()


def _curves(models: Sequence[Model], styles: Mapping[str, int]) -> str:
    """Shares of the singular values on logarithmic axes."""
    lines = []
    for one in models:
        shares = np.array(one["s"]) / np.sum(one["s"])
        shares = shares[: one["rank"]]
        picked = np.unique(np.geomspace(1, len(shares), MOST_POINTS).round().astype(int))
        heights = np.log10(shares[picked - 1])
        lines.append(charts.Series(one["name"], picked.tolist(), heights.tolist(),
                                   styles[one["name"]]))  # fmt: skip
    return charts.line_chart(lines, title="Share of each singular value, power of 10",
                             x_label="number of the singular value", marks=False, doubling=True,
                             legend=len(lines) > 2)  # fmt: skip


def _dots(models: Sequence[Model], styles: Mapping[str, int], measure: str, title: str) -> str:
    dots = [charts.Dot(one["name"], one[measure], style=styles[one["name"]]) for one in models]
    return charts.dot_chart(dots, title=title, x_label="nats")


def _table(models: Sequence[Model]) -> Table:
    columns = [
        Column("Model", numeric=False),
        Column("Features", "D."),
        Column("Rank"),
        Column("SVE", "Singular value entropy, nats."),
        Column("LSVR", "Largest singular value ratio, nats."),
        Column("p1, %", "Share of the largest singular value."),
        Column("Top 5, %", "Share of the five largest."),
        Column("Skewness", "Of all entries of the features."),
        Column("Kurtosis", "Of all entries; 3 for a normal distribution."),
        Column("Turned, degrees", "Largest angle between the five leading directions over the rows "
               "and those of the first model."),
    ]  # fmt: skip
    rows = []
    for one in models:
        angle = math.degrees(max(one["angles"])) if one["angles"] else None
        rows.append(
            [
                Cell(one["name"]),
                Cell(str(one["D"]), value=one["D"]),
                Cell(str(one["rank"]), value=one["rank"]),
                *(Cell(f"{one[name]:.3f}", value=one[name]) for name in ("sve", "lsvr")),
                *(Cell(f"{100 * one[name]:.1f}", value=one[name]) for name in ("p1", "topk")),
                *(Cell(f"{one[name]:.2f}", value=one[name]) for name in ("skewness", "kurtosis")),
                Cell(MISSING if angle is None else f"{angle:.1f}", value=angle),
            ]
        )
    note = f"Entropy is at most {math.log(models[0]['rank']):.2f}, the logarithm of the rank, for "
    return Table(columns, rows, f"{note}{models[0]['name']}.")


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions: Mapping[str, str] = values["versions"]
    return [
        ("Data", f"{values['data']}, {values['rows']} rows (seed {values['seed']})"),
        ("Task", values["task"]),
        ("Features", "last hidden states of the encoder, mean over tokens or positions"),
        ("Pre-processing", values["preprocess"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
