"""Marks of values: shapes that are told apart without colour, and strokes of intervals with arrows at their ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from markupsafe import Markup

from curate.reporting.frame import sign_entry
from curate.reporting.markup import element, figure, joined
from curate.reporting.palette import colour_class

Shape = Literal["dot", "ring", "diamond", "square", "triangle", "bar"]
SIZE: Final = 4.6
_CORNERS: Final = {
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    "bar": ((-0.25, -1.3), (0.25, -1.3), (0.25, 1.3), (-0.25, 1.3)),
}


def mark(shape: Shape, x: float, y: float, slot: int, said: str | None = None, size: float = SIZE) -> Markup:
    """A shape around a point; `said` is read when one points at it."""
    told = [] if said is None else [element("title", said)]
    if shape in ("dot", "ring"):
        class_ = f"{'dot' if shape == 'dot' else 'ring'} {colour_class(slot)}"
        return element("circle", *told, cx=x, cy=y, r=size if shape == "dot" else size - 0.6, class_=class_)
    corners = (f"{figure(x + a * size, 2)} {figure(y + b * size, 2)}" for a, b in _CORNERS[shape])
    return element("path", *told, d=f"M{'L'.join(corners)}Z", class_=f"dot {colour_class(slot)}")


def interval(low: float, high: float, y: float, slot: int, bounds: tuple[float, float]) -> Markup:
    """A stroke from `low` to `high`; an end beyond `bounds` becomes an arrow there."""
    left, right = max(low, bounds[0]), min(high, bounds[1])
    strokes = [f"M{figure(left)} {figure(y)}H{figure(right)}"] if left <= right else []
    strokes += _arrows(low < bounds[0], high > bounds[1], y, bounds)
    return element("path", d="".join(strokes), class_=f"stroke {colour_class(slot)}")


def bracket(low: float, high: float, y: float, bounds: tuple[float, float]) -> Markup:
    """A thin line with upright ends, but for an end beyond `bounds`, which has none."""
    left, right = max(low, bounds[0]), min(high, bounds[1])
    ends = "".join(f"M{figure(at)} {figure(y - 5)}v10" for at in (low, high) if bounds[0] <= at <= bounds[1])
    line = f"M{figure(left)} {figure(y)}H{figure(right)}" if left <= right else ""
    return element("path", d=line + ends, class_="bracket")


def mark_entry(shape: Shape, name: str, slot: int, *, line: bool = False) -> Markup:
    """A legend entry for a shape, with a piece of its interval if `line`."""
    stroke = [interval(3, 27, 6, slot, (0, 30))] if line else []
    return sign_entry(joined(*stroke, mark(shape, 15, 6, slot, size=4)), name)


def bracket_entry(name: str) -> Markup:
    """A legend entry for a bracket."""
    return sign_entry(bracket(2, 28, 6, (0, 30)), name)


def zone_entry(name: str) -> Markup:
    """A legend entry for a shaded zone."""
    return sign_entry(element("rect", x=3, y=0, width=24, height=12, class_="zone"), name)


def _arrows(left: bool, right: bool, y: float, bounds: tuple[float, float]) -> Iterator[str]:
    if left:
        yield f"M{figure(bounds[0] + 5)} {figure(y - 3.5)}l-5 3.5l5 3.5"
    if right:
        yield f"M{figure(bounds[1] - 5)} {figure(y - 3.5)}l5 3.5l-5 3.5"
