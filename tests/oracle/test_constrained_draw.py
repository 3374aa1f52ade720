"""The constrained draw against a literal sequential one, its invariant, and its price against a brute-force sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.kernels.selection import Loss, Side
from curate.kernels.selection.plain import PlainPairs
from curate.policy import drawing
from curate.policy.atoms import Frame, membership
from curate.policy.certificate import rows_of
from curate.policy.drawing import ConstrainedDraw, draw_constrained, draw_within
from curate.policy.price import batch_score, price
from curate.policy.quotas import Quota
from curate.selection.criteria import LOSSES
from curate.selection.joint import Pairs, chunk_sizes, draw_joint
from curate.selection.noise import gumbel

GAIN = 3.0  # small: noise and scores both matter
Accept = Callable[[list[int], int], bool]


def models(size: int, seed: int) -> tuple[Pairs, Pairs, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(4, size, 3, generator=generator, dtype=torch.float64), dim=2)
    ids = np.random.default_rng(seed).integers(0, 256, (size, 16), dtype=np.uint8)
    return Pairs(rows[0], rows[1], 9.0, -2.0), Pairs(rows[2], rows[3], 5.0, -1.0), ids


def sides(reference: Pairs, learner: Pairs) -> list[Side]:
    return [
        Side(pairs.image_BD, pairs.text_BD, pairs.scale, pairs.bias, weight)
        for pairs, weight in ((learner, 1.0), (reference, -1.0))
    ]


def quota_of(member_BG: np.ndarray, size: int, least: Any, most: Any, debt: Any = None) -> Quota:
    present_G = member_BG.sum(axis=0).astype(np.int64)
    least_G = np.minimum(np.array(least, dtype=np.int64), present_G)
    most_G = np.maximum(np.minimum(np.array(most, dtype=np.int64), present_G), least_G)
    debt_G = least_G.astype(float) if debt is None else np.array(debt, dtype=float)
    names = tuple("abcdefgh"[: len(present_G)])
    return Quota(names, len(member_BG), size, present_G, debt_G, debt_G, least_G, most_G)


def sequential(kernel: PlainPairs, ids: np.ndarray, accept: Accept, *, size: int, chunks: int, seed: int) -> list[int]:
    """Candidate by candidate, largest logit + Gumbel first, ties by id: taken if `accept` says so."""
    chosen: list[int] = []
    for chunk, part in enumerate(chunk_sizes(size, chunks)):
        value = GAIN * kernel.scores().numpy() + gumbel(ids, seed=seed, step=0, chunk=chunk)
        fresh: list[int] = []
        for i in sorted(set(range(len(ids))) - set(chosen), key=lambda i: (-value[i], ids[i].tobytes())):
            if len(fresh) < part and accept(chosen + fresh, i):
                fresh.append(i)
        kernel.update(torch.tensor(fresh))
        chosen += fresh
    return chosen


def rule_of_disjoint_groups(group_B: np.ndarray, quota: Quota) -> Accept:
    """audit.md, word for word: unless c_g = V_g, or g needs nothing and the needs fill the remaining slots."""

    def accept(chosen: list[int], i: int) -> bool:
        count = [sum(group_B[j] == g for j in chosen) for g in range(len(quota.names))]
        needs = [max(0, least - c) for least, c in zip(quota.least_G, count, strict=True)]
        g = group_B[i]
        if g >= 0 and count[g] == quota.most_G[g]:
            return False
        return not ((g < 0 or needs[g] == 0) and sum(needs) >= quota.size - len(chosen))

    return accept


def some_batch(member_BG: np.ndarray, quota: Quota, chosen: list[int]) -> bool:
    """Whether any batch at all contains the chosen and keeps to the bounds, by enumeration."""
    rest = sorted(set(range(len(member_BG))) - set(chosen))
    for more in itertools.combinations(rest, quota.size - len(chosen)):
        count = member_BG[[*chosen, *more]].sum(axis=0)
        if (count >= quota.least_G).all() and (count <= quota.most_G).all():
            return True
    return False


def drawn_of(size_of: int, seed: int, loss: Loss, member_BG: np.ndarray, quota: Quota, chunks: int) -> ConstrainedDraw:
    reference, learner, ids = models(size_of, seed)
    kernel = PlainPairs(sides(reference, learner), loss, torch.arange(size_of))
    return draw_within(kernel, ids, member_BG, quota, chunks=chunks, gain=GAIN, seed=seed, step=0)


seeds = st.integers(0, 2**32 - 1)
losses = st.sampled_from(LOSSES)


@st.composite
def disjoint(draw: st.DrawFn) -> tuple[np.ndarray, Quota]:
    """Group numbers (-1: none), and bounds that may or may not be possible."""
    candidates, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    group_B = np.array(draw(st.lists(st.integers(-1, groups - 1), min_size=candidates, max_size=candidates)))
    bound = st.lists(st.integers(0, 12), min_size=groups, max_size=groups)
    size = draw(st.integers(1, candidates))
    return group_B, quota_of(membership(group_B, groups), size, draw(bound), draw(bound), draw(bound))


@st.composite
def overlapping(draw: st.DrawFn) -> tuple[np.ndarray, Quota]:
    candidates, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    cells = st.lists(st.booleans(), min_size=candidates * groups, max_size=candidates * groups)
    member_BG = np.array(draw(cells)).reshape(candidates, groups)
    bound = st.lists(st.integers(0, 6), min_size=groups, max_size=groups)
    return member_BG, quota_of(member_BG, draw(st.integers(1, candidates)), draw(bound), draw(bound), draw(bound))


@settings(deadline=None, max_examples=150)
@given(disjoint(), seeds, losses, st.integers(1, 9))
def test_disjoint_groups_are_drawn_by_the_rule(
    case: tuple[np.ndarray, Quota], seed: int, loss: Loss, chunks: int
) -> None:
    """Member by member the sequential rule's draw; infeasible is only what sum L <= b <= sum V excludes."""
    group_B, quota = case
    drawn = drawn_of(len(group_B), seed, loss, membership(group_B, len(quota.names)), quota, chunks)
    room = quota.most_G.sum() + (group_B < 0).sum()
    assert (drawn.conflict == "") == (quota.least_G.sum() <= quota.size <= room)
    reference, learner, ids = models(len(group_B), seed)
    kernel = PlainPairs(sides(reference, learner), loss, torch.arange(len(ids)))
    served = quota_of(membership(group_B, len(quota.names)), quota.size, drawn.least_G, drawn.most_G)
    accept = rule_of_disjoint_groups(group_B, served)
    assert drawn.draw.index_b.tolist() == sequential(kernel, ids, accept, size=quota.size, chunks=chunks, seed=seed)


