"""Laws of the sampler: what must not change a selection, what must, and how often each one is drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.kernels.selection import Side, native
from curate.kernels.selection.native import NativePairs
from curate.kernels.selection.tiled import TiledPairs
from curate.selection.criteria import CRITERIA, LOSSES
from curate.selection.joint import Draw, Pairs, draw_joint, draw_with

NATIVE = pytest.param(
    NativePairs, marks=pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernel: {native.why_not()}")
)


@pytest.fixture(params=[TiledPairs, NATIVE])
def kernel_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[TiledPairs | NativePairs]:
    """The kernel of every draw in a test; embeddings in fp64 are drawn by `TiledPairs` all the same."""
    if request.param is TiledPairs:
        monkeypatch.setattr(native, "supports", lambda _: False)
    return request.param


by_either_kernel = pytest.mark.usefixtures("kernel_type")


def corpus(size: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Pairs, Pairs, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(4, size, width, generator=generator), dim=2).to(dtype)
    ids = np.random.default_rng(seed).integers(0, 256, (size, 16), dtype=np.uint8)
    return Pairs(rows[0], rows[1], 40.0, -9.0), Pairs(rows[2], rows[3], 25.0, -6.0), ids


def permuted(pairs: Pairs, order: np.ndarray) -> Pairs:
    rows = torch.from_numpy(order)
    return Pairs(pairs.image_BD[rows], pairs.text_BD[rows], pairs.scale, pairs.bias)


def equal(one: Draw, other: Draw) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("index_b", "chunk_b", "logit_b", "logit_B")
    )


# hypothesis objects to fixtures made once for all its examples; this one is the same for all of them
either = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.tuples(st.integers(1, 90), st.integers(1, 20), st.integers(0, 2**32 - 1))


@by_either_kernel
@settings(either, max_examples=40)
@given(shapes, st.data())
def test_exactly_size_distinct_rows_in_chunks_that_differ_by_one(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    """A draw has exactly the members asked for, each once, in consecutive chunks of nearly equal size."""
    reference, learner, ids = corpus(*shape)
    size = data.draw(st.integers(1, shape[0]))
    chunks = data.draw(st.integers(1, 120))
    criterion, loss = data.draw(st.sampled_from(CRITERIA)), data.draw(st.sampled_from(LOSSES))
    draw = draw_joint(reference, learner, ids, size=size, chunks=chunks, criterion=criterion, loss=loss, seed=shape[2])
    counts = np.bincount(draw.chunk_b)
    assert len(draw.index_b) == size == len(set(draw.index_b.tolist()))
    assert len(counts) == min(chunks, size)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(draw.chunk_b) >= 0).all()
    assert np.array_equal(draw.logit_B[draw.index_b], draw.logit_b)


@by_either_kernel
@settings(either, max_examples=25)
@given(shapes, st.sampled_from(LOSSES), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_the_order_of_the_rows_changes_nothing(shape: tuple[int, int, int], loss: str, dtype: torch.dtype) -> None:
    """Shuffled rows give the same samples in the same order, with the same bits in every logit."""
    reference, learner, ids = corpus(*shape, dtype)
    order = np.random.default_rng(shape[2] + 1).permutation(shape[0])
    size = (shape[0] + 1) // 2
    one = draw_joint(reference, learner, ids, size=size, chunks=4, loss=loss)
    other = draw_joint(permuted(reference, order), permuted(learner, order), ids[order], size=size, chunks=4, loss=loss)
    assert np.array_equal(one.index_b, order[other.index_b])
    assert np.array_equal(one.logit_b, other.logit_b)
    assert np.array_equal(one.logit_B[order], other.logit_B)


@by_either_kernel
@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_rows_and_the_threads_change_no_bit_across_tiles(loss: str) -> None:
    """1, 2 and 5 threads and a shuffled input give the same bits with candidates and chosen in several tiles."""
    reference, learner, ids = corpus(1700, 24, 7)
    draws = [draw_joint(reference, learner, ids, size=900, chunks=3, loss=loss, threads=count) for count in (1, 2, 5)]
    order = np.random.default_rng(1).permutation(1700)
    other = draw_joint(permuted(reference, order), permuted(learner, order), ids[order], size=900, chunks=3, loss=loss)
    assert equal(draws[0], draws[1])
    assert equal(draws[0], draws[2])
    assert np.array_equal(draws[0].index_b, order[other.index_b])
    assert np.array_equal(draws[0].logit_B[order], other.logit_B)


@by_either_kernel
def test_the_callers_number_of_torch_threads_is_left_alone() -> None:
    """A draw lowers torch's intra-op threads only inside its workers."""
    reference, learner, ids = corpus(60, 8, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        draw_joint(reference, learner, ids, size=20, loss="sigmoid", threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@by_either_kernel
@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}])
def test_another_seed_or_step_draws_others(change: dict[str, int]) -> None:
    """At gain 0 the noise decides alone, so a new seed or step changes the selection."""
    reference, learner, ids = corpus(200, 8, 3)
    one = draw_joint(reference, learner, ids, size=50, loss="sigmoid", gain=0.0)
    other = draw_joint(reference, learner, ids, size=50, loss="sigmoid", gain=0.0, **change)
    shared = len(np.intersect1d(one.index_b, other.index_b))
    assert shared < 30  # 12.5 expected, standard deviation 2.7


@by_either_kernel
def test_a_hair_of_half_precision_storage_changes_few_members() -> None:
    """Embeddings stored in fp16 select at least 97 of 100 of what fp32 selects ."""
    reference, learner, ids = corpus(600, 32, 5)
    half = [
        Pairs(pairs.image_BD.half(), pairs.text_BD.half(), pairs.scale, pairs.bias) for pairs in (reference, learner)
    ]
    one = draw_joint(reference, learner, ids, size=120, loss="sigmoid")
    other = draw_joint(*half, ids, size=120, loss="sigmoid")
    assert len(np.intersect1d(one.index_b, other.index_b)) >= 116


def test_inclusion_follows_plackett_luce(kernel_type: type[TiledPairs | NativePairs]) -> None:
    """With one chunk, 3 of 5 come as often as sequential sampling says, by chi-square over 4,000 seeds."""
    reference, learner, ids = corpus(5, 3, 11)
    sides = [
        Side(learner.image_BD, learner.text_BD, 25.0, -6.0, 1.0),
        Side(reference.image_BD, reference.text_BD, 40.0, -9.0, -1.0),
    ]
    kernel, gain = kernel_type(sides, "sigmoid", torch.arange(5)), 0.02
    weight = np.exp(gain * kernel.scores().numpy())
    orders = list(itertools.permutations(range(5), 3))
    expected = []
    for order in orders:
        left, chance = weight.sum(), 1.0
        for i in order:
            chance *= weight[i] / left
            left -= weight[i]
        expected.append(chance)
    seen = dict.fromkeys(orders, 0)
    for seed in range(4000):
        draw = draw_with(kernel, ids, size=3, chunks=1, gain=gain, seed=seed, step=0)  # one chunk: no update
        seen[tuple(draw.index_b.tolist())] += 1
    expected_count = 4000 * np.array(expected)
    chi_square = ((np.array(list(seen.values())) - expected_count) ** 2 / expected_count).sum()
    assert expected_count.min() > 5
    assert chi_square < 98.3  # 59 degrees of freedom, p = 0.001; the seeds are fixed
