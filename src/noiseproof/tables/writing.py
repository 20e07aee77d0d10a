"""Writing tables and archives, whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noiseproof.arrays import write_npz
from noiseproof.errors import InputError, path_of
from noiseproof.tables.reading import DELIMITERS, KINDS
from noiseproof.tables.strings import reason
from noiseproof.tables.table import Table, check_unique, plain_cells

if TYPE_CHECKING:
    from noiseproof.tables.table import DataFrame

ROW_GROUP = 20_000  # rows that are written to Parquet at a time
WRITABLE = (".csv", ".tsv", ".jsonl", ".parquet")


def check_writable(
    path: str | Path, *, overwrite: bool = False, suffixes: Sequence[str] = WRITABLE
) -> Path:
    """Refuse a place that `write_table` could not write to, before any work is done.

    Raises:
        InputError: Unsupported suffix, a folder, an existing file, or no folder to write in.
    """
    path = path_of(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"cannot write {path}: unsupported suffix {path.suffix!r}; "
            f"supported: {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name or give --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    return path


def write_table(
    frame: DataFrame | Iterable[DataFrame], path: str | Path, *, overwrite: bool = False
) -> None:
    """Write a frame as CSV, TSV, JSON lines or Parquet, as the suffix says; whole or not at all.

    Args:
        frame: The table, or its pieces in order, at least one, which all have the same columns. The
            index is not written.
        path: The file to write, in a folder that exists.
        overwrite: Whether a file that exists may be replaced.

    >>> import tempfile
    >>> from noiseproof.tables import read_table
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(read_table({"text": ["a, b", "NA"]}), f"{folder}/t.csv")
    ...     read_table(f"{folder}/t.csv")["text"].tolist()
    ['a, b', 'NA']
    """
    import pandas as pd

    path = check_writable(path, overwrite=overwrite)
    pieces = iter([frame] if isinstance(frame, pd.DataFrame) else frame)
    first = next(pieces)
    check_unique([str(column) for column in first.columns], f"the table for {path}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(first, pieces, temporary, KINDS[path.suffix.lower()])
        os.replace(temporary, path)
    except Exception as error:  # pyarrow has many errors for a column of mixed types
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_archive(table: Table, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a table with all its arrays as a NumPy archive; whole or not at all.

    Args:
        table: Its columns become arrays of numbers or of text.
        path: The .npz file to write.
        overwrite: Whether a file that exists may be replaced.
    """
    path = check_writable(path, overwrite=overwrite, suffixes=(".npz",))
    columns = {str(name): _narrow(column) for name, column in table.frame.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_npz(temporary, columns | dict(table.arrays))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _narrow(column: Any) -> np.ndarray:
    """Make an array of a column: numbers as they are, anything else as text."""
    values: np.ndarray = column.to_numpy()
    return values.astype(str) if values.dtype.hasobject else values


def _write(first: DataFrame, more: Iterable[DataFrame], path: Path, kind: str) -> None:
    """Write a table piece by piece; the first says the columns and, for Parquet, their types."""
    if kind == "parquet":
        _write_parquet(first, more, path)
        return
    header = [str(column) for column in first.columns]
    with path.open("w", encoding="utf-8", newline="") as out:
        if kind != "jsonl":
            out.write(_delimited(header, DELIMITERS[kind]))
        dump = json.JSONEncoder(ensure_ascii=False, default=_jsonable).encode
        for frame in chain([first], more):
            columns = [plain_cells(frame.iloc[:, place]) for place in range(len(header))]
            for row in zip(*columns, strict=True):
                if kind == "jsonl":
                    out.write(dump(dict(zip(header, row, strict=True))) + "\n")
                else:
                    out.write(_delimited(row, DELIMITERS[kind]))


def _write_parquet(first: DataFrame, more: Iterable[DataFrame], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.Schema.from_pandas(first, preserve_index=False)
    schema = schema.remove_metadata()  # pandas cannot read what it writes of a column of lists
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for frame in chain([first], more):
            for start in range(0, max(1, len(frame)), ROW_GROUP):
                piece = frame.iloc[start : start + ROW_GROUP]
                writer.write_table(pyarrow.Table.from_pandas(piece, schema, preserve_index=False))
                pyarrow.default_memory_pool().release_unused()


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _delimited(row: Sequence[Any], delimiter: str) -> str:
    """Write one row; csv.writer leaves a lone carriage return unquoted before Python 3.13."""
    cells = ["" if value is None else str(value) for value in row]
    quoted = [
        '"' + cell.replace('"', '""') + '"'
        if any(c in cell for c in (delimiter, *'"\r\n'))
        else cell
        for cell in cells
    ]
    return (delimiter.join(quoted) if quoted != [""] else '""') + "\n"
