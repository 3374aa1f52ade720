"""Checks of finished selections: what passes, what is violated, and what nobody could have told."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from curate.auditing.columns import Column, column_of
from curate.errors import UsageError
from curate.marked_yaml import parse_yaml
from curate.policy.atoms import atoms_of
from curate.policy.checking import EXIT_CODES, Verdict, check_selection
from curate.policy.memberships import members_of
from curate.policy.quotas import State, quota
from curate.policy.ratios import pool_ratio
from curate.policy.schema import Policy, check_policy

RESULTS = ("passed", "violated", "infeasible", "indeterminate")  # by exit code
HEAD = "schema: 1\nauthor: A\ndate: 2026-11-20\nrationale: R\ncolumns:\n"


def policy(*columns: str) -> Policy:
    """Columns as flow mappings without their source."""
    lines = "".join(f"  - {{source: test, {column}}}\n" for column in columns)
    return check_policy(parse_yaml(HEAD + lines, "p.yaml"))


def pool(**groups: tuple[int, int]) -> tuple[Column, np.ndarray]:
    """A column c with groups of n rows of which k are selected; `unknown` are rows without a value."""
    values = [None if name == "unknown" else name for name, (n, _) in groups.items() for _ in range(n)]
    chosen = [i < k for n, k in groups.values() for i in range(n)]
    return column_of(values, name="c", kind="label", provenance="test"), np.array(chosen)


def checked(rules: str, **groups: tuple[int, int]) -> Verdict:
    found, chosen_N = pool(**groups)
    return check_selection(policy(f"column: c, {rules}"), {"c": found}, chosen_N)


@pytest.mark.parametrize(
    ("rules", "groups", "result", "reason"),
    [
        ("groups: [a], min_ratio: 0.8", {"a": (4000, 800), "b": (4000, 800)}, "passed", "ratio 1 (0.956 to 1.04)"),
        ("groups: [a], min_ratio: 0.8", {"a": (4000, 500), "b": (4000, 800)}, "violated", "ratio 0.769"),
        ("groups: [a], min_ratio: 0.8", {"a": (40, 8), "b": (4000, 800)}, "indeterminate", "could see a ratio below"),
        ("groups: [a], min_ratio: 0.8", {"a": (40, 6), "b": (4000, 800)}, "indeterminate", "its interval crosses"),
        ("groups: [a], min_ratio: 0.8", {"a": (40, 0), "b": (4000, 800)}, "violated", "ratio 0 (0 to 0."),
        ("groups: [a], min_ratio: 0.8", {"a": (8, 0), "b": (4000, 200)}, "indeterminate", "could not have seen"),
        ("groups: [a], min_ratio: 0.8", {"a": (40, 30), "b": (4000, 800)}, "passed", "ratio 3.65 (3.04 to 4.38)"),
        ("groups: [a], max_ratio: 1.25", {"a": (4000, 900), "b": (4000, 800)}, "passed", "max_ratio 1.25"),
        ("groups: [a], max_ratio: 1.25", {"a": (4000, 1600), "b": (4000, 800)}, "violated", "ratio 1.33"),
        ("groups: [a], max_ratio: 1.25", {"a": (40, 9), "b": (4000, 800)}, "indeterminate", "a ratio above"),
        ("groups: [a], min_ratio: 1", {"a": (4000, 800), "b": (4000, 800)}, "indeterminate", "crosses the bound"),
        ("groups: [a], min_ratio: 1", {"a": (4000, 1000), "b": (4000, 800)}, "passed", "min_ratio 1"),
        ("groups: [a], min_ratio: 0.8", {"a": (50, 50), "b": (50, 50)}, "passed", "the whole pool was selected"),
        ("groups: [a], min_ratio: 0.8", {"a": (50, 10)}, "indeterminate", "none beside it"),
        ("groups: [a], min_count: 10", {"a": (50, 10), "b": (50, 1)}, "passed", "10 selected, min_count 10"),
        ("groups: [a], min_count: 11", {"a": (50, 10), "b": (50, 1)}, "violated", "10 selected, min_count 11"),
        ("groups: [a], min_count: 51", {"a": (50, 10), "b": (50, 90)}, "infeasible", "51 are asked for, but the pool"),
        ("groups: [a], min_share: 0.5", {"a": (50, 9), "b": (50, 10)}, "passed", "min_share 0.5"),  # 9 is floor(9.5)
        ("groups: [a], min_share: 0.5", {"a": (50, 8), "b": (50, 10)}, "violated", "0.4444 of the selected"),
        ("groups: [a], min_share: 0.5, min_ratio: 0.8", {"a": (50, 8), "b": (50, 10)}, "violated", "min_share 0.5"),
        (
            "groups: [a], min_ratio: 0.8, min_coverage: 0.6",
            {"a": (4000, 500), "unknown": (4000, 800)},
            "indeterminate",
            "only 50.0% of the rows are known, below min_coverage 60.0%",
        ),
    ],
)  # fmt: skip
def test_a_result_needs_the_figure_and_the_power(
    rules: str, groups: dict[str, tuple[int, int]], result: str, reason: str
) -> None:
    """Within or without the bounds, and whether the data can tell: each case has its result and says why."""
    found = checked(rules, **groups)
    assert (found.result, found.groups[0].result) == (result, result), found.groups[0].reason
    assert reason in found.groups[0].reason
    assert found.exit_code == EXIT_CODES[found.result] == RESULTS.index(result)
    said = found.as_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_indeterminate_never_becomes_zero() -> None:
    """One group that nobody could judge keeps the whole from passing; a violation beside it outweighs it."""
    rules = "groups: [a, d], min_ratio: 0.8"
    assert checked(rules, a=(4000, 800), d=(20, 4), b=(4000, 800)).exit_code == 3
    assert checked(rules, a=(4000, 500), d=(20, 4), b=(4000, 800)).exit_code == 1


def test_a_warning_is_shown_and_decides_nothing() -> None:
    """The result in all is that of the columns with severity error."""
    found, chosen_N = pool(a=(4000, 500), b=(4000, 800))
    rules = policy("column: c, groups: [a], min_ratio: 0.8, severity: warning", "column: d, groups: [b], min_count: 5")
    verdict = check_selection(rules, {"c": found, "d": found}, chosen_N)
    assert [group.result for group in verdict.groups] == ["violated", "passed"]
    assert verdict.exit_code == 0


def test_a_policy_that_no_selection_could_meet_names_its_conflict() -> None:
    """Two shares of 0.5 and 0.4 of groups that are one and the same, under a ceiling, exclude each other."""
    found, chosen_N = pool(a=(100, 10), b=(300, 30))
    rules = policy(
        "column: c, groups: [{name: a, min_share: 0.5}]", "column: d, groups: [{name: a, max_ratio: 1.5}]"
    )  # fmt: skip
    verdict = check_selection(rules, {"c": found, "d": found}, chosen_N)
    assert verdict.exit_code == 2
    assert verdict.conflict == "c=a at least 20, d=a at most 15 cannot be met together in 40 of 400 candidates"


def test_a_selection_drawn_to_its_floors_passes() -> None:
    """What the quotas ask for at the end is what the check asks: a group exactly at its floor has passed."""
    rules = policy("column: c, groups: [a, b], min_ratio: 0.8")
    found, _ = pool(a=(4003, 0), b=(9001, 0))
    member_NG = members_of(rules, {"c": found})
    whole = quota(
        rules.bounds, State.empty(rules.bounds), atoms_of(member_NG).per_group, candidates=13004, size=3000, last=True
    )
    least = int(whole.least_G[0])
    chosen_N = np.zeros(13004, dtype=int)
    chosen_N[np.flatnonzero(member_NG[:, 0])[:least]] = 1
    chosen_N[np.flatnonzero(member_NG[:, 1])[: 3000 - least]] = 1
    verdict = check_selection(rules, {"c": found}, chosen_N)
    assert verdict.exit_code == 0
    assert verdict.groups[0].chosen == least == math.ceil(0.8 * 3000 * 4003 / 13004)
    chosen_N[np.flatnonzero(member_NG[:, 0])[: least // 10]] = 0
    assert check_selection(rules, {"c": found}, chosen_N).exit_code == 1


def test_a_training_is_held_to_its_draws() -> None:
    """Half as many samples of a group, each drawn twice, are as many draws: the floor is kept."""
    rules = policy("column: c, groups: [a, b], min_ratio: 0.8")
    found, _ = pool(a=(4000, 0), b=(8000, 0))
    times_N = np.zeros(12000, dtype=int)
    times_N[:400], times_N[4000:5600] = 2, 1
    once, twice = (check_selection(rules, {"c": found}, drawn) for drawn in (times_N > 0, times_N))
    assert (once.groups[0].result, twice.groups[0].result) == ("violated", "passed")
    assert [(one.chosen, one.draws) for one in twice.groups] == [(400, 800), (1600, 1600)]
    assert twice.groups[0].ratio.value == pytest.approx(800 / 2400 * 12000 / 4000)
    widths = [math.log(one.groups[0].ratio.high / one.groups[0].ratio.low) for one in (once, twice)]
    assert widths[0] == pytest.approx(widths[1])


def test_unknown_rows_can_be_a_group() -> None:
    """Rows without a value are bounded like any group where the policy says so."""
    verdict = checked("groups: [a], min_ratio: 0.8, unknowns: group", a=(4000, 800), unknown=(4000, 400))
    assert [(group.group, group.n, group.result) for group in verdict.groups] == [
        ("a", 4000, "passed"), ("unknown", 4000, "violated")
    ]  # fmt: skip


def test_near_duplicates_take_the_power_away() -> None:
    """2,000 rows that are 40 clusters tell as little as 40 rows: the figure stays, its interval widens."""
    found, chosen_N = pool(a=(2000, 400), b=(4000, 800))
    rules = policy("column: c, groups: [a], min_ratio: 0.8")
    cluster_N = np.arange(6000)
    alone = check_selection(rules, {"c": found}, chosen_N, cluster_N=cluster_N)
    cluster_N[:2000] //= 50
    together = check_selection(rules, {"c": found}, chosen_N, cluster_N=cluster_N)
    assert (alone.result, together.result) == ("passed", "indeterminate")
    assert together.groups[0].ratio.value == alone.groups[0].ratio.value
    assert together.groups[0].ratio.low < alone.groups[0].ratio.low


def test_the_ratio_to_the_pool_follows_from_that_to_the_rest() -> None:
    """100 of 1,000 against 1,900 of 9,000: 0.4737 of the rest's rate, half of the pool's; limits move with it."""
    found = pool_ratio(100, 1000, 2000, 10_000)
    assert found.value == pytest.approx(0.5)
    spread = 1.959964 * math.sqrt(1 / 100 - 1 / 1000 + 1 / 1900 - 1 / 9000)  # Katz, of the ratio to the rest
    limits = [(100 / 1000) / (1900 / 9000) * math.exp(sign * spread) for sign in (-1, 1)]
    assert (found.low, found.high) == pytest.approx([one / (0.1 * one + 0.9) for one in limits], rel=1e-5)
    assert found.seen_below is not None
    assert 0.8 < found.seen_below < 1
    assert pool_ratio(5, 5, 5, 10).high == 2.0  # nothing of the rest: at most 1 / its share of the pool


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (np.zeros(100), "nothing was selected"),
        (np.ones(99), r"shape \(99,\) does not fit columns of 100 rows"),
        (np.ones((100, 1)), "does not fit"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(chosen: np.ndarray, message: str) -> None:
    """A wrong length and an empty selection are usage errors, never a result."""
    found, _ = pool(a=(50, 1), b=(50, 1))
    with pytest.raises(UsageError, match=message):
        check_selection(policy("column: c, groups: [a], min_ratio: 0.8"), {"c": found}, chosen)
