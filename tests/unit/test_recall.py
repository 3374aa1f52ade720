"""Recall at k against a loop over every pair, and the intervals that come with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from curate.errors import UsageError
from curate.evaluation import recall as ranking
from curate.evaluation.interval import mean_share, wilson
from curate.evaluation.recall import TIE, ranks, recall

# N images, M captions, D width


def slow_ranks(image_ND: Tensor, text_MD: Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    """Sort every row of the similarity matrix, foreign first among equals, and look where the own one stands."""

    def place(rows: list[tuple[float, bool]]) -> int:
        best = max(sim for sim, own in rows if own)
        order = sorted(rows, key=lambda row: (-row[0] if row[0] < best - TIE or row[0] > best + TIE else -best, row[1]))
        return next(at for at, row in enumerate(order) if row[1])

    sim = (image_ND.double() @ text_MD.double().T).tolist()
    images, texts = range(len(image_ND)), range(len(text_MD))
    return (
        [place([(sim[i][m], owner[m] == i) for m in texts]) for i in images],
        [place([(sim[i][m], owner[m] == i) for i in images]) for m in texts],
    )


def drawn(counts: list[int], *, seed: int, noise: float = 0.5, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images, and of captions near their image."""
    dice = torch.Generator().manual_seed(seed)
    image = functional.normalize(torch.randn(len(counts), width, generator=dice), dim=-1)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    text = image[owner] + noise * torch.randn(len(owner), width, generator=dice)
    return image, functional.normalize(text, dim=-1), owner


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("blocks", [(1024, 4096), (5, 7), (1, 1)])
def test_ranks_are_those_of_the_loop(seed: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one to four captions an image, in any blocks, images and captions have the ranks of the slow loop."""
    monkeypatch.setattr(ranking, "BLOCK_IMAGES", blocks[0])
    monkeypatch.setattr(ranking, "BLOCK_CAPTIONS", blocks[1])
    image, text, owner = drawn([1 + (seed + n) % 4 for n in range(23)], seed=seed)
    before_N, before_M = ranks(image, text, owner)
    assert (before_N.tolist(), before_M.tolist()) == slow_ranks(image, text, owner.tolist())
    assert before_N.max() > 3


@pytest.mark.parametrize("seed", range(3))
def test_ties_count_against_the_model(seed: int) -> None:
    """With copies among images and captions, equal similarities come before the own one, as in the slow loop."""
    image, text, owner = drawn([2] * 12, seed=seed)
    image[3], image[7] = image[2], image[2]
    text[5], text[20] = text[9], text[9]
    before_N, before_M = ranks(image, text, owner)
    assert (before_N.tolist(), before_M.tolist()) == slow_ranks(image, text, owner.tolist())
    assert min(before_N[[2, 3, 7]].tolist()) >= 0
    assert before_M[[4, 5, 6, 7]].min() >= 2  # images 2 and 3 and 7 are one picture


def test_a_model_that_embeds_everything_alike_finds_nothing() -> None:
    """Constant embeddings give no hit at any k below the number of candidates."""
    image = torch.full((40, 16), 0.25)
    found = recall(image, image, torch.arange(40))
    assert (found.image_to_text, found.text_to_image) == ({1: 0, 5: 0, 10: 0}, {1: 0, 5: 0, 10: 0})


@pytest.mark.parametrize("pool", [1, 4, 10, 29, 30, 500, None])
def test_pools_are_consecutive_and_whole(pool: int | None) -> None:
    """Hits in pools are the sum of the hits of each pool by itself; what fills no pool is left over and counted."""
    counts = [1 + n % 3 for n in range(30)]
    image, text, owner = drawn(counts, seed=9)
    found = recall(image, text, owner, pool=pool)
    size = min(pool or 30, 30)
    expected = {side: dict.fromkeys((1, 5, 10), 0) for side in ("image", "text")}
    used = 0
    for first in range(0, 30 - size + 1, size):
        rows = [m for m, o in enumerate(owner.tolist()) if first <= o < first + size]
        one, other = slow_ranks(image[first : first + size], text[rows], [int(owner[m]) - first for m in rows])
        used += len(rows)
        for k in (1, 5, 10):
            expected["image"][k] += sum(rank < k for rank in one)
            expected["text"][k] += sum(rank < k for rank in other)
    assert (found.image_to_text, found.text_to_image) == (expected["image"], expected["text"])
    assert (found.pool, found.pools, found.left_over) == (size, 30 // size, 30 % size)
    assert (found.images, found.captions) == (30 // size * size, used)


def test_k_beyond_the_candidates_is_one() -> None:
    """Where there are k candidates or fewer, recall at k is 1, and so is its chance."""
    image, text, owner = drawn([1] * 4, seed=0, noise=50)
    found = recall(image, text, owner)
    assert (found.image_to_text[5], found.text_to_image[10]) == (4, 4)
    assert (found.image_to_text_chance[5], found.text_to_image_chance[10]) == (1.0, 1.0)


def test_chance_is_the_mean_over_all_orders() -> None:
    """The chance of an image with two captions of five is the share of orders that have one of them in front."""
    image, text, owner = drawn([2, 1, 2], seed=0)
    found = recall(image, text, owner, ks=(1, 2))
    orders = list(itertools.permutations(range(5)))
    for k in (1, 2):
        of_two, of_one = (sum(any(m in own for m in order[:k]) for order in orders) / 120 for own in ((0, 1), (2,)))
        assert found.image_to_text_chance[k] == pytest.approx((2 * of_two + of_one) / 3)
        assert found.text_to_image_chance[k] == pytest.approx(k / 3)


def test_what_cannot_be_ranked_is_refused() -> None:
    """No image, an image without a caption and a pool of none are errors that say so."""
    image, text, owner = drawn([1, 1, 1], seed=0)
    with pytest.raises(UsageError, match="image 1 has no caption"):
        recall(image, text[[0, 2]], owner[[0, 2]])
    with pytest.raises(UsageError, match="no image"):
        recall(image[:0], text[:0], owner[:0])
    with pytest.raises(UsageError, match="pool 0"):
        recall(image, text, owner, pool=0)


@pytest.mark.parametrize(("hits", "of"), [(8, 10), (1, 30), (500, 1000), (0, 10), (10, 10)])
def test_wilson_limits_solve_its_equation(hits: int, of: int) -> None:
    """At each limit p the share lies 1.96 standard errors sqrt(p (1 - p) / n) from p, or the limit is 0 or 1."""
    share = wilson(hits, of)
    for limit in (share.low, share.high):
        error = 1.959963984540054 * (limit * (1 - limit) / of) ** 0.5
        assert abs(share.value - limit) == pytest.approx(error, abs=1e-12) or limit in (0, 1)
    assert share.low <= share.value <= share.high


def test_the_mean_of_shares_has_the_interval_of_its_parts() -> None:
    """One share alone keeps its interval; four equal ones have half its width."""
    one = wilson(8, 10)
    same, four = mean_share([one]), mean_share([one] * 4)
    assert (same.low, same.high) == pytest.approx((one.low, one.high))
    assert (four.value - four.low, four.high - four.value) == pytest.approx(
        ((one.value - one.low) / 2, (one.high - one.value) / 2)
    )
    for wrong in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            wilson(*wrong)
