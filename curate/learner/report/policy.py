"""What a policy asked of a run and what it got: in sentences, a chart of each group's rate over the steps, and tables.

Ratios are to the rate of all candidates that were looked at, as a policy's bounds are. What conflicted stands beside
what was served: a policy that was not kept says so first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from curate.learner.report.course import Course, Group, over_steps, points
from curate.learner.report.history import History, Record, number, word
from curate.learner.report.words import over, percent, plain, seeds
from curate.reporting.charts import Level
from curate.reporting.curves import spread
from curate.reporting.page import Finding, Section, Table
from curate.reporting.scales import Axis

MOST_LINES: Final = 6
_BOUNDS: Final = ("min_ratio", "max_ratio", "min_share", "min_count")
_RATIO: Final = Axis("rate over that of all candidates", include=(1.0,))
_CAPTION: Final = (
    "Cumulative over the draws so far, at 1 chosen as often as candidates are on average. The policy's bounds are on "
    "whole samples, so the first steps may lie outside."
)


def policy_findings(runs: Sequence[History]) -> Iterator[Finding]:
    """Whether the policy was kept, what could not be met, and what it gave up; nothing for runs without one."""
    policed = [run for run in runs if run.policy is not None]
    if not policed:
        return
    for run in policed:
        short = [str(row.get("group")) for row in _rows(run) if _missing(row)]
        which = f" ({seeds([run])})" if len(runs) > 1 else ""
        if run.certificate is None:
            text = "The run has not ended, so its certificate is not written yet"
        elif short:
            text = f"Not kept: {', '.join(short[:MOST_LINES])}" + (" and others" if len(short) > MOST_LINES else "")
            text += " outside the bounds over the whole run; the table says by how much"
        else:
            text = f"All {len(_rows(run))} bounded groups are within the policy's bounds over the whole run"
        yield Finding("Policy", f"{text}{which}. {_conflicts(run)}", "warning" if short else "plain")
    changed = over((number(run.certificate, "draws_bound") for run in policed), "{:,.0f}".format)
    given_up = over((number(run.certificate, "price", "given_up_per_member") for run in policed), "{:.4g}".format)
    if changed:
        of = over((_priced(run) for run in policed), percent)
        price = f"; it gave up {given_up} of the score per pair against draws without it" if given_up else ""
        price += f", as measured on {of} of the pairs" if given_up and of else ""
        yield Finding("Price", f"The policy passed candidates over in {changed} of the draws{price}.")


def policy_sections(groups: Sequence[Group], course: Course) -> Iterator[Section]:
    """The policy, its groups over the steps and over the run, and the conflicts, of the first group's runs."""
    runs = [run for run in groups[0].runs if run.policy is not None]
    if not runs:
        return
    lines = [
        spread(name, [points(run.quotas, partial(_ratio, name)) for run in runs], slot=slot)
        for slot, name in enumerate(_shown(runs[0]))
    ]
    figures = over_steps(course, "Groups under the policy", lines, _RATIO, _CAPTION, levels=_levels(runs[0]))
    tables = [_group_table(runs[0]), *_conflict_table(runs[0]), *_column_table(runs[0])]
    yield Section("Policy", _words(runs[0]), list(figures), tables)


def _priced(run: History) -> float | None:
    """The share of the pairs drawn whose price was taken."""
    members, chosen = number(run.certificate, "price", "members"), number(run.certificate, "chosen")
    return members / chosen if members and chosen else None


def _words(run: History) -> str:
    policy = _mapping(run.policy, "policy")
    author, date = word(policy, "author") or "someone unnamed", word(policy, "date") or "no date"
    return f"By {author}, {date}: {word(policy, 'rationale') or 'no rationale given'}"


def _conflicts(run: History) -> str:
    conflicts = sum(bool(word(line, "conflict")) for line in run.shorts)
    few = len(run.shorts) - conflicts
    parts = [f"{conflicts:,} of {run.last_step:,} draws could not meet every bound"]
    parts += [f"{few:,} had too few candidates for what was owed"] if few else []
    return f"{'; '.join(parts)}."


