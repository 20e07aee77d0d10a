"""A frame with where it came from, its columns and its cells."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from noiseproof.errors import InputError
from noiseproof.tables import strings
from noiseproof.tables.strings import Strings

if TYPE_CHECKING:
    import datasets
    import pandas

    DataFrame: TypeAlias = pandas.DataFrame
    Source: TypeAlias = str | Path | pandas.DataFrame | datasets.Dataset | dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """A frame with what error messages need to know of where it came from."""

    frame: DataFrame
    name: str
    lines: Sequence[int] | None = None  # (N,) file line where each row starts
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: Mapping[str, Strings] = field(default_factory=dict)  # columns as they were read
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # wide columns (N, ...)
    base: Path | None = None  # folder that paths in the cells are relative to
    taken: frozenset[str] = frozenset()  # columns with a role: not proposed for another

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.frame)

    def place(self, row: int) -> str:
        """Say where the row with this position (from 0) stands, counted from 1."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"row {row + 1}{line} of {self.name}"

    def cells(self, column: str) -> Iterator[Any]:
        """Give the column's cells as plain Python values, `None` where there is none."""
        return iter(self.texts[column]) if column in self.texts else plain_cells(self.frame[column])

    def strings(self, column: str) -> Strings | None:
        """Give the column as Arrow keeps it, if it does and no cell is missing."""
        if column in self.texts:
            return self.texts[column]
        chunks = _text_chunks(self.frame[column])
        missing = chunks is None or any(chunk.null_count for chunk in chunks)
        return None if missing else Strings(chunks or [])

    def require(self, column: str, purpose: str) -> None:
        """Raise unless the column exists."""
        names = list(self.frame.columns)
        if column in names:
            return
        if column in self.arrays:
            raise InputError(
                f"array {column!r} of {self.name} has the shape {self.arrays[column].shape}; "
                f"expected one value a row ({purpose})"
            )
        hint = nearest(column, [name for name in names if name not in self.taken])
        if len(names) == 1 and (other := re.search(r"[;\t|,]", names[0])):
            hint = f"; is {other[0]!r} its separator? expected ',' in .csv and a tab in .tsv"
        names += [f"{name} {array.shape}" for name, array in self.arrays.items()]
        raise InputError(
            f"{self.name} has no column {column!r} ({purpose}){hint}; columns: {shorten(names)}"
        )


def array_column(values: np.ndarray) -> Any:
    """Make a column whose cells are the rows of a matrix, without an object per row.

    >>> array_column(np.array([[1, 2], [3, 4]])).tolist()
    [[1, 2], [3, 4]]
    """
    import pandas as pd
    import pyarrow

    rows, width = values.shape
    offsets = np.arange(rows + 1, dtype=np.int64) * width
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    lists = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), flat)
    return pd.Series(pd.arrays.ArrowExtensionArray(pyarrow.chunked_array([lists])))


def nearest(name: str, known: Iterable[str]) -> str:
    """Word the nearest known names as a question, or nothing.

    >>> nearest("lable", ["text", "label"])
    "; did you mean 'label'?"
    """
    by_lower = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_lower, n=3)
    found = [by_lower[other] for other in close]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def shorten(names: Sequence[str], longest: int = 12) -> str:
    """List names, at most twelve.

    >>> shorten(["a", "b", "c"], longest=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - longest} more" if len(names) > longest else ""
    shown = [name if name.isprintable() and name == name.strip() else repr(name) for name in names]
    return ", ".join(shown[:longest]) + more


def plain_cells(series: Any) -> Iterator[Any]:
    """Give the cells of a series as plain Python values, `None` where there is none."""
    chunks = _text_chunks(series)
    if chunks is not None:
        yield from Strings(chunks)
        return
    for start in range(0, len(series), strings.PIECE):
        yield from map(_plain, series.iloc[start : start + strings.PIECE].tolist())


def _text_chunks(series: Any) -> list[Any] | None:
    """Give the Arrow arrays of a column of text, where Arrow keeps it."""
    import pandas as pd
    import pyarrow

    if not isinstance(series.dtype, pd.ArrowDtype | pd.StringDtype):
        return None
    values = pyarrow.array(series)
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        return None
    return values.chunks if isinstance(values, pyarrow.ChunkedArray) else [values]


def _plain(value: Any) -> Any:
    """Turn NumPy scalars into Python ones, and every kind of missing into `None`."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float) and value != value
    ):
        return None
    return value


def check_unique(names: Iterable[str], where: str) -> None:
    """Raise if two columns have one name."""
    twice = [f"{name!r} ({count} times)" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{where} has several columns named {shorten(twice)}; rename them")
