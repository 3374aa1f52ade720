"""Charts of what a selection went by: scores per group, and the learner's loss against the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curate.auditing.columns import Column
from curate.auditing.losses import FEWEST_ROWS, QUANTILES
from curate.auditing.membership import membership_of
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report.chosen import HIGHER, LOWER, NEUTRAL, full_name, largest, name_of, plural, short_names
from curate.reporting.charts import Series, line_chart
from curate.reporting.marks import Shape, mark_entry, zone_entry
from curate.reporting.page import Figure
from curate.reporting.scales import Axis
from curate.reporting.scatter import MOST_NAMED, Guides, Point, scatter_chart

Numbers = NDArray[np.floating[Any]]
MOST_LINES: Final = 5
MOST_POINTS: Final = 600
_SHARES: Final = tuple(np.linspace(0.01, 0.99, 99).tolist())
_NEAR: Final = 0.2  # as in curate.auditing.losses: nearer to the median than a small effect
_CORNERS: Final = (
    "worth learning", "hard for the reference too", "already learned", "learned beyond the reference",
)  # fmt: skip
_SHAPES: Final[Mapping[str, Shape]] = {
    "worth learning": "triangle",
    "hard for the reference too": "square",
    "already learned": "dot",
    "learned beyond the reference": "diamond",
}
_SLOTS: Final = dict(zip(_CORNERS, (HIGHER, LOWER, 2, 3), strict=True))


def score_lines(column: ColumnAudit, score_N: Numbers | None, members: Mapping[str, Column]) -> Iterator[Figure]:
    """The distribution of scores per group: from the scores where they are given, otherwise from five quantiles."""
    rows = sorted(largest(column.groups), key=lambda row: not row.flagged)
    known = members.get(column.name)
    if score_N is not None and known is not None and len(known) == len(score_N):
        lines, text = _exact(rows, score_N, known), "From the lowest 1 % to the highest 1 % of the group."
    else:
        lines, text = _coarse(rows), f"Drawn through {len(QUANTILES)} quantiles of each group, from 10 % to 90 %."
    if sum(line.slot != NEUTRAL for line in lines) == 0:
        return
    shares = Axis("share with this score or less", include=(0.0, 1.0))
    chart = line_chart("Scores by group", lines, x=Axis("score"), y=shares, words=_score_words(lines))
    hidden = sum(row.score_quantiles is not None for row in column.groups) - sum(x.slot != NEUTRAL for x in lines)
    rest = f" {hidden:,} more {plural(hidden, 'group')} not drawn." if hidden > 0 else ""
    yield Figure(chart, "Read across: at a height of 0.5 a line is at the group's median score. A line to the right "
                 f"of another has higher scores throughout. {text}{rest}")  # fmt: skip


def quadrants(audit: Audit) -> Iterator[Figure]:
    """Groups by their losses: what looks alike in the score can need opposite remedies."""
    rows = [row for row in audit.rows if row.losses is not None and row.losses.quadrant is not None]
    rows.sort(key=lambda row: (not row.flagged, -_distance(row)))
    if not rows:
        return
    named = enumerate(zip(rows[:MOST_POINTS], short_names(rows), strict=False))
    points = [_point(row, name, named=n < MOST_NAMED and _distance(row) >= _NEAR) for n, (row, name) in named]
    there = {row.losses.quadrant for row in rows if row.losses}
    legend = [mark_entry(_SHAPES[name], name, _SLOTS[name]) for name in _CORNERS if name in there]
    legend += [mark_entry("ring", "in the middle", NEUTRAL)] if "in the middle" in there else []
    chart = scatter_chart(
        "Learner against reference",
        points,
        x=Axis("loss of the reference, from the pool's median (sd)", include=(-0.4, 0.4)),
        y=Axis("loss of the learner, from the pool's median (sd)", include=(-0.4, 0.4)),
        guides=Guides([0.0], [0.0], (-_NEAR, _NEAR, _NEAR, -_NEAR), _CORNERS),
        legend=[*legend, zone_entry("too near to the median to tell")],
        words=_quadrant_words(rows),
    )
    few = len([row for row in audit.rows if row.losses is not None]) - len(rows)
    small = f" {few:,} {plural(few, 'group')} of fewer than {FEWEST_ROWS} rows not drawn." if few else ""
    yield Figure(chart, "Top left: the learner has yet to learn it and the reference knows it, which is what a "
                 "learnability score looks for. Bottom left: both know it. Top right: hard for both; the reference may "
                 "never have seen such samples, or their captions are noise, and then another reference helps, not "
                 f"another threshold. Groups of few rows scatter by chance.{small}")  # fmt: skip


def _exact(rows: Sequence[GroupRow], score_N: Numbers, column: Column) -> list[Series]:
    members = membership_of(column)
    number = {name: code for code, name in enumerate(members.groups)}
    lines: list[Series] = []
    for row in rows:
        code = number.get(row.group)
        value = score_N[members.row_M[members.code_M == code]] if code is not None else score_N[:0]
        value = value[np.isfinite(value)]
        if len(value) >= FEWEST_ROWS and len(lines) < MOST_LINES:
            lines.append(Series(name_of(row), np.quantile(value, _SHARES).tolist(), _SHARES, slot=len(lines)))
    pool = score_N[np.isfinite(score_N)]
    whole = [Series("the whole pool", np.quantile(pool, _SHARES).tolist(), _SHARES, slot=NEUTRAL)] if len(pool) else []
    return [*lines, *whole]


def _coarse(rows: Sequence[GroupRow]) -> list[Series]:
    told = [(row, row.score_quantiles) for row in rows if row.score_quantiles is not None]
    told = [pair for pair in told if pair[0].pool >= FEWEST_ROWS][:MOST_LINES]
    return [Series(name_of(row), quantiles, QUANTILES, slot=slot) for slot, (row, quantiles) in enumerate(told)]


def _score_words(lines: Sequence[Series]) -> str:
    return " ".join(f"{one.name}: median {one.x[len(one.x) // 2]:.3g}." for one in lines)


def _distance(row: GroupRow) -> float:
    assert row.losses is not None
    return max(abs(row.losses.learner_d or 0.0), abs(row.losses.reference_d or 0.0))


def _point(row: GroupRow, name: str, *, named: bool) -> Point:
    assert row.losses is not None
    x, y, quadrant = row.losses.reference_d or 0.0, row.losses.learner_d or 0.0, row.losses.quadrant or "in the middle"
    said = f"{full_name(row)}: learner {y:+.2f}, reference {x:+.2f}, n {row.losses.rows:,}; {quadrant}"
    return Point(x, y, name, _SHAPES.get(quadrant, "ring"), _SLOTS.get(quadrant, NEUTRAL), named, said)


def _quadrant_words(rows: Sequence[GroupRow]) -> str:
    parts = []
    for name in (*_CORNERS, "in the middle"):
        inside = [full_name(row) for row in rows if row.losses and row.losses.quadrant == name]
        more = f" and {len(inside) - MOST_NAMED:,} more" if len(inside) > MOST_NAMED else ""
        parts += [f"{name}: {', '.join(inside[:MOST_NAMED])}{more}."] if inside else []
    return " ".join(parts)
