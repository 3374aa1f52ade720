"""Trimming against a loop, and against planted noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from curate.errors import UsageError
from curate.learner.trimming import log_ratios, trim
from curate.selection.joint import Pairs


def planted(count: int, seed: int, width: int = 16) -> tuple[Pairs, np.ndarray]:
    """Pairs of which the first half are matched and the second half drawn at random; ids in a random order."""
    dice = torch.Generator().manual_seed(seed)
    text_BD = torch.randn(count, width, generator=dice)
    image_BD = text_BD + 0.5 * torch.randn(count, width, generator=dice)
    image_BD[count // 2 :] = torch.randn(count - count // 2, width, generator=dice)
    ids = np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)
    return Pairs(functional.normalize(image_BD, dim=1), functional.normalize(text_BD, dim=1), 10.0, -10.0), ids


def test_ratios_equal_a_loop() -> None:
    """log r is the own logit less the log of the mean exponential over all captions; two models add up."""
    (one, _), (two, _) = planted(9, 0), planted(9, 1)
    found = log_ratios([(one, 3.0), (two, 0.5)])
    for i in range(9):
        wanted = 0.0
        for pairs, scale in ((one, 3.0), (two, 0.5)):
            z = [scale * float(pairs.image_BD[i] @ pairs.text_BD[j]) for j in range(9)]
            wanted += z[i] - math.log(sum(map(math.exp, z)) / 9)
        assert float(found[i]) == pytest.approx(wanted, abs=1e-5)


def test_tiles_do_not_change_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time give what all at once give."""
    pairs, _ = planted(10, 2)
    whole = log_ratios([(pairs, 5.0)])
    monkeypatch.setattr("curate.learner.trimming._TILE", 4)
    torch.testing.assert_close(log_ratios([(pairs, 5.0)]), whole)


def test_planted_noise_is_left_out() -> None:
    """With half of the candidates kept, nine in ten of those chosen are matched ones, each only once."""
    pairs, ids = planted(200, 3)
    chosen = trim([(pairs, 10.0)], ids, size=60, keep=0.5, seed=0, step=0)
    assert len(set(chosen.index_b.tolist())) == 60 and (chosen.index_b < 100).mean() >= 0.9
    assert chosen.effective == 100


def test_what_is_kept_is_drawn_uniformly() -> None:
    """Over many steps every kept candidate is chosen about as often as any other."""
    pairs, ids = planted(40, 4)
    counts = np.zeros(40)
    for step in range(400):
        counts[trim([(pairs, 10.0)], ids, size=5, keep=0.5, seed=1, step=step).index_b] += 1
    assert np.count_nonzero(counts) == 20
    assert abs(counts[counts > 0] - 100).max() < 5 * math.sqrt(100)


def test_the_order_of_the_rows_does_not_matter() -> None:
    """Permuted rows give the same samples."""
    pairs, ids = planted(50, 5)
    order = np.random.default_rng(0).permutation(50)
    moved = Pairs(pairs.image_BD[order], pairs.text_BD[order], pairs.scale, pairs.bias)
    once = trim([(pairs, 10.0)], ids, size=10, keep=0.4, seed=2, step=7)
    again = trim([(moved, 10.0)], ids[order], size=10, keep=0.4, seed=2, step=7)
    assert once.index_b.tolist() == order[again.index_b].tolist()
    assert np.array_equal(once.logit_b, again.logit_b)


def test_bad_requests_are_refused() -> None:
    """No model, and more than there are."""
    pairs, ids = planted(4, 6)
    with pytest.raises(UsageError, match="needs the learner's or the reference's embeddings"):
        trim([], ids, size=1, keep=1.0, seed=0, step=0)
    with pytest.raises(UsageError, match="cannot draw 5 of 4 candidates"):
        trim([(pairs, 1.0)], ids, size=5, keep=1.0, seed=0, step=0)
