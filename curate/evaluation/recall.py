"""Rank captions for images and images for captions: recall at k, block by block, never the whole similarity matrix.

2 N M D multiply-adds for N images and M captions of width D; memory O((N + M) D) and one block of similarities.
An image may have several captions, which lie side by side; it is found if the best of them is.
"""

# N images, M captions, D width; i, m rows of a block

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from curate.errors import UsageError

KS: Final = (1, 5, 10)
# Cosines of float32 unit vectors are rounded by less than this. Whatever lies so near counts as a tie, and a tie counts
# against the model: one that embeds everything alike finds nothing.
TIE: Final = 1e-6
BLOCK_IMAGES, BLOCK_CAPTIONS = 1024, 4096  # 16 MiB of similarities


@dataclass(frozen=True, slots=True)
class Recall:
    """Hits among the first k, in either direction, for each k; `chance` is what a random order would hit on average.

    `images` and `captions` took part, in `pools` pools of `pool` images; `left_over` images made no full pool.
    """

    images: int
    captions: int
    pool: int
    pools: int
    left_over: int
    image_to_text: dict[int, int]
    text_to_image: dict[int, int]
    image_to_text_chance: dict[int, float]
    text_to_image_chance: dict[int, float]


def ranks(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> tuple[Tensor, Tensor]:
    """How many foreign captions come before the best own one, int64 [N]; how many foreign images before the own, [M].

    Unit vectors in float32; `owner_M` int64 is the image of each caption, every image with at least one. Ties (cosines
    within 1e-6) come before. Example: two images, captions of owner 0, 0, 1: a perfect model gives [0, 0], [0, 0, 0].
    """
    N = len(image_ND)
    own_M = torch.cat([(image_ND[o_m] * t_mD).sum(1) for o_m, t_mD in _blocks(BLOCK_CAPTIONS, owner_M, text_MD)])
    best_N = own_M.new_full((N,), -torch.inf).scatter_reduce(0, owner_M, own_M, "amax")
    if bool((best_N == -torch.inf).any()):
        raise UsageError(f"image {int(best_N.argmin())} has no caption; leave it out")
    before_N, before_M = (torch.zeros(n, dtype=torch.int64, device=image_ND.device) for n in (N, len(text_MD)))
    row_N, column_M = torch.arange(N, device=image_ND.device), torch.arange(len(text_MD), device=image_ND.device)
    for image_iD, best_i, row_i in _blocks(BLOCK_IMAGES, image_ND, best_N, row_N):
        for text_mD, own_m, owner_m, column_m in _blocks(BLOCK_CAPTIONS, text_MD, own_M, owner_M, column_M):
            sim_im, foreign_im = image_iD @ text_mD.T, owner_m != row_i[:, None]
            before_N[row_i] += ((sim_im >= best_i[:, None] - TIE) & foreign_im).sum(1)
            before_M[column_m] += ((sim_im >= own_m - TIE) & foreign_im).sum(0)
    return before_N, before_M


def recall(
    image_ND: Tensor, text_MD: Tensor, owner_M: Tensor, *, pool: int | None = None, ks: Sequence[int] = KS
) -> Recall:
    """Recall over the whole set, or over consecutive pools of `pool` images and their captions; a rest is left over.

    As `ranks`; `owner_M` ascends. A pool larger than the set is the whole set. Where a pool has k candidates or fewer,
    recall at k is 1 by definition, and so is its chance.
    Errors: UsageError for a pool below 1, no image, or an image without a caption.
    Example: 178 images with a caption each and pool 100: one pool, 78 left over.
    """
    N = len(image_ND)
    if pool is not None and pool < 1:
        raise UsageError(f"pool {pool} must be at least 1")
    if not N:
        raise UsageError("there is no image to rank")
    size = min(pool or N, N)
    pools = N // size
    edge = torch.searchsorted(owner_M, torch.arange(0, pools * size + 1, size, device=owner_M.device)).tolist()
    hits = {side: dict.fromkeys(ks, 0) for side in ("image", "text")}
    chance = {side: dict.fromkeys(ks, 0.0) for side in ("image", "text")}
    for at in range(pools):
        captions = slice(edge[at], edge[at + 1])
        owner_m = owner_M[captions] - at * size
        before_i, before_m = ranks(image_ND[at * size : (at + 1) * size], text_MD[captions], owner_m)
        own = Counter(torch.bincount(owner_m, minlength=size).tolist())
        for k in ks:
            hits["image"][k] += int((before_i < k).sum())
            hits["text"][k] += int((before_m < k).sum())
            chance["image"][k] += sum(n * _chance(len(owner_m), m, k) for m, n in own.items())
            chance["text"][k] += len(owner_m) * _chance(size, 1, k)
    M = edge[-1]
    return Recall(
        images=pools * size,
        captions=M,
        pool=size,
        pools=pools,
        left_over=N - pools * size,
        image_to_text=hits["image"],
        text_to_image=hits["text"],
        image_to_text_chance={k: total / (pools * size) for k, total in chance["image"].items()},
        text_to_image_chance={k: total / M for k, total in chance["text"].items()},
    )


def _chance(candidates: int, own: int, k: int) -> float:
    """Chance that a random order of `candidates` has one of `own` among its first k."""
    return 1 - math.comb(candidates - own, k) / math.comb(candidates, k) if k < candidates else 1.0


def _blocks(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
