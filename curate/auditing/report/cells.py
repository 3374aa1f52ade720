"""Cells of sortable tables: what is read, what stands small below it, and the key that the column is sorted by.

A number that is not there has an empty key and is sorted last, whichever way; a cell without a key sorts by its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from curate.auditing.power import Reach
from curate.auditing.strata import Ratio
from curate.evaluation.interval import Share

MANY_ROWS: Final = 25
_SMALLEST: Final = 0.0001


@dataclass(frozen=True, slots=True)
class Cell:
    """`main`, and `under` in small letters. `tone` is "", "faint", "strong" or "warning"; words carry it as well."""

    main: str
    under: str = ""
    key: str | None = None
    tone: str = ""


@dataclass(frozen=True, slots=True)
class SortTable:
    """Rows of cells, the first of each its head. `numeric` are the columns that stand to the right."""

    caption: str
    head: tuple[str, ...]
    numeric: frozenset[int]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @property
    def tall(self) -> bool:
        """Whether it scrolls on the screen, its head staying in sight; in print it never does."""
        return len(self.rows) > MANY_ROWS


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a table: its heading, and the cell it makes of a row."""

    name: str
    cell: Callable[[Any], Cell]
    numeric: bool = True


def tabulate(caption: str, fields: Sequence[Field], rows: Iterable[Any], note: str = "") -> SortTable:
    """A table with a column per field."""
    numeric = frozenset(place for place, field in enumerate(fields) if field.numeric)
    cells = tuple(tuple(field.cell(row) for field in fields) for row in rows)
    return SortTable(caption, tuple(field.name for field in fields), numeric, cells, note)


def text(main: str, under: str = "", tone: str = "") -> Cell:
    """A cell that is sorted by its text."""
    return Cell(main, under, None, tone)


def count(value: float | None, under: str = "") -> Cell:
    """A whole number with thousands set apart; `votes` that are not whole get one digit."""
    if value is None:
        return MISSING
    return Cell(f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}", under, sort_key(value))


def number(value: float | None, digits: int = 2, under: str = "") -> Cell:
    """A number, NaN and None missing. Example: `number(-0.516).main` is "-0.52" with a true minus sign."""
    if value is None or math.isnan(value):
        return MISSING
    return Cell(f"{value:.{digits}f}".replace("-", "\u2212"), under, sort_key(value))


def probability(value: float | None, under: str = "") -> Cell:
    """A p or q; below 0.0001 only that is said, and the exact number is what it is sorted by."""
    if value is None:
        return MISSING
    shown = f"<{_SMALLEST}" if value < _SMALLEST else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"
    return Cell(shown, under, sort_key(value))


def share(value: Share | None) -> Cell:
    """A rate in percent with its interval below."""
    if value is None:
        return MISSING
    return Cell(percent(value.value), f"{percent(value.low)} to {percent(value.high)}", sort_key(value.value))


def ratio(value: Ratio | None) -> Cell:
    """A ratio with its interval below; where none of the rest was selected it has only a lower limit."""
    if value is None:
        return MISSING
    if math.isinf(value.value):
        return Cell("none of the rest", f"{times(value.low)} or more", sort_key(math.inf))
    high = f"to {times(value.high)}" if math.isfinite(value.high) else "or more"
    return Cell(times(value.value), f"{times(value.low)} {high}", sort_key(value.value))


def reach(value: Reach) -> Cell:
    """The ratios that could have been seen; a group that could show none says so."""
    above = "" if value.above is None else f"from {times(value.above)}"
    if value.below is None:
        return Cell("none below 1", above, sort_key(-1.0), "warning")
    return Cell(f"up to {times(value.below)}", above, sort_key(value.below))


def percent(value: float) -> str:
    """Percent with three digits or so. Example: 0.1834 is "18.3%", 0.00042 "0.042%"."""
    of_hundred = 100 * value
    digits = 1 if of_hundred >= 1 or not of_hundred else 2 if of_hundred >= 0.1 else 3
    return f"{of_hundred:.{digits}f}%"


def times(value: float) -> str:
    """A ratio. Example: 0.6234 is "0.62", 12.34 "12.3", 1234.5 "1,234"."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def sort_key(value: float) -> str:
    """A number as the sorting script reads it."""
    return "Infinity" if value == math.inf else repr(float(value))


MISSING: Final = Cell("\u2013", key="", tone="faint")
