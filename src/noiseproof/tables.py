"""Tables in and out: CSV, TSV, JSON lines, Parquet, saved `datasets` folders and hub names.

Whatever is wrong with a file becomes one line that names the file, the row and the remedy; nothing
that pandas, pyarrow or datasets raise gets through.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
import re
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from noiseproof.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pandas

    DataFrame: TypeAlias = pandas.DataFrame
    Source: TypeAlias = str | Path | pandas.DataFrame | datasets.Dataset | dict[str, list[Any]]

__all__ = ["Table", "load_table", "nearest", "read_table", "read_utf8", "shorten", "write_table"]

_KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_WRITABLE = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_CELL = 2**31 - 1  # the csv module stops at 131,072 letters; this is the largest C long


@dataclass(frozen=True)
class Table:
    """A frame with what error messages need to know of where it came from."""

    frame: DataFrame
    name: str
    lines: Sequence[int] | None = None  # (N,) file line where each row starts
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """Say where the row with this position (from 0) stands, counted from 1."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"row {row + 1}{line} of {self.name}"

    def cells(self, column: str) -> list[Any]:
        """Give the column as plain Python values, `None` where there is none."""
        values = self.frame[column].tolist()
        return [_plain(value) for value in values]

    def require(self, column: str, purpose: str) -> None:
        """Raise unless the column exists."""
        names = list(self.frame.columns)
        if column in names:
            return
        hint = nearest(column, names)
        if len(names) == 1 and (other := re.search(r"[;\t|,]", names[0])):
            hint = f"; is {other[0]!r} its separator? expected ',' in .csv and a tab in .tsv"
        raise InputError(
            f"{self.name} has no column {column!r} ({purpose}){hint}; columns: {shorten(names)}"
        )


def read_table(source: Source, split: str = "train") -> DataFrame:
    """Read a table; rows keep their order.

    CSV and TSV cells stay text ("NA" too, an empty cell is ""), cells of JSON lines stay what they
    are, class numbers of a `datasets.ClassLabel` column become their names.

    Args:
        source: A CSV, TSV, JSON lines or Parquet file, a folder written by `save_to_disk`, the
            name of a data set on the hub, or the data themselves.
        split: The split to take where there are several.

    >>> read_table({"text": ["good", "bad"], "label": [1, 0]}).shape
    (2, 2)
    """
    return load_table(source, split).frame


def load_table(source: Source, split: str = "train", name: str = "the table") -> Table:
    """Read a table as `read_table` does, and keep what messages need.

    Args:
        source: As in `read_table`.
        split: The split to take where there are several.
        name: What messages call a source that has no path.
    """
    import pandas as pd

    if isinstance(source, (str, Path)):
        table = _from_place(source, split)
    elif (datasets := sys.modules.get("datasets")) and isinstance(
        source, (datasets.Dataset, datasets.DatasetDict)
    ):
        table = _from_dataset(source, split, name)
    elif isinstance(source, pd.DataFrame):
        table = Table(source.reset_index(drop=True), name)
    elif isinstance(source, Mapping):
        table = _from_columns(source, name)
    else:
        raise InputError(
            "expected a path, a hub name, a DataFrame, a Dataset or a dict of lists, "
            f"got {type(source).__name__}"
        )
    table.frame.columns = [str(column) for column in table.frame.columns]
    _check_unique(table.frame.columns, table.name)
    if not len(table.frame):
        raise InputError(f"{table.name} has no rows; expected at least one below the header")
    return table


