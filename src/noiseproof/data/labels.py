"""Labels: read from a column, checked, and numbered by their classes."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError, path_of
from noiseproof.tables import Table, load_table, nearest, read_utf8, shorten

if TYPE_CHECKING:
    from noiseproof.tables import Source

Ints = npt.NDArray[np.int64]
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0+)?")  # "3", "-1", "3.0"; "007" is a name
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
UNSEEN = "was never seen in training"
EMPTY = {"nan", "na", "n/a", "#n/a", "<na>", "null", "nil", "none"}  # in any case
FOREIGN = "<foreign>"  # true label where no class is right, as after open-set noise


def read_labels(source: Source, label: str, split: str = "train") -> tuple[Ints, tuple[str, ...]]:
    """Read labels without texts: class numbers (N,) and names, as `read_examples` finds them.

    >>> read_labels({"y": ["no", "yes", "no"]}, label="y")
    (array([0, 1, 0]), ('no', 'yes'))
    """
    table = load_table(source, split)
    table.require(label, "label")
    given, rows = column_labels(table, label), np.arange(len(table))
    check_all_labelled(table, label, given, rows)
    chosen = table.class_names.get(label)
    check_trainable(table, label, given, rows, chosen is None)
    names = sorted_names(given.among(rows)) if chosen is None else checked_names(chosen)
    classes = Classes(table, names, by_position=False)
    return classes.numbers(given, rows, "label", "is not among the classes", False), names


def read_label_names(path: str | Path) -> tuple[str, ...]:
    r"""Read class names from a JSON list or from a file with one name per line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "names.txt").write_text("spam\nham\n")
    ...     read_label_names(f"{folder}/names.txt")
    ('spam', 'ham')
    """
    path = path_of(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a file of label names")
    content = read_utf8(path)
    if path.suffix.lower() != ".json" and not content.lstrip().startswith("["):
        return checked_names(
            [line.strip() for line in content.splitlines() if line.strip()], str(path)
        )
    try:
        names = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); expected a list of names") from error
    if not isinstance(names, list):
        raise InputError(f"{path} holds a {type(names).__name__}, expected a list of names")
    return checked_names(names, str(path))


def whole_numbers(values: npt.ArrayLike, what: str) -> Ints:
    """Check that these are whole numbers in one dimension."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"{what} must be whole numbers in one dimension, got {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def class_numbers(values: npt.ArrayLike, what: str, rows: int, classes: int) -> Ints:
    """Check that N rows have the number of a class each, or -1."""
    numbers = whole_numbers(values, what)
    if len(numbers) != rows:
        raise InputError(f"{what} has {len(numbers)} rows, there are {rows} inputs")
    if numbers.size and (numbers.min() < -1 or numbers.max() >= classes):
        raise InputError(
            f"{what} must lie in 0 to {classes - 1} (-1 for no known class), "
            f"got {numbers.min()} to {numbers.max()}"
        )
    return numbers


@dataclass(frozen=True)
class Labels:
    """A column of labels: the different ones as text, and which of them each row has."""

    names: tuple[str, ...]  # "" where there is none
    codes: Ints  # (N,) positions in names

    def name(self, row: int) -> str:
        """Give the label of a row."""
        return self.names[int(self.codes[row])]

    def among(self, rows: Ints) -> set[str]:
        """Give the different labels of these rows."""
        return {self.names[code] for code in np.unique(self.codes[rows])}


def column_labels(table: Table, column: str) -> Labels:
    """Read a column of labels; a missing one is ""."""
    seen: dict[str, int] = {}
    texts = (_label_text(table, column, *item) for item in enumerate(table.cells(column)))
    codes = np.fromiter((seen.setdefault(text, len(seen)) for text in texts), np.int64, len(table))
    return Labels(tuple(seen), codes)


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


def is_label(name: str, wanted: object) -> bool:
    """Whether a label is the wanted one; "3.0" is "3"."""
    if wanted is None:
        return False
    text = str(wanted).strip()
    return name == text or (_whole(name) is not None and _whole(name) == _whole(text))


def check_all_labelled(
    table: Table,
    column: str,
    labels: Labels,
    rows: Ints,
    purpose: str = "label",
    droppable: bool = False,
) -> None:
    """Raise if one of these rows has no label."""
    remedy = "fill or remove them"
    if droppable:
        remedy += ", or let fit leave such rows out with drop_label=''"
    without = rows[np.array([not name for name in labels.names])[labels.codes[rows]]]
    if len(without):
        raise InputError(
            f"{table.place(without[0])} has no {purpose} in column {column!r} "
            f"({such_rows(len(without))}); {remedy}"
        )


def such_rows(count: int) -> str:
    """Count rows in words."""
    return "1 such row" if count == 1 else f"{count} such rows"


def check_trainable(table: Table, column: str, labels: Labels, rows: Ints, guessed: bool) -> None:
    """Raise unless there are two rows and two classes, and `guessed` ones are no measurements.

    Warn of a guessed class whose name stands for no label in other programs.
    """
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
    for code in np.unique(labels.codes[rows]) if guessed else ():
        name = labels.names[code]
        if name.casefold() in EMPTY:
            found = rows[labels.codes[rows] == code]
            remedy = "remove such rows"
            if name.casefold() != "null":  # which is nothing at all on the command line
                remedy += f", or let fit leave them out with --drop-label {name!r}"
            warnings.warn(
                f"{table.place(found[0])} has the label {name!r} in column {column!r} "
                f"({such_rows(len(found))}), which is taken as a class; if it stands for no label, "
                f"{remedy}",
                UserWarning,
                stacklevel=2,
            )


def check_classes(labels: Ints, names: Sequence[str], column: str) -> None:
    """Raise if every row has a class of its own, and warn of what looks like a mistake.

    Args:
        labels: Class numbers (N,).
        names: Of the classes (C,).
        column: Where the labels stand.
    """
    rows = np.bincount(labels[labels >= 0], minlength=len(names))  # (C,)
    there = [name for name, count in zip(names, rows, strict=True) if count]
    single = int((rows == 1).sum())
    if single == len(labels):
        raise InputError(
            f"each of the {len(labels)} rows has a class of its own in column {column!r} "
            f"({shorten(there, 3)}); expected classes of several rows, so name another column of "
            "labels"
        )
    if single > len(there) / 2:
        warnings.warn(
            f"{single} of {len(there)} classes in column {column!r} have a single row; is it the "
            "column of the labels?",
            UserWarning,
            stacklevel=2,
        )
    for alike in _alike(there):
        warnings.warn(
            f"the classes {' and '.join(map(repr, alike))} differ in their case alone; write them "
            "alike if they are one class",
            UserWarning,
            stacklevel=2,
        )
    numbers = [name for name in there if _NUMBER.fullmatch(name)]
    if len(numbers) == 1 and len(there) > 2:
        warnings.warn(
            f"the class {numbers[0]!r} is a number and all others are names; correct it if it is a "
            "mistake",
            UserWarning,
            stacklevel=2,
        )


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that differ in their case alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Sort names of classes: by number where all are whole numbers, else by name."""
    whole = {_whole(name) for name in names}
    if None in whole:
        return tuple(sorted(names))
    return tuple(sorted((name for name in whole if name is not None), key=int))


def checked_names(names: Sequence[object], where: str = "label_names") -> tuple[str, ...]:
    """Check names of classes that were given: text, none of them twice."""
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
class Classes:
    """The map from label texts to class numbers; `by_position` lets numbers stand for positions."""

    table: Table
    names: tuple[str, ...]
    by_position: bool

    def numbers(self, labels: Labels, rows: Ints, what: str, fate: str, allow_unseen: bool) -> Ints:
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
            more = f" ({such_rows(unseen.size)})" if unseen.size > 1 else ""
            remedy = "correct it, or leave such rows out with drop_label"
            if what == "clean label":
                remedy = "correct it, or name all classes in label_names"
            raise InputError(
                f"the {what} {name!r} of {self.table.place(row)} {fate}{more}"
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
