"""Inputs of any kind, texts among them, and examples: inputs with their given labels."""

from __future__ import annotations

import hashlib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noiseproof.data.labels import (
    UNSEEN,
    Classes,
    Ints,
    check_all_labelled,
    check_trainable,
    checked_names,
    class_numbers,
    column_labels,
    is_label,
    sorted_names,
    such_rows,
    whole_numbers,
)
from noiseproof.errors import InputError
from noiseproof.tables import Strings, Table, load_table

if TYPE_CHECKING:
    from typing_extensions import Self

    from noiseproof.tables import Source

_BARE_NUMBER = re.compile(r"\s*[-+]?[0-9]*[.,]?[0-9]+\s*")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


class Inputs(ABC):
    """N rows without their labels: texts, vectors, images."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the rows, N."""

    @abstractmethod
    def take(self, rows: Ints) -> Self:
        """Take the rows at these positions, in the order given."""

    @abstractmethod
    def replaced(self, rows: Ints, pool: Self, chosen: Ints) -> Self:
        """Put the rows ``chosen`` of a pool in the place of these rows; both (R,)."""

    @abstractmethod
    def content(self) -> Iterator[bytes]:
        """Give all that the inputs hold, for a fingerprint."""

    def shown(self) -> Mapping[str, Sequence[str]]:
        """Give the columns (N,) by which a person finds a row again, beside its id."""
        return {}

    def as_texts(self) -> list[tuple[str, ...]]:
        """Give the texts of every row together: one, the two of a pair, or the turns of a chat.

        Raises:
            InputError: The rows are no texts.
        """
        raise InputError(f"text noise needs rows of texts, these are {type(self).__name__.lower()}")

    def with_texts(self, texts: Sequence[tuple[str, ...]]) -> Inputs:
        """Put other texts of the N rows in the place of those that `as_texts` gives."""
        raise NotImplementedError(f"{type(self).__name__} has no texts")

    def with_responses(self, responses: Sequence[str]) -> Inputs:
        """Put other responses (N,) in place of the given ones."""
        raise NotImplementedError(f"{type(self).__name__} has no responses")

    @property
    def right(self) -> Ints | None:
        """Labels of the truth (N,) where labels are texts: 0 if right, -1 if wrong; else None."""
        return None

    def trusted(self) -> Inputs:
        """Give the rows with the true labels, where labels are part of them."""
        return self

    def labels_shown(self) -> dict[str, Any]:
        """Give the columns of the labels, where labels are part of the rows."""
        return {}


@dataclass(frozen=True, eq=False)
class Texts(Inputs):
    """Texts, or pairs of texts. Any sequence of str may be given; it is kept by Arrow.

    Attributes:
        texts: N texts.
        pairs: N second texts, or `None`.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Let Arrow keep the texts, and check that there are as many second ones."""
        if self.pairs is not None and len(self.pairs) != len(self.texts):
            raise InputError(f"there are {len(self.texts)} texts and {len(self.pairs)} second ones")
        for name in ("texts", "pairs"):
            column = getattr(self, name)
            if column is not None:
                object.__setattr__(self, name, Strings.of(column))

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.texts)

    def take(self, rows: Ints) -> Texts:
        """Take the rows at these positions, in the order given."""
        pairs = self.pairs
        return Texts(
            Strings.of(self.texts).take(rows),
            None if pairs is None else Strings.of(pairs).take(rows),
        )

    def as_texts(self) -> list[tuple[str, ...]]:
        """Give the texts of every row together: one, or the two of a pair.

        >>> Texts(["a", "b"], ["c", "d"]).as_texts()
        [('a', 'c'), ('b', 'd')]
        """
        columns = [self.texts] if self.pairs is None else [self.texts, self.pairs]
        return list(zip(*columns, strict=True))

    def with_texts(self, texts: Sequence[tuple[str, ...]]) -> Texts:
        """Put other texts of N rows, or N pairs, in their place."""
        return Texts(*map(list, zip(*texts, strict=True)))

    def replaced(self, rows: Ints, pool: Texts, chosen: Ints) -> Texts:
        """Put texts of a pool in the place of these rows."""
        texts = list(self.texts)
        pairs = None if self.pairs is None else list(self.pairs)
        for row, other in zip(rows.tolist(), chosen.tolist(), strict=True):
            texts[row] = pool.texts[other]
            if pairs is not None and pool.pairs is not None:
                pairs[row] = pool.pairs[other]
        return Texts(texts, pairs)

    def content(self) -> Iterator[bytes]:
        """Give the texts, each after its length."""
        for part in (self.texts, self.pairs):
            yield from content_of(part)

    def shown(self) -> Mapping[str, Sequence[str]]:
        """Give the texts."""
        columns = {"text": self.texts}
        return columns if self.pairs is None else columns | {"second_text": self.pairs}


