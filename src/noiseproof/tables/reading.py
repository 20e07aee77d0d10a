"""Reading: files of every format, folders, hub names and data in memory become a `Table`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from noiseproof.arrays import arrays_of_split, read_npz
from noiseproof.errors import InputError, path_of
from noiseproof.tables.strings import Strings, TextColumn, pieces, reason
from noiseproof.tables.table import Table, check_unique, nearest, plain_cells, shorten

if TYPE_CHECKING:
    from noiseproof.tables.table import DataFrame, Source

KINDS = {  # kind of file by suffix
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
}
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
DELIMITERS = {"csv": ",", "tsv": "\t"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_CELL = 2**31 - 1  # the csv module stops at 131,072 letters; this is the largest C long


def read_table(source: Source, split: str = "train") -> DataFrame:
    """Read a table; rows keep their order.

    CSV and TSV cells stay text ("NA" too, an empty cell is ""), cells of JSON lines stay what they
    are, class numbers of a `datasets.ClassLabel` column become their names. Columns of text from
    files are kept by Arrow (`large_string[pyarrow]`).

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
    check_unique(table.frame.columns, table.name)
    if not len(table.frame):
        raise InputError(f"{table.name} has no rows; expected at least one below the header")
    return table


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
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _from_columns(columns: Mapping[str, Sequence[Any]], name: str) -> Table:
    for key, values in columns.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            kind = type(values).__name__
            raise InputError(f"column {key!r} of {name} must be a list of cells, got {kind}")
    if len({len(values) for values in columns.values()}) > 1:
        sizes = shorten([f"{key} {len(values)}" for key, values in columns.items()])
        raise InputError(f"the columns of {name} must have one length, got {sizes}")
    wide: dict[str, np.ndarray] = {}
    for key, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim > 1:
            wide[key] = values
    lists = {key: list(values) for key, values in columns.items() if key not in wide}
    rows = len(next(iter(columns.values()), ()))
    return Table(_frame(lists, rows), name, arrays=wide)


def _from_place(source: str | Path, split: str) -> Table:
    try:
        path = path_of(source)
        is_folder, exists = path.is_dir(), path.exists()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # too long, a null letter
        raise InputError(f"{str(source)[:200]!r} is not a path: {reason(error)}") from error
    if is_folder:
        return _from_folder(path, split)
    if exists:
        return replace(_from_file(path, _kind(path), split), base=path.parent)
    if isinstance(source, str) and _is_hub_name(source):
        return _from_hub(source, split)
    beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    raise InputError(f"{path} does not exist{nearest(path.name, beside) or '; check the path'}")


def is_missing(source: str) -> bool:
    """Whether a source is a path where nothing lies; what may be a name on the hub is none.

    >>> is_missing("no/such/rows.csv"), is_missing("someone/data")
    (True, False)
    """
    return not os.path.exists(os.path.expanduser(source)) and not _is_hub_name(source)


def _is_hub_name(source: str) -> bool:
    """Whether a source that does not exist here may be the name of a data set on the hub."""
    path = Path(source)
    if not _HUB_NAME.fullmatch(source) or _kind(path):
        return False
    return path.parent == Path() or not path.parent.is_dir()


def has_splits(source: Source) -> bool:
    """Whether a source may hold several splits: any but a file of rows.

    >>> has_splits("rows.csv"), has_splits("rows.npz"), has_splits("someone/data")
    (False, True, True)
    """
    return not isinstance(source, str | Path) or _kind(Path(source)) in (None, "npz")


def _kind(path: Path) -> str | None:
    suffix, zipped = path.suffix.lower(), path.suffix.lower() == ".gz"
    kind = KINDS.get(path.with_suffix("").suffix.lower() if zipped else suffix)
    return None if zipped and kind in ("parquet", "npz") else kind


def _from_file(path: Path, kind: str | None, split: str) -> Table:
    if kind is None:
        raise InputError(
            f"{path} has the unsupported suffix {path.suffix!r}; supported: {', '.join(KINDS)} "
            "(text formats also with .gz)"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {path}: no permission")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; expected a table with one row per example")
    if kind == "parquet":
        return _from_parquet(path)
    if kind == "npz":
        return _from_npz(path, split)
    with _opened(path) as file:
        if not any(map(str.strip, iter(lambda: file.read(1 << 16), ""))):
            raise InputError(f"{path} is empty; expected a table with one row per example")
    return _from_json_lines(path) if kind == "jsonl" else _from_delimited(path, DELIMITERS[kind])


