"""Draw a sub-batch by one score per candidate, such as alignment: no pairs, so one chunk and O(B log B).

    logit_i = gain z_i,    z_i = Phi^-1((rank_i - 1/2) / B), the normal score of its rank; equal scores share a rank

Scores of other models and batch sizes differ by orders of magnitude, hence standard units: `gain` is logits per
standard deviation, and under it about exp(-gain^2 / 2) of the candidates count, whatever the scores (2: a seventh).
Ranks, because derivatives have long tails: of 5,166 real pairs the largest was 11 robust deviations out, which in units
of median and absolute deviation left 1.3 candidates that counted at gain 2; and in units of a mean and a plain
deviation such pairs would make all others alike. The noise is that of the joint sampler (`noise.py`), ties go to the
smaller id, and the row order does not matter.
"""

# B candidates (the super-batch), b drawn (the sub-batch), V different scores

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.selection.joint import Draw, canonical_order, largest
from curate.selection.noise import gumbel


def draw_alone(
    score_B: NDArray[np.floating[Any]],
    sample_ids: NDArray[np.uint8],
    *,
    size: int,
    gain: float = 2.0,
    seed: int = 0,
    step: int = 0,
) -> Draw:
    """Draw `size` of B candidates without replacement, in proportion to exp(logit); all in chunk 0.

    `sample_ids` is uint8 [B, 16], all different. Raises `UsageError` for a score that is not finite (naming the
    sample), lengths that disagree, a duplicate id, a size outside 1..B, and a gain that is negative or not finite.

    >>> ids = np.arange(64, dtype=np.uint8).reshape(4, 16)
    >>> draw = draw_alone(np.array([0.1, 5.0, 0.2, 0.3]), ids, size=1)
    >>> draw.index_b.tolist(), draw.logit_B.astype(int).tolist()
    ([1], [-2, 2, 0, 0])
    """
    order_B = canonical_order(sample_ids)
    if score_B.shape != (len(sample_ids),):
        raise UsageError(f"scores are {score_B.shape} for {len(sample_ids)} sample ids; give one each")
    if not 1 <= size <= len(sample_ids):
        raise UsageError(f"cannot draw {size} of {len(sample_ids)} candidates; give a size from 1 to {len(sample_ids)}")
    if not (math.isfinite(gain) and gain >= 0):
        raise UsageError(f"gain is {gain}; give a finite number, 0 or more")
    bad = np.flatnonzero(~np.isfinite(score_B))
    if len(bad):
        name = sample_ids[bad[0]].tobytes().hex()
        raise UsageError(f"the score of row {bad[0]} (sample {name}) is {score_B[bad[0]]}; leave the sample out")
    logit_B = gain * normal_scores(score_B)
    index_b = largest(logit_B + gumbel(sample_ids, seed=seed, step=step, chunk=0), order_B, size)
    logit_float_B = logit_B.astype(np.float32)
    return Draw(index_b, np.zeros(size, np.int16), logit_float_B[index_b], logit_float_B, "independent")


def normal_scores(score_B: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """What the ranks of the scores would be worth in standard deviations if these were normal; all equal: all 0.

    >>> normal_scores(np.array([1.0, 2.0, 2.0, 3.0, 100.0])).round(2).tolist()
    [-1.28, -0.25, -0.25, 0.52, 1.28]
    """
    _, place_B, count_V = np.unique(score_B, return_inverse=True, return_counts=True)
    below_V = np.cumsum(count_V) - count_V
    share_B = (below_V + count_V / 2)[place_B] / len(score_B)
    normal_B: NDArray[np.float64] = torch.special.ndtri(torch.from_numpy(share_B)).numpy()
    return normal_B
