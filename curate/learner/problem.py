"""A learner as its estimators see it: the contrastive loss in float32, the towers in the precision that was chosen.

Where captions repeat, each distinct one is embedded once per batch: the same embeddings and gradients for less.
"""

# B batch, U distinct captions, D embedding width

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curate.estimators.problem import DualEncoderProblem, Embeddings
from curate.models.precision import has_native_bf16

REPEATED = 4  # captions of a pool that share one text, on average, from which on it pays to look for them


@dataclass(frozen=True, slots=True)
class LearnerProblem(DualEncoderProblem):
    """`DualEncoderProblem` with autocast to bf16, and with distinct captions embedded once."""

    bf16: bool = False
    distinct: bool = False

    def embed(self, batch: Any) -> Embeddings:
        image_BCHW, token_BT = batch
        with self.arithmetic(image_BCHW.device):
            if not self.distinct:
                return DualEncoderProblem.embed(self, batch)
            token_UT, row_B = torch.unique(token_BT, dim=0, return_inverse=True)
            image_BD, text_UD = DualEncoderProblem.embed(self, (image_BCHW, token_UT))
        return image_BD, text_UD[row_B]

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the towers run."""
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()


def repeated(token_NT: Tensor) -> bool:
    """Do captions of a pool repeat often enough to embed distinct ones only?"""
    return len(torch.unique(token_NT, dim=0)) * REPEATED <= len(token_NT)


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Is this precision bf16 on this device? "auto" is where the hardware has it."""
    return precision == "bf16" or (precision == "auto" and has_native_bf16(device))