@contextmanager
def _opened(path: Path, newline: str = "") -> Iterator[IO[str]]:
    """Open a text file as `read_utf8` reads it, but piece by piece, and complain as it does."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        read_utf8(path)  # knows the offset
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _from_delimited(path: Path, delimiter: str) -> Table:
    """Read CSV or TSV with the csv module, which knows the line of a row."""
    lines = array("q")
    columns = _Columns()
    header: list[str] = []
    end = 0  # the last line of the row before

    def rows(file: IO[str]) -> Iterator[list[str]]:
        nonlocal end
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        for cells in reader:
            start, end = end + 1, reader.line_num
            if not cells:  # a blank line
                continue
            if not header:
                check_unique(cells, str(path))
                header.extend(cells)
                continue
            if len(cells) != len(header):
                _check_separator(path, header, delimiter)
                raise InputError(
                    f"row {len(lines) + 1} (line {start}) of {path} has another number of "
                    f"fields ({len(cells)}) than the header ({len(header)}); "
                    f"quote cells that contain {delimiter!r}"
                )
            lines.append(start)
            yield cells

    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _opened(path) as file:
            for piece in pieces(rows(file)):
                cells = map(list, zip(*piece, strict=True))
                columns.add(dict(zip(header, cells, strict=True)), len(piece))
    except csv.Error as error:
        _check_separator(path, header, delimiter)
        where = f"row {len(lines) + 1} (line {end + 1})" if header else "the header"
        raise InputError(
            f"{where} of {path} has a broken quote ({error}); close each quote, and double a quote "
            "inside a quoted cell"
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not lines:
        raise InputError(f"{path} has a header ({shorten(header)}) but no rows")
    return columns.table(str(path), lines)


def _check_separator(path: Path, header: Sequence[str], delimiter: str) -> None:
    """Raise if the header is one field, or unreadable, and holds what separates other tables."""
    with _opened(path) as file:
        first = next(line for line in file if line.strip())
    other = next((one for one in ";\t,|" if one != delimiter and one in first), None)
    if len(header) < 2 and delimiter not in first and other is not None:
        raise InputError(
            f"{path} looks separated by {other!r}, expected {delimiter!r}; save it with commas as "
            ".csv, or with tabs as .tsv"
        )


def _from_json_lines(path: Path) -> Table:
    lines = array("q")
    columns = _Columns()
    with _opened(path, newline="\n") as file:
        for piece in pieces(_records(path, file, lines)):
            names = dict.fromkeys(name for record in piece for name in record)
            columns.add(
                {name: [record.get(name) for record in piece] for name in names}, len(piece)
            )
    if not columns.names:
        raise InputError(f"the objects of {path} have no fields; expected a text and a label")
    return columns.table(str(path), lines)


def _records(path: Path, file: IO[str], lines: array[int]) -> Iterator[dict[str, Any]]:
    """Read the objects of JSON lines; ``lines`` gets the number of each one's line."""
    read = json.JSONDecoder(object_pairs_hook=_unique).decode
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        line = line.removesuffix("\n")
        where = f"line {number} of {path}"
        try:
            record = read(line)
        except KeyError as error:
            raise InputError(
                f"{where} has several values named {error.args[0]!r}; rename or remove all but one"
            ) from error
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply for JSON") from error
        except ValueError as error:
            at = reason(error)
            if isinstance(error, json.JSONDecodeError):
                at = f"{error.msg} at character {error.pos + 1}"
            array_like = not lines and line.lstrip()[0] == "["
            whole = "; the file looks like one JSON array" if array_like else ""
            raise InputError(
                f"{where} is not JSON ({at}){whole}; expected one object per line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{where} holds a {type(record).__name__}, expected one object per line such as "
                '{"text": "...", "label": "..."}'
            )
        lines.append(number)
        yield record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object.

    Raises:
        KeyError: A name stands twice, of which Python would keep the last.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        raise KeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return record


def _from_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        # Without the metadata a pandas index comes back as a column instead of getting lost.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        check_unique(table.column_names, str(path))
        return Table(_from_arrow(table), str(path))
    except InputError:
        raise
    except Exception as error:  # damaged files raise whatever the damage hits
        raise InputError(f"cannot read {path} as Parquet: {reason(error)}") from error


def _from_npz(path: Path, split: str) -> Table:
    """Arrays of one dimension are the frame; the others stand beside it."""
    import pandas as pd

    arrays = {name: a for name, a in arrays_of_split(read_npz(path), split).items() if a.ndim}
    if len({len(array) for array in arrays.values()}) != 1:
        sizes = shorten([f"{name} {array.shape}" for name, array in arrays.items()])
        raise InputError(
            f"the arrays of {path} must have one length, got {sizes or 'none'}; arrays of several "
            "splits are told apart by their names, such as x_train and x_test"
        )
    columns = {name: pd.Series(array) for name, array in arrays.items() if array.ndim == 1}
    rows = len(next(iter(arrays.values())))
    wide = {name: array for name, array in arrays.items() if array.ndim > 1}
    return Table(pd.DataFrame(columns, index=range(rows)), str(path), arrays=wide)


