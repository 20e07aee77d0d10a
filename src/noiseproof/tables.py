"""Tables in and out: CSV, TSV, JSON lines, Parquet, saved `datasets` folders and hub names.

Also NumPy archives, whose arrays of more than one dimension are columns beside the frame, and
folders of images, one folder per class.

Whatever is wrong with a file becomes one line that names the file, the row and the remedy; nothing
that pandas, pyarrow or datasets raise gets through. Files are read and written in pieces of `PIECE`
rows. Texts are kept by Arrow, and where they are many, in a temporary file that is mapped into
memory: a million short texts would take 250 MB as Python objects, and take next to none so.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import mmap
import os
import re
import sys
import tempfile
import uuid
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from noiseproof.arrays import arrays_of_split, read_npz, write_npz
from noiseproof.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pandas

    DataFrame: TypeAlias = pandas.DataFrame
    Source: TypeAlias = str | Path | pandas.DataFrame | datasets.Dataset | dict[str, list[Any]]

__all__ = [
    "Strings",
    "Table",
    "array_column",
    "has_splits",
    "let_go",
    "load_table",
    "map_table",
    "nearest",
    "read_table",
    "read_utf8",
    "shorten",
    "write_archive",
    "write_table",
]

PIECE = 10_000  # rows that are Python objects at a time
SCATTERED = 256  # texts read here and there, each with its surroundings, before they are let go
ROW_GROUP = 20_000  # rows that are written to Parquet at a time
MAPPED = 1 << 23  # bytes from which on the texts of a column lie in a file

_KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
}
WRITABLE = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_CELL = 2**31 - 1  # the csv module stops at 131,072 letters; this is the largest C long


class Strings(Sequence[str]):
    """N texts kept by Arrow, read like a list of str and equal to one with the same texts.

    Many texts lie in a file that is mapped into memory; what was read of it is let go again.

    >>> some = Strings.of(f"text {row}" for row in range(4))
    >>> some[1], some[2:], some.take([3, 0]) == ["text 3", "text 0"]
    ('text 1', Strings(['text 2', 'text 3']), True)
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, chunks: Sequence[Any], mapped: mmap.mmap | None = None) -> None:
        """Wrap Arrow arrays of strings without nulls; nothing is copied.

        Args:
            chunks: The arrays.
            mapped: The file that they lie in.
        """
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])  # and the end
        self._mapped = mapped

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Keep these texts.

        Raises:
            UnicodeEncodeError: A text has half a surrogate pair.
            InputError: There is no room for the temporary file.
        """
        if isinstance(texts, Strings):
            return texts
        column = _TextColumn()
        for piece in _pieces(texts):
            column.add(piece)
        return column.strings()

    def __len__(self) -> int:
        """Count the texts, N."""
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        """Give text after text."""
        for chunk in self._chunks:
            for start in range(0, len(chunk), PIECE):
                yield from chunk.slice(start, PIECE).to_pylist()
                self._let_go()

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Strings: ...
    def __getitem__(self, place: int | slice) -> str | Strings:
        """Give one text, or those of a slice."""
        if not isinstance(place, slice):
            row = range(len(self))[place]  # negative places, and the IndexError
            chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
            text: str = self._chunks[chunk][row - int(self._starts[chunk])].as_py()
            return text
        start, stop, step = place.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        stop = max(start, stop)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        inside = []
        for chunk, begin in zip(self._chunks[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            low = max(start - begin, 0)
            inside.append(chunk.slice(low, stop - begin - low))
        return Strings(inside, self._mapped)

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of texts."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))

    def __repr__(self) -> str:
        """Show the first texts."""
        shown = ", ".join([repr(text) for text in self[:6]] + ["..."] * (len(self) > 6))
        return f"Strings([{shown}])"

    def take(self, rows: npt.ArrayLike) -> Strings:
        """Take the texts at these positions (from 0), in the order given."""
        places = np.asarray(rows, dtype=np.int64)
        if len(places) == len(self) and np.array_equal(places, np.arange(len(self))):
            return self  # every row
        return Strings.of(self._at(places))

    def series(self) -> Any:
        """Give a pandas Series over the same memory."""
        import pandas as pd
        import pyarrow

        kind = self._chunks[0].type if self._chunks else pyarrow.large_string()
        chunked = pyarrow.chunked_array(self._chunks, kind)
        return pd.Series(pd.arrays.ArrowExtensionArray(chunked))

    def _at(self, rows: npt.NDArray[np.int64]) -> Iterator[str]:
        for start in range(0, len(rows), SCATTERED):
            piece = rows[start : start + SCATTERED]
            numbers = np.searchsorted(self._starts, piece, side="right") - 1
            places = piece - self._starts[numbers]
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
                yield self._chunks[number][place].as_py()
            self._let_go()

    def _let_go(self) -> None:
        if self._mapped is not None:
            let_go(self._mapped)


class _TextColumn:
    """Texts on their way into `Strings`: in memory as long as they are few, then in a file."""

    def __init__(self) -> None:
        self._arrays: list[Any] = []
        self._size = 0  # bytes of the arrays
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def add(self, texts: list[str]) -> None:
        """Append texts; all of them or, when one has half a surrogate pair, none."""
        import pyarrow

        # Memory of the C library: Arrow's own pool would keep as much again for itself.
        pool = pyarrow.system_memory_pool()
        made = pyarrow.array(texts, pyarrow.large_string(), memory_pool=pool)
        self._arrays.append(made)
        self._size += made.nbytes
        if self._file is not None or self._size > MAPPED:
            try:
                self._write()
            except OSError as error:
                raise InputError(
                    f"cannot write a temporary file in {tempfile.gettempdir()}: {_reason(error)}; "
                    "make room, or set TMPDIR to a folder that has some"
                ) from error

    def _write(self) -> None:
        import pyarrow

        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="noiseproof-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)  # also when a bad row ends the reading
            self._writer = pyarrow.ipc.new_stream(
                self._file, pyarrow.schema({"text": pyarrow.large_string()})
            )
        for made in self._arrays:
            self._writer.write_batch(pyarrow.record_batch([made], ["text"]))
        self._arrays.clear()

    def strings(self) -> Strings:
        """Give the texts; nothing can be added afterwards."""
        if self._file is None:
            return Strings(self._arrays)
        self._writer.close()
        with self._file as file:
            file.flush()
            table, mapped = map_table(file)
        return Strings(table.column(0).chunks, mapped)


def map_table(file: IO[bytes]) -> tuple[Any, mmap.mmap]:
    """Map an Arrow stream file into memory.

    Returns:
        The table (a `pyarrow.Table`) that lies in it, and the map, for `let_go`.
    """
    import pyarrow

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)) as stream:
        return stream.read_all(), mapped


def let_go(mapped: mmap.mmap) -> None:
    """Take a file's pages out of this process's memory; each comes back when it is read."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


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

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.frame)

    def place(self, row: int) -> str:
        """Say where the row with this position (from 0) stands, counted from 1."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"row {row + 1}{line} of {self.name}"

    def cells(self, column: str) -> Iterator[Any]:
        """Give the column's cells as plain Python values, `None` where there is none."""
        return iter(self.texts[column]) if column in self.texts else _cells(self.frame[column])

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
        hint = nearest(column, names)
        if len(names) == 1 and (other := re.search(r"[;\t|,]", names[0])):
            hint = f"; is {other[0]!r} its separator? expected ',' in .csv and a tab in .tsv"
        names += [f"{name} {array.shape}" for name, array in self.arrays.items()]
        raise InputError(
            f"{self.name} has no column {column!r} ({purpose}){hint}; columns: {shorten(names)}"
        )


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
    _check_unique(table.frame.columns, table.name)
    if not len(table.frame):
        raise InputError(f"{table.name} has no rows; expected at least one below the header")
    return table


