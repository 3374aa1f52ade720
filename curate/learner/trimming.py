"""Leave out the candidates that are probably noise: judged by learner and reference, one pair at a time.

A model's word on a pair is log r = z_ii - log mean_j exp(z_ij), z its similarities times a scale: how much likelier the
caption is with this image than with the others. Unlike the similarity itself it does not favour captions that lie near
to every image. Two models count as two witnesses: their words are added. Costs 2 B^2 D FLOPs for each model, memory 8 B
bytes a row; b / keep candidates instead of a whole super-batch, so it is cheaper than joint selection wherever more is
kept than 1 - filter ratio.
"""

# B candidates, b drawn, R rows of a tile, D embedding width

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import UsageError
from curate.learner.choosing import Chosen
from curate.selection.joint import Pairs, canonical_order, largest
from curate.selection.noise import gumbel

_TILE = 1024  # rows at a time: 8 MB at 1,000 candidates


def log_ratios(models: Sequence[tuple[Pairs, float]]) -> Tensor:
    """The sum of the models' log r, float64 [B], at given scales (not their own ones); biases cancel.

    >>> eye = torch.eye(2)
    >>> log_ratios([(Pairs(eye, eye, 10.0, -5.0), 2.0)])  # 2 - log((e^2 + 1) / 2)
    tensor([0.5662, 0.5662], dtype=torch.float64)
    """
    count = len(models[0][0].image_BD)
    parts = [_tile(models, slice(start, start + _TILE)) for start in range(0, count, _TILE)]
    return torch.cat(parts)


def trim(
    models: Sequence[tuple[Pairs, float]],
    id_B16: NDArray[np.uint8],
    *,
    size: int,
    keep: float,
    seed: int,
    step: int,
) -> Chosen:
    """`size` drawn uniformly among the share `keep` of candidates with the highest ratio; ties go to the smaller id.

    The arithmetic is in the order of the ids, the draw counter-based: neither depends on the order of the rows.
    Chosen.logit_b holds log r. Raises `UsageError` for no model, or a size outside 1..B.
    """
    if not models:
        raise UsageError("trimming needs the learner's or the reference's embeddings of the candidates")
    if not 1 <= size <= len(id_B16):
        raise UsageError(f"cannot draw {size} of {len(id_B16)} candidates; give a size from 1 to {len(id_B16)}")
    order_B = canonical_order(id_B16)
    ordered = [(_rows(pairs, torch.from_numpy(order_B)), scale) for pairs, scale in models]
    ratio_B = np.empty(len(order_B))
    ratio_B[order_B] = log_ratios(ordered).numpy()
    kept = max(size, round(keep * len(order_B)))
    standing = largest(ratio_B, order_B, kept)
    index_b = largest(gumbel(id_B16, seed=seed, step=step, chunk=0), standing, size)
    return Chosen(index_b, np.zeros(size, np.int16), ratio_B[index_b].astype(np.float32), float(kept))


def _tile(models: Sequence[tuple[Pairs, float]], rows: slice) -> Tensor:
    """The sum of log r of some rows."""
    return torch.stack([_word(pairs, scale, rows) for pairs, scale in models]).sum(0)


def _word(pairs: Pairs, scale: float, rows: slice) -> Tensor:
    z_RB = scale * (pairs.image_BD[rows].detach().double().cpu() @ pairs.text_BD.detach().double().cpu().T)
    own_R = z_RB[torch.arange(len(z_RB)), torch.arange(z_RB.shape[1])[rows]]
    return own_R - (torch.logsumexp(z_RB, dim=1) - math.log(z_RB.shape[1]))


def _rows(pairs: Pairs, order_B: Tensor) -> Pairs:
    return Pairs(pairs.image_BD[order_B], pairs.text_BD[order_B], pairs.scale, pairs.bias)
