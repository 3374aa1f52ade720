"""Which groups a chart shows, in which order, and how the rest is accounted for; how numbers and names are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from curate.auditing.columns import shown
from curate.auditing.outcome import ColumnAudit, GroupRow
from curate.auditing.strata import Ratio
from curate.reporting.marks import Shape

MOST: Final = 20
SHAPES: Final[dict[str, Shape]] = {
    "confidently large": "diamond",
    "detected and large": "square",
    "detected": "dot",
    "not detected": "ring",
}
LEVELS: Final = {
    "confidently large": "detected, confidently large",
    "detected and large": "detected and large",
    "detected": "detected",
    "not detected": "not detected",
}
LOWER, HIGHER, NEUTRAL = 1, 0, 5  # colours: kept less often, more often, neither


def largest(rows: Sequence[GroupRow]) -> list[GroupRow]:
    """The groups that were compared: the flagged ones first, by the size of the ratio, then the others by p."""
    return sorted((row for row in rows if row.ratio is not None), key=_rank)


def size_of(ratio: Ratio | None) -> float:
    """How far a ratio is from 1 in either direction: the absolute logarithm, endless for 0 and for no rest."""
    if ratio is None:
        return 0.0
    return abs(math.log(ratio.value)) if 0 < ratio.value < math.inf else math.inf


def slot_of(row: GroupRow) -> int:
    """The colour of a group's mark: of a flagged one, by its side of 1."""
    if not row.flagged or row.ratio is None:
        return NEUTRAL
    return LOWER if row.ratio.value < 1 else HIGHER


def left_out(column: ColumnAudit, drawn: int) -> str:
    """What a chart of `drawn` groups does not show: "20 of 243 groups are drawn, ...", or nothing if it shows all."""
    compared = [row for row in column.groups if row.ratio is not None]
    lost = len(column.groups) - len(compared)
    said = []
    if drawn < len(compared):
        hidden = sum(row.flagged for row in largest(column.groups)[drawn:])
        flags = f", {hidden:,} of the others flagged too" if hidden else ", none of the others flagged"
        said.append(f"{drawn:,} of {len(compared):,} groups are drawn, flagged ones first{flags}.")
    if lost:
        said.append(f"{lost:,} {plural(lost, 'group')} could not be compared (see the table).")
    return " ".join(said)


def name_of(row: GroupRow) -> str:
    """A group's name within its column."""
    return "(not known)" if row.is_unknown else shown(row.group)


def full_name(row: GroupRow) -> str:
    """A group's name with its column's."""
    return f"{shown(row.column)}: {name_of(row)}"


def short_names(rows: Sequence[GroupRow]) -> list[str]:
    """Names for groups of several columns: their own where that tells them apart, else with their column's."""
    common = Counter(row.group for row in rows)
    return [full_name(row) if row.is_unknown or common[row.group] > 1 else name_of(row) for row in rows]


def ratio_words(ratio: Ratio | None) -> str:
    """A ratio and its limits in few characters. Example: "0.62 (0.55-0.70)"."""
    if ratio is None:
        return "not compared"
    if math.isinf(ratio.value):
        return f"above {ratio.low:.2f}"
    limits = f"{ratio.low:.2f}-{ratio.high:.2f}" if math.isfinite(ratio.high) else f"{ratio.low:.2f} or more"
    return f"{ratio.value:.2f} ({limits})"


def plural(count: int, noun: str) -> str:
    """The noun in the number that it needs."""
    return noun if count == 1 else f"{noun}s"


def _rank(row: GroupRow) -> tuple[bool, float, str]:
    return not row.flagged, -size_of(row.ratio) if row.flagged else 1.0 if row.p is None else row.p, row.group
