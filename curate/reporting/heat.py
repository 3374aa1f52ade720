"""A table of coloured cells: a number in each, what it rests on below it, and the shade for those who see it.

The number carries the meaning, the colour only leads the eye: one hue below the middle, another above, pale near it.
Cells with a firm frame stand out without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from curate.reporting import frame
from curate.reporting.frame import WIDTH, Chart, sign_entry
from curate.reporting.lettering import fitted, width
from curate.reporting.markup import element, figure, joined
from curate.reporting.palette import colour_class

MOST_COLUMNS: Final = 8
TALL: Final = 38.0
NAMES: Final = 145.0  # the most that the rows' names take
SLANTED: Final = 120.0  # the most that a slanted name takes
_DARKEST: Final = 0.5  # text stays legible on it


@dataclass(frozen=True, slots=True)
class Cell:
    """`shade` from -1 (far below) to 1 (far above), None for a cell without a value; `firm` cells have a frame."""

    text: str
    below: str
    shade: float | None = None
    firm: bool = False
    said: str = ""


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Cell],
    *,
    legend: Sequence[Markup] = (),
) -> Chart:
    """Cells by (row, column); one that is missing stays empty.

    Example: `heat_map("Kept", ["women"], ["old"], {("women", "old"): Cell("0.62", "412", -0.7)})`.
    """
    left = min(NAMES, max((width(name) for name in rows), default=0.0) + 12)
    wide = (WIDTH - left - 4) / max(len(columns), 1)
    lines = _wrapped(columns, wide - 4)
    slanted = min(SLANTED, max(map(width, columns), default=0.0))
    top = 11 + 15.0 * max(map(len, lines)) if lines else 16 + 0.6 * slanted
    parts = list(_heads(columns, left, wide, top, lines))
    for n, row in enumerate(rows):
        y = top + n * TALL
        told = element("title", row)
        parts.append(element("text", told, fitted(row, left - 8), x=4.0, y=y + TALL / 2 + 4, class_="name"))
        parts += [
            _cell(cells[row, column], left + m * wide, y, wide, f"{row}, {column}")
            for m, column in enumerate(columns)
            if (row, column) in cells
        ]
    words = " ".join(_in_words(row, columns, cells) for row in rows)
    drawing = frame.drawing(title, words, *parts, height=top + len(rows) * TALL + 4)
    return Chart(title, words, drawing, frame.legend(legend))


def shade_of(ratio: float, farthest: float = 2.0) -> float:
    """Where a ratio lies between 1 / `farthest` (-1) and `farthest` (1). Example: `shade_of(0.5)` is -1."""
    if not ratio > 0 or math.isinf(ratio):
        return 1.0 if ratio > 1 else -1.0
    return min(1.0, max(-1.0, math.log(ratio) / math.log(farthest)))


def shade_entry(shade: float, name: str, *, firm: bool = False) -> Markup:
    """A legend entry for a shade, or a frame."""
    return sign_entry(_box(3, 0.5, 24, 11, shade, firm), name)


def _heads(
    columns: Sequence[str], left: float, wide: float, top: float, lines: Sequence[Sequence[str]]
) -> Iterator[Markup]:
    """Names on two lines where their words fit, else slanted, where the last must not leave the drawing."""
    for n, name in enumerate(columns):
        x, told = left + (n + 0.5) * wide, element("title", name)
        if lines:
            parts = (
                element("text", part, x=x, y=top - 9 - 15 * (len(lines[n]) - 1 - m), class_="tick middle")
                for m, part in enumerate(lines[n])
            )
            yield element("g", told, *parts)
        else:
            turn = f"rotate(-38 {figure(x)} {figure(top - 8)})"
            room = min(SLANTED, (WIDTH - x) / 0.8)
            yield element("text", told, fitted(name, room), x=x - 4, y=top - 8, transform=turn, class_="tick")


def _wrapped(names: Sequence[str], wide: float) -> list[list[str]]:
    """Each name on a line or two; nothing if one of them does not fit."""
    found = []
    for name in names:
        lines = [""]
        for word in name.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if width(longer) <= wide or not lines[-1] else [*lines, word]
        if len(lines) > 2 or any(width(line) > wide for line in lines):
            return []
        found.append(lines)
    return found


def _cell(cell: Cell, x: float, y: float, wide: float, where: str) -> Markup:
    middle = x + wide / 2
    return element(
        "g",
        element("title", f"{where}: {cell.said or cell.text}"),
        _box(x + 1.5, y + 1.5, wide - 3, TALL - 3, cell.shade, cell.firm),
        element("text", fitted(cell.text, wide), x=middle, y=y + TALL / 2 - 1.5, class_="name middle"),
        element("text", fitted(cell.below, wide), x=middle, y=y + TALL / 2 + 13, class_="tick ink middle"),
    )


def _box(x: float, y: float, wide: float, tall: float, shade: float | None, firm: bool) -> Markup:
    """The ground of a cell; without a value it has an outline only."""
    place = {"x": x, "y": y, "width": wide, "height": tall}
    frames = [element("rect", **place, class_="frame")] if firm else []
    if shade is None:
        return joined(element("rect", **place, class_="hollow"), *frames)
    hue = colour_class(1 if shade < 0 else 0)
    depth = figure(0.06 + (_DARKEST - 0.06) * abs(shade), 2)
    return joined(element("rect", **place, class_=f"cell {hue}", fill_opacity=depth), *frames)


def _in_words(row: str, columns: Sequence[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    there = ((column, cells[row, column]) for column in columns if (row, column) in cells)
    return f"{row}: " + ", ".join(f"{column} {cell.text} ({cell.below})" for column, cell in there) + "."