@settings(deadline=None, max_examples=150)
@given(overlapping(), seeds, losses, st.integers(1, 4))
def test_overlapping_groups_are_drawn_as_enumeration_allows(
    case: tuple[np.ndarray, Quota], seed: int, loss: Loss, chunks: int
) -> None:
    """A candidate is passed over if and only if no batch within the bounds has it beside those already chosen."""
    member_BG, quota = case
    drawn = drawn_of(len(member_BG), seed, loss, member_BG, quota, chunks)
    assert (drawn.conflict == "") == some_batch(member_BG, quota, [])
    reference, learner, ids = models(len(member_BG), seed)
    kernel = PlainPairs(sides(reference, learner), loss, torch.arange(len(ids)))
    served = quota_of(member_BG, quota.size, drawn.least_G, drawn.most_G)

    def accept(chosen: list[int], i: int) -> bool:
        return some_batch(member_BG, served, [*chosen, i])

    assert drawn.draw.index_b.tolist() == sequential(kernel, ids, accept, size=quota.size, chunks=chunks, seed=seed)


@settings(deadline=None, max_examples=150)
@given(st.one_of(disjoint(), overlapping()), seeds, losses, st.integers(1, 9))
def test_the_invariant(case: tuple[np.ndarray, Quota], seed: int, loss: Loss, chunks: int) -> None:
    """Exactly b different members in the plain draw's chunks; L <= c <= V where possible, else as it was settled."""
    groups, quota = case
    member_BG = membership(groups, len(quota.names))
    drawn = drawn_of(len(groups), seed, loss, member_BG, quota, chunks)
    assert len(set(drawn.draw.index_b.tolist())) == len(drawn.draw.index_b) == quota.size
    assert np.bincount(drawn.draw.chunk_b).tolist() == chunk_sizes(quota.size, chunks)
    assert np.array_equal(drawn.count_G, member_BG[drawn.draw.index_b].sum(axis=0))
    assert ((drawn.least_G <= drawn.count_G) & (drawn.count_G <= drawn.most_G)).all()
    assert (drawn.least_G <= quota.least_G).all()
    assert (drawn.most_G >= quota.most_G).all()
    if not drawn.conflict:
        assert ((quota.least_G <= drawn.count_G) & (drawn.count_G <= quota.most_G)).all()
    assert [row.C - row.L for row in rows_of(drawn)] == [row.slack for row in rows_of(drawn)]


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 60), seeds, losses, st.integers(1, 20), st.data())
def test_what_does_not_bind_changes_no_bit(
    candidates: int, seed: int, loss: Loss, chunks: int, data: st.DataObject
) -> None:
    """Where the plain draw is within the bounds already, also barely, the constrained one is it bit for bit."""
    reference, learner, ids = models(candidates, seed)
    size, groups = data.draw(st.integers(1, candidates)), data.draw(st.integers(1, 5))
    random = np.random.default_rng(seed)
    member_BG = random.random((candidates, groups)) < 0.4
    if data.draw(st.booleans()):
        member_BG = membership(random.integers(-1, groups, candidates), groups)
    plain = draw_joint(reference, learner, ids, size=size, chunks=chunks, loss=loss, gain=GAIN, seed=seed, threads=1)
    count_G = member_BG[plain.index_b].sum(axis=0)
    apart = data.draw(st.integers(0, 3))
    quota = quota_of(member_BG, size, np.maximum(count_G - apart, 0), count_G + apart)
    drawn = draw_constrained(
        reference, learner, ids, member_BG, quota, chunks=chunks, loss=loss, gain=GAIN, seed=seed, threads=1
    )
    for name in ("index_b", "chunk_b", "logit_b", "logit_B"):
        assert np.array_equal(getattr(drawn.draw, name), getattr(plain, name)), name
    assert drawn.draw.kernel == plain.kernel
    assert not drawn.passed_over
    assert price(drawn, reference, learner, ids, loss=loss).given_up == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_rows_changes_nothing(loss: Loss) -> None:
    """Shuffled rows with their memberships give the same samples in the same order."""
    reference, learner, ids = models(50, 4)
    member_BG = np.random.default_rng(1).random((50, 3)) < 0.4
    order = np.random.default_rng(2).permutation(50)
    rows = torch.from_numpy(order)
    other = [Pairs(p.image_BD[rows], p.text_BD[rows], p.scale, p.bias) for p in (reference, learner)]
    quota = quota_of(member_BG, 12, [6, 6, 0], [7, 9, 2])
    one = draw_constrained(reference, learner, ids, member_BG, quota, chunks=4, loss=loss, threads=1)
    two = draw_constrained(*other, ids[order], member_BG[order], quota, chunks=4, loss=loss, threads=1)
    assert one.passed_over
    assert np.array_equal(one.draw.index_b, order[two.draw.index_b])


