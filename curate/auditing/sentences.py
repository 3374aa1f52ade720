"""Findings in words that say no more than was measured.

"Captions that mention X", "perceived", "associated with"; never a verdict on the selection, and never silence without
what could have been seen. The ratio of 0.8 is a screening ratio, not a legal test.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from curate.auditing.association import Association
from curate.auditing.columns import shown
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.placebo import Placebo
from curate.auditing.strata import Conditional, Ratio

_SUBJECTS: Final = {
    "mention": "captions that mention {group}",
    "script": "captions in the script {group}",
    "language": "captions whose language was taken for {group}",
    "cluster": "samples of {group}",
    "duplicate": "samples whose duplicates are {group}",
}
_OTHERWISE: Final = "samples with {column} {group}"
# What a model says of pictures is told as its guess, never as a fact about who or what they show.
_PREDICTED: Final = "samples that {model} takes for {group}"
_IN_PART: Final = "samples with {column} {group}, in part as {model} takes them"
_OPEN: Final = "samples whose {column} {model} leaves open"
_HOW_LARGE: Final = {
    "detected": "a disparity was detected, within the screening range",
    "detected and large": "detected and large, though its interval reaches into the screening range",
    "confidently large": "detected and confidently large",
}


def subject(row: GroupRow, kind: str, model: str | None = None) -> str:
    """Who is spoken of; `model` is whose predictions the groups are.

    Example: of a caption lexicon's group, "captions that mention women".
    """
    said = _SUBJECTS.get(kind, _OTHERWISE)
    if model is not None:
        said = _IN_PART if kind == "intersection" else _PREDICTED
    if row.is_unknown:
        said = _OPEN if model is not None and kind != "intersection" else "samples whose {column} is not known"
    return said.format(column=shown(row.column), group=shown(row.group), model=shown(model or ""))


def finding(row: GroupRow, kind: str = "label", model: str | None = None) -> str:
    """One row in a sentence, without a full stop.

    Example: "captions that mention women were kept 0.62 times as often as the rest (0.55-0.70); detected and
    confidently large; could be explained by caption length: no".
    """
    who = subject(row, kind, model)
    if row.level == "untested" or row.ratio is None:
        return f"{who} could not be compared: {row.untested}"
    if not row.flagged:
        return f"{who}: nothing detected at {_times(row.ratio)}; {reach(row)}"
    held = [explained(one) for one in row.conditional]
    return "; ".join([f"{who} were kept {_times(row.ratio)}", _HOW_LARGE[row.level], *_label_noise(row), *held])


def reach(row: GroupRow) -> str:
    """What the audit could not have seen: "could not have seen a ratio above 0.33 and below 1.88"."""
    below, above = row.could_see.below, row.could_see.above
    size = f"{row.pool:,} in the pool, {row.selected:,} selected"
    if below is None:
        rest = "" if above is None else f"; above 1 it sees ratios from {above:.2f}"
        return f"with {size}, the audit could not have seen any ratio below 1{rest}"
    side = f"{below:.2f}" if above is None else f"{below:.2f} and below {above:.2f}"
    return f"with {size}, the audit could not have seen a ratio above {side}"


def explained(held: Conditional) -> str:
    """Whether a confounder could be behind a crude ratio. Example: "could be explained by caption length: no"."""
    name = shown(held.confounder)
    if held.ratio is None:
        return f"could be explained by {name}: cannot be told, no stratum has both"
    within = f"within equal {name} {_plain(held.ratio)}"
    mixed = held.homogeneity_p is not None and held.homogeneity_p < 0.05
    tail = ", and not the same in all strata" if mixed else ""
    if held.explains == "reversed":
        return f"the direction reverses {within}{tail}"
    answer = "cannot be told" if held.explains == "undecided" else held.explains
    return f"could be explained by {name}: {answer} ({within}{tail})"


def association(one: Association, alpha: float = 0.05) -> str:
    """A pair in a sentence. Example: "'doctor' is 0.50 times as strongly associated with gender she as in the pool"."""
    pair = f"{shown(one.concept)!r} with {shown(one.column)} {shown(one.group)}"
    if one.change is None or one.q is None:
        return f"the association of {pair} could not be compared: too few have both, or only one of them"
    if one.q > alpha:
        return f"the association of {pair}: no change detected, odds ratio times {_plain(one.change)}"
    way = "more" if one.change.value > 1 else "less"
    return f"{pair}: {way} associated than in the pool, odds ratio times {_plain(one.change)}"


def chance(placebo: Placebo, flags: int) -> str:
    """The flags beside those of random selections. Example: "3 flags of 40 tests; 20 random selections: 0 to 1"."""
    if not placebo.flags:
        return f"{_flags(flags)}; no random selections were audited"
    least, most = min(placebo.flags), max(placebo.flags)
    span = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{_flags(flags)} of {placebo.tests} tests; {len(placebo.flags)} random selections of equal size raised {span}"
    )


def findings(audit: Audit) -> tuple[str, ...]:
    """What to read first: the flagged groups, the largest first, then random selections, then what cannot be said."""
    whose = {column.name: (column.kind, column.model) for column in audit.columns}
    found = [_sentence(finding(row, *whose[row.column])) for row in flagged(audit)]
    found.append(_sentence(chance(audit.placebo, audit.flags)))
    return (*found, *(_sentence(line) for column in audit.columns for line in silence(column)))


def flagged(audit: Audit) -> tuple[GroupRow, ...]:
    """The groups whose disparities were detected, in the order of the findings: the furthest from 1 first.

    Where a column has two groups only, their ratios are each other's inverse: the one kept less often stands for both.
    """
    said = (row for column in audit.columns for row in column.groups if row.flagged and not _mirrors(row, column))
    return tuple(sorted(said, key=_size))


def _mirrors(row: GroupRow, column: ColumnAudit) -> bool:
    """Is it the other side of a finding that is told already?"""
    others = [other for other in column.groups if not other.is_unknown and other.pool and other is not row]
    if column.overlapping or row.is_unknown or len(others) != 1 or not others[0].flagged:
        return False
    assert row.ratio is not None
    return row.ratio.value > 1


def silence(column: ColumnAudit) -> list[str]:
    """What cannot be said of a column: how much is not known, and what could not have been seen; no full stops."""
    said = [f"{shown(column.name)}: the group of {column.unknown_share:.1%} of the pool is not known"]
    quiet = [row for row in column.groups if row.level == "not detected"]
    blind = [row for row in quiet if row.could_see.below is None]
    lines = said if column.unknown_share else []
    for why, groups in Counter(row.untested for row in column.groups if row.pool and row.untested).items():
        lines = [*lines, f"{shown(column.name)}: {groups} of {len(column.groups)} groups could not be compared: {why}"]
    if blind:
        lines = [
            *lines,
            f"{shown(column.name)}: {len(blind)} of {len(column.groups)} groups are too small for any ratio below 1",
        ]
    seen = [row.could_see.below for row in quiet if row.could_see.below is not None]
    if seen:
        least, most = f"{min(seen):.2f}", f"{max(seen):.2f}"
        span = most if least == most else f"{least} to {most}, by group"
        where = f"nothing detected in {len(seen)} group{'s' * (len(seen) > 1)}"
        lines = [*lines, f"{shown(column.name)}: {where}; the audit could not have seen a ratio above {span}"]
    return lines


def _size(row: GroupRow) -> float:
    assert row.ratio is not None
    return -abs(math.log(row.ratio.value)) if 0 < row.ratio.value < math.inf else -math.inf


def _label_noise(row: GroupRow) -> list[str]:
    return [] if row.corrected is None else [f"with the labels' stated errors put right {_plain(row.corrected)}"]


def _times(ratio: Ratio) -> str:
    if math.isinf(ratio.value):
        return f"while none of the rest was (a ratio of {ratio.low:.2f} or more)"
    return f"{ratio.value:.2f} times as often as the rest ({_limits(ratio)})"


def _plain(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({_limits(ratio)})" if math.isfinite(ratio.value) else f"above {ratio.low:.2f}"


def _limits(ratio: Ratio) -> str:
    return f"{ratio.low:.2f}-{ratio.high:.2f}" if math.isfinite(ratio.high) else f"{ratio.low:.2f} or more"


def _flags(flags: int) -> str:
    return f"{flags} flag" if flags == 1 else f"{flags} flags"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
