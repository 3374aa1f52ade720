"""The debt rule: what is owed by when, what is certain to be met, and the state that a run carries."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.marked_yaml import parse_yaml
from curate.policy.atoms import atoms_of, membership
from curate.policy.certificate import certificate, rows_of_run
from curate.policy.price import Price
from curate.policy.quotas import Ahead, Quota, State, quota
from curate.policy.schema import Bounds, check_policy
from curate.policy.settling import settle


def ratios(low: str | None, high: str | None, count: int) -> list[Bounds]:
    exact = [None if one is None else Fraction(one) for one in (low, high)]
    return [Bounds(f"g{number}", *exact) for number in range(count)]


def some_counts(bounds: Quota, settled_least: np.ndarray, settled_most: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`size` members for disjoint groups that hold every row: first the floors, then by order up to the ceilings."""
    count_G = settled_least.copy()
    for group in order:
        count_G[group] += min(bounds.size - count_G.sum(), settled_most[group] - count_G[group])
    return count_G


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 60), min_size=2, max_size=4), min_size=1, max_size=5), st.data())
def test_the_bounds_of_a_draw_are_those_of_the_formulas(pools: list[list[int]], data: st.DataObject) -> None:
    """F, L and V as written in the module, exact in fractions, for draws of one size from pools of one size."""
    groups, size = len(pools[0]), data.draw(st.integers(1, 40))
    pools = [(pool * groups)[:groups] for pool in pools]
    candidates = max(size, *(sum(pool) for pool in pools))
    low, high, rho = Fraction("0.8"), Fraction("1.25"), Fraction(size, candidates)
    bounds = ratios("0.8", "1.25", groups)
    state = State.empty(bounds)
    for t, pool in enumerate(pools):
        last = t == len(pools) - 1
        found = quota(bounds, state, pool, candidates=candidates, size=size, last=last)
        for g in range(groups):
            seen, before = sum(one[g] for one in pools[: t + 1]), state.chosen_G[g]
            floor = low * rho * seen
            least = min(max((math.ceil(floor) if last else math.floor(floor)) - before, 0), pool[g])
            assert found.floor_G[g] == pytest.approx(float(floor))
            assert found.least_G[g] == least
            assert found.most_G[g] == max(min(pool[g], math.ceil(high * rho * seen) - before), least)
        state = state.after(found, np.array([data.draw(st.integers(0, n)) for n in pool]))


def test_floors_are_exact_where_floats_are_not() -> None:
    """0.07 x 100 is 7.000000000000001 in floats and 0.29 x 100 is 28.999999999999996; the floors are 7 and 29."""
    bounds = [Bounds("a", min_ratio=Fraction("0.07")), Bounds("b", min_ratio=Fraction("0.29"))]
    for last in (False, True):
        found = quota(bounds, State.empty(bounds), [100, 100], candidates=200, size=200, last=last)
        assert found.least_G.tolist() == [7, 29]


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from(["0.3", "0.8", "0.9"]), st.sampled_from(["1.1", "1.5", "3"]),
    st.integers(1, 9), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_large_enough_sub_batches_always_have_room(
    groups: int, draws: int, low: str, high: str, times: int, seed: int
) -> None:
    """With b (1 - min_ratio) and b (max_ratio - 1) at least G, twice the former at last, no draw conflicts."""
    size = math.ceil(groups * max(2 / (1 - Fraction(low)), 1 / (Fraction(high) - 1)))
    candidates, random, bounds = size * times, np.random.default_rng(seed), ratios(low, high, groups)
    state = State.empty(bounds)
    for t in range(draws):
        weight_G = random.random(groups) ** random.integers(1, 9)  # the pool's composition jumps from draw to draw
        group_B = random.choice(groups, candidates, p=weight_G / weight_G.sum())
        present_G = np.bincount(group_B, minlength=groups)
        found = quota(bounds, state, present_G, candidates=candidates, size=size, last=t == draws - 1)
        settled = settle(found, atoms_of(membership(group_B, groups)))
        assert settled.conflict == ""
        state = state.after(found, some_counts(found, settled.least_G, settled.most_G, random.permutation(groups)))
        for g in range(groups):
            even = Fraction(state.chosen * state.pool_G[g], state.pool)
            assert math.floor(Fraction(low) * even) <= state.chosen_G[g] <= math.ceil(Fraction(high) * even)
    assert state.draws == draws


def test_the_last_draw_may_need_twice_the_room() -> None:
    """b (1 - min_ratio) = G suffices until the last draw, whose rounding up can owe each group one more."""
    bounds = ratios("0.9", None, 10)
    before = State.empty(bounds)
    first = quota(bounds, before, [11] * 9 + [901], candidates=1000, size=100)
    assert first.least_G.tolist() == [0] * 9 + [81]
    state = before.after(first, np.array([0] * 9 + [100]))
    pool = [112] * 8 + [104, 0]
    group_B = np.repeat(np.arange(10), pool)
    sums, conflicts = [], []
    for last in (False, True):
        found = quota(bounds, state, pool, candidates=1000, size=100, last=last)
        sums.append(int(found.least_G.sum()))
        conflicts.append(settle(found, atoms_of(membership(group_B, 10))).conflict)
    assert sums == [98, 107]
    assert conflicts[0] == ""
    assert "g0 at least 12" in conflicts[1]


def test_what_could_not_be_served_stays_owed() -> None:
    """A group that is absent from the candidates gathers debt, and is owed all of it when it comes back."""
    bounds = ratios("0.8", None, 2)
    state, owed = State.empty(bounds), []
    for present, got in (([50, 50], [0, 10]), ([0, 100], [0, 10]), ([50, 50], [9, 1])):
        found = quota(bounds, state, present, candidates=100, size=10)
        owed.append((found.debt_G.tolist(), found.least_G.tolist()))
        state = state.after(found, np.array(got))
    assert owed == [([4.0, 4.0], [4, 4]), ([4.0, 2.0], [0, 2]), ([8.0, -4.0], [8, 0])]


