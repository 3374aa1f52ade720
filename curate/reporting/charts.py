"""Charts of lines and steps as inline SVG, drawn by a few functions: no script, no library, no colour alone.

Every series has its own colour and dash; every chart says what it shows in words (`desc`). A series of thousands of
points is reduced first (`curate.reporting.curves`): a chart is some kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markupsafe import Markup

from curate.reporting import frame
from curate.reporting.frame import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Plot
from curate.reporting.markup import element, figure, joined
from curate.reporting.palette import colour_class, dash
from curate.reporting.scales import Axis, fit_scale, narrow_scale, short

DOTS_UP_TO: Final = 40


@dataclass(frozen=True, slots=True)
class Series:
    """A line through (x, y); a y of None is a gap. `low` and `high`, where given, are a band around it.

    `slot` numbers colour and dash, so that one thing looks the same in every chart of a page. `step`: each value holds
    until the next.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    slot: int = 0
    step: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """An event: a vertical line at `x`, numbered, explained in the legend."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Level:
    """A value to compare with: a horizontal line at `y`, explained in the legend."""

    y: float
    label: str


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    markers: Sequence[Marker] = (),
    levels: Sequence[Level] = (),
    words: str | None = None,
) -> Chart:
    """Lines over a common axis, with bands, events and levels. Values that an axis cannot show leave gaps.

    `words` describe the chart; None has each series' ends and extremes.

    Example: `line_chart("Loss", [Series("JEST", steps, losses)], x=Axis("step"), y=Axis("loss"))`.
    """
    heights = [v for one in series for values in (one.y, one.low, one.high) for v in values] + [at.y for at in levels]
    plot = Plot(narrow_scale((v for one in series for v in one.x), x), fit_scale(heights, y))
    shown = sorted((event for event in markers if plot.x.low <= event.x <= plot.x.high), key=lambda event: event.x)
    parts = [frame.axes(plot, x, y)]
    parts += [_band(plot, one) for one in series if one.low]
    parts += [_level(plot, level) for level in levels if plot.y.shows(level.y)]
    parts += _markers(plot, shown)
    parts += [_line(plot, one, x, y) for one in series]
    words = _in_words(series, x, shown) if words is None else words
    return Chart(title, words, frame.drawing(title, words, *parts), _lines_legend(series, shown, levels))


def _lines_legend(series: Sequence[Series], markers: Sequence[Marker], levels: Sequence[Level]) -> Markup:
    named = [frame.line_entry(one.name, one.slot) for one in series]
    notes = [frame.note_entry(str(n), event.label) for n, event in enumerate(markers, 1)]
    notes += [frame.note_entry("\u2013\u2009\u2013", level.label) for level in levels]
    return frame.legend([*named, *notes] if len(named) > 1 or notes else [])


def _line(plot: Plot, one: Series, x: Axis, y: Axis) -> Markup:
    path = "".join(_path(plot, one))
    line = element("path", d=path, class_=f"line {colour_class(one.slot)}", stroke_dasharray=dash(one.slot))
    points = [(at, value) for at, value in zip(one.x, one.y, strict=True) if _shown(plot, at, value)]
    few = points if len(points) <= DOTS_UP_TO and not one.step else []
    return joined(line, *(_dot(plot, one, at, value, x, y) for at, value in few if value is not None))


def _dot(plot: Plot, one: Series, at: float, value: float, x: Axis, y: Axis) -> Markup:
    said = element("title", f"{one.name}: {y.label} {value:.4g} at {x.label} {short(at)}")
    return element("circle", said, cx=plot.px(at), cy=plot.py(value), r=2.4, class_=f"dot {colour_class(one.slot)}")


def _path(plot: Plot, one: Series) -> Iterator[str]:
    """The commands of a path; it is lifted at every gap."""
    down = False
    for at, value in zip(one.x, one.y, strict=True):
        if value is None or not _shown(plot, at, value):
            down = False
            continue
        x, y = figure(plot.px(at)), figure(plot.py(value))
        yield f"{f'H{x}V{y}' if one.step else f'L{x} {y}'}" if down else f"M{x} {y}h0"
        down = True


def _band(plot: Plot, one: Series) -> Markup:
    """The area between `low` and `high`, in pieces where one of them is missing."""
    drawn = joined(*(element("path", d=_outline(plot, run, one.step)) for run in _runs(plot, one)))
    return element("g", drawn, class_=f"band {colour_class(one.slot)}")


def _runs(plot: Plot, one: Series) -> Iterator[list[tuple[float, float, float]]]:
    run: list[tuple[float, float, float]] = []
    for at, low, high in zip(one.x, one.low, one.high, strict=True):
        if low is not None and high is not None and _shown(plot, at, low) and _shown(plot, at, high):
            run.append((at, low, high))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _outline(plot: Plot, run: Sequence[tuple[float, float, float]], step: bool) -> str:
    there = [(plot.px(at), plot.py(high)) for at, _, high in run]
    back = [(plot.px(at), plot.py(low)) for at, low, _ in run]
    if step:  # each value holds until the next
        there, back = _held(there), _held(back)
    corners = [f"{figure(x)} {figure(y)}" for x, y in (*there, *reversed(back))]
    return "M" + "L".join(corners) + "Z"


def _held(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    turns = [(after[0], before[1]) for before, after in pairwise(points)]
    return [corner for pair in zip(points, turns, strict=False) for corner in pair] + [points[-1]]


def _markers(plot: Plot, events: Sequence[Marker]) -> Iterator[Markup]:
    """Lines with numbers on top, which move aside where lines are close."""
    free = 0.0
    for number, event in enumerate(events, 1):
        x = plot.px(event.x)
        path = f"M{figure(x)} {figure(TOP)}V{figure(HEIGHT - BOTTOM)}"
        yield element("path", element("title", event.label), d=path, class_="marker")
        yield element("text", str(number), x=max(x, free), y=TOP - 4, class_="tick middle")
        free = max(x, free) + 10.0


def _level(plot: Plot, level: Level) -> Markup:
    path = f"M{figure(LEFT)} {figure(plot.py(level.y))}H{figure(WIDTH - RIGHT)}"
    return element("path", element("title", level.label), d=path, class_="level")


def _shown(plot: Plot, at: float, value: float | None) -> bool:
    return plot.x.shows(at) and plot.y.shows(value)


def _in_words(series: Sequence[Series], x: Axis, markers: Sequence[Marker]) -> str:
    lines = (f"{one.name}: {_course(one, x)}." for one in series)
    return " ".join([*lines, *(f"At {x.label} {short(event.x)}: {event.label}." for event in markers)])


def _course(one: Series, x: Axis) -> str:
    points = [(at, value) for at, value in zip(one.x, one.y, strict=True) if value is not None]
    if not points:
        return "no values"
    (first, start), (last, end) = points[0], points[-1]
    values = [value for _, value in points]
    course = f"{start:.3g} at {x.label} {short(first)}, {end:.3g} at {short(last)}"
    return f"{course}, between {min(values):.3g} and {max(values):.3g}"