class Reader(ABC):
    """Finds the inputs of one kind in a table."""

    kind: str
    """What messages call the columns: text, features, image."""

    @abstractmethod
    def columns(self, table: Table) -> tuple[str, ...]:
        """Name the columns of the table that hold the inputs, or complain that there are none."""

    @abstractmethod
    def read(self, table: Table, rows: Ints) -> Inputs:
        """Read the inputs of these rows, which are sorted."""

    def moved(self, table: Table, folder: Path) -> Table:
        """Give the table as it has to be written into another folder."""
        return table

    def cell(self, table: Table, column: str, row: int) -> Any:
        """Give one cell of the inputs, to be put into another table."""
        if column in table.arrays:
            return table.arrays[column][row]
        return table.frame[column].iloc[row]


@dataclass(frozen=True)
class TextColumns(Reader):
    """One text column, or two.

    Attributes:
        text: Name of the column; `"premise,hypothesis"` means two.
    """

    text: str | tuple[str, ...]

    kind = "text"

    def columns(self, table: Table) -> tuple[str, ...]:
        """Name the text columns."""
        return _text_columns(table, self.text)

    def read(self, table: Table, rows: Ints) -> Texts:
        """Read the texts of these rows."""
        columns = self.columns(table)
        texts = Texts(*_texts(table, columns, rows))
        if texts.pairs is None and all(map(_BARE_NUMBER.fullmatch, texts.texts)):
            warnings.warn(
                f"column {columns[0]!r} of {table.name} holds bare numbers; is it the column of "
                "the texts?",
                UserWarning,
                stacklevel=2,
            )
        return texts


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with their given labels, row by row.

    Ids may be given as any sequence of str; they are kept by Arrow.

    Attributes:
        row_ids: N names of the rows, unique.
        inputs: N rows of some kind.
        labels: (N,) class numbers as given; -1 where a label is in no known class.
        clean_labels: (N,) true class numbers, -1 where no class is right (a foreign input), or
            `None` where the truth is not known.
        label_names: C names; class number c is called `label_names[c]`.
        dropped: How many rows `drop_label` left out when the table was read.

    >>> train = read_examples({"t": ["a", "b"], "y": ["no", "yes"]}, text="t", label="y")
    >>> train.labels.tolist(), train.label_names
    ([0, 1], ('no', 'yes'))
    """

    row_ids: Sequence[str]
    inputs: Inputs
    labels: Ints
    clean_labels: Ints | None
    label_names: tuple[str, ...]
    dropped: int = 0

    def __post_init__(self) -> None:
        """Check that all columns have N rows and all labels name a class."""
        rows, classes = len(self.inputs), len(self.label_names)
        if len(self.row_ids) != rows:
            raise InputError(f"row_ids has {len(self.row_ids)} rows, there are {rows} inputs")
        object.__setattr__(self, "row_ids", Strings.of(self.row_ids))
        object.__setattr__(self, "labels", class_numbers(self.labels, "labels", rows, classes))
        if self.clean_labels is not None:
            clean = class_numbers(self.clean_labels, "clean_labels", rows, classes)
            object.__setattr__(self, "clean_labels", clean)

    @property
    def texts(self) -> Sequence[str]:
        """The texts, where the inputs are texts."""
        if not isinstance(self.inputs, Texts):
            raise InputError(f"expected texts, the rows are {type(self.inputs).__name__}")
        return self.inputs.texts

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.inputs)

    def select(self, rows: npt.ArrayLike) -> Examples:
        """Take the rows at these positions, or where this mask is true, in the order given."""
        chosen = np.asarray(rows)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        places = whole_numbers(chosen, "rows")
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise InputError(
                f"rows must lie in 0 to {len(self) - 1}, got {places.min()} to {places.max()}"
            )
        clean = self.clean_labels
        return replace(
            self,
            row_ids=Strings.of(self.row_ids).take(places),
            inputs=self.inputs.take(places),
            labels=self.labels[places],
            clean_labels=None if clean is None else clean[places],
        )

    def with_labels(self, labels: npt.ArrayLike, *, old_are_clean: bool = False) -> Examples:
        """Replace the given labels; known clean labels stay.

        Args:
            labels: (N,) class numbers.
            old_are_clean: Whether the labels replaced are the truth where none is known yet, as
                when synthetic noise is added to clean data.
        """
        clean = self.labels if self.clean_labels is None and old_are_clean else self.clean_labels
        return replace(self, labels=np.asarray(labels), clean_labels=clean)

    def trusted(self) -> Examples:
        """Give the rows with the true labels as the given ones, where they are known."""
        true = self.labels if self.clean_labels is None else self.clean_labels
        return replace(self, inputs=self.inputs.trusted(), labels=true)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over inputs, given labels and label names; row ids and the truth do not count."""
        digest = hashlib.sha256()
        for part in content_of(self.label_names):
            digest.update(part)
        for part in self.inputs.content():
            digest.update(part)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def content_of(texts: Sequence[str] | None) -> Iterator[bytes]:
    """Give a column of texts as bytes; lengths keep ("ab", "c") from ("a", "bc")."""
    yield b"none" if texts is None else b"%d:" % len(texts)
    for text in texts or ():
        data = text.encode("utf-8", "surrogatepass")
        yield b"%d:" % len(data) + data