def test_shares_are_of_the_selected_and_counts_are_paced() -> None:
    """min_share counts what is drawn, min_count the share of the run that is done; without that it is owed at once."""
    bounds = [Bounds("share", min_share=Fraction("0.3")), Bounds("count", min_count=12)]
    state = State.empty(bounds)
    asked = [
        quota(bounds, state, [40, 40], candidates=100, size=20, done=done).least_G.tolist()
        for done in (Fraction(1, 4), Fraction(1, 3), None)
    ]
    assert asked == [[6, 3], [6, 4], [6, 12]]
    assert quota(bounds, state, [40, 40], candidates=100, size=20, last=True).least_G.tolist() == [6, 12]
    assert quota(bounds, state, [2, 40], candidates=100, size=20).least_G.tolist() == [2, 12]  # no more than there are


def test_the_state_survives_json() -> None:
    """A resumed run owes what the interrupted one did; what is no state is refused."""
    bounds = ratios("0.8", None, 2)
    found = quota(bounds, State.empty(bounds), np.array([50, 50]), candidates=100, size=10)
    state = State.empty(bounds).after(found, np.array([3, 7]))
    assert State.from_json(json.loads(json.dumps(state.as_json()))) == state
    for wrong in ({"chosen": -1}, {"names": ["g0"]}, {"pool_G": [1.5, 2]}, {"draws": None}):
        with pytest.raises(UsageError, match="cannot be read"):
            State.from_json(state.as_json() | wrong)
    with pytest.raises(UsageError, match="cannot be read"):
        State.from_json({})


@pytest.mark.parametrize(
    ("count", "present", "size", "message"),
    [
        (3, [1, 2, 3], 5, "but the policy has g0, g1, g2"),
        (2, [1], 5, "the quotas count g0, g1"),
        (2, [1, 2], 0, "cannot draw 0 of 10"),
        (2, [1, 2], 11, "cannot draw 11 of 10"),
        (2, [1, 11], 5, "between 0 and 10 members"),
    ],
)
def test_sizes_that_cannot_be_are_refused(count: int, present: list[int], size: int, message: str) -> None:
    """A state of other groups, and counts that no candidates have, are usage errors."""
    with pytest.raises(UsageError, match=message):
        quota(ratios("0.8", None, count), State.empty(ratios("0.8", None, 2)), present, candidates=10, size=size)


def test_the_certificate_of_a_run_says_for_each_group_what_was_asked_and_why_it_got_that() -> None:
    """One row per group for the run as a whole, with conflicts counted and the price; all of it JSON."""
    text = """
schema: 1
author: A
date: 2026-11-20
rationale: R
columns:
  - {column: c, source: s, min_ratio: 0.8, max_ratio: 1.2, groups: [a, b, d, e, {name: f, min_count: 40}]}
"""
    policy = check_policy(parse_yaml(text, "p.yaml"))
    state = State(tuple(bound.name for bound in policy.bounds), (100, 101, 300, 99, 30), (8, 8, 36, 0, 5), 1000, 100, 4)
    rows = rows_of_run(policy.bounds, state)
    assert [(row.group, row.L, row.V, row.C, row.reason) for row in rows] == [
        ("c=a", 8, 12, 8, "at its floor"),
        ("c=b", 9, 13, 8, "short by 0.08, less than one sample"),
        ("c=d", 24, 36, 36, "at its ceiling"),
        ("c=e", 8, 12, 0, "short by 8"),
        ("c=f", 40, 40, 5, "short by 35: the pool has only 30"),
    ]
    whole = certificate(policy, state, conflicts=["x", "", "y", "x"], price=Price(10.0, 14.0, 100))
    assert json.loads(json.dumps(whole)) == whole
    assert whole["conflicts"] == [{"conflict": "x", "draws": 2}, {"conflict": "y", "draws": 1}]
    assert whole["draws_with_conflict"] == 3
    assert whole["price"]["given_up_per_member"] == pytest.approx(0.04)
    assert whole["groups"][3] == {
        "group": "c=e", "n": 99, "F": 7.92, "L": 8, "V": 12, "C": 0, "slack": -8, "reason": "short by 8"
    }  # fmt: skip


def test_counts_and_shares_are_spread_over_the_candidates_of_their_group() -> None:
    """A group of which two thirds are here is asked for two thirds of what is missing; all of it where none follow."""
    asked = [Bounds("a", min_count=9), Bounds("b", min_share=Fraction("0.3")), Bounds("c", min_count=4)]
    first = quota(
        asked, State.empty(asked), [20, 0, 5], candidates=50, size=10, ahead=Ahead(total=20, present_G=(10, 8, 0))
    )
    assert first.floor_G.tolist() == [6.0, 0.0, 4.0]
    assert first.least_G.tolist() == [6, 0, 4]
    state = State.empty(asked).after(first, np.array([8, 0, 4]))
    second = quota(
        asked, state, [10, 8, 0], candidates=50, size=10, ahead=Ahead(total=20, present_G=(0, 0, 0)), last=True
    )
    assert second.least_G.tolist() == [1, 6, 0]


def test_the_last_candidates_of_a_group_are_asked_for_the_fraction_too() -> None:
    """A floor of 2.5 is 3 where no later draw could make up for it, 2 where one can."""
    asked = [Bounds("a", min_share=Fraction("0.25"))]
    for later, least in ((0, 3), (30, 1)):
        drawn = quota(asked, State.empty(asked), [30], candidates=60, size=5, ahead=Ahead(10, (later,)))
        assert drawn.least_G.tolist() == [least]
