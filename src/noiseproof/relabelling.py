"""A reviewed list of suspicious rows, put into effect: labels changed, rows dropped.

    suspects.csv, edited -> row_id, label -> the table with these labels, without the dropped rows

The list says what should be: another label than the table has replaces it, an empty one drops the
row. Rows that are not in the list stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noiseproof.data import read_row_ids
from noiseproof.errors import InputError, path_of
from noiseproof.tables import Table, load_table, nearest
from noiseproof.tasks import RowSettings, find_task

if TYPE_CHECKING:
    from noiseproof.tables import Source

ROW_ID, LABEL, SUGGESTED, TRUE = "row_id", "label", "suggested_label", "clean_label"
"""Columns of a list of suspects."""


@dataclass(frozen=True)
class Relabelling:
    """What a list changed; row numbers are those of the table before.

    Attributes:
        changed: Rows with another label now (M,).
        dropped: Rows that were left out (M,).
        listed: Rows in the list.
    """

    changed: np.ndarray
    dropped: np.ndarray
    listed: int


def relabel(data: Source, reviewed: Source, **settings: Any) -> tuple[Any, Relabelling]:
    """Put a reviewed list of suspicious rows into effect.

    Args:
        data: Rows, read like training data.
        reviewed: Rows with ``row_id`` and ``label``, such as ``suspects.csv`` after an edit.
        **settings: Further arguments of `relabel_table`: ``label``, ``row_id``, ``accept``, ...

    Returns:
        The table (a DataFrame, without the arrays of an archive) and what was changed.

    Raises:
        InputError: The list does not fit the table.
    """
    try:
        table, done = relabel_table(data, reviewed, **settings)
    except TypeError as error:
        raise InputError(f"relabel: {error}") from error
    return table.frame, done


def relabel_table(
    data: Source,
    reviewed: Source,
    *,
    label: str = "label",
    row_id: str | None = None,
    accept: bool = False,
    new_labels: bool = False,
    task: str = "text",
    split: str = "train",
    out: str | Path | None = None,
    **rows: Any,
) -> tuple[Table, Relabelling]:
    """Relabel a table and keep its arrays, see `relabel`.

    Args:
        data: Rows, read like training data.
        reviewed: The list; its labels stand in the column ``label``, whatever the table calls them.
        label: Column of the labels in the table.
        row_id: Column of the table that names the rows, as given to ``fit`` or ``audit``; None
            numbers them from 0.
        accept: Take ``suggested_label`` instead, where the list has one.
        new_labels: Accept labels that the table does not have; else they are taken for mistakes.
        task: Kind of the rows.
        split: Split of a hub data set or of an archive.
        out: File that the table is to be written to; paths in it will hold from there.
        **rows: Fields of `RowSettings`: ``text``, ``image``, ...

    Raises:
        InputError: A column is missing, a row is unknown or listed twice, or a label is unknown.
    """
    reader = find_task(task).reader(RowSettings(**rows))
    table, found = load_table(data, split), load_table(reviewed)
    table.require(label, "labels")
    found.require(ROW_ID, "row ids; give a list that audit or fit wrote")
    column = SUGGESTED if accept else LABEL
    found.require(column, "labels as they should be")
    truth: Iterable[Any] = repeat(None, len(found))
    if TRUE in found.frame.columns and not accept:
        truth = found.cells(TRUE)
    places = {name: row for row, name in enumerate(read_row_ids(table, row_id))}
    labels = [_text(cell) for cell in table.cells(label)]
    known, kept = set(labels), np.ones(len(table), dtype=bool)
    wanted: dict[int, str] = {}
    lines = zip(found.cells(ROW_ID), found.cells(column), truth, strict=True)
    for line, (name, cell, true) in enumerate(map(_text, cells) for cells in lines):
        row = places.get(name)
        if row is None:
            raise InputError(
                f"{found.place(line)}: {table.name} has no row {name!r}"
                + ("" if row_id else "; name the column of its row ids with row_id if it has one")
            )
        if row in wanted:
            raise InputError(f"{found.place(line)}: row {name!r} is listed a second time")
        if not cell and accept:  # no suggestion
            cell = labels[row]
        if cell and cell not in known and not new_labels:
            raise InputError(
                f"{found.place(line)}: no row of {table.name} has the label {cell!r} "
                f"(new_labels=true accepts new ones){nearest(cell, known)}"
            )
        if cell != labels[row] == true:
            raise InputError(
                f"{found.place(line)}: the label {cell!r} was made wrong on purpose, by the noise "
                "of the run; take the list of a run without noise"
            )
        wanted[row] = cell
        kept[row] = bool(cell)
    changed = np.array(
        [row for row, cell in wanted.items() if cell and cell != labels[row]], dtype=np.int64
    )
    frame = table.frame.assign(**{label: _with(table.frame[label], labels, wanted, changed, label)})
    result = dataclasses.replace(
        table,
        frame=frame[kept].reset_index(drop=True),
        arrays={name: array[kept] for name, array in table.arrays.items()},
        texts={},
        lines=None,
    )
    if out is not None:
        result = reader.moved(result, path_of(out).absolute().parent)
    return result, Relabelling(np.sort(changed), np.flatnonzero(~kept), len(found))


def _text(cell: Any) -> str:
    """A label or a row id as text; nothing for an empty cell."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return "" if np.isnan(cell) else str(int(cell) if cell.is_integer() else cell)
    return str(cell).strip()


def _with(
    column: Any, labels: list[str], wanted: dict[int, str], changed: np.ndarray, name: str
) -> Any:
    """The column with new labels in these rows, in the type that it had."""
    import pandas as pd

    cells = column.to_numpy(dtype=object).copy()
    values = dict(zip(labels, cells, strict=True))
    for row in changed.tolist():
        cells[row] = values.get(wanted[row], wanted[row])
    try:
        return pd.Series(cells, index=column.index).astype(column.dtype)
    except (TypeError, ValueError) as error:
        odd = next(wanted[row] for row in changed.tolist() if wanted[row] not in values)
        raise InputError(
            f"column {name!r} holds values of type {column.dtype}, which {odd!r} is not"
        ) from error
