"""Small charts: numbers in, one SVG string out.

Colours and fonts are left to the page: a series has the class ``s0`` to ``s6`` (0 is grey, for what
others are compared with), dashed, dotted and both beyond that. Every text is escaped, every mark
has a tooltip, and what is not finite is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6  # beside the grey one
PATTERNS = ("", " dashed", " dotted", " mixed")
SHIFT = 8.0  # pixels by which the whiskers at one x stand apart, the first from the last
NEAR = 30.0  # pixels from the end of a line to its name that a leader may bridge
LETTER = 6.1  # width of a letter at 11 pixels, about
SMALLEST_SPAN = 1e-300  # of an axis; below it steps cannot be told from 0
Range = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Stands at the end of the line.
        x: Positions (n,).
        y: Values (n,); what is not finite leaves a gap.
        style: Its colour and pattern, as `style` numbers them; None is thin, grey and without a
            name, for one of too many.
        low: Lower ends of intervals (n,), where there are any.
        high: Upper ends (n,).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart: a value, with an interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    style: int = 0


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    x_range: Range | None = None,
    y_range: Range | None = None,
    x_ticks: Sequence[float] | None = None,
    marks: bool = True,
    verticals: Sequence[float] = (),
    diagonal: bool = False,
    legend: bool = False,
    doubling: bool = False,
) -> str:
    """Lines over a common axis, each named at its end. Intervals end where the axis does.

    Args:
        series: The lines.
        title: Stands above the chart and says what the values are.
        x_label: Stands below it.
        x_range: Ends of the x axis; by default those of the data.
        y_range: Ends of the y axis; by default round numbers around the data.
        x_ticks: Where to put numbers on the x axis; by default round ones.
        marks: Whether to draw the points.
        verticals: Positions of thin vertical lines.
        diagonal: Whether to draw the line of pure chance from corner to corner.
        legend: Whether the names stand in a list, for lines that all end in one place.
        doubling: Whether equal steps on the x axis are doublings; all x are then positive.
    """
    lines = [line for line in series if any(map(math.isfinite, line.y))]
    if not lines:
        return ""
    lines.sort(key=lambda line: line.style is not None)  # what has a name is drawn on top
    named = [line for line in lines if line.style is not None and len(lines) > 1]
    xs = [x for line in lines for x in line.x]
    ys = [
        y for line in lines for y in (*line.y, *line.low, *line.high) if math.isfinite(y)
    ]  # fmt: skip
    right = 14 + LETTER * max((len(shorten(line.name, 22)) for line in named), default=0)
    width, left, top, bottom = 400, 34, 26, 36
    height = max(250, top + bottom + 13 * len(named))
    low, high = y_range or _padded(ys)
    y_ticks = [tick for tick in ticks(low, high) if low <= tick <= high]
    start, end = x_range or (min(xs), max(xs))
    x_at = _axis(start, end, left + 6, width - right - 6)
    if doubling:
        straight = _axis(math.log2(start), math.log2(end), left + 6, width - right - 6)
        powers = range(math.floor(math.log2(start)), math.ceil(math.log2(end)) + 1)
        x_ticks = [2.0**power for power in powers] if x_ticks is None else x_ticks

        def x_at(value: float) -> float:
            return straight(math.log2(value))

    scale = _axis(low, high, height - bottom, top)

    def y_at(value: float) -> float:
        return scale(max(low, min(high, value)))

    parts = [_text(0, 12, title, "title")]
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right:.1f}"/>')
        parts.append(_text(left - 5, y + 3.5, number(tick), "tick", "end"))
    for tick in x_ticks if x_ticks is not None else ticks(start, end):
        if start <= tick <= end:
            parts.append(_text(x_at(tick), height - bottom + 15, number(tick), "tick", "middle"))
    middle = (left + width - right) / 2
    parts.append(_text(middle, height - 4, x_label, "tick", "middle"))
    for position in verticals:
        x = x_at(position)
        parts.append(f'<path class="grid dashed" d="M{x:.1f} {top}V{height - bottom}"/>')
    if diagonal:
        corners = f"M{x_at(start):.1f} {y_at(low):.1f}L{x_at(end):.1f} {y_at(high):.1f}"
        parts.append(f'<path class="grid dashed" d="{corners}"/>')
    ends: list[tuple[Series, tuple[float, float]]] = []
    step = min(4.0, SHIFT / max(1, len(lines) - 1))
    for index, line in enumerate(lines):
        whiskers = any(map(math.isfinite, line.low))  # they stand side by side
        shift = step * (index - (len(lines) - 1) / 2) if whiskers else 0
        drawn, last = _line(line, x_at, y_at, marks and line.style is not None, shift)
        parts.append(drawn)
        if legend:
            last = (width - right - 5, top + 6 + 13 * len(ends))
        if named and line.style is not None:
            ends.append((line, last))
    parts += _end_labels(ends, width - right, top, height - bottom)
    return _svg(parts, width, height, f"{title}: {', '.join(line.name for line in lines)}")


def dot_chart(dots: Sequence[Dot], *, title: str, x_label: str) -> str:
    """Values with their intervals, one row each, and a line at zero.

    A value without an interval is a ring.
    """
    dots = [dot for dot in dots if math.isfinite(dot.value)]
    if not dots:
        return ""
    names = [shorten(dot.name, 22) for dot in dots]
    step, top, bottom, width = 19, 26, 34, 400
    height = top + step * len(dots) + bottom
    left = 10 + LETTER * max(map(len, names))
    ends = [v for dot in dots for v in (dot.value, dot.low, dot.high) if v is not None]
    low, high = _padded([*ends, 0.0])
    x_at = _axis(low, high, left, width - 12)
    floor = height - bottom
    parts = [_text(0, 12, title, "title")]
    for tick in ticks(low, high):
        if low <= tick <= high:
            x, kind = x_at(tick), "zero" if tick == 0 else "grid"
            parts.append(f'<path class="{kind}" d="M{x:.1f} {top}V{floor}"/>')
            parts.append(_text(x, floor + 14, number(tick, signed=True), "tick", "middle"))
    parts.append(_text((left + width - 12) / 2, height - 3, x_label, "tick", "middle"))
    for index, (dot, name) in enumerate(zip(dots, names, strict=True)):
        y = top + step * (index + 0.5)
        tip = f"{dot.name}: {number(dot.value, signed=True)}"
        bar, hole = "", " ring"
        if dot.low is not None and dot.high is not None:
            tip += f" [{number(dot.low, signed=True)}, {number(dot.high, signed=True)}]"
            bar, hole = f'<path d="M{x_at(dot.low):.1f} {y:.1f}H{x_at(dot.high):.1f}"/>', ""
        circle = f'<circle class="dot{hole}" cx="{x_at(dot.value):.1f}" cy="{y:.1f}" r="3.5"/>'
        parts.append(_text(left - 8, y + 3.5, name, "name", "end"))
        parts.append(f'<g class="series {style(dot.style)}">{_tip(tip)}{bar}{circle}</g>')
    return _svg(parts, width, height, f"{title}: {', '.join(dot.name for dot in dots)}")


def heat_map(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
) -> str:
    """A square matrix of shares as shades, rows by columns.

    Args:
        values: Shares in [0, 1], (C, C).
        names: Of rows and columns alike (C,).
        title: Stands above the map.
        row_label: What the rows are.
        column_label: What the columns are.
    """
    size = len(values)
    if not size:
        return ""
    shown = [shorten(name, 12) for name in names]
    cell = max(11.0, min(36.0, 264 / size))
    space = LETTER * max(map(len, shown)) + 8
    upright = cell < LETTER * max(map(len, shown)) + 4  # names of columns stand on their heads
    left, top = space + 16, 34 + (space if upright else 18)
    width, height = left + cell * size + 2, top + cell * size + 2
    parts = [_text(0, 12, title, "title")]
    parts.append(_text(left, 30, f"{column_label} →", "tick"))
    middle = top + cell * size / 2
    turned = f'transform="rotate(-90 9 {middle:.1f})"'
    parts.append(_text(9, middle, f"← {row_label}", "tick", "middle", turned))
    for index, name in enumerate(shown):
        centre = cell * (index + 0.5)
        parts.append(_text(left - 5, top + centre + 3.5, name, "name", "end"))
        x, y = left + centre, top - 6
        turn = f'transform="rotate(-90 {x + 3.5:.1f} {y:.1f})"' if upright else ""
        place = (x + 3.5, y, name, "name", "start") if upright else (x, y, name, "name", "middle")
        parts.append(_text(*place, turn))
    for row, column in ((row, column) for row in range(size) for column in range(size)):
        share = values[row][column]
        if not math.isfinite(share):
            continue
        x, y = left + cell * column, top + cell * row
        tip = _tip(f"{names[row]} → {names[column]}: {100 * share:.1f} %")
        box = f'x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}"'
        shade = f'fill-opacity="{max(0.0, min(1.0, share)):.3f}"'
        text = ""
        if cell >= 22 and share >= 0.005:
            kind = "value over" if share > 0.5 else "value"
            text = _text(x + cell / 2, y + cell / 2 + 3.5, f"{100 * share:.0f}", kind, "middle")
        parts.append(
            f'<g>{tip}<rect class="cell" {box}/><rect class="heat" {box} {shade}/>{text}</g>'
        )
    return _svg(parts, width, height, title, kind="chart map")


def style(number_: int | None) -> str:
    """CSS classes of the n-th series.

    Six colours, then the same in other patterns; 0 and below are grey in all patterns, and None is
    what has no name.

    >>> style(6), style(7), style(13), style(0), style(-1), style(None)
    ('s6', 's1 dashed', 's1 dotted', 's0', 's0 dashed', 'quiet')
    """
    if number_ is None:
        return "quiet"
    turn, colour = divmod(number_ - 1, COLOURS) if number_ > 0 else (-number_, -1)
    return f"s{colour + 1}{PATTERNS[turn % len(PATTERNS)]}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover [low, high], about ``most`` of them.

    >>> ticks(0.0, 10.0)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = high - low
    if not span > SMALLEST_SPAN:
        return [low]
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if span / (power * unit) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(float(index * step), 12) for index in range(first, last + 1)]


def number(value: float, *, signed: bool = False) -> str:
    """A number as short as four digits allow, with a true minus sign.

    >>> number(0.25), number(3.0, signed=True), number(0.0, signed=True)
    ('0.25', '+3', '0')
    """
    text = f"{abs(value):.4g}"
    return "\N{MINUS SIGN}" * (value < 0) + "+" * (signed and value > 0) + text


def shorten(text: str, longest: int) -> str:
    """The text, cut in its middle to a number of letters: names often differ at their ends.

    >>> shorten("CrossEntropy (tune=full)", 17)
    'CrossE…tune=full)'
    """
    if len(text) <= longest:
        return text
    head = (longest - 1) * 2 // 5
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def _line(
    line: Series,
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    marks: bool,
    shift: float,
) -> tuple[str, tuple[float, float]]:
    """One line with its points and whiskers, and where it ends."""
    path, points, whiskers, pen, last = "", "", "", "M", (0.0, 0.0)
    for index, (x_value, y_value) in enumerate(zip(line.x, line.y, strict=True)):
        if not math.isfinite(y_value):
            pen = "M"
            continue
        x, y = x_at(x_value) + shift, y_at(y_value)
        path += f"{pen}{x:.1f} {y:.1f}"
        pen, last = "L", (x, y)
        tip = f"{line.name}: {number(y_value)} at {number(x_value)}"
        if line.low and math.isfinite(line.low[index]) and math.isfinite(line.high[index]):
            low, high = line.low[index], line.high[index]
            tip += f" [{number(low)}, {number(high)}]"
            whiskers += f"M{x:.1f} {y_at(low):.1f}V{y_at(high):.1f}"
        if marks:
            points += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2">{_tip(tip)}</circle>'
    whisker = f'<path class="whisker" d="{whiskers}"/>' if whiskers else ""
    drawn = f'{whisker}<path class="line" d="{path}"/>{points}'
    return f'<g class="series {style(line.style)}">{_tip(line.name)}{drawn}</g>', last


def _end_labels(
    ends: Iterable[tuple[Series, tuple[float, float]]], x: float, top: float, bottom: float
) -> list[str]:
    """Names beside the ends of their lines, pushed apart so that they do not overlap.

    A line that ends far from its name has a dash of its kind beside it, and no leader.
    """
    ordered = sorted(ends, key=lambda end: end[1][1])
    gap = min(12.5, (bottom - top + 16) / max(1, len(ordered)))
    places: list[float] = []
    for _, (_, y) in ordered:
        places.append(max(y, places[-1] + gap) if places else max(y, top - 6))
    limit = bottom + 8
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    parts = []
    for (line, (end_x, end_y)), place in zip(ordered, places, strict=True):
        far = x - end_x > NEAR
        start = f"{x - 4:.1f} {place:.1f}" if far else f"{end_x + 3:.1f} {end_y:.1f}"
        leader = f'<path class="leader" d="M{start}L{x + 8:.1f} {place:.1f}"/>'
        label = _text(x + 11, place + 3.5, shorten(line.name, 22), "name")
        parts.append(f'<g class="{style(line.style)}">{_tip(line.name)}{leader}{label}</g>')
    return parts


def _axis(start: float, end: float, low: float, high: float) -> Callable[[float], float]:
    """A straight map from values to pixels; a single value stands in the middle."""
    if end == start:
        return lambda value: (low + high) / 2
    return lambda value: low + (value - start) / (end - start) * (high - low)


def _padded(values: Sequence[float]) -> Range:
    """Round numbers around values."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    around = ticks(low, high)
    return around[0], around[-1]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"'
        f"{' ' if extra else ''}{extra}>{escape(text)}</text>"
    )


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(parts: Iterable[str], width: float, height: float, label: str, kind: str = "chart") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
