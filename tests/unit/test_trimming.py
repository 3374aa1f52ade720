"""Trimming against a loop, and against planted noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from curate.errors import UsageError
from curate.learner.trimming import log_ratios, log_worth, trim
from curate.selection.joint import Pairs


def planted(count: int, seed: int, width: int = 16) -> tuple[Pairs, NDArray[np.uint8]]:
    """Pairs of which the first half are matched and the second half drawn at random; ids in a random order."""
    dice = torch.Generator().manual_seed(seed)
    text_BD = torch.randn(count, width, generator=dice)
    image_BD = text_BD + 1.5 * torch.randn(count, width, generator=dice)
    image_BD[count // 2 :] = torch.randn(count - count // 2, width, generator=dice)
    ids = np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)
    return Pairs(functional.normalize(image_BD, dim=1), functional.normalize(text_BD, dim=1), 10.0, -10.0), ids


def test_ratios_equal_a_loop() -> None:
    """r is the own weight over the mean weight, 1 - q what the other captions get; two models' logits add up."""
    (one, _), (two, _) = planted(9, 0), planted(9, 1)
    caption_B = np.array([0, 1, 2, 0, 1, 5, 6, 7, 8])
    ratio_B, unknown_B = log_ratios([(one, 3.0), (two, 0.5)], caption_B)
    for i in range(9):
        z = [float(3 * one.image_BD[i] @ one.text_BD[j] + two.image_BD[i] @ two.text_BD[j] / 2) for j in range(9)]
        weight = [math.exp(value) for value in z]
        others = sum(w for w, caption in zip(weight, caption_B, strict=True) if caption != caption_B[i])
        assert float(ratio_B[i]) == pytest.approx(z[i] - math.log(sum(weight) / 9), abs=1e-5)
        assert float(unknown_B[i]) == pytest.approx(others / sum(weight), abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.4, 0.9])
def test_worth_is_bayes_rule_times_what_is_left(noise: float) -> None:
    """Worth equals the product of both probabilities, computed without logarithms."""
    ratio_B, unknown_B = torch.tensor([0.1, 1.0, 8.0]).double(), torch.tensor([0.9, 0.5, 0.2]).double()
    clean_B = (1 - noise) * ratio_B / ((1 - noise) * ratio_B + noise)
    torch.testing.assert_close(log_worth(ratio_B.log(), unknown_B, noise).exp(), clean_B * unknown_B)


def test_certain_pairs_keep_a_finite_worth() -> None:
    """A pair that is known for sure, or noise for sure, has a tiny worth and no infinity."""
    extreme_B = torch.tensor([500.0, -800.0]).double()
    found_B = log_worth(extreme_B, torch.tensor([0.0, 1.0]).double(), 0.5)
    assert found_B.isfinite().all()
    assert (found_B < -10).all()


def test_tiles_do_not_change_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time give what all at once give."""
    pairs, _ = planted(10, 2)
    whole = log_ratios([(pairs, 5.0)], np.arange(10) % 7)
    monkeypatch.setattr("curate.learner.trimming._TILE", 4)
    for once, again in zip(whole, log_ratios([(pairs, 5.0)], np.arange(10) % 7), strict=True):
        torch.testing.assert_close(once, again)


def test_planted_noise_is_left_out() -> None:
    """Half of the candidates are noise; of those drawn, each only once, five in six at least are clean."""
    pairs, ids = planted(200, 3)
    chosen = trim([(pairs, 10.0)], ids, np.arange(200), size=60, noise=0.5, seed=0, step=0)
    assert len(set(chosen.index_b.tolist())) == 60
    assert (chosen.index_b < 100).mean() > 5 / 6


def test_the_order_of_the_rows_does_not_matter() -> None:
    """Permuted rows give the same samples with the same logits."""
    pairs, ids = planted(50, 5)
    order, caption_B = np.random.default_rng(0).permutation(50), np.arange(50) % 13
    moved = Pairs(pairs.image_BD[order], pairs.text_BD[order], pairs.scale, pairs.bias)
    once = trim([(pairs, 10.0)], ids, caption_B, size=10, noise=0.4, seed=2, step=7)
    again = trim([(moved, 10.0)], ids[order], caption_B[order], size=10, noise=0.4, seed=2, step=7)
    assert once.index_b.tolist() == order[again.index_b].tolist()
    assert np.array_equal(once.logit_b, again.logit_b)


def test_bad_requests_are_refused() -> None:
    """No model, more than there are, and a pool of nothing but noise."""
    pairs, ids = planted(4, 6)
    with pytest.raises(UsageError, match="needs the learner's or the reference's embeddings"):
        trim([], ids, np.arange(4), size=1, noise=0.0, seed=0, step=0)
    with pytest.raises(UsageError, match="cannot draw 5 of 4 candidates"):
        trim([(pairs, 1.0)], ids, np.arange(4), size=5, noise=0.0, seed=0, step=0)
    with pytest.raises(UsageError, match="share of wrong captions"):
        trim([(pairs, 1.0)], ids, np.arange(4), size=2, noise=1.0, seed=0, step=0)
