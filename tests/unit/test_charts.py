"""Charts and pages: axes with round ticks, drawings that are well-formed, text that stays text, colours one can see."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from curate.reporting.bars import bar_chart, histogram
from curate.reporting.charts import Level, Marker, Series, line_chart
from curate.reporting.curves import aligned, spread, thinned
from curate.reporting.frame import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart
from curate.reporting.markup import element, visible
from curate.reporting.page import Figure, Finding, Page, Section, Table, environment, render
from curate.reporting.palette import DARK, DASHES, LIGHT, PAGE
from curate.reporting.scales import Axis, fit_scale, narrow_scale, short

FEW = settings(max_examples=150, deadline=None)
HOSTILE = "</title><script>alert(1)</script>\"' onload=x \u202eexe \ud800\x00 &amp;"
FINITE = st.floats(-1e15, 1e15, allow_subnormal=False)


def parsed(chart: Chart) -> ElementTree.Element:
    """The drawing as XML; a mistake in it is an exception."""
    return ElementTree.fromstring(str(chart.svg))


def with_class(chart: Chart, name: str) -> list[ElementTree.Element]:
    return [node for node in parsed(chart).iter() if name in node.get("class", "").split()]


def coordinates(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


@given(values=st.lists(FINITE, min_size=1, max_size=20), whole=st.booleans())
@FEW
def test_linear_ticks_hold_the_data(values: list[float], whole: bool) -> None:
    """Ticks rise in equal steps, reach beyond the data on both sides, and are few."""
    values = [float(round(value)) for value in values] if whole else values
    scale = fit_scale(values, Axis(whole=whole))
    unseen = 1e-6 * max(map(abs, values))  # far below the width of a line
    assert scale.low <= min(values) + unseen
    assert scale.high >= max(values) - unseen
    assert 2 <= len(scale.ticks) <= 10
    steps = [b - a for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)]
    assert max(steps) - min(steps) <= 1e-6 * max(abs(scale.low), abs(scale.high))
    assert not whole or all(abs(tick - round(tick)) < 1e-6 * max(1.0, abs(tick)) for tick in scale.ticks)


@given(values=st.lists(st.floats(1e-12, 1e20), min_size=1, max_size=20))
@FEW
def test_logarithmic_ticks_hold_the_data(values: list[float]) -> None:
    """Ticks rise, are powers of ten or 2 and 5 times one, and hold the data; positions go from 0 to 1."""
    scale = fit_scale(values, Axis(log=True))
    assert scale.low <= min(values) * 1.0001
    assert scale.high >= max(values) * 0.9999
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert {round(tick / 10 ** math.floor(math.log10(tick) + 1e-9)) for tick in scale.ticks} <= {1, 2, 5}
    assert -1e-4 <= scale.at(min(values)) <= scale.at(max(values)) <= 1 + 1e-4


def test_the_ticks_of_known_ranges() -> None:
    """Round numbers, as a person would choose them."""
    assert fit_scale([0.02, 0.43], Axis(include=(0,))).labels == ("0", "0.1", "0.2", "0.3", "0.4", "0.5")
    assert fit_scale([3, 40_000], Axis(log=True)).labels == ("1", "10", "100", "1k", "10k", "100k")
    assert fit_scale([12, 60], Axis(log=True)).labels == ("10", "20", "50", "100")
    assert narrow_scale([1, 300], Axis(whole=True)).labels == ("100", "200", "300")
    assert fit_scale([1, 4], Axis(whole=True)).ticks == (1, 2, 3, 4)
    assert fit_scale([], Axis()).ticks  # nothing to show is still an axis


@pytest.mark.parametrize("axis", [Axis(), Axis(log=True), Axis(whole=True)])
@pytest.mark.parametrize("values", [[5.0], [0.0], [-3.0, -3.0], [None, math.nan, math.inf], []])
def test_odd_data_has_an_axis(values: list[float | None], axis: Axis) -> None:
    """One value, one value many times, none, or nothing finite: a scale of some length."""
    for scale in (fit_scale(values, axis), narrow_scale(values, axis)):
        assert scale.low < scale.high
        assert len(scale.ticks) == len(scale.labels)


def test_numbers_are_short() -> None:
    """Three digits and a decimal prefix, also where rounding reaches the next one."""
    numbers = {12_800: "12.8k", 0.123456: "0.123", 3.3e13: "33T", 999_999: "1M", 0: "0", -2500: "-2.5k", 1e-5: "1e-05"}
    assert {value: short(value) for value in numbers} == numbers


def test_a_line_chart_holds_what_it_was_given() -> None:
    """Every point lies inside, the line is lifted at a gap, events and levels are drawn and explained."""
    one = Series("JEST", [0, 10, 20, 30], [1.0, None, 3.0, 2.0], low=[0.5, None, 2, 1], high=[2, None, 4, 2.5])
    two = Series("IID", [0, 30], [1.0, 1.5], slot=1)
    chart = line_chart("Loss", [one, two], x=Axis("step"), y=Axis("loss"), markers=[Marker(20, "handover"),
                       Marker(99, "outside")], levels=[Level(2.5, "target 2.5")])  # fmt: skip
    lines = with_class(chart, "line")
    assert [line.get("d", "").count("M") for line in lines] == [2, 1]
    assert [line.get("stroke-dasharray") for line in lines] == [None, DASHES[1]]
    for x, y in zip(*[iter(coordinates(lines[1].get("d", "").replace("h0", "")))] * 2, strict=True):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT
    assert len(with_class(chart, "marker")) == len(with_class(chart, "level")) == 1
    assert "handover" in chart.legend
    assert "target 2.5" in chart.legend
    assert "outside" not in chart.legend + chart.svg
    assert "JEST: 1 at step 0, 2 at 30, between 1 and 3." in chart.description
    assert parsed(chart).find("{*}desc") is not None or parsed(chart).find("desc") is not None


def test_higher_is_further_up_and_later_further_right() -> None:
    """Positions follow the values on linear and logarithmic axes; what a logarithm has not is left out."""
    for log in (False, True):
        series = [Series("a", [1, 2, 3], [1.0, 10.0, 100.0])]
        chart = line_chart("t", series, x=Axis(), y=Axis(log=log))
        spots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in with_class(chart, "dot")]
        assert spots == sorted(spots, key=lambda spot: spot[0])
        heights = [y for _, y in spots]
        assert heights == sorted(heights, reverse=True)
        assert (abs(heights[0] - 2 * heights[1] + heights[2]) < 0.3) == log  # evenly spaced on a logarithmic axis only
    zeros = [Series("a", [1, 2, 3], [0.0, 1.0, 10.0])]
    assert len(with_class(line_chart("t", zeros, x=Axis(), y=Axis(log=True)), "dot")) == 2


def test_steps_hold_their_value() -> None:
    """A step series goes across first and then up; it has no slanted line."""
    chart = line_chart("t", [Series("a", [0, 1, 2], [1.0, 2.0, 2.0], step=True)], x=Axis(), y=Axis())
    path = with_class(chart, "line")[0].get("d", "")
    assert "L" not in path
    assert re.fullmatch(r"M[\d. ]+h0(H[\d.]+V[\d.]+){2}", path)


def test_bars_start_on_the_ground() -> None:
    """Heights are in proportion, an empty bar has none, and every bar says its number."""
    chart = bar_chart("Repeats", ["1", "2", "3+"], [("JEST", [900, 450, 0]), ("IID", [300, 0, 0])], x=Axis(), y=Axis())
    bars = with_class(chart, "bar")
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2)
    assert heights[4] == heights[5] == 0
    grounds = {round(float(bar.get("y", "")) + float(bar.get("height", "")), 1) for bar in bars}
    assert max(grounds) - min(grounds) <= 0.2
    assert "JEST: 1 900, 2 450, 3+ 0." in chart.description


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.booleans())
@FEW
def test_a_histogram_counts_every_value(values: list[float], log: bool) -> None:
    """The description accounts for all values: shown, or left out where a logarithmic axis has no place for them."""
    chart = histogram("t", [("a", values)], x=Axis("size", log=log), bins=7)
    shown = [value for value in values if value > 1e-300 or not log]
    assert (f"{len(shown):,} values" if shown else "no values") in chart.description
    assert ("Not shown" in chart.description) == (len(shown) < len(values))
    parsed(chart)


def test_histogram_counts_are_right() -> None:
    """Four values in two bins of equal width: three and one; the largest value is in the last bin."""
    chart = histogram("t", [("a", [0.0, 1.0, 4.9, 10.0])], x=Axis(), bins=2)
    ticks = [node.text for node in parsed(chart).iter() if node.get("class") == "tick end"]
    assert ticks[:1] == ["0"]
    path = coordinates(with_class(chart, "line")[0].get("d", "").replace("h0", ""))
    ground, top = path[-1], path[1]
    assert (ground - path[3]) == pytest.approx((ground - top) / 3, abs=0.2)


def test_text_stays_text() -> None:
    """Names with markup, quotes, control and direction characters are escaped or dropped, in every place."""
    series = [Series(HOSTILE, [0, 1], [1.0, 2.0]), Series("b", [0], [1.0], slot=1)]
    chart = line_chart(HOSTILE, series, x=Axis(HOSTILE), y=Axis(HOSTILE), markers=[Marker(0, HOSTILE)])
    parsed(chart)
    bars = bar_chart(HOSTILE, [HOSTILE], [(HOSTILE, [1.0]), ("b", [2.0])], x=Axis(HOSTILE), y=Axis(HOSTILE))
    figures = [Figure(chart, HOSTILE), Figure(bars, HOSTILE)]
    table = Table(HOSTILE, (HOSTILE,), ((HOSTILE,),), folded=True)
    page = Page(HOSTILE, HOSTILE, [Finding(HOSTILE, HOSTILE)], [Section(HOSTILE, HOSTILE, figures, [table])], HOSTILE)
    text = render(page)
    text.encode()
    assert "<script" not in text
    assert not set("\u202e\ud800\x00") & set(text)
    assert "\"' onload" not in text
    assert "&amp;amp;" in text  # what was escaped before is shown as it was written


def test_only_unseen_characters_go() -> None:
    """Letters of any script, emoji with joiners and narrow spaces stay; controls and marks of direction go."""
    assert visible("नमस्ते 👩\u200d🚀 5\u00a0%") == "नमस्ते 👩\u200d🚀 5\u00a0%"
    assert visible("a\u202e\u2066b\n\tc\x07\ufeff") == "ab  c"
    assert str(element("p", "<", element("b", "&"), class_="x", y=None)) == '<p class="x">&lt;<b>&amp;</b></p>'


def test_a_page_loads_and_runs_nothing() -> None:
    """The policy forbids everything but inline styles and data images; no script, no address, no handler is there."""
    chart = line_chart("Loss", [Series("a", [0, 1], [1.0, 2.0])], x=Axis("step"), y=Axis("loss"))
    sections = [Section("Charts", "", [Figure(chart, "Down.")], [Table("T", ("a", "b"), (("x", "1"),), (1,))])]
    text = render(
        Page("Report", "of a run", [Finding("Loss", "It fell.", "good")], [*sections, Section("Empty")], "end")
    )
    assert "default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;; img-src data:" in text
    assert not re.search(r"<script|https?://|@import|url\(|\son\w+=|<link|<img|<iframe", text)
    assert "Empty" not in text
    assert "viewport" in text
    assert text == render(Page("Report", "of a run", [Finding("Loss", "It fell.", "good")], sections, "end"))


def test_a_misspelt_name_in_a_template_fails() -> None:
    """An undefined value is an error, not an empty place."""
    with pytest.raises(UndefinedError):
        environment().from_string("{{ finding.txet }}").render(finding=Finding("a", "b"))


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, PAGE[0]), (DARK, PAGE[1])])
def test_colours_can_be_seen(colours: tuple[str, ...], page: str) -> None:
    """Every colour has 3 : 1 against its page at least, and no two share a dash pattern."""
    behind = luminance(page)
    for colour in colours:
        low, high = sorted((luminance(colour), behind))
        assert (high + 0.05) / (low + 0.05) >= 3, colour
    assert len(set(DASHES)) == len(DASHES) == len(colours)


def test_many_points_become_few_with_their_extremes() -> None:
    """3,000 points are reduced to means in a band that still holds the one outlier; few points stay as they are."""
    points = [(float(n), 1.0 if n != 1234 else 50.0) for n in range(3000)]
    curve = thinned("loss", points, most=100)
    assert len(curve.x) == 100
    assert max(high for high in curve.high if high is not None) == 50.0
    assert min(low for low in curve.low if low is not None) == 1.0
    few = thinned("loss", points[:50], most=100)
    assert (list(few.x), few.low) == ([float(n) for n in range(50)], ())


def test_runs_count_once_each() -> None:
    """The mean over two runs weighs them equally though one has more points; gaps of all runs stay gaps."""
    curve = spread("a", [[(0, 1.0), (1, 1.0), (2, None)], [(0, 3.0), (2, None)]])
    assert (curve.x, curve.y, curve.low, curve.high) == (
        [0, 1, 2],
        [2.0, 1.0, None],
        [1.0, 1.0, None],
        [3.0, 1.0, None],
    )
    dense = [(n / 10, 0.0) for n in range(1000)]
    assert spread("a", [dense, [(50.0, 1.0)]], most=1).y == [0.5]


def test_runs_are_aligned_by_step() -> None:
    """Values at the same step are averaged in both directions; a step that one run lacks is left out."""
    curve = aligned("a", [[(1, 10.0, 0.1), (2, 20.0, 0.2)], [(1, 12.0, 0.3)]])
    assert (curve.x, curve.y, curve.low, curve.high) == ([11.0], [0.2], [0.1], [0.3])
