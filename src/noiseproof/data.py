"""Examples with given labels: from any table to inputs, class numbers and row ids.

What the inputs are is up to a task, see `Inputs` and `Reader`; texts are at home here.

`labels` are the given, possibly wrong labels; `clean_labels` exist where the truth is known and are
for metrics and reports alone. Every complaint names the file, the row and what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError
from noiseproof.tables import (
    Strings,
    Table,
    load_table,
    nearest,
    read_table,
    read_utf8,
    shorten,
    write_table,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from noiseproof.tables import Source

__all__ = [
    "Examples",
    "Inputs",
    "Reader",
    "TextColumns",
    "Texts",
    "content_of",
    "read_examples",
    "read_inputs",
    "read_label_names",
    "read_labels",
    "read_row_ids",
    "read_table",
    "read_texts",
    "stratified_sample",
    "stratified_split",
    "write_table",
]

Ints = npt.NDArray[np.int64]
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0+)?")  # "3", "-1", "3.0"; "007" is a name
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
UNSEEN = "was never seen in training"
FOREIGN = "<foreign>"  # true label where no class is right, as after open-set noise


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
        """Give the texts of every row together: one, or the two of a pair.

        Raises:
            InputError: The rows are no texts.
        """
        raise InputError(f"text noise needs rows of texts, these are {type(self).__name__.lower()}")

    def with_texts(self, texts: npt.NDArray[Any]) -> Inputs:
        """Put other texts (N, K) in the place of those that `as_texts` gives."""
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

    def with_texts(self, texts: npt.NDArray[Any]) -> Texts:
        """Put other texts (N, 1), or pairs (N, 2), in their place."""
        return Texts(*texts.T.tolist())

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
        return Texts(*_texts(table, self.columns(table), rows))


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
        object.__setattr__(self, "labels", _class_numbers(self.labels, "labels", rows, classes))
        if self.clean_labels is not None:
            clean = _class_numbers(self.clean_labels, "clean_labels", rows, classes)
            object.__setattr__(self, "clean_labels", clean)

    @property
    def texts(self) -> Sequence[str]:
        """The texts, where the inputs are texts."""
        return self._texts.texts

    @property
    def text_pairs(self) -> Sequence[str] | None:
        """The second texts of pairs, where the inputs are texts."""
        return self._texts.pairs

    @property
    def _texts(self) -> Texts:
        if not isinstance(self.inputs, Texts):
            raise InputError(f"expected texts, the rows are {type(self.inputs).__name__}")
        return self.inputs

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.inputs)

    def select(self, rows: npt.ArrayLike) -> Examples:
        """Take the rows at these positions, or where this mask is true, in the order given."""
        chosen = np.asarray(rows)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        places = _whole_numbers(chosen, "rows")
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
    columns = reader.columns(table)
    for column, purpose in ((label, "label"), (clean_label, "clean label"), (row_id, "row id")):
        if column is not None:
            table.require(column, purpose)
        if column in columns and column != row_id:
            raise InputError(
                f"column {column!r} of {table.name} cannot be both {reader.kind} and {purpose}"
            )
    ids = read_row_ids(table, row_id)
    given = _read_labels(table, label)
    dropped = np.array([_is_label(name, drop_label) for name in given.names])
    rows = np.flatnonzero(~dropped[given.codes])
    if not len(rows):
        raise InputError(f"every row of {table.name} has the label {drop_label!r} to drop")
    _check_all_labelled(table, label, given, rows, droppable=True)
    inputs = reader.read(table, rows)
    chosen = label_names if label_names is not None else table.class_names.get(label)
    if role == "training":
        _check_trainable(table, label, given, rows, chosen is None)
    names = _sorted_names(given.among(rows)) if chosen is None else _checked(chosen)
    classes = _Classes(table, names, by_position=label_names is not None)
    fate = "is not in label_names" if role == "training" else UNSEEN
    labels = classes.numbers(given, rows, "label", fate, allow_unseen)
    clean = None
    if clean_label is not None:
        truth = _read_labels(table, clean_label)
        _check_all_labelled(table, clean_label, truth, rows, "clean label")
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


def read_labels(source: Source, label: str, split: str = "train") -> tuple[Ints, tuple[str, ...]]:
    """Read labels without texts: class numbers (N,) and names, as `read_examples` finds them.

    >>> read_labels({"y": ["no", "yes", "no"]}, label="y")
    (array([0, 1, 0]), ('no', 'yes'))
    """
    table = load_table(source, split)
    table.require(label, "label")
    given, rows = _read_labels(table, label), np.arange(len(table))
    _check_all_labelled(table, label, given, rows)
    chosen = table.class_names.get(label)
    _check_trainable(table, label, given, rows, chosen is None)
    names = _sorted_names(given.among(rows)) if chosen is None else _checked(chosen)
    classes = _Classes(table, names, by_position=False)
    return classes.numbers(given, rows, "label", "is not among the classes", False), names


def read_label_names(path: str | Path) -> tuple[str, ...]:
    r"""Read class names from a JSON list or from a file with one name per line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "names.txt").write_text("spam\nham\n")
    ...     read_label_names(f"{folder}/names.txt")
    ('spam', 'ham')
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a file of label names")
    content = read_utf8(path)
    if path.suffix.lower() != ".json" and not content.lstrip().startswith("["):
        return _checked([line.strip() for line in content.splitlines() if line.strip()], str(path))
    try:
        names = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); expected a list of names") from error
    if not isinstance(names, list):
        raise InputError(f"{path} holds a {type(names).__name__}, expected a list of names")
    return _checked(names, str(path))