def _group_table(run: History) -> Table:
    head = ("group", "asked", "candidates", "at least", "at most", "chosen", "why")
    asked = _asked(run)
    rows = [
        (
            str(row.get("group")), asked.get(str(row.get("group")), ""),
            _whole(row, "n"), _whole(row, "L"), "" if row.get("V") == row.get("n") else _whole(row, "V"),
            _whole(row, "C"), word(row, "reason") or "",
        )
        for row in _rows(run)
    ]  # fmt: skip
    return Table("Groups over the whole run; a pair counts as often as it was drawn", head, rows, numeric=(2, 3, 4, 5))


def _conflict_table(run: History) -> Iterator[Table]:
    often = Counter(text for line in run.shorts if (text := word(line, "conflict")))
    if often:
        rows = [(text, f"{draws:,}") for text, draws in often.most_common(20)]
        yield Table("Conflicts, the most frequent first", ("conflict", "draws"), rows, numeric=(1,), folded=True)


def _column_table(run: History) -> Iterator[Table]:
    columns = (run.policy or {}).get("columns")
    rows = [
        (str(column.get("column")), str(column.get("provenance")), _percent(number(column, "coverage")))
        for column in (columns if isinstance(columns, list) else [])
        if isinstance(column, Mapping)
    ]
    if rows:
        yield Table("Where the groups come from", ("column", "provenance", "share known"), rows, numeric=(2,))


def _asked(run: History) -> dict[str, str]:
    """What each group is asked for, by its name `column=group`."""
    found = {}
    for column in _records(_mapping(run.policy, "policy"), "columns"):
        for group in _records(column, "groups"):
            bounds = [f"{name.replace('_', ' ')} {plain(group[name])}" for name in _BOUNDS if name in group]
            found[f"{column.get('column')}={group.get('name')}"] = ", ".join(bounds)
    return found


def _levels(run: History) -> list[Level]:
    """The floors and ceilings that are asked of ratios, each once."""
    groups = [
        group for column in _records(_mapping(run.policy, "policy"), "columns") for group in _records(column, "groups")
    ]
    ways = (("min_ratio", "floor"), ("max_ratio", "ceiling"))
    levels = {(at, name) for group in groups for key, name in ways if (at := number(group, key)) is not None}
    return [Level(at, f"{name} {at:g}") for at, name in sorted(levels)] if len(levels) <= MOST_LINES else []


def _shown(run: History) -> list[str]:
    """The groups that a chart shows: those that were the least within their bounds, where there are too many."""
    names = [str(row.get("group")) for row in sorted(_rows(run), key=lambda row: number(row, "slack") or 0.0)]
    return (names or list(_asked(run)))[:MOST_LINES]


def _ratio(name: str, record: Record) -> float | None:
    counts = _mapping(record, "groups").get(name)
    pool, chosen = number(record, "candidates"), number(record, "chosen")
    if not isinstance(counts, list) or len(counts) != 2 or not pool or not chosen:
        return None
    n, got = (number({"at": one}, "at") for one in counts)
    return None if not n or got is None else (got / n) / (chosen / pool)


def _rows(run: History) -> list[Mapping[str, Any]]:
    return _records(run.certificate or {}, "groups")


def _missing(row: Mapping[str, Any]) -> bool:
    """Is a whole sample missing, or one too many there?"""
    got, owed, most = (number(row, name) for name in ("C", "F", "V"))
    return got is not None and ((owed is not None and got <= owed - 1) or (most is not None and got > most))


def _whole(row: Mapping[str, Any], name: str) -> str:
    value = number(row, name)
    return "" if value is None else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _mapping(record: Record | None, key: str) -> Mapping[str, Any]:
    found = (record or {}).get(key)
    return found if isinstance(found, Mapping) else {}


def _records(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = record.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
