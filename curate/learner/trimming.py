"""Draw what is probably clean and not yet known, judged by learner and reference together, one pair at a time.

Let z be the sum of the models' similarities times a scale each. r_i = exp(z_ii) / mean_j exp(z_ij) says how much
likelier a caption is with its image than with the others, so by Bayes' rule a pair of a pool with a share `noise` of
wrong captions is clean with probability (1 - noise) r / ((1 - noise) r + noise). What is left to learn of it is 1 - q,
with q the probability that the models give to its caption among those of the candidates. A pair is drawn by
(P(clean) (1 - q))^2. Clean alone would choose what is easy, unknown alone what is noise.

Costs 2 B^2 D FLOPs for each model, memory 24 B bytes a row of a tile; b / (1 - noise) candidates instead of a whole
super-batch, so it is cheaper than joint selection wherever noise is below the filter ratio.
"""

# B candidates, b drawn, R rows of a tile, D embedding width

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from curate.errors import UsageError
from curate.learner.choosing import Chosen, effective_candidates
from curate.policy.drawing import Limit
from curate.policy.fixed_scores import draw_fixed, fixed_price
from curate.selection.joint import Pairs, canonical_order, largest
from curate.selection.noise import gumbel

SHARPNESS = 2.0  # the power of a pair's worth; 1 and 2 were tried
_LEAST_UNKNOWN = 1e-6
_TILE = 1024  # rows at a time: 24 MB at 1,000 candidates


def log_ratios(models: Sequence[tuple[Pairs, float]], caption_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """log r and 1 - q of each pair, float64 [B], under models at given scales (not their own ones); biases cancel.

    `caption_B` numbers the captions: pairs with the same number have the same text.

    >>> eye = torch.eye(2)
    >>> log_ratios([(Pairs(eye, eye, 10.0, -5.0), 2.0)], np.arange(2))[0]  # 2 - log((e^2 + 1) / 2)
    tensor([0.5662, 0.5662], dtype=torch.float64)
    """
    label_B = torch.from_numpy(caption_B)
    tiles = [_tile(models, label_B, slice(start, start + _TILE)) for start in range(0, len(caption_B), _TILE)]
    ratio_B, unknown_B = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return ratio_B, unknown_B


def log_worth(ratio_B: Tensor, unknown_B: Tensor, noise: float) -> Tensor:
    """log of P(clean) (1 - q), float64 [B], from `log_ratios` and the pool's share of noise.

    Example: r = 1 at noise 0.4 is clean with probability 0.6; with q = 0.5 the worth is 0.3.
    """
    clean_B = torch.zeros_like(ratio_B)
    if noise > 0:
        clean_B = -functional.softplus(math.log(noise) - math.log1p(-noise) - ratio_B)
    return clean_B + torch.log(unknown_B.clamp(min=_LEAST_UNKNOWN))


def trim(
    models: Sequence[tuple[Pairs, float]],
    id_B16: NDArray[np.uint8],
    caption_B: NDArray[np.int64],
    *,
    size: int,
    noise: float,
    seed: int,
    step: int,
    limit: Limit | None = None,
) -> Chosen:
    """Draw `size` of B candidates without replacement, with probability by worth to the power `SHARPNESS`.

    Under a policy's `limit` within it; the price is then in log worth.

    The arithmetic is in the order of the ids, the noise of the draw counter-based: neither depends on the order of the
    rows. Raises `UsageError` for no model, a size outside 1..B, or a noise outside 0 up to below 1.
    """
    if not models:
        raise UsageError("trimming needs the learner's or the reference's embeddings of the candidates")
    if not 1 <= size <= len(id_B16):
        raise UsageError(f"cannot draw {size} of {len(id_B16)} candidates; give a size from 1 to {len(id_B16)}")
    if not 0 <= noise < 1:
        raise UsageError(f"noise is {noise}; it is the share of wrong captions, 0 up to below 1")
    order_B = canonical_order(id_B16)
    ordered = [(_rows(pairs, torch.from_numpy(order_B)), scale) for pairs, scale in models]
    logit_B = np.empty(len(order_B))
    logit_B[order_B] = SHARPNESS * log_worth(*log_ratios(ordered, caption_B[order_B]), noise).numpy()
    effective = effective_candidates(torch.from_numpy(logit_B))
    if limit is None:
        index_b = largest(logit_B + gumbel(id_B16, seed=seed, step=step, chunk=0), order_B, size)
        return Chosen(index_b, np.zeros(size, np.int16), logit_B[index_b].astype(np.float32), effective)
    kept = draw_fixed(logit_B, id_B16, limit.member_BG, limit.quota, seed=seed, step=step)
    price = fixed_price(kept, logit_B / SHARPNESS, logit_B, id_B16, seed=seed, step=step)
    return Chosen(kept.draw.index_b, kept.draw.chunk_b, kept.draw.logit_b, effective, None, kept, price)


def _tile(models: Sequence[tuple[Pairs, float]], label_B: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """log r and 1 - q of some rows."""
    parts = [
        scale * (pairs.image_BD[rows].detach().double().cpu() @ pairs.text_BD.detach().double().cpu().T)
        for pairs, scale in models
    ]
    z_RB = torch.stack(parts).sum(0)
    own_R = z_RB[torch.arange(len(z_RB)), torch.arange(len(label_B))[rows]]
    total_R = torch.logsumexp(z_RB, dim=1)
    other_RB = torch.where(label_B[rows, None] == label_B, -math.inf, z_RB)
    return own_R - (total_R - math.log(len(label_B))), torch.exp(torch.logsumexp(other_RB, dim=1) - total_R)


def _rows(pairs: Pairs, order_B: Tensor) -> Pairs:
    return Pairs(pairs.image_BD[order_B], pairs.text_BD[order_B], pairs.scale, pairs.bias)
