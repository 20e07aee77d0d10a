"""From a study to its grid and its cost, and from finished runs to its pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from noiseproof.grid import Cell, Grid, parse_grid
from noiseproof.record import write_atomic
from noiseproof.report.runs import find_runs
from noiseproof.report.writing import as_csv, as_html, as_markdown
from noiseproof.study.contract import Asked, Study, available

START_S = 12.0  # of a process: imports, model, tokens
ROW_S = 0.014  # a row an epoch: a step, and its share of the passes that measure
PROBED_S = 0.08  # a row an epoch whose gradient is measured: less for adapters, more for full


def plan(study: Study, asked: Asked) -> Grid:
    """The grid of a study, every cell checked, with what it will cost.

    Raises:
        InputError: Something that was asked for cannot be.
    """
    grid = parse_grid(study.grid(asked))
    seconds = estimate(grid.cells, available(asked.rows()))
    each = in_words(seconds / len(grid.cells))
    cost = (
        f"about {each} of one core a cell, {in_words(seconds)} in all, with the default encoder "
        "and short texts"
    )
    return dataclasses.replace(grid, cost=cost, file=f"noiseproof study {study.name}")


def estimate(cells: Iterable[Cell], rows: int) -> float:
    """Processor seconds of some cells, as measured with the default encoder and short texts.

    Args:
        cells: Of a grid.
        rows: Training rows where a cell takes all.
    """
    total = 0.0
    for cell in cells:
        used = min(rows, cell.job.get("sample") or rows)
        probed = cell.job.get("probe_gradients", 0)
        total += START_S + cell.job["train"]["epochs"] * (used * ROW_S + probed * PROBED_S)
    return total


def in_words(seconds: float) -> str:
    """A duration as one says it.

    >>> in_words(40), in_words(130), in_words(7200), in_words(36 * 3600)
    ('40 seconds', '2 minutes', '2 hours', '36 hours')
    """
    name, size = ("second", 1) if seconds < 100 else ("minute", 60)
    name, size = (name, size) if seconds < 100 * 60 else ("hour", 3600)
    count = max(1, round(seconds / size))
    return f"{count} {name}{'s' * (count != 1)}"


def write_pages(study: Study, folder: Path) -> list[Path]:
    """Write the pages of a study from the runs in its folder.

    Returns:
        ``study.html``, ``study.md`` and ``study.csv``, one row per run.

    Raises:
        InputError: There is no run yet.
    """
    found = find_runs([folder])
    report = study.report(found)
    texts = {"html": as_html(report), "md": as_markdown(report), "csv": as_csv(found)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"study.{suffix}")
        write_atomic(paths[-1], text)
    return paths
