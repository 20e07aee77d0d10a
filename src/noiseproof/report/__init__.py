"""Reports on runs, from their records alone: a page, Markdown tables, or one CSV row per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from noiseproof.errors import InputError, path_of
from noiseproof.record import write_atomic
from noiseproof.report.comparison import grid_report
from noiseproof.report.runs import find_runs
from noiseproof.report.single import single_report
from noiseproof.report.writing import as_csv, as_html, as_markdown

FORMATS = (".html", ".md", ".csv")

__all__ = ["report"]


def report(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a report on all runs below some folders.

    Args:
        paths: Folders with runs; each is searched for ``record.json`` at any depth.
        out: File to write: a page (.html), tables (.md), or one row per run (.csv).
        baseline: Method to compare with; by default that of the grid, else plain fine-tuning.
        title: Heading; by default that of the grid.
        overwrite: Whether ``out`` may be replaced.

    Returns:
        The file.

    Raises:
        InputError: There is no record, the baseline is unknown, or ``out`` cannot be written.
    """
    target = path_of(out)
    _check_target(target, overwrite)
    found = find_runs([paths] if isinstance(paths, str | Path) else paths)
    if target.suffix.lower() == ".csv":
        text = as_csv(found)
    else:
        make = single_report if len(found.runs) == 1 else grid_report
        made = make(found, baseline, title)
        text = as_html(made) if target.suffix.lower() == ".html" else as_markdown(made)
    write_atomic(target, text)
    return target


def _check_target(path: Path, overwrite: bool) -> None:
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"cannot write {path}: unsupported suffix {path.suffix!r}; "
            f"supported: {', '.join(FORMATS)}"
        )
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name or give --overwrite")
