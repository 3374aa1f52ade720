"""One row per thing, its name above its marks: forest plots, dumbbells and shifts, legible down to a phone's width.

The name has the whole width, so that it need not be cut at 20 letters; the number stands to its right. Values beyond
the axis, none and endless ones too, sit at its end with an arrow. Height grows with the rows: some 30 make a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markupsafe import Markup

from curate.reporting import frame
from curate.reporting.frame import Chart
from curate.reporting.lettering import fitted, width
from curate.reporting.marks import Shape, bracket, interval, mark
from curate.reporting.markup import element, figure, joined
from curate.reporting.palette import colour_class
from curate.reporting.scales import Axis, Scale, fit_scale, ratio_scale

LEFT: Final = 12.0
RIGHT: Final = frame.WIDTH - 12.0
TOP: Final = 8.0
NAME: Final = 19.0  # the height of a row's line of text
TRACK: Final = 14.0  # that of a line of marks
BELOW: Final = 42.0
ASIDE: Final = 9.0  # of the end, where the arrow is, for a mark that lies beyond it


@dataclass(frozen=True, slots=True)
class Mark:
    """A value with the limits of its interval, if it has one. `said` is read when one points at it."""

    value: float
    low: float | None = None
    high: float | None = None
    shape: Shape = "dot"
    slot: int = 0
    said: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A name, a number in words to its right, and marks on one line, or on a line each if `apart`.

    `blind` is drawn as a bracket behind the marks. `linked` joins the first mark to the last.
    """

    name: str
    note: str
    marks: Sequence[Mark]
    blind: tuple[float, float] | None = None
    linked: bool = False
    apart: bool = False

    @property
    def height(self) -> float:
        """In units of the drawing."""
        return NAME + TRACK * (len(self.marks) if self.apart else 1) + 3


def row_chart(
    title: str,
    rows: Sequence[Row],
    *,
    x: Axis,
    zone: tuple[float, float] | None = None,
    line: float | None = None,
    legend: Sequence[Markup] = (),
) -> Chart:
    """Rows over a common axis, with a shaded `zone` of values and an upright `line` to compare with.

    A logarithmic axis is one of ratios (`scales.ratio_scale`).

    Example: `row_chart("Kept", [Row("women", "0.62", [Mark(0.62, 0.55, 0.70)])], x=Axis("ratio", log=True), line=1.0)`.
    """
    scale = _scale(rows, x, [*(zone or ()), *([] if line is None else [line])])
    tops = [TOP]
    for row in rows:
        tops.append(tops[-1] + row.height)
    spans = [(top + NAME - 2, end) for top, end in pairwise(tops)]
    parts = [_zone(scale, zone, spans)] if zone else []
    parts += [_grid(scale, spans, x)]
    parts += [_upright(scale, line, spans)] if line is not None else []
    parts += [_row(scale, row, top) for row, top in zip(rows, tops, strict=False)]
    words = " ".join(f"{row.name}: {row.note}." for row in rows)
    drawing = frame.drawing(title, words, *parts, height=tops[-1] + BELOW)
    return Chart(title, words, drawing, frame.legend(legend))


def _scale(rows: Sequence[Row], x: Axis, more: Sequence[float]) -> Scale:
    marks = [one for row in rows for one in row.marks]
    values = [one.value for one in marks if math.isfinite(one.value)]
    ends = [v for one in marks for v in (one.low, one.high) if v is not None and math.isfinite(v)]
    if not x.log:
        return fit_scale([*values, *ends, *more], x)
    fixed = [*(v for v in values if v > 0), *more, *x.include]
    low, high = min(fixed, default=1.0) / 1.5, max(fixed, default=1.0) * 1.5  # a tiny group's limits end in arrows
    return ratio_scale([*fixed, *(min(max(v, low), high) for v in ends)])


def _px(scale: Scale, value: float) -> float:
    """The place of a value; beyond the ends by a little where the axis does not reach it."""
    if scale.log and value <= 0:
        return LEFT - 1
    if math.isinf(value):
        return RIGHT + 1
    place = LEFT + scale.at(value) * (RIGHT - LEFT)
    return min(max(place, LEFT - 1), RIGHT + 1)


def _zone(scale: Scale, zone: tuple[float, float], spans: Sequence[tuple[float, float]]) -> Markup:
    left, right = (_px(scale, end) for end in zone)
    boxes = (element("rect", x=left, y=top, width=right - left, height=end - top) for top, end in spans)
    return element("g", *boxes, class_="zone")


def _grid(scale: Scale, spans: Sequence[tuple[float, float]], x: Axis) -> Markup:
    base, parts = spans[-1][1] if spans else TOP, []
    for at, text in zip(scale.ticks, scale.labels, strict=True):
        parts.append(_upright(scale, at, spans, "grid"))
        parts.append(element("text", text, x=_px(scale, at), y=base + 16, class_="tick middle"))
    bottom = element("path", d=f"M{figure(LEFT)} {figure(base)}H{figure(RIGHT)}", class_="axis")
    label = f"{x.label} (logarithmic)" if x.log else x.label
    return joined(*parts, bottom, element("text", label, x=(LEFT + RIGHT) / 2, y=base + 35, class_="label middle"))


def _upright(scale: Scale, at: float, spans: Sequence[tuple[float, float]], class_: str = "axis") -> Markup:
    """An upright line beside the marks only: names stay clear of it."""
    place = figure(_px(scale, at))
    return element("path", d="".join(f"M{place} {figure(top)}V{figure(end)}" for top, end in spans), class_=class_)


def _row(scale: Scale, row: Row, top: float) -> Markup:
    room = RIGHT - LEFT - width(row.note) - 10
    name = element("text", fitted(row.name, room), x=LEFT - 8, y=top + 13, class_="name")
    note = element("text", row.note, x=RIGHT + 8, y=top + 13, class_="note end")
    said = element("title", f"{row.name}: {row.note}")
    marks = joined(*_marks(scale, row, top + NAME + TRACK / 2 - 2))
    return element("g", said, name, note, marks)


def _marks(scale: Scale, row: Row, y: float) -> Iterator[Markup]:
    if row.blind is not None:
        low, high = (_px(scale, end) for end in row.blind)
        yield bracket(low, high, y, (LEFT, RIGHT))
    if row.linked and len(row.marks) > 1:
        yield _link(_px(scale, row.marks[0].value), _px(scale, row.marks[-1].value), y, row.marks[-1].slot)
    for one in row.marks:
        yield _mark(scale, one, y)
        y += TRACK * row.apart


def _mark(scale: Scale, one: Mark, y: float) -> Markup:
    place, parts = _px(scale, one.value), []
    if not LEFT <= place <= RIGHT:
        place = min(max(place, LEFT + ASIDE), RIGHT - ASIDE)
    if one.low is not None and one.high is not None:
        parts.append(interval(_px(scale, one.low), _px(scale, one.high), y, one.slot, (LEFT, RIGHT)))
    elif place != _px(scale, one.value):  # the arrow alone
        parts.append(interval(_px(scale, one.value), _px(scale, one.value), y, one.slot, (LEFT, RIGHT)))
    return joined(*parts, mark(one.shape, place, y, one.slot, one.said or None))


def _link(start: float, end: float, y: float, slot: int) -> Markup:
    return element("path", d=f"M{figure(start)} {figure(y)}H{figure(end)}", class_=f"stroke {colour_class(slot)}")
