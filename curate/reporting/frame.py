"""What every chart stands in: a drawing area with grid, axes, ticks and labels, a title for readers, a legend in HTML.

The drawing is 460 units wide and grows or shrinks with its column; on a phone its letters stay above 9 pixels. The
legend stands outside the drawing, where long names wrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from curate.reporting.markup import element, figure, joined
from curate.reporting.palette import colour_class, dash
from curate.reporting.scales import Axis, Scale

WIDTH: Final = 460.0
HEIGHT: Final = 272.0
LEFT: Final = 50.0
RIGHT: Final = 14.0
TOP: Final = 30.0
BOTTOM: Final = 44.0


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing (`svg`), its `legend` (an HTML list, or empty), and what it shows in words."""

    title: str
    description: str
    svg: Markup
    legend: Markup


@dataclass(frozen=True, slots=True)
class Plot:
    """The drawing area between two scales."""

    x: Scale
    y: Scale

    def px(self, value: float) -> float:
        return LEFT + self.x.at(value) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.at(value) * (HEIGHT - TOP - BOTTOM)


def drawing(title: str, description: str, *parts: Markup, height: float = HEIGHT) -> Markup:
    """The SVG around `parts`, with name and description for those who cannot see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *parts,
        viewBox=f"0 0 {figure(WIDTH)} {figure(height)}",
        role="img",
        aria_label=f"{title}. {description}",
        class_="chart",
        preserveAspectRatio="xMidYMid meet",
    )


def axes(plot: Plot, x: Axis, y: Axis) -> Markup:
    """Grid, ticks with numbers, and both labels; that of the vertical axis stands on top, where it can be read."""
    across = [_x_tick(plot, at, text) for at, text in zip(plot.x.ticks, plot.x.labels, strict=True)]
    up = [_y_tick(plot, at, text) for at, text in zip(plot.y.ticks, plot.y.labels, strict=True)]
    base = element("path", d=f"M{figure(LEFT)} {figure(HEIGHT - BOTTOM)}H{figure(WIDTH - RIGHT)}", class_="axis")
    return joined(*up, *across, base, *axis_labels(x, y))


def axis_labels(x: Axis, y: Axis) -> tuple[Markup, Markup]:
    """What the axes measure, with a word where one is logarithmic."""
    below = element("text", _labelled(x), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="label middle")
    above = element("text", _labelled(y), x=4.0, y=13.0, class_="label")
    return below, above


def y_grid(plot: Plot) -> Markup:
    """Horizontal lines and their numbers, for a chart whose other axis is not numeric."""
    return joined(*(_y_tick(plot, at, text) for at, text in zip(plot.y.ticks, plot.y.labels, strict=True)))


def legend(entries: Sequence[Markup]) -> Markup:
    """A list of entries; nothing for none."""
    return element("ul", *entries, class_="legend") if entries else Markup("")


def line_entry(name: str, slot: int) -> Markup:
    """A legend entry with a piece of the line."""
    return _entry(element("path", d="M1 6H29", class_=f"line {colour_class(slot)}", stroke_dasharray=dash(slot)), name)


def box_entry(name: str, slot: int) -> Markup:
    """A legend entry with a filled box."""
    return _entry(element("rect", x=5, y=1, width=20, height=10, class_=f"bar {colour_class(slot)}"), name)


def sign_entry(sample: Markup, name: str) -> Markup:
    """A legend entry with a piece of the drawing, 30 units wide and 12 high."""
    return _entry(sample, name)


def note_entry(sign: str, name: str) -> Markup:
    """A legend entry for a marker: its sign as in the drawing, and what happened."""
    return element("li", element("span", sign, class_="sign"), " ", name)


def _entry(sample: Markup, name: str) -> Markup:
    return element("li", element("svg", sample, viewBox="0 0 30 12", class_="swatch", aria_hidden="true"), " ", name)


def _labelled(axis: Axis) -> str:
    return f"{axis.label} (logarithmic)" if axis.log else axis.label


def _x_tick(plot: Plot, value: float, text: str) -> Markup:
    x, y = plot.px(value), HEIGHT - BOTTOM
    side = " end" if x > WIDTH - RIGHT - 12 else " middle"
    mark = element("path", d=f"M{figure(x)} {figure(y)}v4", class_="axis")
    return mark + element("text", text, x=x + (RIGHT - 4 if side == " end" else 0), y=y + 17, class_=f"tick{side}")


def _y_tick(plot: Plot, value: float, text: str) -> Markup:
    y = plot.py(value)
    line = element("path", d=f"M{figure(LEFT)} {figure(y)}H{figure(WIDTH - RIGHT)}", class_="grid")
    return line + element("text", text, x=LEFT - 6, y=y + 4, class_="tick end")