def test_the_largest_debt_is_served_first_and_the_conflict_is_named() -> None:
    """Floors of 7 and 6 in 10 places: the group with the larger debt gets all, the other the rest, and 3 are logged."""
    group_B = np.arange(40) % 2
    quota = quota_of(membership(group_B, 2), 10, [6, 7], [20, 20], debt=[6.1, 9.2])
    drawn = drawn_of(40, 3, "sigmoid", membership(group_B, 2), quota, 4)
    assert drawn.count_G.tolist() == [3, 7]
    assert drawn.shortfall.tolist() == [3, 0]
    assert drawn.conflict == "a at least 6, b at least 7 cannot be met together in 10 of 40 candidates"
    short, met = rows_of(drawn)
    assert (short.L, short.C, short.slack) == (6, 3, -3)
    assert short.reason == f"short by 3 ({drawn.conflict})"
    assert met.reason == "at its floor"


def test_ceilings_that_leave_too_few_rise_together() -> None:
    """Ceilings of 2 and 4 for 9 places rise by the same half: 3 and 6; the group without a bound is no part of it."""
    group_B = np.array([0] * 20 + [1] * 20)
    quota = quota_of(membership(group_B, 2), 9, [0, 0], [2, 4])
    drawn = drawn_of(40, 3, "softmax", membership(group_B, 2), quota, 3)
    assert drawn.count_G.tolist() == [3, 6]
    assert drawn.conflict == "a at most 2, b at most 4 cannot be met together in 9 of 40 candidates"
    assert [row.reason.split(" (")[0] for row in rows_of(drawn)] == ["over by 1", "over by 2"]


def test_only_the_bounds_that_conflict_are_named() -> None:
    """All of `a` is in `b`: at least 5 of one against at most 3 of the other, whatever `c` asks."""
    member_BG = np.zeros((30, 3), dtype=bool)
    member_BG[:10, 0] = member_BG[:14, 1] = member_BG[20:, 2] = True
    drawn = drawn_of(30, 3, "sigmoid", member_BG, quota_of(member_BG, 12, [5, 0, 2], [10, 3, 9]), 4)
    assert drawn.conflict == "a at least 5, b at most 3 cannot be met together in 12 of 30 candidates"
    assert drawn.least_G.tolist() == [5, 0, 2]  # floors come before ceilings


