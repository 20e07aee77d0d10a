"""What a report is made of, whatever it is written as: sections of tables, facts, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from noiseproof.statistics import Summary

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column: its name, what it means, and whether it holds numbers."""

    name: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: What is read first.
        note: What is read next to it: a spread, an interval, a count.
        value: What the column is sorted by; by default the text.
        best: Whether it is the best of its column.
    """

    text: str
    note: str = ""
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the first column names the row.

    Attributes:
        columns: The columns.
        rows: As many cells as there are columns in each.
        note: Stands below.
        title: Stands above.
        fixed: Whether the order of the rows means something, so that no one sorts it.
        folded: What stands in its place until it is opened; empty shows it at once.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    title: str = ""
    fixed: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Facts:
    """Names with a value each; ``folded`` is as with a table."""

    items: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Figures:
    """Charts side by side, as SVG, with one note below them."""

    charts: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out a little."""

    text: str
    warning: bool = False


Block = Table | Facts | Figures | Text


@dataclass
class Section:
    """A heading with what stands below it.

    Attributes:
        title: The heading.
        blocks: What stands below it.
        folded: Whether a page shows it on demand only.
        link: What the list of sections calls it; by default the title.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False
    link: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report; ``verdict`` is what comes out, in a sentence or two."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    verdict: str = ""


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share in percent with one decimal, with a true minus sign.

    >>> percent(0.9137), percent(0.021, signed=True)
    ('91.4', '+2.1')
    """
    if value is None:
        return MISSING
    shown = round(100 * value, 1) + 0.0
    sign = "\N{MINUS SIGN}" if shown < 0 else "+" if signed and shown > 0 else ""
    return f"{sign}{abs(shown):.1f}"


def bounds(found: Summary) -> str:
    """The interval of a difference in points, or why there is none.

    >>> from noiseproof.statistics import summarize
    >>> bounds(summarize([0.1, 0.11])), bounds(summarize([0.1])), bounds(summarize([0.1, 0.1]))
    ('(+4.1 to +16.9)', '(one seed)', '(no spread)')
    """
    if found.interval is None:
        return "(one seed)" if found.n == 1 else "(no spread)"
    low, high = found.interval.low, found.interval.high
    return f"({percent(low, signed=True)} to {percent(high, signed=True)})"


def quantity(value: float | None, decimals: int | None = None) -> str:
    """A number with separated thousands, with as many decimals as its size asks for.

    >>> quantity(22715526), quantity(3.14159), quantity(27.25)
    ('22,715,526', '3.14', '27.2')
    """
    if value is None:
        return MISSING
    if decimals is None:
        size = abs(value)
        decimals = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")
