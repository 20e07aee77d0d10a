"""Texts kept by Arrow, in memory or, where they are many, in a file that is mapped into it."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError

PIECE = 10_000  # rows that are Python objects at a time
SCATTERED = 256  # texts read here and there, each with its surroundings, before they are let go
MAPPED = 1 << 23  # bytes from which on the texts of a column lie in a file


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
        column = TextColumn()
        for piece in pieces(texts):
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


class TextColumn:
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
                    f"cannot write a temporary file in {tempfile.gettempdir()}: {reason(error)}; "
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


def pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut into lists of `PIECE` rows; the last is shorter."""
    rest = iter(rows)
    return iter(lambda: [*islice(rest, PIECE)], [])


def reason(error: BaseException) -> str:
    """Cut an error down to one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
