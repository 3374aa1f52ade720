"""The trusted-set measures against brute force, and the noise share against mixtures of a known share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from curate.learner.watch import (
    PoolSums,
    View,
    calibrate,
    compare,
    distinct,
    losses,
    measure,
    noise_share,
    pool_sums,
    view,
)


def world(count: int, seed: int, blur: float = 1.0, captions: int = 10, width: int = 16) -> tuple[View, torch.Tensor]:
    """Images around the caption they belong to, blurred; the view of them, and the captions' embeddings [K, D]."""
    centres = torch.Generator().manual_seed(99)
    text_KD = functional.normalize(torch.randn(captions, width, generator=centres), dim=1)
    dice = torch.Generator().manual_seed(seed)
    caption_T = torch.randint(captions, (count,), generator=dice)
    image_TD = text_KD[caption_T] + blur * torch.randn(count, width, generator=dice) / math.sqrt(width)
    return view(functional.normalize(image_TD, dim=1), text_KD, caption_T.numpy()), text_KD


def by_hand(views: list[View], scales: list[float]) -> float:
    """The mean cross-entropy, image by image and caption by caption."""
    total = 0.0
    captions = views[0].caption_T.tolist()
    share = [captions.count(k) / len(captions) for k in range(views[0].sim_TK.shape[1])]
    for t, own in enumerate(captions):
        weights = [
            s * math.exp(sum(a * v.sim_TK[t, k] for a, v in zip(scales, views, strict=True)))
            for k, s in enumerate(share)
        ]
        total -= math.log(weights[own] / sum(weights))
    return total / len(captions)


def test_losses_equal_a_loop() -> None:
    """The cross-entropy is that of captions weighted by how often they occur, for one model and for two."""
    one, two = world(40, 0)[0], world(40, 0, blur=2.0)[0]
    assert math.isclose(losses([one], [3.0]).mean(), by_hand([one], [3.0]), rel_tol=1e-12)
    assert math.isclose(losses([one, two], [3.0, 1.5]).mean(), by_hand([one, two], [3.0, 1.5]), rel_tol=1e-12)


def test_the_scale_is_that_of_the_lowest_loss() -> None:
    """No scale of a fine grid has a lower loss than the fitted one."""
    seen = world(200, 1)[0]
    (scale,) = calibrate([seen])
    grid = np.linspace(0.05, 40, 800)
    best = min(losses([seen], [a]).mean() for a in grid)
    assert losses([seen], [scale]).mean() <= best + 1e-7
    assert abs(scale - grid[np.argmin([losses([seen], [a]).mean() for a in grid])]) < 0.1


def test_two_scales_are_those_of_the_lowest_loss() -> None:
    """No pair of scales of a grid beats the fitted pair, and the pair beats each model alone."""
    one, two = world(200, 1, blur=1.5)[0], world(200, 1, blur=1.0)[0]
    scales = calibrate([one, two])
    fitted = losses([one, two], scales).mean()
    grid = np.linspace(0, 20, 21)
    assert fitted <= min(losses([one, two], [a, b]).mean() for a in grid for b in grid) + 1e-7
    assert fitted <= min(measure(one).loss, measure(two).loss) + 1e-9


def test_a_model_that_misleads_gets_scale_zero() -> None:
    """Similarities of the wrong sign count for nothing, alone or beside a good model."""
    good = world(300, 2)[0]
    bad = View(-good.sim_TK + 0.1 * world(300, 3)[0].sim_TK, good.caption_T)
    assert calibrate([bad]) == (0.0,)
    fog_TK = np.random.default_rng(0).normal(size=good.sim_TK.shape)
    scales = calibrate([good, View(fog_TK - good.sim_TK, good.caption_T)])
    assert scales[0] > 1
    assert scales[1] >= 0


def test_a_perfect_model_has_a_finite_scale() -> None:
    """With every pair right by a margin the loss falls for ever; the scale stays finite and the loss near zero."""
    caption_T = np.arange(50) % 5
    found = measure(View(np.eye(5)[caption_T], caption_T))
    assert found.scale < 1000
    assert found.loss < 1e-3
    assert found.recall == 1


def test_a_model_without_information_is_at_chance() -> None:
    """Constant similarities give the entropy of the captions, and no information."""
    caption_T = np.repeat(np.arange(3), [50, 30, 20])
    found = measure(View(np.zeros((100, 3)), caption_T))
    assert math.isclose(found.loss, -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)))
    assert found.information == pytest.approx(0, abs=1e-12)
    assert found.scale == 0


