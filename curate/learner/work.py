"""What passes of the learner cost in FLOPs, by the analytic count: images by size, captions by the length they run."""

# B batch, T tokens

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curate.costs.flops import Size, Work, image_work, optimiser_flops, text_work
from curate.models.towers import pooled_position, text_parts

_EXACT = "forward-exact"


class PassCosts:
    """Counts for one learner; what was counted once is remembered.

    Example: `costs.forward(640, token_640T)` is the scoring pass of a super-batch, `costs.step(128, token_128T)` a
    forward and backward pass.
    """

    def __init__(self, module: Any, *, distinct: bool = False) -> None:
        self._module, self._distinct, self._parts = module, distinct, text_parts(module)
        self._known: dict[tuple[str, Any], Work] = {}
        self.update = optimiser_flops(module)

    def forward(self, images: int, token_BT: Tensor, size: Size | None = None) -> float:
        """FLOPs of one pass over images and captions, without gradients."""
        image, text, captions = self._both(token_BT, size)
        return images * image.forward + captions * text.forward

    def step(self, images: int, token_BT: Tensor, size: Size | None = None) -> float:
        """FLOPs of a pass forth and back."""
        image, text, captions = self._both(token_BT, size)
        return images * image.step + captions * text.step

    def _both(self, token_BT: Tensor, size: Size | None) -> tuple[Work, Work, int]:
        captions = len(torch.unique(token_BT, dim=0)) if self._distinct and len(token_BT) else len(token_BT)
        image = self._counted("image", size, lambda: image_work(self._module, size=size, training=True))
        tokens = self._tokens(token_BT)
        text = self._counted("text", tokens, lambda: text_work(self._module, tokens, training=True))
        return image, text, captions

    def _tokens(self, token_BT: Tensor) -> int | None:
        """Tokens that run: captions are cut at the longest of the batch where the tower allows it."""
        if self._parts is None or not len(token_BT):
            return None
        return int(pooled_position(self._parts, token_BT).max()) + 1

    def _counted(self, tower: str, at: Any, count: Callable[[], Work]) -> Work:
        if (tower, at) not in self._known:
            self._known[tower, at] = count()
        return self._known[tower, at]


def forwards_per_step(estimator: str, tangents: int, dimensions: int) -> float | None:
    """A step of an estimator in forward passes (`curate.estimators`); None for backprop and hybrids: forth and back."""
    each = {
        "backprop-checkpoint": 4.0, "forward": 2.0 * tangents, "forward-dense": 3.0 * tangents,
        "forward-activity": 4.0 * tangents, "forward-local": 7.0, "local-backprop": 4.0,
        _EXACT: 3.0 * dimensions, "zeroth-order": 2.0 * tangents,
    }  # fmt: skip
    return each.get(estimator)
