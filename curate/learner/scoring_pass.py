"""The learner's look at a super-batch: embeddings without gradients, in evaluation mode, with its present weights.

Cost F per candidate; batch norms are folded and captions cut as in `curate score`. Modes and statistics of the module
are afterwards what they were.
"""

# B candidates, m of a micro-batch, C channels, H, W height and width, T tokens, D embedding width

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curate.costs.flops import Size
from curate.learner.problem import LearnerProblem
from curate.learner.resolution import at_size, low_cost, shrink
from curate.learner.reuse import Reuse
from curate.learner.work import PassCosts
from curate.models.embed import plain_image, plain_text
from curate.models.modes import evaluating
from curate.models.towers import encode_text_trimmed, image_path, text_parts
from curate.selection.joint import Pairs

MICRO_BATCH = 128  # bounds memory; on a CPU larger ones are no faster


@dataclass(frozen=True, slots=True)
class Scorer:
    """Embeds candidates with a learner as it is now; `reuse` keeps the products of the pass for the training step."""

    problem: LearnerProblem
    compact: Callable[[Tensor], Tensor]
    device: torch.device
    width: int
    low: Size | None = None
    reuse: Reuse | None = None

    def __call__(self, image_BCHW: Tensor, token_BT: Tensor) -> Pairs:
        """Unit vectors in float32 on the CPU, with the learner's own scale and bias."""
        module: Any = self.problem.module
        if self.low is not None:
            image_BCHW = shrink(image_BCHW, self.low)
        if self.reuse is not None:
            image_BD, text_BD = self.reuse.score(image_BCHW.to(self.device), self.compact(token_BT).to(self.device))
        else:
            with evaluating(module), torch.inference_mode(), self.problem.arithmetic(self.device):
                image_BD, text_BD = self._images(image_BCHW), self._text(self.compact(token_BT))
        scale, bias = float(module.logit_scale.detach().exp()), module.logit_bias
        image_BD, text_BD = (torch.empty(side.shape).copy_(side) for side in (image_BD, text_BD))  # ordinary again
        return Pairs(image_BD, text_BD, scale, 0.0 if bias is None else float(bias.detach()))

    def flops(self, costs: PassCosts, token_BT: Tensor) -> float:
        """What a look at these candidates costs."""
        return costs.forward(len(token_BT), token_BT, self.low)

    @property
    def low_cost(self) -> float:
        """What a look costs over one at full resolution, captions included."""
        return 1.0 if self.low is None else low_cost(self.problem.module, self.low, training=False)

    def _images(self, image_BCHW: Tensor) -> Tensor:
        module: Any = self.problem.module
        with nullcontext() if self.low is None else at_size(module, self.low):
            short = image_path(module) if self.low is None else None
            encode = short or partial(plain_image, module)
            return torch.cat([self._image(encode, image) for image in image_BCHW.split(MICRO_BATCH)])

    def _image(self, encode: Callable[[Tensor], Tensor], image_mCHW: Tensor) -> Tensor:
        settings = self.problem.module.visual.preprocess_cfg
        mean, std = (torch.tensor(settings[k], device=self.device).view(-1, 1, 1) for k in ("mean", "std"))
        x_mCHW = (image_mCHW.to(self.device).float() / 255 - mean) / std
        if not x_mCHW.is_cuda:
            x_mCHW = x_mCHW.contiguous(memory_format=torch.channels_last)
        return functional.normalize(encode(x_mCHW).float(), dim=-1)

    def _text(self, token_BT: Tensor) -> Tensor:
        module, token_BT = self.problem.module, token_BT.to(self.device)
        row_B: Tensor | None = None
        if self.problem.distinct:
            token_BT, row_B = torch.unique(token_BT, dim=0, return_inverse=True)
        parts = text_parts(module)
        text_BD = plain_text(module, token_BT) if parts is None else encode_text_trimmed(parts, token_BT)
        text_BD = functional.normalize(text_BD.float(), dim=-1)
        return text_BD if row_B is None else text_BD[row_B]
