"""Charts of the ratios: forest plot, the same with confounders held equal, late against early, and the volcano."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from markupsafe import Markup

from curate.auditing.columns import shown
from curate.auditing.losses import FEWEST_ROWS
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report.chosen import (
    HIGHER,
    LEVELS,
    LOWER,
    MOST,
    NEUTRAL,
    SHAPES,
    full_name,
    largest,
    left_out,
    name_of,
    plural,
    ratio_words,
    short_names,
    size_of,
    slot_of,
)
from curate.auditing.strata import Ratio
from curate.reporting.marks import Shape, bracket_entry, mark_entry, zone_entry
from curate.reporting.page import Figure
from curate.reporting.rows import Mark, Row, row_chart
from curate.reporting.scales import Axis, short
from curate.reporting.scatter import MOST_NAMED, Guides, Point, scatter_chart

MOST_HELD: Final = 10
MOST_POINTS: Final = 600
_RATIO: Final = Axis("rate over the rate of the rest", log=True, include=(0.5, 2.0))
_HIGHEST: Final = 20.0  # -log10 of the smallest q that a volcano has a place for
_FARTHEST: Final = 20.0
_TRACKS: Final[tuple[Shape, ...]] = ("square", "triangle", "diamond", "bar")
_ANSWERS: Final = {"undecided": "cannot be told", "reversed": "reversed"}


def forest(column: ColumnAudit, audit: Audit) -> Iterator[Figure]:
    """The ratio of each group with its interval, what could not have been seen, and the screening range."""
    rows = largest(column.groups)[:MOST]
    if not rows:
        return
    drawn = [
        Row(name_of(row), f"{ratio_words(row.ratio)}  n {short(row.pool)}", [_ratio_mark(row)], _blind(row))
        for row in rows
    ]
    low, high = audit.screen
    legend = [
        *_levels(rows),
        bracket_entry("could not have seen"),
        zone_entry(f"screening range {low:g} to {high:g}"),
    ]
    chart = row_chart("Kept, against the rest", drawn, x=_RATIO, zone=audit.screen, line=1.0, legend=legend)
    yield Figure(chart, _joined(
        "How often a group was kept, over how often the rest was, with its 95 % interval; left of 1 less often. Thin "
        "bracket: ratios too near to 1 for a group of this size (n in the pool) to be seen in 4 of 5 audits. The "
        "screening range is a convention, no verdict.",
        left_out(column, len(rows)),
    ))  # fmt: skip


def held_equal(column: ColumnAudit, audit: Audit) -> Iterator[Figure]:
    """Crude and conditional ratios side by side, of flagged groups and of those that a confounder hid."""
    strict = audit.alpha / max(1, sum(audit.tests.values()))
    rows = [row for row in largest(column.groups) if _worth_holding(row, strict)][:MOST_HELD]
    if not rows:
        return
    names = [shown(held.confounder) for held in rows[0].conditional]
    noisy = any(row.corrected for row in rows)
    drawn = [Row(name_of(row), _answer(row), list(_tracks(row)), apart=True) for row in rows]
    legend = [mark_entry("dot", "crude", NEUTRAL, line=True)]
    legend += [mark_entry(_TRACKS[n % 4], f"with equal {name}", n % 5, line=True) for n, name in enumerate(names)]
    legend += [mark_entry("ring", "with the labels' stated errors put right", 4, line=True)] if noisy else []
    chart = row_chart("Crude, and with confounders held equal", drawn, x=_RATIO, zone=audit.screen, line=1.0,
                      legend=legend)  # fmt: skip
    yield Figure(chart, _joined(
        f"The crude ratio, then the same among samples alike in a confounder. To the right: does {names[-1]} explain "
        "the crude ratio? Marks on opposite sides of 1 are a reversal. What explains a disparity does not excuse it."
        if names
        else "",
        "The ring: the range of the ratio once the labels' stated errors are put right." if noisy else "",
    ))  # fmt: skip


def late_and_early(column: ColumnAudit, audit: Audit) -> Iterator[Figure]:
    """Whether a group was chosen more in the first sub-batches of a run or in the last."""
    timed = [row for row in column.groups if row.early_late and row.early_late.ratio and row.selected >= FEWEST_ROWS]
    timed.sort(key=lambda row: _time_rank(row, audit.alpha))
    drawn = [_timed(row, audit.alpha) for row in timed[:MOST_HELD]]
    if not drawn:
        return
    found = {one.marks[0].shape for one in drawn}
    legend = [mark_entry("dot", "detected", HIGHER)] if "dot" in found else []
    legend += [mark_entry("ring", "not detected", NEUTRAL)] if "ring" in found else []
    axis = Axis("late over early", log=True, include=(0.5, 2.0))
    chart = row_chart("Late against early sub-batches", drawn, x=axis, line=1.0, legend=legend)
    hidden = len(timed) - len(drawn)
    yield Figure(chart, _joined(
        "Whether a group's rows came more in the second half of the sub-batches (right of 1) or in the first, "
        "against the rest. Rows of one sub-batch are somewhat alike: read intervals near 1 with care.",
        f"{hidden:,} {plural(hidden, 'group')} with smaller changes not drawn." if hidden else "",
    ))  # fmt: skip


def volcano(rows: Sequence[GroupRow], audit: Audit, title: str) -> Iterator[Figure]:
    """Every group by its ratio and by how sure one can be, the flagged ones with their names."""
    tested = [row for row in largest(rows) if row.q is not None]
    if len(tested) < 2:
        return
    naming = short_names(tested)
    edge = max([2.0, *(math.exp(size_of(row.ratio)) * 1.1 for row in tested if row.flagged)])
    edge = min(edge, _FARTHEST)
    points = [
        _point(row, name, edge, named=row.flagged and n < MOST_NAMED)
        for n, (row, name) in enumerate(zip(tested, naming, strict=True))
    ]
    low, high = audit.screen
    chart = scatter_chart(
        title,
        points[:MOST_POINTS],
        x=_RATIO,
        y=Axis("evidence: -log10 q", include=(0.0, 2.0)),
        guides=Guides([-math.log10(audit.alpha)], [1.0], (low, None, high, None)),
        legend=[*_levels(tested), zone_entry(f"screening range {low:g} to {high:g}")],
        words=_volcano_words(tested),
    )
    flags = sum(row.flagged for row in tested)
    yield Figure(chart, _joined(
        f"Each point is a group: left of 1 kept less often than the rest, and the higher, the surer. Above the dashed "
        f"line (q = {audit.alpha:g}) a disparity counts as detected: {flags:,} of {len(tested):,}.",
        f"Names: the {MOST_NAMED} largest at most, where there is room." if flags else "",
        f"{MOST_POINTS:,} are drawn, flagged ones first." if len(tested) > MOST_POINTS else "",
        "Points at the edges lie beyond them." if any(_beyond(row, edge) for row in tested) else "",
    ))  # fmt: skip


def _ratio_mark(row: GroupRow) -> Mark:
    assert row.ratio is not None
    said = f"{row.selected:,} of {row.pool:,} kept; {LEVELS[row.level]}" if row.level in LEVELS else ""
    shape = SHAPES.get(row.level, "ring")
    return Mark(row.ratio.value, row.ratio.low, row.ratio.high, shape, slot_of(row), said)


def _blind(row: GroupRow) -> tuple[float, float]:
    """The ratios between which nothing could have been seen; open where no ratio on that side could."""
    below, above = row.could_see.below, row.could_see.above
    return (0.0 if below is None else below, math.inf if above is None else above)


def _levels(rows: Sequence[GroupRow]) -> list[Markup]:
    """Legend entries of the levels that occur."""
    there = {row.level for row in rows}
    return [
        mark_entry(SHAPES[level], text, NEUTRAL if level == "not detected" else LOWER)
        for level, text in LEVELS.items()
        if level in there
    ]


def _worth_holding(row: GroupRow, strict: float) -> bool:
    hidden = any(held.p is not None and held.p <= strict for held in row.conditional)
    return bool(row.conditional or row.corrected) and (row.flagged or hidden)


def _answer(row: GroupRow) -> str:
    if not row.conditional:
        return ratio_words(row.ratio)
    explains = row.conditional[-1].explains
    return f"explained: {_ANSWERS.get(explains, explains)}"


def _tracks(row: GroupRow) -> Iterator[Mark]:
    if row.ratio is not None:
        yield _held_mark(row.ratio, "dot", NEUTRAL, "crude")
    for n, held in enumerate(row.conditional):
        if held.ratio is not None:
            yield _held_mark(held.ratio, _TRACKS[n % 4], n % 5, f"with equal {shown(held.confounder)}")
    if row.corrected is not None:
        yield _held_mark(row.corrected, "ring", 4, "labels' errors put right")


def _held_mark(ratio: Ratio, shape: Shape, slot: int, what: str) -> Mark:
    return Mark(ratio.value, ratio.low, ratio.high, shape, slot, f"{what}: {ratio_words(ratio)}")


def _point(row: GroupRow, name: str, edge: float, *, named: bool) -> Point:
    assert row.ratio is not None
    assert row.q is not None
    x = min(max(row.ratio.value, 1 / edge), edge)
    y = _HIGHEST if row.q <= 0 else max(0.0, min(_HIGHEST, -math.log10(row.q)))
    said = f"{name}: {ratio_words(row.ratio)}, q {row.q:.2g}, n {row.pool:,}"
    return Point(x, y, name, SHAPES.get(row.level, "ring"), slot_of(row), named, said)


def _beyond(row: GroupRow, edge: float) -> bool:
    assert row.ratio is not None
    return not 1 / edge <= row.ratio.value <= edge or (row.q or 0.0) < 10**-_HIGHEST


def _volcano_words(rows: Sequence[GroupRow]) -> str:
    flagged = [row for row in rows if row.flagged]
    named = "; ".join(f"{full_name(row)} {ratio_words(row.ratio)}" for row in flagged[:MOST_NAMED])
    return f"{len(rows):,} groups, {len(flagged):,} flagged{': ' if named else ''}{named}."


def _time_rank(row: GroupRow, alpha: float) -> tuple[bool, float]:
    when = row.early_late
    assert when is not None
    return when.q is None or when.q > alpha, -size_of(when.ratio)


def _timed(row: GroupRow, alpha: float) -> Row:
    when = row.early_late
    assert when is not None
    assert when.ratio is not None
    flagged = when.q is not None and when.q <= alpha
    slot = NEUTRAL if not flagged else LOWER if when.ratio.value < 1 else HIGHER
    said = f"{when.early:,} early, {when.late:,} late"
    one = Mark(when.ratio.value, when.ratio.low, when.ratio.high, "dot" if flagged else "ring", slot, said)
    return Row(name_of(row), ratio_words(when.ratio), [one])


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