def read_examples(
    source: Source,
    *,
    text: str | tuple[str, ...] | Reader,
    label: str,
    clean_label: str | None = None,
    row_id: str | None = None,
    label_names: Sequence[str] | None = None,
    drop_label: str | None = None,
    split: str = "train",
    allow_unseen: bool = False,
    role: str = "training",
) -> Examples:
    """Read labelled rows from whatever `read_table` reads.

    Labels may be numbers, booleans or names; spaces around a name do not count. Classes are sorted
    by number where all labels are whole numbers, else by name.

    Args:
        source: A path, a hub name, a frame, a data set or a dict of columns.
        text: One or two text columns; `"premise,hypothesis"` means two. A `Reader` reads inputs of
            another kind.
        label: The column of given labels.
        clean_label: The column of true labels, where they are known; `FOREIGN` is none of them.
        row_id: A column of unique ids; without one, ids are positions in the source from "0".
        label_names: The classes in order. Whole numbers then count as positions in it, unless some
            class has a number as its name.
        drop_label: Leave out the rows with this given label; "" stands for no label.
        split: The split to take where there are several.
        allow_unseen: Give -1 to labels outside `label_names` instead of raising.
        role: What messages call the data; "training" data must have two rows and two classes.

    >>> table = {"text": ["a", "b", "c"], "votes": [1, -1, 0]}
    >>> read_examples(table, text="text", label="votes", drop_label="-1").row_ids
    Strings(['0', '2'])
    """
    table = load_table(source, split, f"the {role} table")
    reader = text if isinstance(text, Reader) else TextColumns(text)
    named = ((label, "label"), (clean_label, "clean label"), (row_id, "row id"))
    table = replace(table, taken=frozenset(column for column, _ in named if column is not None))
    columns = reader.columns(table)
    for column, purpose in named:
        if column is not None:
            table.require(column, purpose)
        if column in columns and column != row_id:
            raise InputError(
                f"column {column!r} of {table.name} cannot be both {reader.kind} and {purpose}"
            )
    ids = read_row_ids(table, row_id)
    given = column_labels(table, label)
    dropped = np.array([is_label(name, drop_label) for name in given.names])
    rows = np.flatnonzero(~dropped[given.codes])
    if not len(rows):
        raise InputError(f"every row of {table.name} has the label {drop_label!r} to drop")
    check_all_labelled(table, label, given, rows, droppable=True)
    inputs = reader.read(table, rows)
    chosen = label_names if label_names is not None else table.class_names.get(label)
    if role == "training":
        check_trainable(table, label, given, rows, chosen is None)
    names = sorted_names(given.among(rows)) if chosen is None else checked_names(chosen)
    classes = Classes(table, names, by_position=label_names is not None)
    fate = "is not in label_names" if role == "training" else UNSEEN
    labels = classes.numbers(given, rows, "label", fate, allow_unseen)
    clean = None
    if clean_label is not None:
        truth = column_labels(table, clean_label)
        check_all_labelled(table, clean_label, truth, rows, "clean label")
        fate = "is not among the classes"
        clean = classes.numbers(truth, rows, "clean label", fate, allow_unseen)
    kept = ids.take(rows)
    return Examples(kept, inputs, labels, clean, names, dropped=len(table) - len(rows))


