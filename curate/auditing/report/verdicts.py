"""The policy's verdict in a report: the result in words, the conflict, and a row per bounded group with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from curate.auditing.power import Reach
from curate.auditing.report import cells
from curate.auditing.report.cells import Cell, Field, SortTable, tabulate
from curate.auditing.strata import Ratio
from curate.policy.checking import GroupCheck, Result, Verdict
from curate.policy.ratios import PoolRatio
from curate.policy.schema import Policy

_MEANING: Final[dict[Result, str]] = {
    "passed": "Every group with a bound of severity error keeps to it, and the counts sufficed to tell.",
    "violated": "At least one bound of severity error is not kept.",
    "infeasible": "No selection of this size from this pool can keep to all bounds of severity error.",
    "indeterminate": "Coverage or counts do not suffice to tell whether the bounds are kept. This is not a pass.",
}
_TONES: Final[dict[Result, Literal["good", "warning", "plain"]]] = {
    "passed": "good", "violated": "warning", "infeasible": "warning", "indeterminate": "plain",
}  # fmt: skip
_ORDER: Final = ("passed", "indeterminate", "violated", "infeasible")


@dataclass(frozen=True, slots=True)
class PolicyPart:
    """The section on the policy: `result` is the word, `lines` explain it, `facts` tell whose policy it is."""

    result: str
    tone: str
    lines: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    table: SortTable


def policy_part(verdict: Verdict, policy: Policy | None = None) -> PolicyPart:
    """A verdict as the report shows it; with the policy itself, also its author, date and rationale."""
    lines = [_MEANING[verdict.result]]
    if verdict.conflict:
        lines.append(f"The conflict: {verdict.conflict}.")
    facts = () if policy is None else _facts(policy)
    return PolicyPart(verdict.result, _TONES[verdict.result], tuple(lines), facts, _table(verdict))


def _facts(policy: Policy) -> tuple[tuple[str, str], ...]:
    sources = tuple((f"Source of {column.name}", column.source) for column in policy.columns)
    return (("Author", policy.author), ("Date", str(policy.date)), ("Rationale", policy.rationale), *sources)


def _table(verdict: Verdict) -> SortTable:
    fields = (
        Field("Group", lambda one: cells.text(one.group, one.column), numeric=False),
        Field("Result", _result, numeric=False),
        Field("Reason", lambda one: cells.text(one.reason), numeric=False),
        Field("In the pool", lambda one: cells.count(one.n)),
        Field("Selected", lambda one: cells.count(one.chosen)),
        Field("Rate", lambda one: cells.share(one.rate)),
        Field("Ratio to the pool", lambda one: _ratio(one.ratio)),
        Field("Could see", lambda one: cells.reach(Reach(one.ratio.seen_below, one.ratio.seen_above))),
    )
    note = (
        "A policy's ratios are to the rate of the whole pool; those of the other tables are to the rest of the column."
    )
    return tabulate("Bounds of the policy, group by group", fields, verdict.groups, note)


def _result(one: GroupCheck) -> Cell:
    tone = {"violated": "warning", "infeasible": "warning", "indeterminate": "strong"}.get(one.result, "")
    return Cell(one.result, f"severity {one.severity}", str(_ORDER.index(one.result)), tone)


def _ratio(found: PoolRatio) -> Cell:
    return cells.ratio(None if found.value != found.value else Ratio(found.value, found.low, found.high))
