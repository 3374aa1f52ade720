"""The tables of an audit: where groups come from, a table per column, what may lie behind a ratio, pairs of concepts.

Every group has a row, however small, and so do the rows whose group is not known. Above twelve groups the flagged come
first, then by size; up to twelve they keep the column's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from curate.auditing.association import Association
from curate.auditing.composition import Shift
from curate.auditing.losses import QUANTILES
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report import cells
from curate.auditing.report.cells import MISSING, Cell, Field, SortTable, tabulate
from curate.auditing.strata import Conditional

OWN_ORDER: Final = 12
MOST_PAIRS: Final = 200
KINDS: Final = {
    "mention": "caption mentions",
    "label": "labels",
    "metadata": "metadata",
    "script": "script of the caption",
    "language": "language of the caption",
    "cluster": "clusters of embeddings",
    "duplicate": "near-duplicates",
    "zero-shot": "predicted by a model",
    "intersection": "intersection",
}
_LEVELS: Final = {"untested": 0, "not detected": 1, "detected": 2, "detected and large": 3, "confidently large": 4}
_TONES: Final = {
    "untested": "faint",
    "detected": "strong",
    "detected and large": "warning",
    "confidently large": "warning",
}
_EXPLAINS: Final = {"reversed": "direction reverses", "undecided": "cannot be told"}


def ordered(column: ColumnAudit) -> tuple[GroupRow, ...]:
    """The groups as they are read, those not known last."""
    if len(column.groups) <= OWN_ORDER:
        return column.groups
    return tuple(sorted(column.groups, key=lambda row: (row.is_unknown, not row.flagged, -row.pool)))


def overview(audit: Audit) -> SortTable:
    """Where the groups come from: provenance, coverage, unknown share, and how far the mix moved."""
    fields = (
        Field("Column", lambda one: cells.text(one.name, KINDS.get(one.kind, one.kind)), numeric=False),
        Field("Where its groups come from", lambda one: cells.text(one.provenance), numeric=False),
        Field("Known", lambda one: _share_of(one.coverage)),
        Field("Not known", lambda one: _share_of(one.unknown_share)),
        Field("Groups", lambda one: cells.count(sum(not row.is_unknown for row in one.groups), _overlap(one))),
        Field("Flagged", lambda one: cells.count(sum(row.flagged for row in one.groups))),
        Field("Mix moved by", _variation),
    )
    note = "Mix moved by: the share of the selection that would have to change groups to have the pool's mix."
    return tabulate("Columns: provenance, coverage and what is not known", fields, audit.columns, note)


def group_table(column: ColumnAudit) -> SortTable:
    """Every group against its rest: counts, rate, ratio, effect, test, level, and what could have been seen."""
    fields = (
        Field("Group", _group, numeric=False),
        Field("In the pool", lambda row: cells.count(row.pool, cells.percent(row.share_of_pool))),
        Field("Selected", lambda row: cells.count(row.selected, _of_selected(row))),
        Field("Never selected", lambda row: cells.count(row.never_selected)),
        Field("Rate", lambda row: cells.share(row.rate)),
        Field("Ratio to the rest", lambda row: cells.ratio(row.ratio)),
        Field("Cohen's h", lambda row: cells.number(row.cohens_h)),
        Field("q", lambda row: cells.probability(row.q, row.test or "")),
        Field("Level", _level, numeric=False),
        Field("Could see", lambda row: cells.reach(row.could_see)),
    )
    return tabulate(f"{column.name}: rates and ratios", fields, ordered(column))


def behind_table(column: ColumnAudit) -> SortTable | None:
    """Crude and conditional side by side, and what else may move a ratio; None where nothing of that was measured."""
    rows = column.groups
    confounders = [held.confounder for held in rows[0].conditional] if rows else []
    fields = [field for place, name in enumerate(confounders) for field in _held(place, name)]
    if any(row.corrected for row in rows):
        fields.append(Field("With label errors put right", lambda row: cells.ratio(row.corrected)))
    if any(row.votes != row.pool for row in rows):
        fields.append(Field("Counting copies", lambda row: cells.number(row.ratio_of_rows, under=_votes(row))))
    if any(row.shrunken for row in rows):
        fields.append(Field("Rate after shrinkage", lambda row: cells.share(row.shrunken)))
    if not fields:
        return None
    crude = Field("Crude ratio", lambda row: cells.ratio(row.ratio))
    name = f"{column.name}: what may lie behind the ratios"
    return tabulate(name, (Field("Group", _group, numeric=False), crude, *fields), ordered(column))


def draws_table(column: ColumnAudit) -> SortTable | None:
    """What a joint selection adds: exposures, early against late, both losses, scores; None where there is none."""
    rows = column.groups
    fields = []
    if any(row.exposures for row in rows):
        fields.append(Field("Exposures", _exposures))
        fields.append(Field("Per example", lambda row: cells.number(row.exposures and row.exposures.per_selected)))
    if any(row.early_late for row in rows):
        fields += [Field("Early", partial(_half, "early")), Field("Late", partial(_half, "late"))]
        fields.append(Field("Late to early", lambda row: cells.ratio(row.early_late and row.early_late.ratio)))
    if any(row.losses for row in rows):
        fields += [
            Field("Learner loss", partial(_loss, "learner")),
            Field("Reference loss", partial(_loss, "reference")),
        ]
        fields.append(Field("Which means", _quadrant, numeric=False))
    if any(row.score_quantiles for row in rows):
        fields.append(Field("Median score", _median))
    if not fields:
        return None
    name = f"{column.name}: draws, losses and scores"
    return tabulate(name, (Field("Group", _group, numeric=False), *fields), ordered(column))


def association_table(found: Sequence[Association]) -> SortTable | None:
    """Pairs of a group and a concept in the order of q, the first 200; None without any."""
    if not found:
        return None
    fields = (
        Field("Concept", lambda one: cells.text(one.concept), numeric=False),
        Field("Group", lambda one: cells.text(one.group, one.column), numeric=False),
        Field("Together in the pool", lambda one: cells.count(one.pool_together)),
        Field("Together selected", lambda one: cells.count(one.selected_together)),
        Field("Odds ratio in the pool", lambda one: cells.number(one.pool_odds_ratio)),
        Field("Changed by", lambda one: cells.ratio(one.change)),
        Field("q", lambda one: cells.probability(one.q)),
    )
    rest = len(found) - MOST_PAIRS
    note = (
        f"The {MOST_PAIRS} pairs with the smallest q; the other {rest:,} are in the data of this file."
        if rest > 0
        else ""
    )
    return tabulate("Pairs of a group and a concept", fields, found[:MOST_PAIRS], note)


def _held(place: int, name: str) -> tuple[Field, Field]:
    return (
        Field(f"Within equal {name}", lambda row: cells.ratio(row.conditional[place].ratio)),
        Field(f"Explained by {name}?", lambda row: _explained(row, row.conditional[place]), numeric=False),
    )


def _explained(row: GroupRow, held: Conditional) -> Cell:
    """The answer for a flagged group; for another only what the strata bring to light."""
    if held.ratio is None:
        return cells.text("no stratum has both", tone="faint")
    if not row.flagged and held.explains in ("undecided", "yes"):
        return cells.text("\u2013", "nothing was detected", "faint")
    mixed = held.homogeneity_p is not None and held.homogeneity_p < 0.05
    parts = [f"{cells.percent(held.covered)} of its rows"] if held.covered < 0.995 else []
    parts += ["not the same in all strata"] if mixed else []
    return cells.text(_EXPLAINS.get(held.explains, held.explains), "; ".join(parts))


def _group(row: GroupRow) -> Cell:
    return cells.text(row.group, "no group is known", "faint") if row.is_unknown else cells.text(row.group)


def _level(row: GroupRow) -> Cell:
    blind = row.level == "not detected" and row.could_see.below is None
    under = row.untested or ("too small to see any ratio below 1" if blind else "")
    return Cell(row.level, under, str(_LEVELS[row.level]), _TONES.get(row.level, ""))


def _of_selected(row: GroupRow) -> str:
    return "" if row.share_of_selected is None else cells.percent(row.share_of_selected)


def _share_of(value: float) -> Cell:
    return Cell(cells.percent(value), key=cells.sort_key(value))


def _overlap(column: ColumnAudit) -> str:
    return "may overlap" if column.overlapping else ""


def _variation(column: ColumnAudit) -> Cell:
    if column.composition is None:
        return MISSING
    moved: Shift = column.composition.total_variation
    span = f"{cells.percent(moved.low)} to {cells.percent(moved.high)}; by chance {cells.percent(moved.by_chance)}"
    return Cell(cells.percent(moved.value), span, cells.sort_key(moved.value))


def _votes(row: GroupRow) -> str:
    return f"{row.pool:,} rows, {row.votes:,.0f} votes"


def _exposures(row: GroupRow) -> Cell:
    drawn = row.exposures
    return MISSING if drawn is None else cells.count(drawn.exposures, f"{cells.percent(drawn.share)} of all")


def _half(which: str, row: GroupRow) -> Cell:
    return MISSING if row.early_late is None else cells.count(getattr(row.early_late, which))


def _loss(which: str, row: GroupRow) -> Cell:
    if row.losses is None:
        return MISSING
    away = getattr(row.losses, f"{which}_d")
    return cells.number(
        getattr(row.losses, which), under="" if away is None else f"{away:+.2f} sd".replace("-", "\u2212")
    )


def _quadrant(row: GroupRow) -> Cell:
    if row.losses is None or row.losses.quadrant is None:
        return cells.text("too few rows" if row.losses else "\u2013", tone="faint")
    return cells.text(row.losses.quadrant)


def _median(row: GroupRow) -> Cell:
    if row.score_quantiles is None:
        return MISSING
    low, middle, high = row.score_quantiles[0], row.score_quantiles[QUANTILES.index(0.5)], row.score_quantiles[-1]
    return Cell(f"{middle:.3g}", f"{low:.3g} to {high:.3g}".replace("-", "\u2212"), cells.sort_key(middle))
