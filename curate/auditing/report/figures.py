"""The figures of an audit as sections of a page: the whole first, then column by column, then scores and associations.

Charts show the groups that matter first and count the others in words; tables have them all. A thousand groups take
some 300 kB and a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from curate.auditing.association import Association
from curate.auditing.columns import Column, shown
from curate.auditing.outcome import Audit, ColumnAudit
from curate.auditing.report.chosen import HIGHER, LOWER, MOST, NEUTRAL, plural
from curate.auditing.report.comparing import forest, held_equal, late_and_early, volcano
from curate.auditing.report.mixing import composition, crossed, shares
from curate.auditing.report.scoring import Numbers, quadrants, score_lines
from curate.auditing.strata import Ratio
from curate.errors import UsageError
from curate.reporting.marks import mark_entry
from curate.reporting.page import Figure, Section
from curate.reporting.rows import Mark, Row, row_chart
from curate.reporting.scales import Axis
from curate.reporting.tallies import tally_chart

MANY: Final = 20  # groups, from which a column has a volcano of its own


def figures_of(
    audit: Audit, *, score_N: ArrayLike | None = None, members: Mapping[str, Column] | None = None
) -> tuple[Section, ...]:
    """Sections of figures; one without any is left out.

    `score_N`: the score of each row of the pool, with `members`, the audit's columns by name: both give the whole
    distribution per group, without them five quantiles do. Errors: UsageError for scores of another length.
    Example: `figures_of(audit_columns({"tone": tones}, selected_N))[1].title` is "tone".
    """
    scores = None if score_N is None else _scores(score_N, audit)
    columns = [column_section(one, audit, scores, members or {}) for one in audit.columns]
    sections = [
        Section("The audit as a whole", figures=(*placebos(audit), *_volcano(audit), *composition(audit))),
        *columns,
        Section("Losses behind the scores", figures=tuple(quadrants(audit))),
        Section("Associations", figures=tuple(associations(audit))),
    ]
    return tuple(section for section in sections if section.filled)


def column_section(
    column: ColumnAudit, audit: Audit, score_N: Numbers | None, members: Mapping[str, Column]
) -> Section:
    """The figures of one column."""
    many = len(column.groups) >= MANY or column.kind == "cluster"
    figures = [
        *forest(column, audit),
        *shares(column, audit),
        *crossed(column, audit),
        *(volcano(column.groups, audit, "Ratio and evidence") if many else ()),
        *score_lines(column, score_N, members),
        *late_and_early(column, audit),
        *held_equal(column, audit),
    ]
    unknown = f" The group of {column.unknown_share:.1%} of the pool is not known." if column.unknown_share else ""
    source = column.provenance.rstrip(". ").replace(".; ", "; ")
    return Section(title_of(column), f"{source}.{unknown}", tuple(figures))


def placebos(audit: Audit) -> Iterator[Figure]:
    """The flags of random selections of equal size, and this selection's."""
    random = audit.placebo
    if not random.flags:
        return
    chart = tally_chart(
        "Flags, and what chance alone flags", random.flags, audit.flags, x=Axis("groups flagged"),
        y=Axis("selections"), names=("random selections", "this selection"),
    )  # fmt: skip
    count = len(random.flags)
    yield Figure(chart, f"The same {random.tests:,} tests on {count} {plural(count, 'selection')} of equal size drawn "
                 f"by chance: {random.with_any} raised a flag at all. A selection whose mark lies among the bars shows "
                 "nothing that chance does not.")  # fmt: skip


def associations(audit: Audit) -> Iterator[Figure]:
    """How strongly groups and concepts go together in the pool and in the selection."""
    pairs = [one for one in audit.associations if one.change is not None and one.pool_odds_ratio is not None]
    flagged = [one for one in pairs if _changed(one, audit.alpha)]
    pairs.sort(key=lambda one: (not _changed(one, audit.alpha), one.p or 0.0))
    if not pairs:
        return
    rows = [_shift(one, audit.alpha) for one in pairs[:MOST]]
    legend = [mark_entry("ring", "in the pool", NEUTRAL)]
    legend += [mark_entry("dot", "in the selection, change detected", LOWER, line=True)] if flagged else []
    if len(flagged) < len(rows):
        legend.append(mark_entry("square", "in the selection, none detected", NEUTRAL, line=True))
    axis = Axis("odds ratio of group and word", log=True, include=(0.5, 2.0))
    chart = row_chart("Associations, from the pool to the selection", rows, x=axis, line=1.0, legend=legend)
    hidden = f" {len(pairs) - MOST:,} more {plural(len(pairs) - MOST, 'pair')} not drawn." if len(pairs) > MOST else ""
    yield Figure(chart, "Right of 1 the word stands more often with the group than with others, left of it less often; "
                 "the factor of the change stands to the right, its 95 % interval is drawn where the selection is. "
                 f"Changes detected: {len(flagged):,} of {len(pairs):,} pairs.{hidden}")  # fmt: skip


def _changed(one: Association, alpha: float) -> bool:
    return one.q is not None and one.q <= alpha


def _volcano(audit: Audit) -> Iterator[Figure]:
    return volcano(audit.rows, audit, "All groups: ratio and evidence")


def _shift(one: Association, alpha: float) -> Row:
    assert one.change is not None
    assert one.pool_odds_ratio is not None
    start, change = one.pool_odds_ratio, one.change
    flagged = _changed(one, alpha)
    slot = NEUTRAL if not flagged else LOWER if change.value < 1 else HIGHER
    end = Ratio(start * change.value, start * change.low, start * change.high)
    said = f"{shown(one.column)}: {one.selected_together:,} of {one.pool_together:,} together were kept"
    marks = [
        Mark(start, shape="ring", slot=NEUTRAL, said=f"in the pool {start:.2f}"),
        Mark(end.value, end.low, end.high, "dot" if flagged else "square", slot, said),
    ]
    return Row(f"{shown(one.concept)} with {shown(one.group)}", f"times {change.value:.2f}", marks)


def _scores(score_N: ArrayLike, audit: Audit) -> Numbers:
    scores = np.asarray(score_N, dtype=np.float64)
    if scores.shape != (audit.pool,):
        raise UsageError(f"score_N has {scores.size:,} values for {audit.pool:,} rows of the pool; give one a row")
    return scores


def title_of(column: ColumnAudit) -> str:
    """A user's own column keeps its name; ours begin like titles."""
    name = shown(column.name)
    if column.kind == "mention" and not name.startswith("caption mentions"):
        return f"Caption mentions: {name}"
    if column.kind == "intersection":
        return f"Intersection: {name}"
    if column.kind == "zero-shot":
        return f"Predicted: {name}"
    return name if column.kind == "label" else name[:1].upper() + name[1:]