def test_a_measure_ignores_the_models_own_scale() -> None:
    """Similarities times ten are the same model."""
    seen = world(100, 4)[0]
    once, again = measure(seen), measure(View(10 * seen.sim_TK, seen.caption_T))
    assert math.isclose(once.loss, again.loss, rel_tol=1e-6)
    assert once.recall == again.recall


def test_paired_errors_are_smaller() -> None:
    """Two models that fail on the same images differ by less than their own errors suggest, and the sign is right."""
    good, worse = world(500, 5, blur=1.0)[0], world(500, 5, blur=1.3)[0]
    found = compare(good, worse)
    assert found.value < -2 * found.error
    assert found.error < math.hypot(measure(good).error, measure(worse).error)


def test_standard_errors_match_repeated_draws() -> None:
    """The stated error of a loss is the spread over fresh trusted sets, within a quarter."""
    found = [measure(world(200, 100 + seed)[0]) for seed in range(60)]
    assert np.std([one.loss for one in found]) == pytest.approx(np.mean([one.error for one in found]), rel=0.25)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.8])
def test_the_noise_share_of_a_mixture(share: float) -> None:
    """A planted share is found within three stated errors, which are below 0.05 at 500 trusted and 4,000 pool pairs."""
    trusted, text_KD = world(500, 7)
    pool = world(4000, 8)[0]
    dice = np.random.default_rng(9)
    image_BD = torch.from_numpy(pool.sim_TK) @ torch.linalg.pinv(text_KD.double()).T  # any embedding of these views
    caption_B = pool.caption_T.copy()
    noisy = dice.random(4000) < share
    caption_B[noisy] = dice.permutation(pool.caption_T)[noisy]
    found = noise_share(trusted, pool_sums(image_BD, text_KD.double()[caption_B]))
    assert found.error < 0.05
    assert abs(found.value - share) < 3 * found.error


def test_noise_errors_match_repeated_draws() -> None:
    """The stated error of a noise share is the spread over fresh trusted sets and pools, within a third."""
    values, errors = [], []
    for seed in range(60):
        trusted, pool = world(150, 1000 + seed)[0], world(300, 2000 + seed)[0]
        dice = np.random.default_rng(seed)
        caption_B = np.where(dice.random(300) < 0.5, dice.integers(10, size=300), pool.caption_T)
        own_B = pool.sim_TK[np.arange(300), caption_B]
        sums = PoolSums(300, float(own_B.sum()), float((own_B**2).sum()), float(pool.sim_TK.mean() * 300))
        found = noise_share(trusted, sums)
        values.append(found.value)
        errors.append(found.error)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.33)


def test_pool_sums_equal_a_loop_and_add_up() -> None:
    """Matched and mismatched means are those of the B x B matrix; two batches are summed weighted by their size."""
    dice = torch.Generator().manual_seed(3)
    image_BD, text_BD = (torch.randn(7, 4, generator=dice).double() for _ in range(2))
    sums, sim_BB = pool_sums(image_BD, text_BD), image_BD @ text_BD.T
    off = [float(sim_BB[i, j]) for i in range(7) for j in range(7) if i != j]
    assert math.isclose(sums.mismatched / sums.count, sum(off) / len(off), rel_tol=1e-9)
    assert math.isclose(sums.matched, float(sim_BB.diag().sum()), rel_tol=1e-9)
    assert (sums + sums).count == 14
    assert math.isclose((sums + sums).squares, 2 * sums.squares)
    assert pool_sums(image_BD[:1], text_BD[:1]).mismatched == 0


def test_no_information_no_noise_share() -> None:
    """A model that tells nothing apart has an infinite error."""
    trusted = View(np.full((5, 2), 0.3), np.array([0, 1, 0, 1, 0]))
    assert noise_share(trusted, PoolSums(10, 3.0, 0.9, 3.0)).error == math.inf


def test_distinct_captions_are_rows_of_the_tokens() -> None:
    """Every row is recovered from the distinct ones, of which there are as few as possible."""
    token_TC = torch.tensor([[5, 0], [2, 1], [5, 0], [2, 2]])
    unique_KC, caption_T = distinct(token_TC)
    assert len(unique_KC) == 3
    assert torch.equal(unique_KC[torch.from_numpy(caption_T)], token_TC)
