"""Charts are well-formed SVG, put values where they belong, and show text as text."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from noiseproof.charts import Dot, Series, dot_chart, heat_map, line_chart, shorten, style, ticks

SVG = ElementTree.Element
EVIL = '</title><script>alert("x")</script>'


def parsed(chart: str) -> SVG:
    return ElementTree.fromstring(chart)


def texts(chart: str) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(chart).iter("text")]


def points(chart: str) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parsed(chart).iter("circle")]


def line(y: list[float], name: str = "a", **more: object) -> Series:
    return Series(name, list(range(len(y))), y, **more)  # type: ignore[arg-type]


def chart(*series: Series, **more: object) -> str:
    return line_chart(series, title="t", x_label="x", **more)  # type: ignore[arg-type]


def test_points_lie_where_their_values_are() -> None:
    """Equal steps in value are equal steps on paper, and up is more."""
    (x0, y0), (x1, y1), (x2, y2) = points(chart(line([0.0, 50.0, 100.0])))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0


def test_a_missing_value_leaves_a_gap() -> None:
    drawn = chart(line([1.0, math.nan, 3.0, 4.0]))
    assert len(points(drawn)) == 3
    path = next(p for p in parsed(drawn).iter("path") if p.get("class") == "line")
    assert path.attrib["d"].count("M") == 2 and "nan" not in drawn


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart() == "" and chart(line([math.nan])) == ""
    assert dot_chart([], title="t", x_label="x") == ""
    assert heat_map([], [], title="t", row_label="r", column_label="c") == ""


def test_intervals_end_where_the_axis_does() -> None:
    """With two seeds an interval may reach from minus to plus infinity, nearly."""
    drawn = chart(
        Series("a", [0, 1], [50, 60], low=[-900, 55], high=[1000, 65]), y_range=(0, 100)
    )  # fmt: skip
    (path,) = [p for p in parsed(drawn).iter("path") if p.get("class") == "whisker"]
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)", path.attrib["d"])]
    heights += [float(y) for y in re.findall(r"V([\d.]+)", path.attrib["d"])]
    assert all(0 <= y <= 250 for y in heights)
    assert "[−900, 1000]" in drawn  # noqa: RUF001 (the tooltip has the whole of it)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=14))
@example(values=[5e-324])
def test_labels_at_the_ends_do_not_overlap(values: list[float]) -> None:
    series = [line([0.0, value], f"method {i}") for i, value in enumerate(values)]
    places = sorted(
        float(node.attrib["y"])
        for node in parsed(chart(*series)).iter("text")
        if node.get("class") == "name"
    )
    assert len(places) == (len(values) if len(values) > 1 else 0)
    assert all(b - a >= 10.5 for a, b in itertools.pairwise(places))


def test_a_dot_without_interval_is_a_ring_and_zero_is_always_in_view() -> None:
    drawn = dot_chart([Dot("a", 5, 3, 7), Dot("b", 4)], title="t", x_label="x")
    classes = [node.get("class") for node in parsed(drawn).iter("circle")]
    assert classes == ["dot", "dot ring"]
    assert "zero" in [node.get("class") for node in parsed(drawn).iter("path")]
    assert "a: +5 [+3, +7]" in drawn


def test_a_heat_map_shades_by_value() -> None:
    drawn = heat_map(
        [[0.75, 0.25], [math.nan, 1.0]], ["x", "y"], title="t", row_label="r", column_label="c"
    )
    shades = [
        float(node.attrib["fill-opacity"])
        for node in parsed(drawn).iter("rect")
        if node.get("class") == "heat"
    ]
    assert shades == [0.75, 0.25, 1.0]
    assert "x → y: 25.0 %" in drawn and {"75", "25", "100"} <= set(texts(drawn))


def test_every_text_is_escaped() -> None:
    for drawn in (
        chart(line([1.0, 2.0], EVIL), line([1.0, 3.0], "b")),
        line_chart([line([1.0, 2.0])], title=EVIL, x_label=EVIL),
        dot_chart([Dot(EVIL, 1)], title=EVIL, x_label=EVIL),
        heat_map([[1.0]], [EVIL], title=EVIL, row_label=EVIL, column_label=EVIL),
    ):
        assert "<script" not in drawn
        assert not list(parsed(drawn).iter("script"))
        assert any(EVIL in title for title in (*texts(drawn), parsed(drawn).get("aria-label", "")))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_with_few_even_steps(low: float, span: float) -> None:
    high = low + span
    if high == low:
        return
    found = ticks(low, high)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * (abs(low) + span) and found[-1] >= high - 1e-6 * (
        abs(high) + span
    )
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in itertools.pairwise(found))


def test_twenty_four_styles_are_all_different() -> None:
    """A grid of 21 methods in which two lines look alike cannot be read."""
    assert len({style(n) for n in range(1, 25)}) == 24
    assert len({style(n) for n in (0, -1, -2, -3)}) == 4 and style(25) == style(1)


def test_a_line_without_a_style_has_no_name_and_is_drawn_below() -> None:
    """Of many methods the few best are named; the others stay in sight and in the tooltip."""
    drawn = chart(line([1.0, 2.0], "best"), line([1.0, 3.0], "one of many", style=None))
    assert [node.text for node in parsed(drawn).iter("text") if node.get("class") == "name"] == [
        "best"
    ]
    groups = [g.get("class") for g in parsed(drawn) if (g.get("class") or "").startswith("series")]
    assert groups == ["series quiet", "series s0"] and "one of many" in drawn


def test_whiskers_at_one_place_stand_within_a_few_pixels() -> None:
    """Twelve lines shifted by four pixels each would move a point by a whole rate."""
    bars = [line([1.0, 2.0], str(n), low=[0.0, 1.0], high=[2.0, 3.0]) for n in range(12)]
    firsts = [x for x, _ in points(chart(*bars))[::2]]
    assert len(firsts) == 12 and 7 <= max(firsts) - min(firsts) <= 8.1
    none = [line([1.0, 2.0], str(n), low=[math.nan] * 2, high=[math.nan] * 2) for n in range(3)]
    assert len({x for x, _ in points(chart(*none))[::2]}) == 1, "without whiskers no shift"


def test_no_leader_runs_across_the_chart() -> None:
    """A line that ends early has a dash beside its name; the others are led to theirs."""
    drawn = chart(line([1.0, 2.0], "short"), line([1.0, 2.0, 2.5, 3.0, 3.5], "long"))
    for node in parsed(drawn).iter("path"):
        if node.get("class") == "leader":
            start, end = re.findall(r"[ML]([\d.]+) ", node.attrib["d"])
            assert 0 < float(end) - float(start) < 40


def test_long_names_keep_both_ends() -> None:
    """`CrossEntropy (dropout=0)` and `CrossEntropy (dropout=none)` must not become one name."""
    one, two = (shorten(f"CrossEntropy (dropout={v})", 20) for v in ("0.25", "none"))
    assert one != two and len(one) == len(two) == 20
    assert shorten("short", 20) == "short"