def stratified_split(labels: npt.ArrayLike, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Split rows so that both sides have every class of two rows or more.

    A class with a single row stays on the first side.

    Args:
        labels: (N,) class numbers.
        fraction: Share of the rows on the second side, between 0 and 1.
        seed: Seed of this split alone.

    Returns:
        Sorted row numbers of the rest and of the split.

    >>> rest, held_out = stratified_split([0, 0, 0, 0, 1, 1], fraction=0.34, seed=0)
    >>> len(rest), len(held_out)
    (4, 2)
    """
    classes = _whole_numbers(labels, "labels")
    if not 0 < fraction < 1:  # NaN fails too
        raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
    counts = np.unique(classes, return_counts=True)[1]  # (C,)
    if not (counts > 1).any():
        raise InputError(
            f"cannot split {len(classes)} rows of {len(counts)} classes: no class has two rows"
        )
    sizes = _allocate(fraction * counts, np.minimum(1, counts - 1), counts - 1)
    split = _draw(classes, sizes, seed)
    return np.setdiff1d(np.arange(len(classes)), split), split


def stratified_sample(labels: npt.ArrayLike, size: int, seed: int) -> Ints:
    """Draw rows that keep the shares of the classes, by largest remainder.

    Every class gets a row where `size` is at least the number of classes.

    Args:
        labels: (N,) class numbers.
        size: How many rows to draw, 1 to N.
        seed: Seed of this sample alone.

    Returns:
        (size,) sorted row numbers.

    >>> stratified_sample([0, 1, 0, 0, 0, 1], size=3, seed=0).shape
    (3,)
    """
    classes = _whole_numbers(labels, "labels")
    size = int(_whole_numbers([size], "size")[0])
    if not 1 <= size <= len(classes):
        raise InputError(f"size must lie in 1 to {len(classes)} (the rows), got {size}")
    counts = np.unique(classes, return_counts=True)[1]  # (C,)
    low = np.ones_like(counts) if size >= len(counts) else np.zeros_like(counts)
    return _draw(classes, _allocate(size * counts / counts.sum(), low, counts), seed)


def _allocate(quota: npt.NDArray[np.floating[Any]], low: Ints, high: Ints) -> Ints:
    """Round quotas by largest remainder within bounds.  (C,) -> (C,), sum as near as they allow."""
    total = round(float(quota.sum()))
    sizes: Ints = np.clip(np.floor(quota).astype(np.int64), low, high)
    while sizes.sum() < total and (sizes < high).any():
        sizes[np.where(sizes < high, quota - sizes, -np.inf).argmax()] += 1
    while sizes.sum() > total and (sizes > low).any():
        sizes[np.where(sizes > low, quota - sizes, np.inf).argmin()] -= 1
    return sizes


def _draw(labels: Ints, sizes: Ints, seed: int) -> Ints:
    """Draw so many rows of each class.  (N,), (C,) -> sorted row numbers."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed must be a whole number from 0, got {seed!r}")
    generator = np.random.default_rng(seed)
    drawn = [
        generator.permutation(np.flatnonzero(labels == label))[:size]
        for label, size in zip(np.unique(labels), sizes, strict=True)
    ]
    rows: Ints = np.sort(np.concatenate(drawn))
    return rows


def _whole_numbers(values: npt.ArrayLike, what: str) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"{what} must be whole numbers in one dimension, got {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def _class_numbers(values: npt.ArrayLike, what: str, rows: int, classes: int) -> Ints:
    numbers = _whole_numbers(values, what)
    if len(numbers) != rows:
        raise InputError(f"{what} has {len(numbers)} rows, there are {rows} inputs")
    if numbers.size and (numbers.min() < -1 or numbers.max() >= classes):
        raise InputError(
            f"{what} must lie in 0 to {classes - 1} (-1 for no known class), "
            f"got {numbers.min()} to {numbers.max()}"
        )
    return numbers


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
                f"({_such_rows(empty)}); "
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


@dataclass(frozen=True)
class _Labels:
    """A column of labels: the different ones as text, and which of them each row has."""

    names: tuple[str, ...]  # "" where there is none
    codes: Ints  # (N,) positions in names

    def name(self, row: int) -> str:
        """Give the label of a row."""
        return self.names[int(self.codes[row])]

    def among(self, rows: Ints) -> set[str]:
        """Give the different labels of these rows."""
        return {self.names[code] for code in np.unique(self.codes[rows])}


def _read_labels(table: Table, column: str) -> _Labels:
    seen: dict[str, int] = {}
    texts = (_label_text(table, column, *item) for item in enumerate(table.cells(column)))
    codes = np.fromiter((seen.setdefault(text, len(seen)) for text in texts), np.int64, len(table))
    return _Labels(tuple(seen), codes)


