"""Draws by fixed scores within a quota: the plain draw where nothing binds, exact bounds where something does."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from curate.errors import UsageError
from curate.policy.fixed_scores import draw_alone_within, draw_in_order
from curate.policy.quotas import Quota, State, quota
from curate.policy.schema import Bounds
from curate.selection.independent import draw_alone, normal_scores
from curate.selection.noise import gumbel

B = 12
DICE = np.random.default_rng(3)
IDS = DICE.integers(0, 256, (B, 16), dtype=np.uint8)
SCORES = DICE.normal(size=B)
MEMBERS = np.stack([np.arange(B) % 4 == 0, np.arange(B) % 3 == 0], axis=1)  # they overlap in row 0


def asked(size: int, *bounds: Bounds) -> Quota:
    state = State.empty(bounds)
    return quota(bounds, state, MEMBERS[:, : len(bounds)].sum(axis=0), candidates=B, size=size)


def test_where_nothing_binds_it_is_the_plain_draw() -> None:
    """Members, their order and logits are those of draw_alone, and nothing is given up."""
    loose = asked(5, Bounds("a", min_ratio=Fraction(0), max_ratio=Fraction(9)))
    drawn, price = draw_alone_within(SCORES, IDS, MEMBERS[:, :1], loose, seed=7, step=2)
    plain = draw_alone(SCORES, IDS, size=5, seed=7, step=2)
    assert drawn.draw.index_b.tolist() == plain.index_b.tolist()
    assert drawn.draw.logit_b.tolist() == plain.logit_b.tolist()
    assert drawn.draw.kernel == plain.kernel
    assert price.given_up == 0


@pytest.mark.parametrize("step", range(6))
def test_where_it_binds_it_is_the_first_that_can_be_finished(step: int) -> None:
    """Against brute force: visited by noisy logit, each is taken unless no set within the bounds holds all of them."""
    bounds = (Bounds("a", min_count=2), Bounds("b", min_count=2))
    tight = asked(4, *bounds)
    drawn, price = draw_alone_within(SCORES, IDS, MEMBERS, tight, seed=1, step=step)
    noisy = 2.0 * normal_scores(SCORES) + gumbel(IDS, seed=1, step=step, chunk=0)
    possible = [set(rows) for rows in combinations(range(B), 4) if (MEMBERS[list(rows)].sum(axis=0) >= 2).all()]
    taken: list[int] = []
    for row in np.argsort(-noisy).tolist():
        if any({*taken, row} <= one for one in possible):
            taken.append(row)
    assert drawn.draw.index_b.tolist() == taken
    plain = draw_alone(SCORES, IDS, size=4, seed=1, step=step).index_b
    assert price.given_up * 4 == pytest.approx(SCORES[plain].sum() - SCORES[taken].sum())
    assert drawn.passed_over == (sorted(plain.tolist()) != sorted(taken))


def test_in_order_the_first_give_way_to_the_next_that_are_owed() -> None:
    """Of rows 0, 4 and 8 at least two, at least three, at most one: others give way to them, or they to others."""
    floor = draw_in_order(MEMBERS[:, :1], asked(4, Bounds("a", min_count=2)))
    assert floor.draw.index_b.tolist() == [0, 1, 2, 4]
    three = draw_in_order(MEMBERS[:, :1], asked(4, Bounds("a", min_count=3)))
    assert (three.draw.index_b.tolist(), three.passed_over) == ([0, 1, 4, 8], True)
    few = draw_in_order(MEMBERS[:, :1], asked(6, Bounds("a", max_ratio=Fraction(1, 2))))
    assert few.draw.index_b.tolist() == [0, 1, 2, 3, 5, 6]


def test_what_cannot_be_drawn_by_is_refused() -> None:
    """A score that is no number is named, as without a policy."""
    bad = SCORES.copy()
    bad[4] = np.nan
    with pytest.raises(UsageError, match="the score of row 4"):
        draw_alone_within(bad, IDS, MEMBERS[:, :1], asked(2, Bounds("a", min_count=1)))
