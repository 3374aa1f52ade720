"""Does a finished selection keep to a policy: passed, violated, infeasible or indeterminate, per group and in all.

A row's result needs the figure and the power to read it. Counts and shares are exact. A ratio within its bounds has
passed if its interval lies within too, or if the bound itself would have been seen (minimum detectable ratio at 80 %
power, 5 % level); one outside is violated if its interval lies outside too, or if that power was there. Everything
else is indeterminate: so is a column whose coverage is below its `min_coverage`. Bounds that no selection of this size
could meet are infeasible, and the conflict is named. A training draws samples repeatedly: its draws are held to the
bounds, as its sampler holds them, and how sure a ratio of draws is follows from the different samples among them. In
all the worst of the columns with `severity: error` counts:

    passed 0    violated 1    infeasible 2    indeterminate 3      (an indeterminate result never becomes 0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.evaluation.interval import Share, wilson
from curate.policy.feasibility import find_conflict
from curate.policy.memberships import Grouped, members_of
from curate.policy.quotas import owed
from curate.policy.ratios import PoolRatio, pool_ratio
from curate.policy.schema import Bounds, Column, Policy

# N rows of the pool, G groups of the policy

Result = Literal["passed", "violated", "infeasible", "indeterminate"]
EXIT_CODES: Final[dict[Result, int]] = {"passed": 0, "violated": 1, "infeasible": 2, "indeterminate": 3}
_WORST_FIRST: Final[tuple[Result, ...]] = ("infeasible", "violated", "indeterminate", "passed")


@dataclass(frozen=True, slots=True)
class GroupCheck:
    """One group: n in the pool, chosen of them, draws of these, its rate and ratio to the pool's rate, what follows."""

    column: str
    group: str
    severity: Literal["error", "warning"]
    n: int
    chosen: int
    draws: int
    rate: Share | None
    ratio: PoolRatio
    result: Result
    reason: str

    def as_json(self) -> dict[str, Any]:
        ratio, rate = self.ratio, self.rate
        return {
            "column": self.column, "group": self.group, "severity": self.severity, "n": self.n, "chosen": self.chosen,
            "draws": self.draws, "rate": None if rate is None else [rate.value, rate.low, rate.high],
            "ratio": [_number(one) for one in (ratio.value, ratio.low, ratio.high)],
            "detectable": [ratio.seen_below, ratio.seen_above], "result": self.result, "reason": self.reason,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check, its groups in the policy's order, and the conflict of an infeasible policy."""

    result: Result
    groups: tuple[GroupCheck, ...]
    conflict: str = ""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.result]

    def as_json(self) -> dict[str, Any]:
        rows = [group.as_json() for group in self.groups]
        return {"result": self.result, "exit_code": self.exit_code, "conflict": self.conflict, "groups": rows}


def check_selection(
    policy: Policy,
    found: Mapping[str, Grouped],
    chosen_N: NDArray[Any],
    *,
    cluster_N: NDArray[np.int64] | None = None,
) -> Verdict:
    """Check a selection: true or times drawn per row of the pool.

    `found` are the columns by name. `cluster_N` numbers the clusters of near-duplicates: then a cluster is the unit of
    the intervals, while bounds stay in samples. Errors: UsageError for columns or groups that are not there, lengths
    that differ, and a selection of nothing.
    """
    times_N = np.asarray(chosen_N).astype(np.int64)
    member_NG = members_of(policy, found)
    if times_N.shape != (len(member_NG),) or (cluster_N is not None and cluster_N.shape != times_N.shape):
        raise UsageError(f"a selection of shape {times_N.shape} does not fit columns of {len(member_NG)} rows")
    if not times_N.any():
        raise UsageError("nothing was selected, so there is nothing to check")
    judged, start = [], 0
    for column in policy.columns:
        stop = start + len(column.groups)
        coverage = float(np.mean(found[column.name].is_known))
        judged += _checked(column, coverage, member_NG[:, start:stop], times_N, cluster_N)
        start = stop
    once = int(times_N.max()) == 1  # a sample that is drawn again and again is short of nothing
    impossible = find_conflict(policy, member_NG, int(times_N.sum())) if once else None
    conflict = "" if impossible is None else impossible.text
    results = [one.result for one in judged if one.severity == "error"]
    return Verdict("infeasible" if conflict else _worst(results), tuple(judged), conflict)


