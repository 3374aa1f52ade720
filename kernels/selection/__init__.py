"""Scores of all candidates given the candidates chosen so far, in O(B d) memory: the arithmetic of joint selection.

Mathematics. A model m has embeddings of B pairs, a scale a and a bias b of its own, and counts with a weight w (+1 or
-1). With s_ij = <image_i, text_j> and x_ij = a s_ij + b the score of candidate i given the chosen set K (i not in K)
is

    sigmoid   sum_m w [ softplus(-x_ii) + sum_{k in K} (softplus(x_ik) + softplus(x_ki)) ]
    softmax   sum_m w [ -a s_ii + 1/2 (LSE_{k in K} a s_ik + LSE_{k in K} a s_ki) ]     (no LSE term while K is empty)

For the sigmoid loss this is the marginal gain, from adding i to K, of the sum over the batch of the weighted pair
losses. (Evans et al. 2024, arXiv 2406.17711, Algorithms 2 and 3, with their errata mended.)

Contract. A kernel is a state of accumulators, see `PairKernel`: `update(chosen)` adds the pairs of newly chosen rows
with every row that still stands, `scores()` reads the accumulators. The score of a chosen row stays as it was when it
was chosen. Rows are the caller's; `order_B` is the order in which candidates are laid out in tiles, so a caller that
sorts it by something intrinsic to the samples gets the same bits for any order of its rows. All kernels take the same
constructor: `Kernel(sides, loss, order_B, ...)`. Cost of the updates: 8 B b d multiply-adds x 2 for two models and
both directions.

`plain.py` builds whole B x C tiles and is the oracle; `tiled.py` streams with torch; `native.py` is C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

# B candidates (the super-batch), c newly chosen, D width
Loss = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True)
class Side:
    """One model's L2-normalised embeddings [B, D] (any floating dtype), its scale and bias, its weight (+1, -1)."""

    image_BD: Tensor
    text_BD: Tensor
    scale: float
    bias: float
    weight: float


class PairKernel(Protocol):
    """Accumulators over the candidates. Not safe to update from two threads at once."""

    def update(self, chosen_c: Tensor) -> None:
        """Add the pairs of the rows `chosen_c` (int64, not chosen before) with every row that still stands."""

    def scores(self) -> Tensor:
        """fp64 [B] in the caller's rows; the score of a chosen row is the one it had when it was chosen."""


def check_sides(sides: Sequence[Side], loss: str, order_B: Tensor) -> None:
    """ValueError unless images and texts agree in shape, are floating, and have as many rows as `order_B`."""
    if loss not in ("sigmoid", "softmax"):
        raise ValueError(f"loss {loss!r} is none of sigmoid, softmax")
    if not sides:
        raise ValueError("no model to score with: give at least one side")
    for side in sides:
        if side.image_BD.ndim != 2 or side.image_BD.shape != side.text_BD.shape:
            raise ValueError(
                f"images {tuple(side.image_BD.shape)} and texts {tuple(side.text_BD.shape)} are not both [B, D]"
            )
        if not (side.image_BD.is_floating_point() and side.text_BD.is_floating_point()):
            raise ValueError(f"embeddings are {side.image_BD.dtype} and {side.text_BD.dtype}, not floating point")
        if len(side.image_BD) != len(order_B):
            raise ValueError(f"{len(side.image_BD)} embeddings for {len(order_B)} candidates")


def compute_dtype(sides: Sequence[Side]) -> torch.dtype:
    """fp64 if any embedding is fp64, else fp32: half-precision storage is fine, half-precision sums are not."""
    stored = {tensor.dtype for side in sides for tensor in (side.image_BD, side.text_BD)}
    return torch.float64 if torch.float64 in stored else torch.float32


def own_scores(sides: Sequence[Side], loss: Loss, rows_n: Tensor) -> Tensor:
    """The scores of some rows before anything is chosen (every pair with itself), fp64 [n]; O(n D)."""
    own_n = torch.zeros(len(rows_n), dtype=torch.float64)
    for side in sides:
        s_n = (side.image_BD[rows_n].double() * side.text_BD[rows_n].double()).sum(1)
        loss_n = softplus(-(side.scale * s_n + side.bias)) if loss == "sigmoid" else -side.scale * s_n
        own_n += side.weight * loss_n
    return own_n