def read_texts(
    source: Source, text: str | tuple[str, ...], split: str = "train"
) -> tuple[Sequence[str], Sequence[str] | None]:
    """Read texts without labels, and the second texts where two columns are named.

    >>> read_texts({"a": ["x", "y"], "b": ["1", "2"]}, text="a,b")
    (Strings(['x', 'y']), Strings(['1', '2']))
    """
    table = load_table(source, split)
    return _texts(table, _text_columns(table, text), np.arange(len(table)))


def read_inputs(source: Source, reader: Reader, split: str = "train") -> Inputs:
    """Read inputs without labels."""
    table = load_table(source, split)
    return reader.read(table, np.arange(len(table)))


def _text_columns(table: Table, text: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(text, str):
        parts = (text,) if text in table.frame.columns else tuple(text.split(","))
        columns = tuple(part if part in table.frame.columns else part.strip() for part in parts)
    else:
        columns = tuple(text)
    if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
        raise InputError(f"text must name one column or two different ones, got {text!r}")
    for column in columns:
        table.require(column, "text")
    return columns


def _texts(table: Table, columns: tuple[str, ...], rows: Ints) -> tuple[Strings, Strings | None]:
    found = [_text_column(table, column, rows) for column in columns]
    return found[0], found[1] if len(found) == 2 else None


def _text_column(table: Table, column: str, rows: Ints) -> Strings:
    checked = _checked_texts(table, column, rows)
    strings = table.strings(column)
    if strings is None:
        return Strings.of(checked)
    for _ in checked:  # Arrow keeps them already: only complain
        pass
    return strings.take(rows)


def _checked_texts(table: Table, column: str, rows: Ints) -> Iterator[str]:
    """Give the cells of these rows, each checked to be a text."""
    for row, cell in _cells_of(table, column, rows):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            empty = sum(not str(other or "").strip() for _, other in _cells_of(table, column, rows))
            raise InputError(
                f"{table.place(row)} has no text in column {column!r} "
                f"({such_rows(empty)}); "
                "fill or remove them"
            )
        if not isinstance(cell, str):
            raise InputError(
                f"{table.place(row)} holds a value of type {type(cell).__name__} in column "
                f"{column!r}, expected text; name a text column or turn the values into text"
            )
        if not cell.isascii() and _HALF.search(cell):
            raise InputError(
                f"{table.place(row)} has half a surrogate pair in column {column!r}, which is no "
                "letter; repair the text"
            )
        yield cell


def _cells_of(table: Table, column: str, rows: Ints) -> Iterable[tuple[int, Any]]:
    """Give position and cell of these rows, which are sorted."""
    wanted = np.zeros(len(table), dtype=np.bool_)
    wanted[rows] = True
    return compress(enumerate(table.cells(column)), wanted)


def read_row_ids(table: Table, column: str | None) -> Strings:
    """Read the ids of all rows, unique; without a column they are numbered from "0"."""
    if column is None:
        return Strings.of(map(str, range(len(table))))
    ids = Strings.of(_checked_ids(table, column))
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    if len(np.unique(hashes)) < len(ids):  # equal ids, or, once in a lifetime, equal hashes
        seen: dict[str, int] = {}
        for row, name in enumerate(ids):
            if (first := seen.setdefault(name, row)) != row:
                raise InputError(
                    f"row ids in column {column!r} must be unique, but {name!r} stands in row "
                    f"{first + 1} and in {table.place(row)}; leave row_id out to number the rows"
                )
    return ids


def _checked_ids(table: Table, column: str) -> Iterator[str]:
    for row, cell in enumerate(table.cells(column)):
        whole = isinstance(cell, float) and cell.is_integer()  # pandas reads ids so beside a gap
        name = "" if cell is None else str(int(cell) if whole else cell)
        if not name.strip():
            raise InputError(f"{table.place(row)} has no row id in column {column!r}; give it one")
        yield name