def _label_text(table: Table, column: str, row: int, cell: Any) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, (str, bool, int, float)):
        raise InputError(
            f"{table.place(row)} holds a value of type {type(cell).__name__} in column {column!r}, "
            "expected a label: text, a whole number or a boolean"
        )
    return str(cell).strip()


def _whole(name: str) -> str | None:
    """Give "3" for "3" and "3.0", nothing for what is no whole number."""
    match = _WHOLE.fullmatch(name)
    return str(int(match[1])) if match else None


def _is_label(name: str, wanted: object) -> bool:
    if wanted is None:
        return False
    text = str(wanted).strip()
    return name == text or (_whole(name) is not None and _whole(name) == _whole(text))


def _check_all_labelled(
    table: Table,
    column: str,
    labels: _Labels,
    rows: Ints,
    purpose: str = "label",
    droppable: bool = False,
) -> None:
    remedy = "fill or remove them"
    if droppable:
        remedy += ", or let fit leave such rows out with drop_label=''"
    without = rows[np.array([not name for name in labels.names])[labels.codes[rows]]]
    if len(without):
        raise InputError(
            f"{table.place(without[0])} has no {purpose} in column {column!r} "
            f"({_such_rows(len(without))}); {remedy}"
        )


def _such_rows(count: int) -> str:
    return "1 such row" if count == 1 else f"{count} such rows"


def _check_trainable(table: Table, column: str, labels: _Labels, rows: Ints, guessed: bool) -> None:
    if len(rows) < 2:
        raise InputError(f"{table.name} has {len(rows)} row to train on; expected at least 2")
    kinds = labels.among(rows)
    if len({_whole(name) or name for name in kinds}) < 2:
        raise InputError(
            f"{table.name} has only one class in column {column!r} ({labels.name(rows[0])!r}); "
            "expected at least 2"
        )
    decimals = all(map(_NUMBER.fullmatch, kinds)) and any("." in name for name in kinds)
    if guessed and decimals and len(kinds) == len(rows) and not all(map(_whole, kinds)):
        raise InputError(
            f"the {len(rows)} labels in column {column!r} of {table.name} are all different "
            "decimal numbers, which looks like regression; expected classes, so bin the values"
        )


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    whole = {_whole(name) for name in names}
    if None in whole:
        return tuple(sorted(names))
    return tuple(sorted((name for name in whole if name is not None), key=int))


def _checked(names: Sequence[object], where: str = "label_names") -> tuple[str, ...]:
    if isinstance(names, str) or not names:
        raise InputError(f"{where} must be a list of names, got {names!r}")
    for place, name in enumerate(names):
        if not isinstance(name, (str, int)) or not str(name).strip():
            raise InputError(f"name {place + 1} of {where} must be text, got {name!r}")
    stripped = tuple(str(name).strip() for name in names)
    twice = [name for name, count in Counter(stripped).items() if count > 1]
    if twice:
        raise InputError(f"{where} has a name twice: {shorten(twice)}; names must differ")
    return stripped


@dataclass(frozen=True)
class _Classes:
    """The map from label texts to class numbers; `by_position` lets numbers stand for positions."""

    table: Table
    names: tuple[str, ...]
    by_position: bool

    def numbers(
        self, labels: _Labels, rows: Ints, what: str, fate: str, allow_unseen: bool
    ) -> Ints:
        """Number the classes of these rows, -1 for an unseen one where that is allowed."""
        codes = labels.codes[rows]
        foreign = np.array([what == "clean label" and name == FOREIGN for name in labels.names])
        there = np.unique(codes[~foreign[codes]])  # names in rows that are dropped do not count
        number = np.full(len(labels.names), -1)
        number[there] = [*self._find([labels.names[code] for code in there])]
        numbers: Ints = number[codes]
        unseen = np.flatnonzero((numbers < 0) & ~foreign[codes])
        if unseen.size and not allow_unseen:
            row = int(rows[unseen[0]])
            name = labels.name(row)
            more = f" ({_such_rows(unseen.size)})" if unseen.size > 1 else ""
            remedy = "correct it, or leave such rows out with drop_label"
            if what == "clean label":
                remedy = "correct it, or name all classes in label_names"
            raise InputError(
                f"{what} {name!r} of {self.table.place(row)} {fate}{more}"
                f"{nearest(name, self.names)}; known: {shorten(self.names)}; {remedy}"
            )
        return numbers

    def _find(self, labels: list[str]) -> Iterator[int]:
        known = {name: number for number, name in enumerate(self.names)}
        whole = [_whole(name) for name in self.names]
        if None not in whole:  # "3.0" is class "3" only where all classes are numbers
            known |= {name: number for number, name in enumerate(whole) if name is not None}
            return (known.get(_whole(name) or name, known.get(name, -1)) for name in labels)
        if self.by_position and not any(whole) and all(map(_whole, labels)):
            places = (int(_whole(name) or -1) for name in labels)
            return (place if 0 <= place < len(self.names) else -1 for place in places)
        return (known.get(name, -1) for name in labels)
