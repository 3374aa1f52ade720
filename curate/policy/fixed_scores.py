"""Draws by one score per candidate within floors and ceilings: alignment, trimming, and the order of an epoch.

The draw is the constrained one (`drawing.py`) of a kernel whose scores no member changes, so the same holds: exactly
`size` members within bounds that can be met, and bit for bit the plain draw where it is within them already. O(B log B)
beside the tests of `drawing.py`; the price is a difference of sums, since the plain draw is one sort.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.policy.drawing import ConstrainedDraw, Visit, draw_within
from curate.policy.price import Price
from curate.policy.quotas import Quota
from curate.selection.independent import draw_alone, normal_scores
from curate.selection.joint import Draw, canonical_order, largest
from curate.selection.noise import gumbel

# B candidates, b drawn, G groups

Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class FixedScores:
    """A kernel (`curate.kernels.selection.PairKernel`) whose scores, fp64 [B], stay what they are."""

    logit_B: NDArray[np.float64]

    def update(self, chosen_c: Tensor) -> None:
        """A member changes nobody's score."""

    def scores(self) -> Tensor:
        return torch.from_numpy(self.logit_B)


def draw_alone_within(
    score_B: Scores,
    sample_ids: NDArray[np.uint8],
    member_BG: NDArray[np.bool_],
    quota: Quota,
    *,
    gain: float = 2.0,
    seed: int = 0,
    step: int = 0,
) -> tuple[ConstrainedDraw, Price]:
    """`draw_alone` within the quota, and its price in the scores' unit.

    Errors: UsageError as `draw_alone`, and for groups that do not fit the quota.
    """
    draw_alone(score_B, sample_ids, size=quota.size, gain=gain, seed=seed, step=step)  # refuses what cannot be drawn by
    logit_B = gain * normal_scores(score_B)
    drawn = draw_fixed(logit_B, sample_ids, member_BG, quota, seed=seed, step=step)
    return drawn, fixed_price(drawn, score_B, logit_B, sample_ids, seed=seed, step=step)


def draw_fixed(
    logit_B: NDArray[np.float64],
    sample_ids: NDArray[np.uint8],
    member_BG: NDArray[np.bool_],
    quota: Quota,
    *,
    seed: int = 0,
    step: int = 0,
) -> ConstrainedDraw:
    """`quota.size` candidates in proportion to exp(logit), within the quota, all in chunk 0. Errors: UsageError."""
    kernel = FixedScores(np.asarray(logit_B, dtype=np.float64))
    drawn = draw_within(kernel, sample_ids, member_BG, quota, chunks=1, gain=1.0, seed=seed, step=step)
    return replace(drawn, draw=replace(drawn.draw, kernel="independent"))


def fixed_price(
    drawn: ConstrainedDraw,
    score_B: Scores,
    logit_B: NDArray[np.float64],
    sample_ids: NDArray[np.uint8],
    *,
    seed: int = 0,
    step: int = 0,
) -> Price:
    """The price of `draw_fixed`: sums of `score_B`, over its members and over those of the plain draw."""
    plain_b = drawn.draw.index_b
    if drawn.passed_over:
        noisy_B = logit_B + gumbel(sample_ids, seed=seed, step=step, chunk=0)
        plain_b = largest(noisy_B, canonical_order(sample_ids), drawn.quota.size)
    own, plain = (float(score_B[index_b].sum()) for index_b in (drawn.draw.index_b, plain_b))
    return Price(own, plain, drawn.quota.size)


def draw_in_order(member_BG: NDArray[np.bool_], quota: Quota) -> ConstrainedDraw:
    """The first `quota.size` candidates as they stand, less those that would break the quota. Nothing is weighed.

    Example: of rows that are all men but the last, with women at least 1, the first size - 1 and the last.
    """
    visit = Visit(member_BG, quota)
    row_B = np.arange(len(member_BG), dtype=np.int64)
    index_b = visit.choose(-row_B.astype(np.float64), row_B, quota.size)
    zero_B = np.zeros(len(row_B), np.float32)
    return visit.drawn(Draw(index_b, np.zeros(quota.size, np.int16), zero_B[index_b], zero_B, "in order"))
