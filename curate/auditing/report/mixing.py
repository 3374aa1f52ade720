"""Charts of the mix: each group's share of the pool and of the selection, whole columns, and intersections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from curate.auditing.columns import shown
from curate.auditing.crossing import quoted
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report.chosen import (
    HIGHER,
    LOWER,
    MOST,
    NEUTRAL,
    largest,
    left_out,
    name_of,
    plural,
    ratio_words,
    slot_of,
)
from curate.reporting.heat import MOST_COLUMNS, Cell, heat_map, shade_entry, shade_of
from curate.reporting.marks import mark_entry
from curate.reporting.page import Figure
from curate.reporting.rows import Mark, Row, row_chart
from curate.reporting.scales import Axis, short

MOST_ROWS: Final = 14
_PALER: Final = 0.3  # of its shade, for a cell where nothing was detected: a tiny n must not shine


def shares(column: ColumnAudit, audit: Audit) -> Iterator[Figure]:
    """From a group's share of the pool to its share of the selection, and of all draws where rows were drawn again."""
    rows = largest(column.groups)[:MOST]
    if not rows or not audit.selected:
        return
    drawn = [Row(name_of(row), _course(row), list(_shares(row)), linked=True) for row in rows]
    again = any(row.exposures for row in rows)
    legend = [mark_entry("ring", "of the pool", NEUTRAL), mark_entry("dot", "of the selection", LOWER)]
    legend += [mark_entry("triangle", "of all draws", LOWER)] if again else []
    chart = row_chart("From the pool to the selection", drawn, x=Axis("% of all rows", include=(0.0,)), legend=legend)
    overlap = "A sample may be in several groups, so the shares need not add up to 1." if column.overlapping else ""
    draws = "The triangle counts a sample as often as it was drawn." if again else ""
    text = "What part of all rows a group makes up in the pool, and in what was kept. Order as for the ratios."
    yield Figure(chart, " ".join(filter(None, [text, draws, overlap, left_out(column, len(rows))])))


def composition(audit: Audit) -> Iterator[Figure]:
    """How far the mix of each column moved, beside what chance alone moves."""
    moved = [(one, one.composition.total_variation) for one in audit.columns if one.composition is not None]
    moved.sort(key=lambda pair: -pair[1].value)
    if not moved:
        return
    rows = [
        Row(shown(one.name), f"{shift.value:.1%} ({shift.low:.1%}-{shift.high:.1%})", [
            Mark(100 * shift.by_chance, shape="bar", slot=NEUTRAL, said=f"by chance alone {shift.by_chance:.1%}"),
            Mark(100 * shift.value, 100 * shift.low, 100 * shift.high, "dot", HIGHER),
        ])
        for one, shift in moved[:MOST]
    ]  # fmt: skip
    legend = [mark_entry("dot", "this selection", HIGHER, line=True), mark_entry("bar", "chance alone", NEUTRAL)]
    axis = Axis("% of the selection in another group", include=(0.0,))
    chart = row_chart("How far the mix moved", rows, x=axis, legend=legend)
    yield Figure(chart, "Total variation: the part of the selection that would have to be exchanged for its mix of "
                 "groups to be the pool's, with a 95 % interval. A random selection of this size is above 0 as well: "
                 "the upright bar. Columns whose groups overlap have none.")  # fmt: skip


def crossed(column: ColumnAudit, audit: Audit) -> Iterator[Figure]:
    """An intersection as a table of ratios with n in each cell."""
    if column.kind != "intersection":
        return
    names = {one.name: [row.group for row in one.groups if not row.is_unknown] for one in audit.columns}
    table = _by_two(column, names)
    if not table:
        return
    across, down = _most_common(table, 1, MOST_COLUMNS), _most_common(table, 0, MOST_ROWS)
    if len(across) > len(down):  # names stand better to the left than on top
        table = {(b, a): row for (a, b), row in table.items()}
        across, down = down, across
    cells = {(shown(a), shown(b)): _cell(row) for (a, b), row in table.items() if a in down and b in across}
    legend = [shade_entry(-1, "kept less often"), shade_entry(1, "kept more often"),
              shade_entry(0, "flagged", firm=True)]  # fmt: skip
    title = f"Ratios where {shown(column.name)} cross"
    chart = heat_map(title, [shown(a) for a in down], [shown(b) for b in across], cells, legend=legend)
    yield Figure(chart, _cell_words(len(table) - len(cells)))


def _by_two(column: ColumnAudit, names: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], GroupRow]:
    """Each group of an intersection as (the groups of all columns but the last, the group of the last)."""
    said = column.name.removesuffix(" (crossed)")
    last = max((name for name in names if said.endswith((f" & {name}", f" & {quoted(name)}"))), key=len, default="")
    ends = sorted((f" & {group}" for group in names.get(last, ())), key=len, reverse=True)
    table = {}
    for row in column.groups:
        end = next((end for end in ends if row.group.endswith(end)), None)
        if end is not None and not row.is_unknown:
            table[row.group.removesuffix(end), end.removeprefix(" & ")] = row
    return table


def _most_common(table: Mapping[tuple[str, str], GroupRow], side: int, most: int) -> list[str]:
    counts: dict[str, int] = {}
    for pair, row in table.items():
        counts[pair[side]] = counts.get(pair[side], 0) + row.pool
    return sorted(sorted(counts, key=lambda name: -counts[name])[:most])


def _cell(row: GroupRow) -> Cell:
    if row.ratio is None:
        return Cell("-", short(row.pool), said=f"could not be compared: {row.untested}")
    calmed = f"; rate {row.shrunken.value:.3f} after shrinkage" if row.shrunken else ""
    said = f"{ratio_words(row.ratio)}, n {row.pool:,}, {row.selected:,} kept; {row.level}{calmed}"
    value = ratio_words(row.ratio).split(" (")[0].replace("above ", ">")
    depth = 1.0 if row.flagged else _PALER
    return Cell(value, short(row.pool), depth * shade_of(row.ratio.value), row.flagged, said)


def _cell_words(hidden: int) -> str:
    text = (
        "In each cell the rate over that of all other rows, below it n in the pool. A firm frame: detected. Pale: "
        "nothing detected, and a small n could not have shown much; what could be seen stands in the table."
    )
    return f"{text} {hidden:,} rarer {plural(hidden, 'combination')} not drawn." if hidden else text


def _shares(row: GroupRow) -> Iterator[Mark]:
    yield Mark(100 * row.share_of_pool, shape="ring", slot=NEUTRAL, said=f"{row.share_of_pool:.2%} of the pool")
    kept, slot = row.share_of_selected or 0.0, slot_of(row)
    if row.exposures is not None:
        yield Mark(
            100 * row.exposures.share, shape="triangle", slot=slot, said=f"{row.exposures.share:.2%} of all draws"
        )
    yield Mark(100 * kept, shape="dot", slot=slot, said=f"{kept:.2%} of the selection")


def _course(row: GroupRow) -> str:
    return f"{_percent(row.share_of_pool)} to {_percent(row.share_of_selected or 0.0)}"


def _percent(share: float) -> str:
    """A share with one digit after the point, or two that say something below 1 %."""
    return f"{share:.1%}" if share >= 0.01 else f"{100 * share:.2g}%"