def check_writable(
    path: str | Path, *, overwrite: bool = False, suffixes: Sequence[str] = WRITABLE
) -> Path:
    """Refuse a place that `write_table` could not write to, before any work is done.

    Raises:
        InputError: Unsupported suffix, a folder, an existing file, or no folder to write in.
    """
    path = Path(path).expanduser()
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
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(read_table({"text": ["a, b", "NA"]}), f"{folder}/t.csv")
    ...     read_table(f"{folder}/t.csv")["text"].tolist()
    ['a, b', 'NA']
    """
    import pandas as pd

    path = check_writable(path, overwrite=overwrite)
    pieces = iter([frame] if isinstance(frame, pd.DataFrame) else frame)
    first = next(pieces)
    _check_unique([str(column) for column in first.columns], f"the table for {path}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(first, pieces, temporary, _KINDS[path.suffix.lower()])
        os.replace(temporary, path)
    except Exception as error:  # pyarrow has many errors for a column of mixed types
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
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
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _narrow(column: Any) -> np.ndarray:
    """Make an array of a column: numbers as they are, anything else as text."""
    values: np.ndarray = column.to_numpy()
    return values.astype(str) if values.dtype.hasobject else values


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
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a null letter
        raise InputError(f"{str(source)[:200]!r} is not a path: {_reason(error)}") from error
    if is_folder:
        return _from_folder(path, split)
    kind = _kind(path)
    if exists:
        return replace(_from_file(path, kind, split), base=path.parent)
    has_folder = path.parent != Path() and path.parent.is_dir()
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not kind and not has_folder:
        return _from_hub(source, split)
    beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    raise InputError(f"{path} does not exist{nearest(path.name, beside) or '; check the path'}")


def has_splits(source: Source) -> bool:
    """Whether a source may hold several splits: any but a file of rows.

    >>> has_splits("rows.csv"), has_splits("rows.npz"), has_splits("someone/data")
    (False, True, True)
    """
    return not isinstance(source, str | Path) or _kind(Path(source)) in (None, "npz")


def _kind(path: Path) -> str | None:
    suffix, zipped = path.suffix.lower(), path.suffix.lower() == ".gz"
    kind = _KINDS.get(path.with_suffix("").suffix.lower() if zipped else suffix)
    return None if zipped and kind in ("parquet", "npz") else kind


def _from_file(path: Path, kind: str | None, split: str) -> Table:
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
    if kind == "npz":
        return _from_npz(path, split)
    with _opened(path) as file:
        if not any(map(str.strip, iter(lambda: file.read(1 << 16), ""))):
            raise InputError(f"{path} is empty; expected a table with one row per example")
    return _from_json_lines(path) if kind == "jsonl" else _from_delimited(path, _DELIMITERS[kind])


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
        raise InputError(f"cannot read {path}: {_reason(error)}") from error


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
                _check_unique(cells, str(path))
                header.extend(cells)
                continue
            if len(cells) != len(header):
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
            for piece in _pieces(rows(file)):
                cells = map(list, zip(*piece, strict=True))
                columns.add(dict(zip(header, cells, strict=True)), len(piece))
    except csv.Error as error:
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


def _from_json_lines(path: Path) -> Table:
    lines = array("q")
    columns = _Columns()
    with _opened(path, newline="\n") as file:
        for piece in _pieces(_records(path, file, lines)):
            names = dict.fromkeys(name for record in piece for name in record)
            columns.add(
                {name: [record.get(name) for record in piece] for name in names}, len(piece)
            )
    if not columns.names:
        raise InputError(f"the objects of {path} have no fields; expected a text and a label")
    return columns.table(str(path), lines)


def _records(path: Path, file: IO[str], lines: array[int]) -> Iterator[dict[str, Any]]:
    """Read the objects of JSON lines; ``lines`` gets the number of each one's line."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        line = line.removesuffix("\n")
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply for JSON") from error
        except ValueError as error:
            at = _reason(error)
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