def _checked(
    column: Column,
    coverage: float,
    member_NG: NDArray[np.bool_],
    times_N: NDArray[np.int64],
    cluster_N: NDArray[np.int64] | None,
) -> list[GroupCheck]:
    taken_N = times_N > 0
    pool, all_chosen, all_draws = len(taken_N), int(taken_N.sum()), int(times_N.sum())
    checks = []
    for bound, member_N in zip(column.groups, member_NG.T, strict=True):
        n, chosen, draws = int(member_N.sum()), int((member_N & taken_N).sum()), int(times_N[member_N].sum())
        units = None if cluster_N is None else float(len(np.unique(cluster_N[member_N])))
        ratio = pool_ratio(chosen, n, all_chosen, pool, units=units)
        if all_draws > all_chosen and n:
            ratio = ratio.moved_to(draws * pool / (all_draws * n))
        result, reason = _judged(bound, ratio, n=n, chosen=draws, all_chosen=all_draws, pool=pool)
        if coverage < column.min_coverage:
            result = "indeterminate"
            reason = f"only {coverage:.1%} of the rows are known, below min_coverage {column.min_coverage:.1%}"
        rate = wilson(chosen, n) if n else None
        checks.append(
            GroupCheck(column.name, bound.name, column.severity, n, chosen, draws, rate, ratio, result, reason)
        )
    return checks


def _judged(bound: Bounds, ratio: PoolRatio, *, n: int, chosen: int, all_chosen: int, pool: int) -> tuple[Result, str]:
    """The worst that any of a group's bounds says, with the reasons for it; `chosen` are draws."""
    floors, _ = owed([bound], [n], pool=pool, chosen=all_chosen)
    if math.floor(floors[0]) > max(n, chosen):
        return "infeasible", f"{math.floor(floors[0])} are asked for, but the pool has {n}"
    said = [*_counted(bound, chosen, all_chosen), *_compared(bound, ratio, n, chosen, all_chosen, pool)]
    result = _worst(one for one, _ in said)
    return result, "; ".join(reason for one, reason in said if one == result)


def _counted(bound: Bounds, chosen: int, all_chosen: int) -> list[tuple[Result, str]]:
    """Counts and shares: exact."""
    said: list[tuple[Result, str]] = []
    if bound.min_count is not None:
        kept = chosen >= bound.min_count
        said.append(("passed" if kept else "violated", f"{chosen} selected, min_count {bound.min_count}"))
    if bound.min_share is not None:
        kept = chosen >= math.floor(bound.min_share * all_chosen)
        share = f"{chosen / all_chosen:.4g} of the selected, min_share {float(bound.min_share):g}"
        said.append(("passed" if kept else "violated", share))
    return said


def _compared(
    bound: Bounds, ratio: PoolRatio, n: int, chosen: int, all_chosen: int, pool: int
) -> list[tuple[Result, str]]:
    """Ratios: with the power to tell."""
    low, high = bound.min_ratio, bound.max_ratio
    if low is None and high is None:
        return []
    even = Fraction(all_chosen * n, pool)
    if n and all_chosen == pool and math.isnan(ratio.value):
        kept = (low is None or low <= 1) and (high is None or high >= 1)
        return [("passed" if kept else "violated", "the whole pool was selected: ratio 1")]
    if math.isnan(ratio.value):
        return [("indeterminate", "no row of the pool is in it" if not n else "all rows are in it, and none beside it")]
    said = []
    if low is not None:
        seen = ratio.seen_below is not None and float(low) < 1 and ratio.seen_below >= float(low)
        sides = (chosen >= math.floor(low * even), ratio.low >= float(low), ratio.high < float(low))
        said.append(_with_power("min_ratio", float(low), ratio, seen, sides, ratio.seen_below))
    if high is not None:
        seen = ratio.seen_above is not None and float(high) > 1 and ratio.seen_above <= float(high)
        sides = (chosen <= math.ceil(high * even), ratio.high <= float(high), ratio.low > float(high))
        said.append(_with_power("max_ratio", float(high), ratio, seen, sides, ratio.seen_above))
    return said


def _with_power(
    name: str, limit: float, ratio: PoolRatio, seen: bool, sides: tuple[bool, bool, bool], reach: float | None
) -> tuple[Result, str]:
    """`sides`: whether the count is within the limit, the interval wholly within, the interval wholly outside."""
    within, surely_within, surely_outside = sides
    text = f"ratio {ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g}), {name} {limit:g}"
    if seen or (surely_within if within else surely_outside):
        return ("passed" if within else "violated"), text
    apart = "below" if name == "min_ratio" else "above"
    reached = f"could not have seen a ratio {apart} 1" if reach is None else f"could see a ratio {apart} {reach:.3g}"
    return "indeterminate", f"{text}: {reached}, and its interval crosses the bound"


def _worst(results: Iterable[Result]) -> Result:
    found = set(results)
    return next(one for one in _WORST_FIRST if one in found)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
