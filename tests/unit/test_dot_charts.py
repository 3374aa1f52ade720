"""Charts of rows, points, cells and tallies: values in their places, names that fit, text that stays text."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.reporting.frame import HEIGHT, TOP, WIDTH, Chart
from curate.reporting.heat import Cell, heat_map, shade_entry, shade_of
from curate.reporting.lettering import fitted, width
from curate.reporting.marks import Shape, bracket_entry, mark, mark_entry, zone_entry
from curate.reporting.rows import LEFT, RIGHT, Mark, Row, row_chart
from curate.reporting.scales import Axis, ratio_scale
from curate.reporting.scatter import Guides, Point, scatter_chart
from curate.reporting.tallies import tally_chart

FEW = settings(max_examples=100, deadline=None)
HOSTILE = "</title><script>alert(1)</script>\"' onload=x \u202eexe \ud800\x00 &amp;"
RATIO = Axis("ratio", log=True, include=(0.5, 2.0))


def parsed(chart: Chart) -> ElementTree.Element:
    """The drawing as XML; a mistake in it is an exception."""
    return ElementTree.fromstring(str(chart.svg))


def with_class(chart: Chart, name: str) -> list[ElementTree.Element]:
    return [node for node in parsed(chart).iter() if name in node.get("class", "").split()]


def texts(chart: Chart) -> list[str]:
    """What is written, without what is only read when one points at it."""
    return ["".join(node.itertext()) for node in parsed(chart).iter("text")]


def across(node: ElementTree.Element) -> float:
    """The horizontal place of a circle."""
    return float(node.get("cx", ""))


@given(st.lists(st.floats(0, 1e6), max_size=12))
@FEW
def test_a_scale_of_ratios_holds_one(values: list[float]) -> None:
    """It rises, has a tick at 1, and keeps labels apart."""
    scale = ratio_scale(values)
    assert scale.low < scale.high
    assert 1.0 in scale.ticks
    assert list(scale.ticks) == sorted(set(scale.ticks))
    places = [scale.at(tick) for tick in scale.ticks]
    assert min(b - a for a, b in pairwise(places)) >= 0.085 - 1e-9
    inside = [value for value in values if 0.02 <= value <= 50]
    assert all(scale.low <= value * 1.001 and value * 0.999 <= scale.high for value in inside)


def test_the_ticks_of_known_ratios() -> None:
    """The ends of the screening range are among them where there is room."""
    assert ratio_scale([0.45, 1.8]).labels == ("0.4", "0.5", "0.6", "0.8", "1", "1.25", "1.5", "2")
    assert ratio_scale([0.0, 3.0]).ticks[0] == 0.02
    assert ratio_scale([]).low < 1 < ratio_scale([]).high


@given(st.text(max_size=200), st.floats(0, 300))
@FEW
def test_a_name_is_cut_to_its_room(name: str, room: float) -> None:
    """What fits stays whole; what does not ends in an ellipsis and fits."""
    cut = fitted(name, room)
    assert cut == "…" or width(cut) <= max(room, width("…")) + 1e-9
    assert cut.endswith("…") or width(cut) <= room
    assert fitted("women", 500) == "women"
    assert fitted("captions of unknown origin", 100) == "captions of…"
    assert width("中文") == 28


def test_marks_stand_at_their_values() -> None:
    """A ratio and its reciprocal lie at equal distances from 1, and an interval reaches from limit to limit."""
    rows = [Row("a", "half", [Mark(0.5, 0.4, 0.8)]), Row("b", "one", [Mark(1.0)]), Row("c", "double", [Mark(2.0)])]
    chart = row_chart("t", rows, x=RATIO, line=1.0)
    half, one, double = (across(dot) for dot in with_class(chart, "dot"))
    assert one - half == pytest.approx(double - one, abs=0.2)
    start, end = (
        float(x) for x in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", with_class(chart, "stroke")[0].get("d", ""))[0]
    )
    assert (half - start) / (end - half) == pytest.approx(math.log(0.5 / 0.4) / math.log(0.8 / 0.5), abs=0.02)
    assert chart.description == "a: half. b: one. c: double."
    tall = [float(dot.get("cy", "")) for dot in with_class(chart, "dot")]
    assert tall == sorted(tall)


@pytest.mark.parametrize("value", [0.0, math.inf, 1e-9, 1e9])
def test_what_the_axis_cannot_hold_has_an_arrow(value: float) -> None:
    """None selected, no rest, and far values stay inside the drawing, with an arrow at the end."""
    chart = row_chart("t", [Row("a", "", [Mark(value, 0.0, math.inf)])], x=RATIO)
    (dot,) = with_class(chart, "dot")
    assert across(dot) == (LEFT + 9 if value < 1 else RIGHT - 9)  # beside its arrow
    assert with_class(chart, "stroke")[0].get("d", "").count("M") == 3  # a line and two arrows


def test_a_bracket_is_open_where_nothing_could_be_seen() -> None:
    """Both ends are drawn where both are known; an endless side has none."""
    closed = row_chart("t", [Row("a", "", [Mark(1.0)], blind=(0.8, 1.2))], x=RATIO)
    opened = row_chart("t", [Row("a", "", [Mark(1.0)], blind=(0.0, 1.2))], x=RATIO)
    ends = [with_class(chart, "bracket")[0].get("d", "").count("v10") for chart in (closed, opened)]
    assert ends == [2, 1]


def test_rows_grow_and_stay_inside() -> None:
    """Height follows the rows, marks apart have a line each, and linked ones a stroke between them."""
    one = row_chart("t", [Row("a", "", [Mark(1.0), Mark(2.0)])], x=Axis())
    many = row_chart("t", [Row("a", "", [Mark(1.0), Mark(2.0)], apart=True)] * 30, x=Axis())
    heights = [float(parsed(chart).get("viewBox", "").split()[3]) for chart in (one, many)]
    assert heights[1] > 15 * heights[0]
    assert max(float(dot.get("cy", "")) for dot in with_class(many, "dot")) < heights[1] - 40
    assert len({dot.get("cy") for dot in with_class(many, "dot")}) == 60
    linked = row_chart("t", [Row("a", "", [Mark(1.0, shape="ring"), Mark(2.0)], linked=True)], x=Axis())
    assert len(with_class(linked, "stroke")) == len(with_class(one, "stroke")) + 1
    assert parsed(row_chart("empty", [], x=RATIO, zone=(0.8, 1.25), line=1.0)) is not None


def test_upright_lines_spare_the_names() -> None:
    """Lines and the zone are drawn beside marks only, so that no name is struck through."""
    chart = row_chart("t", [Row("a", "n", [Mark(0.7)]), Row("b", "n", [Mark(1.1)])], x=RATIO, zone=(0.8, 1.25))
    baselines = [float(node.get("y", "")) for node in with_class(chart, "name")]
    for line in with_class(chart, "grid"):
        for top, end in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", line.get("d", "")):
            assert all(not float(top) < y < float(end) for y in baselines)
    assert len(list(with_class(chart, "zone")[0])) == 2


def test_shapes_differ_without_colour() -> None:
    """No two shapes are drawn alike."""
    shapes: tuple[Shape, ...] = ("dot", "ring", "diamond", "square", "triangle", "bar")
    assert len({str(mark(shape, 10, 10, 0)) for shape in shapes}) == 6
    legend = str(
        mark_entry("diamond", HOSTILE, 1, line=True) + bracket_entry("b") + zone_entry("z") + shade_entry(1, "s")
    )
    assert "<script" not in legend


def test_names_beside_points_do_not_collide() -> None:
    """Names keep apart from each other and inside; those without room are left off; nothing is lost but a label."""
    points = [Point(n / 16, (n * 7 % 11) / 11, f"group number {n}", named=True) for n in range(16)]
    chart = scatter_chart("t", points, x=Axis("x"), y=Axis("y"), words="w")
    assert len(with_class(chart, "dot")) == 16
    named = with_class(chart, "name")
    assert 5 <= len(named) <= 12
    boxes = []
    for node in named:
        wide, x, y = width("".join(node.itertext())), float(node.get("x", "")), float(node.get("y", ""))
        left = x - wide if "end" in node.get("class", "") else x - wide / 2 if "middle" in node.get("class", "") else x
        boxes.append((left, y - 11, left + wide, y + 3))
    for n, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= WIDTH
        assert TOP - 10 <= top < bottom <= HEIGHT
        assert not any(left < r and x < right and top < b and y < bottom for x, y, r, b in boxes[n + 1 :])


def test_guides_lie_behind_the_points() -> None:
    """Lines, the zone and the corner words are drawn, the first point last; missing values have no place."""
    guides = Guides([1.3], [1.0], (0.8, None, 1.25, None), ("a", "b", "c", "d"))
    points = [Point(0.5, 2.0, "first", named=True), Point(2.0, 1.0, "second", "ring"), Point(math.nan, 1.0, "lost")]
    chart = scatter_chart("t", points, x=RATIO, y=Axis("y"), guides=guides, words="two groups")
    assert [t for t in texts(chart) if t in "abcd"] == ["a", "b", "c", "d"]
    kinds = [node.get("class", "") for node in parsed(chart)]
    assert kinds.index("zone") < kinds.index("ring c0") < kinds.index("dot c0")
    assert len(with_class(chart, "dot")) == len(with_class(chart, "ring")) == 1
    assert chart.description == "two groups"


def test_cells_say_their_number() -> None:
    """Text and n stand in the cell, flagged ones are framed, missing ones empty; the words say it all again."""
    cells = {("women", "old"): Cell("0.62", "412", -0.7, firm=True), ("men", "old"): Cell("-", "3")}
    chart = heat_map("t", ["women", "men"], ["old", "young"], cells)
    assert [text for text in texts(chart) if text[:1] in "0-43"] == ["0.62", "412", "-", "3"]
    assert len(with_class(chart, "frame")) == len(with_class(chart, "hollow")) == len(with_class(chart, "cell")) == 1
    assert "women: old 0.62 (412)." in chart.description


def test_shades_are_symmetric_and_leave_text_legible() -> None:
    """A ratio and its reciprocal are as deep, in another hue; none is deeper than half."""
    assert shade_of(0.5) == -1 == -shade_of(2.0)
    assert shade_of(0.8) == pytest.approx(-shade_of(1.25))
    assert (shade_of(0.0), shade_of(math.inf), shade_of(1.0)) == (-1.0, 1.0, 0.0)
    cells = {(str(n), "x"): Cell("a", "b", shade) for n, shade in enumerate((-1.0, -0.2, 0.2, 1.0))}
    chart = heat_map("t", ["0", "1", "2", "3"], ["x"], cells)
    drawn = with_class(chart, "cell")
    assert [float(cell.get("fill-opacity", "")) for cell in drawn] == [0.5, 0.15, 0.15, 0.5]
    assert [cell.get("class", "")[-2:] for cell in drawn] == ["c1", "c1", "c0", "c0"]


@pytest.mark.parametrize("names", [["old", "young"], [f"a long name of group {n}" for n in range(8)], [HOSTILE] * 1])
def test_heads_of_columns_stay_inside(names: list[str]) -> None:
    """Short names stand upright, long ones slanted and cut; the drawing is high enough for them."""
    chart = heat_map("t", ["row"], names, {})
    slanted = [node for node in with_class(chart, "tick") if node.get("transform")]
    assert len(slanted) == (8 if len(names) == 8 else 0) or names == [HOSTILE]
    for node in slanted:
        wide, x, y = width("".join(node[0].tail or "")), float(node.get("x", "")), float(node.get("y", ""))
        assert x + 0.79 * wide <= WIDTH + 4
        assert y - 0.62 * wide >= -2


def test_a_tally_counts_and_marks_ones_own() -> None:
    """Bars are as high as their counts; the own number stands out and lies within the axis."""
    chart = tally_chart("t", [0, 0, 0, 1], 9, x=Axis("flags"), y=Axis("draws"), names=("random", "this"))
    heights = [float(bar.get("height", "")) for bar in with_class(chart, "bar")]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.3)
    assert chart.description == "random: 3 with 0, 1 with 1. this: 9."
    place = float(re.findall(r"M([\d.]+)", with_class(chart, "level")[0].get("d", ""))[0])
    assert 50 < place < WIDTH - 14
    assert "9" in texts(chart)


def test_hostile_names_stay_text() -> None:
    """Names with markup, directions and control characters are escaped or cut in every chart."""
    cells = {(HOSTILE, HOSTILE): Cell(HOSTILE, HOSTILE, 0.5, said=HOSTILE)}
    points = [Point(1, 1, HOSTILE, named=True, said=HOSTILE)]
    charts = [
        row_chart(HOSTILE, [Row(HOSTILE, HOSTILE, [Mark(1.0, said=HOSTILE)])], x=Axis(HOSTILE)),
        scatter_chart(HOSTILE, points, x=Axis(HOSTILE), y=Axis(HOSTILE), words=HOSTILE),
        heat_map(HOSTILE, [HOSTILE], [HOSTILE], cells),
        tally_chart(HOSTILE, [1], 1, x=Axis(HOSTILE), y=Axis(HOSTILE), names=(HOSTILE, HOSTILE)),
    ]  # fmt: skip
    for chart in charts:
        assert {node.tag for node in parsed(chart).iter()} <= {
            "svg", "title", "desc", "g", "path", "rect", "circle", "text",
        }  # fmt: skip
        attributes = {key for node in parsed(chart).iter() for key in node.keys()}  # noqa: SIM118 - no dictionary
        assert not any(name.startswith("on") for name in attributes)
        assert not {"<script", "\u202e", "\x00"} & set(re.findall("<script|\u202e|\x00", str(chart.svg + chart.legend)))