def _from_image_folder(path: Path, split: str) -> Table | None:
    """One row per image below a folder per class; None where there is no such folder.

    A folder with the name of the split goes first, as in ``train/cat`` and ``test/cat``.
    """
    root = path / split if (path / split).is_dir() else path
    found: dict[str, list[str]] = {"image": [], "label": []}
    for folder in sorted(place for place in root.iterdir() if place.is_dir()):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                found["image"].append(str(file.relative_to(root)))
                found["label"].append(folder.name)
    if not found["image"]:
        return None
    return Table(_frame(found, len(found["image"])), str(root), base=root)


def _from_folder(path: Path, split: str) -> Table:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        images = _from_image_folder(path, split)
        if images is not None:
            return images
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in KINDS)
        hint = f"; give one of its files: {shorten(files)}" if files else ""
        raise InputError(
            f"the folder {path} holds no folders of images and is no data set written by "
            f"save_to_disk{hint}"
        )
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged folders raise whatever the damage hits
        raise InputError(f"cannot read the data set in {path}: {reason(error)}") from error
    return _from_dataset(dataset, split, str(path))


def _from_hub(name: str, split: str) -> Table:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client has no common base class
        raise InputError(
            f"{name!r} does not exist here, and as a hub name (split {split!r}) it could not be "
            f"reached or is no such data set: {reason(error)}"
        ) from error
    return _from_dataset(dataset, split, f"{name} (split {split!r})")


def _from_dataset(dataset: Any, split: str, name: str) -> Table:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise InputError(f"{name} has no split {split!r}; splits: {shorten(list(dataset))}")
        dataset, name = dataset[split], f"{name} (split {split!r})"
    try:
        frame = _from_arrow(dataset.with_format("arrow")[:])
    except Exception as error:  # pyarrow refuses some nested columns
        raise InputError(f"cannot read {name} as a table: {reason(error)}") from error
    class_names = {
        column: tuple(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for column, names in class_names.items():
        frame[column] = [_class_name(number, names) for number in plain_cells(frame[column])]
    return Table(frame, name, class_names=class_names)


def _class_name(number: float | None, names: Sequence[str]) -> str | None:
    """Name a class; -1 stays "-1", by which hub data sets mark a row without label."""
    if number is None:
        return None
    return names[int(number)] if 0 <= number < len(names) else str(int(number))


class _Columns:
    """Columns that grow piece by piece: those of text go into `Strings`, others stay objects."""

    def __init__(self) -> None:
        self.names: dict[str, TextColumn | list[Any]] = {}
        self.rows = 0

    def add(self, piece: Mapping[str, list[Any]], rows: int) -> None:
        """Add rows; a column that is new, or that the piece has not, is None in the others."""
        for name in {**self.names, **piece}:
            cells = piece.get(name) or [None] * rows
            column = self.names.setdefault(name, [None] * self.rows if self.rows else TextColumn())
            if isinstance(column, TextColumn):
                if all(type(cell) is str for cell in cells):
                    with suppress(UnicodeEncodeError):  # half a surrogate pair
                        column.add(cells)
                        continue
                column = self.names[name] = [*column.strings()]
            column += cells
        self.rows += rows

    def table(self, name: str, lines: Sequence[int]) -> Table:
        """Make a table whose cells stay what they are: no guessed type, no NaN for None."""
        import pandas as pd

        columns = {
            key: column.strings() if isinstance(column, TextColumn) else column
            for key, column in self.names.items()
        }
        texts = {key: column for key, column in columns.items() if isinstance(column, Strings)}
        series = {
            key: column.series() if isinstance(column, Strings) else pd.Series(column, dtype=object)
            for key, column in columns.items()
        }
        return Table(pd.DataFrame(series), name, lines, texts=texts)


def _frame(columns: Mapping[str, Sequence[Any]], rows: int) -> DataFrame:
    """Make a frame whose cells stay the objects they are: no guessed type, no NaN for None."""
    import pandas as pd

    made = {key: pd.Series(values, dtype=object) for key, values in columns.items()}
    return pd.DataFrame(made, index=range(rows))


def _from_arrow(table: Any) -> DataFrame:
    """Make a frame of an Arrow table; its texts stay where they are."""
    import pandas as pd
    import pyarrow

    kept = {kind: pd.ArrowDtype(kind) for kind in (pyarrow.string(), pyarrow.large_string())}
    return table.to_pandas(ignore_metadata=True, types_mapper=kept.get)