def check_writable(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a place that `write_table` could not write to, before any work is done.

    Raises:
        InputError: Unsupported suffix, a folder, an existing file, or no folder to write in.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in _WRITABLE:
        raise InputError(
            f"cannot write {path}: unsupported suffix {path.suffix!r}; "
            f"supported: {', '.join(_WRITABLE)}"
        )
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name or allow to overwrite it")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    return path


def write_table(frame: DataFrame, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a frame as CSV, TSV, JSON lines or Parquet, as the suffix says; whole or not at all.

    Args:
        frame: The table; its index is not written.
        path: The file to write, in a folder that exists.
        overwrite: Whether a file that exists may be replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(read_table({"text": ["a, b", "NA"]}), f"{folder}/t.csv")
    ...     read_table(f"{folder}/t.csv")["text"].tolist()
    ['a, b', 'NA']
    """
    path = check_writable(path, overwrite=overwrite)
    _check_unique([str(column) for column in frame.columns], f"the table for {path}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(_encode(frame, _KINDS[path.suffix.lower()]))
        os.replace(temporary, path)
    except Exception as error:  # pyarrow has many errors for a column of mixed types
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def read_utf8(path: Path) -> str:
    """Read a text file, unzipped if its name ends in .gz, without its byte order mark."""
    data = _read_bytes(path)
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start + mark
        line = data.count(b"\n", 0, start) + 1
        looks = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "is not UTF-8"
        raise InputError(
            f"{path} {looks}: byte 0x{data[start]:02x} at offset {start} (line {line}); expected "
            "UTF-8, so save it as UTF-8 or convert it with iconv"
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error


def _from_columns(columns: Mapping[str, Sequence[Any]], name: str) -> Table:
    for key, values in columns.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            kind = type(values).__name__
            raise InputError(f"column {key!r} of {name} must be a list of cells, got {kind}")
    lists = {key: list(values) for key, values in columns.items()}
    if len({len(values) for values in lists.values()}) > 1:
        sizes = shorten([f"{key} {len(values)}" for key, values in lists.items()])
        raise InputError(f"the columns of {name} must have one length, got {sizes}")
    return Table(_frame(lists), name)


def _from_place(source: str | Path, split: str) -> Table:
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a null letter
        raise InputError(f"{str(source)[:200]!r} is not a path: {_reason(error)}") from error
    if is_folder:
        return _from_folder(path, split)
    kind = _kind(path)
    if exists:
        return _from_file(path, kind)
    has_folder = path.parent != Path() and path.parent.is_dir()
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not kind and not has_folder:
        return _from_hub(source, split)
    beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    raise InputError(f"{path} does not exist{nearest(path.name, beside) or '; check the path'}")


def _kind(path: Path) -> str | None:
    suffix, zipped = path.suffix.lower(), path.suffix.lower() == ".gz"
    kind = _KINDS.get(path.with_suffix("").suffix.lower() if zipped else suffix)
    return None if zipped and kind == "parquet" else kind


def _from_file(path: Path, kind: str | None) -> Table:
    if kind is None:
        raise InputError(
            f"{path} has the unsupported suffix {path.suffix!r}; supported: {', '.join(_KINDS)} "
            "(text formats also with .gz)"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {path}: no permission")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; expected a table with one row per example")
    if kind == "parquet":
        return _from_parquet(path)
    text = read_utf8(path)
    if not text.strip():
        raise InputError(f"{path} is empty; expected a table with one row per example")
    return _from_json_lines(path, text) if kind == "jsonl" else _from_cells(path, text, kind)


def _from_cells(path: Path, text: str, kind: str) -> Table:
    """Read CSV or TSV text with the csv module, which knows the line of a row."""
    delimiter = _DELIMITERS[kind]
    rows: list[list[str]] = []  # the header first
    lines: list[int] = []
    end = 0  # the last line of the row before
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        for cells in reader:
            start, end = end + 1, reader.line_num
            if not cells:  # a blank line
                continue
            if rows and len(cells) != len(rows[0]):
                raise InputError(
                    f"row {len(rows)} (line {start}) of {path} has another number of "
                    f"fields ({len(cells)}) than the header ({len(rows[0])}); "
                    f"quote cells that contain {delimiter!r}"
                )
            rows.append(cells)
            lines.append(start)
    except csv.Error as error:
        where = f"row {len(rows)} (line {end + 1})" if rows else "the header"
        raise InputError(
            f"{where} of {path} has a broken quote ({error}); close each quote, and double a quote "
            "inside a quoted cell"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header, *rows = rows
    _check_unique(header, str(path))
    if not rows:
        raise InputError(f"{path} has a header ({shorten(header)}) but no rows")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    return Table(_frame(columns), str(path), lines[1:])


def _from_json_lines(path: Path, text: str) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines cuts inside strings
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply for JSON") from error
        except ValueError as error:
            at = _reason(error)
            if isinstance(error, json.JSONDecodeError):
                at = f"{error.msg} at character {error.pos + 1}"
            whole = "; the file looks like one JSON array" if text.lstrip()[0] == "[" else ""
            raise InputError(
                f"{where} is not JSON ({at}){whole}; expected one object per line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{where} holds a {type(record).__name__}, expected one object per line such as "
                '{"text": "...", "label": "..."}'
            )
        records.append(record)
        lines.append(number)
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    if not columns:
        raise InputError(f"the objects of {path} have no fields; expected a text and a label")
    return Table(_frame(columns), str(path), lines)


def _from_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        # Without the metadata a pandas index comes back as a column instead of getting lost.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        _check_unique(table.column_names, str(path))
        return Table(table.to_pandas(ignore_metadata=True), str(path))
    except InputError:
        raise
    except Exception as error:  # damaged files raise whatever the damage hits
        raise InputError(f"cannot read {path} as Parquet: {_reason(error)}") from error


def _from_folder(path: Path, split: str) -> Table:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _KINDS)
        hint = f"; give one of its files: {shorten(files)}" if files else ""
        raise InputError(f"the folder {path} is no data set written by save_to_disk{hint}")
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged folders raise whatever the damage hits
        raise InputError(f"cannot read the data set in {path}: {_reason(error)}") from error
    return _from_dataset(dataset, split, str(path))


def _from_hub(name: str, split: str) -> Table:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client has no common base class
        raise InputError(
            f"{name!r} does not exist here, and as a hub name (split {split!r}) it could not be "
            f"reached or is no such data set: {_reason(error)}"
        ) from error
    return _from_dataset(dataset, split, f"{name} (split {split!r})")


def _from_dataset(dataset: Any, split: str, name: str) -> Table:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise InputError(f"{name} has no split {split!r}; splits: {shorten(list(dataset))}")
        dataset, name = dataset[split], f"{name} (split {split!r})"
    try:
        frame = dataset.with_format(None).to_pandas()
    except Exception as error:  # pyarrow refuses some nested columns
        raise InputError(f"cannot read {name} as a table: {_reason(error)}") from error
    class_names = {
        column: tuple(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for column, names in class_names.items():
        numbers = (_plain(value) for value in frame[column].tolist())
        frame[column] = [_class_name(number, names) for number in numbers]
    return Table(frame, name, class_names=class_names)


def _class_name(number: float | None, names: Sequence[str]) -> str | None:
    """Name a class; -1 stays "-1", by which hub data sets mark a row without label."""
    if number is None:
        return None
    return names[int(number)] if 0 <= number < len(names) else str(int(number))


def _frame(columns: Mapping[str, Sequence[Any]]) -> DataFrame:
    """Make a frame whose cells stay the objects they are: no guessed type, no NaN for None."""
    import pandas as pd

    return pd.DataFrame({key: pd.Series(values, dtype=object) for key, values in columns.items()})


def _plain(value: Any) -> Any:
    """Turn NumPy scalars into Python ones, and every kind of missing into `None`."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float) and value != value
    ):
        return None
    return value


def _check_unique(names: Iterable[str], where: str) -> None:
    twice = [f"{name!r} ({count} times)" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{where} has several columns named {shorten(twice)}; rename them")


def _reason(error: BaseException) -> str:
    """Cut an error down to one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _encode(frame: DataFrame, kind: str) -> bytes:
    if kind == "parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, engine="pyarrow", index=False)
        return buffer.getvalue()
    header = [str(column) for column in frame.columns]
    columns = [map(_plain, frame.iloc[:, place].tolist()) for place in range(len(header))]
    rows = zip(*columns, strict=True)
    if kind == "jsonl":
        dump = json.JSONEncoder(ensure_ascii=False, default=_jsonable).encode
        return "".join(dump(dict(zip(header, row, strict=True))) + "\n" for row in rows).encode()
    return "".join(_delimited(row, _DELIMITERS[kind]) for row in (header, *rows)).encode()


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
