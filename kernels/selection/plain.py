"""The scores of joint selection as the mathematics states them: whole B x C tiles, any dtype. The oracle of the others.

Costs what it says: for every update, two B x C matrices per model, a softplus or an exponential of each element, and a
full pass over rows that were chosen long ago. Memory O(B C). Use it for checks, not for work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from curate.kernels.selection import Loss, Side, check_sides, compute_dtype, own_scores

# B candidates, C newly chosen, D width


class PlainPairs:
    """`PairKernel` without any trick; see the package for the contract."""

    def __init__(self, sides: Sequence[Side], loss: Loss, order_B: Tensor, *, dtype: torch.dtype | None = None) -> None:
        check_sides(sides, loss, order_B)
        self._sides, self._loss = tuple(sides), loss
        self._dtype = dtype or compute_dtype(sides)
        self._own_B = own_scores(sides, loss, torch.arange(len(order_B)))
        self._standing_B = torch.ones(len(order_B), dtype=torch.bool)
        self._score_B = self._own_B.clone()
        self._pair_B = torch.zeros_like(self._own_B)
        self._lse_SB = [torch.full((2, len(order_B)), -torch.inf, dtype=torch.float64) for _ in sides]

    def update(self, chosen_c: Tensor) -> None:
        """Add the pairs of `chosen_c` with every row, then show the new score of the rows that still stand."""
        if not len(chosen_c):
            return
        self._standing_B[chosen_c] = False
        given_B = torch.zeros_like(self._own_B)
        for side, lse_2B in zip(self._sides, self._lse_SB, strict=True):
            for direction, x_BC in enumerate(self._tiles(side, chosen_c)):
                if self._loss == "sigmoid":
                    self._pair_B += side.weight * softplus(x_BC + side.bias).sum(1).double()
                else:
                    lse_2B[direction] = torch.logaddexp(lse_2B[direction], x_BC.logsumexp(1).double())
                    given_B += side.weight * lse_2B[direction] / 2
        if self._loss == "sigmoid":
            given_B = self._pair_B
        self._score_B = torch.where(self._standing_B, self._own_B + given_B, self._score_B)

    def scores(self) -> Tensor:
        """fp64 [B]; see `PairKernel`."""
        score_B: Tensor = self._score_B.clone()
        return score_B

    def _tiles(self, side: Side, chosen_c: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities of every image with the chosen texts, and of every text with the chosen images."""
        image_BD, text_BD = side.image_BD.detach().to(self._dtype), side.text_BD.detach().to(self._dtype)
        return side.scale * (image_BD @ text_BD[chosen_c].T), side.scale * (text_BD @ image_BD[chosen_c].T)
