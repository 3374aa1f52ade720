"""Super-batches against a derivation by brute force: candidates laid out one by one."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.pipelines.planning import SuperBatch, plan_super_batches
from curate.settings import SelectSettings

COUNTS = st.lists(st.integers(0, 40), max_size=8)


def settings(super_batch: int, *, keep: float = 0.2, sub_batch: int | None = None, seed: int = 0) -> SelectSettings:
    return SelectSettings(
        keep=keep,
        sub_batch=sub_batch,
        super_batch=super_batch,
        seed=seed,
        criterion="easy-reference",
        loss="sigmoid",
    )


def digests(count: int) -> list[str]:
    return [hashlib.sha256(f"{number}".encode()).hexdigest() for number in range(count)]


def laid_out(batch: SuperBatch) -> list[tuple[int, int]]:
    return [(piece.shard, row) for piece in batch.pieces for row in range(piece.start, piece.stop)]


@given(COUNTS, st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_candidate_is_in_exactly_one_super_batch(counts: list[int], super_batch: int, seed: int) -> None:
    """Super-batches hold every candidate once, at most B each, as few as can be, and are even to within one."""
    batches = plan_super_batches(digests(len(counts)), counts, settings(super_batch, seed=seed))
    rows = [row for batch in batches for row in laid_out(batch)]
    assert sorted(rows) == [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    sizes = [batch.candidates for batch in batches]
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert len(batches) == math.ceil(sum(counts) / super_batch)
    assert max(sizes, default=0) <= super_batch
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@given(COUNTS, st.integers(1, 60), st.floats(0.001, 1))
def test_sub_batches_together_are_the_share_that_is_kept(counts: list[int], super_batch: int, keep: float) -> None:
    """Sub-batches sum to round(keep * candidates), each within one of its own share."""
    batches = plan_super_batches(digests(len(counts)), counts, settings(super_batch, keep=keep))
    assert sum(batch.size for batch in batches) == math.floor(keep * sum(counts) + 0.5)
    for batch in batches:
        assert 0 <= batch.size <= batch.candidates
        assert abs(batch.size - keep * batch.candidates) <= 1 + 1e-9


@given(COUNTS, st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_of_the_shards_does_not_matter(counts: list[int], super_batch: int, random: object) -> None:
    """Shards named in another order make the same super-batches of the same shards."""
    names = digests(len(counts))
    order = list(range(len(counts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    straight = plan_super_batches(names, counts, settings(super_batch))
    shuffled = plan_super_batches([names[i] for i in order], [counts[i] for i in order], settings(super_batch))
    assert [laid_out(batch) for batch in straight] == [
        [(order[shard], row) for shard, row in laid_out(batch)] for batch in shuffled
    ]
    assert [batch.size for batch in straight] == [batch.size for batch in shuffled]


def test_the_seed_permutes_the_shards() -> None:
    """Another seed puts other shards together; every one of 24 orders of four shards comes up."""
    orders = set()
    for seed in range(400):
        batches = plan_super_batches(digests(4), [5] * 4, settings(5, seed=seed))
        orders.add(tuple(batch.pieces[0].shard for batch in batches))
    assert len(orders) == 24


def test_one_shard_given_twice_is_two_shards() -> None:
    """Copies of a shard, which have one digest, both take part."""
    batches = plan_super_batches(["same", "same"], [3, 3], settings(6))
    assert sorted(laid_out(batches[0])) == [(shard, row) for shard in range(2) for row in range(3)]


def test_the_example_of_the_docstring() -> None:
    """250 candidates, B = 100, keep = 0.2: 83, 83 and 84 candidates give 17, 16 and 17."""
    batches = plan_super_batches(digests(3), [100, 100, 50], settings(100))
    assert [(batch.candidates, batch.size) for batch in batches] == [(83, 17), (83, 16), (84, 17)]


def test_a_sub_batch_is_met_or_refused() -> None:
    """--sub-batch is the size of every sub-batch; where the candidates are fewer the message says what to change."""
    batches = plan_super_batches(digests(2), [30, 31], settings(31, sub_batch=30))
    assert [batch.size for batch in batches] == [30, 30]
    with pytest.raises(UsageError, match=r"--sub-batch 31 is more than the 30 candidates.*raise --super-batch"):
        plan_super_batches(digests(2), [30, 31], settings(31, sub_batch=31))


def test_nothing_makes_no_super_batch() -> None:
    """No shards, and shards without a candidate, make none."""
    assert plan_super_batches([], [], settings(10)) == ()
    assert plan_super_batches(digests(2), [0, 0], settings(10)) == ()