def _from_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        # Without the metadata a pandas index comes back as a column instead of getting lost.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        _check_unique(table.column_names, str(path))
        return Table(_from_arrow(table), str(path))
    except InputError:
        raise
    except Exception as error:  # damaged files raise whatever the damage hits
        raise InputError(f"cannot read {path} as Parquet: {_reason(error)}") from error


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
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _KINDS)
        hint = f"; give one of its files: {shorten(files)}" if files else ""
        raise InputError(
            f"the folder {path} holds no folders of images and is no data set written by "
            f"save_to_disk{hint}"
        )
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
        frame = _from_arrow(dataset.with_format("arrow")[:])
    except Exception as error:  # pyarrow refuses some nested columns
        raise InputError(f"cannot read {name} as a table: {_reason(error)}") from error
    class_names = {
        column: tuple(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for column, names in class_names.items():
        frame[column] = [_class_name(number, names) for number in _cells(frame[column])]
    return Table(frame, name, class_names=class_names)


def _class_name(number: float | None, names: Sequence[str]) -> str | None:
    """Name a class; -1 stays "-1", by which hub data sets mark a row without label."""
    if number is None:
        return None
    return names[int(number)] if 0 <= number < len(names) else str(int(number))


class _Columns:
    """Columns that grow piece by piece: those of text go into `Strings`, others stay objects."""

    def __init__(self) -> None:
        self.names: dict[str, _TextColumn | list[Any]] = {}
        self.rows = 0

    def add(self, piece: Mapping[str, list[Any]], rows: int) -> None:
        """Add rows; a column that is new, or that the piece has not, is None in the others."""
        for name in {**self.names, **piece}:
            cells = piece.get(name) or [None] * rows
            column = self.names.setdefault(name, [None] * self.rows if self.rows else _TextColumn())
            if isinstance(column, _TextColumn):
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
            key: column.strings() if isinstance(column, _TextColumn) else column
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


def _pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut into lists of `PIECE` rows; the last is shorter."""
    rest = iter(rows)
    return iter(lambda: [*islice(rest, PIECE)], [])


def _cells(series: Any) -> Iterator[Any]:
    """Give the cells of a series as plain Python values, `None` where there is none."""
    chunks = _text_chunks(series)
    if chunks is not None:
        yield from Strings(chunks)
        return
    for start in range(0, len(series), PIECE):
        yield from map(_plain, series.iloc[start : start + PIECE].tolist())


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


def _check_unique(names: Iterable[str], where: str) -> None:
    twice = [f"{name!r} ({count} times)" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{where} has several columns named {shorten(twice)}; rename them")


def _reason(error: BaseException) -> str:
    """Cut an error down to one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _write(first: DataFrame, more: Iterable[DataFrame], path: Path, kind: str) -> None:
    """Write a table piece by piece; the first says the columns and, for Parquet, their types."""
    if kind == "parquet":
        _write_parquet(first, more, path)
        return
    header = [str(column) for column in first.columns]
    with path.open("w", encoding="utf-8", newline="") as out:
        if kind != "jsonl":
            out.write(_delimited(header, _DELIMITERS[kind]))
        dump = json.JSONEncoder(ensure_ascii=False, default=_jsonable).encode
        for frame in chain([first], more):
            columns = [_cells(frame.iloc[:, place]) for place in range(len(header))]
            for row in zip(*columns, strict=True):
                if kind == "jsonl":
                    out.write(dump(dict(zip(header, row, strict=True))) + "\n")
                else:
                    out.write(_delimited(row, _DELIMITERS[kind]))


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