@pytest.mark.parametrize("wrong", ["needs forgotten", "ceilings forgotten", "places forgotten"])
def test_a_planted_wrong_rule_is_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plausible mistake in the acceptance rule leaves the bounds or the sequential draw."""
    right = Frame.completable

    def mistaken(self: Frame, taken_A: np.ndarray) -> bool:
        if wrong == "places forgotten":
            have_G = taken_A @ self.atoms.member_AG
            return bool((have_G <= self.most_G).all() and taken_A.sum() <= self.size)
        least_G = np.zeros_like(self.least_G) if wrong == "needs forgotten" else self.least_G
        most_G = np.full_like(self.most_G, 99) if wrong == "ceilings forgotten" else self.most_G
        return right(Frame(self.atoms, least_G, most_G, self.size), taken_A)

    group_B = np.arange(40) % 3
    member_BG = membership(group_B, 3)
    quota = quota_of(member_BG, 12, [0, 8, 0], [1, 9, 9])
    expected = []
    for seed in range(8):
        reference, learner, ids = models(40, seed)
        kernel = PlainPairs(sides(reference, learner), "sigmoid", torch.arange(40))
        rule = rule_of_disjoint_groups(group_B, quota)
        expected.append(sequential(kernel, ids, rule, size=12, chunks=3, seed=seed))

    def drawn() -> list[list[int]]:
        return [drawn_of(40, seed, "sigmoid", member_BG, quota, 3).draw.index_b.tolist() for seed in range(8)]

    assert drawn() == expected
    monkeypatch.setattr(drawing.Frame, "completable", mistaken)
    assert drawn() != expected


def test_groups_that_do_not_fit_the_quota_are_refused() -> None:
    """Another matrix than the quota was made for, numbers out of range and floats are usage errors."""
    reference, learner, ids = models(10, 1)
    quota = quota_of(membership(np.arange(10) % 2, 2), 4, [1, 1], [3, 3])
    for groups, message in (
        (np.zeros(10, dtype=int), "made for other candidates"),
        (np.full(10, 2), "group numbers run from 2 to 2"),
        (np.zeros((10, 3), dtype=bool), "give bool"),
        (np.zeros(10), "give bool"),
    ):
        with pytest.raises(UsageError, match=message):
            draw_constrained(reference, learner, ids, groups, quota, loss="sigmoid")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_score_of_a_batch_is_the_sum_over_its_pairs(loss: Loss, dtype: torch.dtype) -> None:
    """From the kernels, and by loops: sum of S over all pairs (sigmoid), over all members' losses (softmax)."""
    reference, learner, _ = models(12, 8)
    index_b = np.array([3, 7, 1, 10, 4])
    total = 0.0
    for side in sides(reference, learner):
        s_bb = (side.image_BD[index_b] @ side.text_BD[index_b].T).numpy() * side.scale
        if loss == "sigmoid":
            x_bb = s_bb + side.bias
            total += side.weight * sum(
                np.log1p(np.exp(-x_bb[i, j] if i == j else x_bb[i, j])) for i in range(5) for j in range(5)
            )
        else:
            lse_b = (np.log(np.exp(s_bb).sum(0)) + np.log(np.exp(s_bb).sum(1))) / 2
            total += side.weight * float((lse_b - np.diag(s_bb)).sum())
    stored = [
        Side(side.image_BD.to(dtype), side.text_BD.to(dtype), side.scale, side.bias, side.weight)
        for side in sides(reference, learner)
    ]
    assert batch_score(stored, loss, index_b) == pytest.approx(total, rel=1e-10 if dtype == torch.float64 else 1e-4)


def test_the_price_compares_with_the_plain_draw() -> None:
    """A policy that asks for what the learner knows best gives learnability up; the sums are of both draws."""
    reference, learner, ids = models(60, 5)
    own_B = PlainPairs(sides(reference, learner), "sigmoid", torch.arange(60)).scores().numpy()
    member_BG = (own_B < np.median(own_B))[:, None]
    quota = quota_of(member_BG, 20, [15], [60])
    drawn = draw_constrained(reference, learner, ids, member_BG, quota, loss="sigmoid", threads=1)
    plain = draw_joint(reference, learner, ids, size=20, loss="sigmoid", threads=1)
    found = price(drawn, reference, learner, ids, loss="sigmoid", threads=1)
    assert found.plain == pytest.approx(batch_score(sides(reference, learner), "sigmoid", plain.index_b))
    assert found.given_up > 0.1
    assert (found + found).given_up == pytest.approx(found.given_up)
