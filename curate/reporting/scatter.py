"""Points of two numbers, the first of them named where there is room: volcano plots and quadrants.

Names are placed one after the other, each at the first of a few places around its point where it covers no other name;
one that finds none stays off (it is read when one points at it). Names stay clear of marks too, but for rings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from markupsafe import Markup

from curate.reporting import frame
from curate.reporting.frame import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Plot
from curate.reporting.lettering import LETTER, fitted, width
from curate.reporting.marks import Shape, mark
from curate.reporting.markup import element, figure
from curate.reporting.scales import Axis, fit_scale, ratio_scale

MOST_NAMED: Final = 12
MOST_AVOIDED: Final = 100
_LONGEST: Final = 190.0

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Point:
    """A point and what it is called; `named` ones have it beside them, in the order given, while there is room."""

    x: float
    y: float
    name: str
    shape: Shape = "dot"
    slot: int = 0
    named: bool = False
    said: str = ""


@dataclass(frozen=True, slots=True)
class Guides:
    """What lies behind the points: lines across and upright, a shaded box (x, y, x, y), a word in each corner.

    A box side of None is the edge. `corners`: top left, top right, bottom left, bottom right.
    """

    across: Sequence[float] = ()
    upright: Sequence[float] = ()
    zone: tuple[float, float | None, float, float | None] | None = None
    corners: Sequence[str] = field(default=())


def scatter_chart(
    title: str,
    points: Sequence[Point],
    *,
    x: Axis,
    y: Axis,
    guides: Guides | None = None,
    legend: Sequence[Markup] = (),
    words: str,
) -> Chart:
    """Points that the axes can show; a logarithmic horizontal axis is one of ratios. `words` say what is to be seen.

    Example: `scatter_chart("Losses", [Point(0.4, 1.2, "maps", named=True)], x=Axis("d"), y=Axis("d"), words="...")`.
    """
    guides = guides or Guides()
    across = [*(one.x for one in points), *guides.upright]
    plot = Plot(
        ratio_scale([*across, *x.include]) if x.log else fit_scale(across, x),
        fit_scale([*(one.y for one in points), *guides.across], y),
    )
    drawn = [one for one in points if plot.x.shows(one.x) and plot.y.shows(one.y)]
    corners = _corners(guides.corners)
    parts = [frame.axes(plot, x, y), *_guides(plot, guides), *(text for text, _ in corners)]
    parts += [mark(p.shape, plot.px(p.x), plot.py(p.y), p.slot, p.said or p.name, 3.8) for p in reversed(drawn)]
    parts += _names(plot, drawn, [box for _, box in corners])
    return Chart(title, words, frame.drawing(title, words, *parts), frame.legend(legend))


def _guides(plot: Plot, guides: Guides) -> Iterator[Markup]:
    top, bottom, left, right = TOP, HEIGHT - BOTTOM, LEFT, WIDTH - RIGHT
    if guides.zone is not None:
        west, north, east, south = guides.zone
        high = top if north is None else plot.py(north)
        low = bottom if south is None else plot.py(south)
        yield element("rect", x=plot.px(west), y=high, width=plot.px(east) - plot.px(west), height=low - high,
                      class_="zone")  # fmt: skip
    for at in guides.across:
        yield element("path", d=f"M{figure(left)} {figure(plot.py(at))}H{figure(right)}", class_="level")
    for at in guides.upright:
        yield element("path", d=f"M{figure(plot.px(at))} {figure(top)}V{figure(bottom)}", class_="axis")


def _corners(words: Sequence[str]) -> list[tuple[Markup, Box]]:
    """The words in the corners and the boxes that they take."""
    found = []
    for n, text in enumerate(words):
        y = TOP + 12 if n < 2 else HEIGHT - BOTTOM - 7
        wide, to_right = width(text), n % 2 == 1
        x = WIDTH - RIGHT - 4 if to_right else LEFT + 4
        box = (x - wide, y - LETTER, x, y + 3) if to_right else (x, y - LETTER, x + wide, y + 3)
        found.append((element("text", text, x=x, y=y, class_="faint end" if to_right else "faint"), box))
    return found


def _names(plot: Plot, points: Sequence[Point], taken: list[Box]) -> Iterator[Markup]:
    spots = [(plot.px(one.x), plot.py(one.y)) for one in points]
    named = [(one, spot) for one, spot in zip(points, spots, strict=True) if one.named]
    firm = [spot for one, spot in zip(points, spots, strict=True) if one.shape != "ring"][:MOST_AVOIDED]
    taken = taken + [(x - 4, y - 4, x + 4, y + 4) for x, y in firm]
    for one, (x, y) in named[:MOST_NAMED]:
        text = fitted(one.name, _LONGEST)
        wide = width(text)
        free = next((place for place in _places(x, y, wide) if _inside(place[1]) and _free(place[1], taken)), None)
        if free is not None:
            (at, line, anchor), box = free
            taken.append(box)
            yield element("text", text, x=at, y=line, class_=f"name halo{anchor}")


def _places(x: float, y: float, wide: float) -> Iterator[tuple[tuple[float, float, str], Box]]:
    for down in (4.5, -7.0, 16.0):
        line = y + down
        top, bottom = line - LETTER + 3, line + 3
        yield (x + 8, line, ""), (x + 7, top, x + 9 + wide, bottom)
        yield (x - 8, line, " end"), (x - 9 - wide, top, x - 7, bottom)
    for line in (y - 9, y + 18):
        yield (x, line, " middle"), (x - wide / 2, line - LETTER + 3, x + wide / 2, line + 3)


def _inside(box: Box) -> bool:
    return box[0] >= 2 and box[1] >= TOP - 8 and box[2] <= WIDTH - 2 and box[3] <= HEIGHT - BOTTOM + 2


def _free(box: Box, taken: Sequence[Box]) -> bool:
    return not any(box[0] < one[2] and one[0] < box[2] and box[1] < one[3] and one[1] < box[3] for one in taken)
