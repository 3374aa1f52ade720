"""The two contrastive losses over a batch of B pairs. O(B^2 D) time, O(B^2) memory.

Sigmoid: each of the B^2 pairs is a yes-or-no question (SigLIP, arXiv 2303.15343, algorithm 1). Softmax: each image
picks its caption among B, each caption its image (CLIP, arXiv 2103.00020, figure 3).
"""

# B batch, D embedding width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sigmoid_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum over all pairs of -log sigmoid(sign (scale s_ij + bias)), divided by B; unit vectors in, a scalar out.

    Example: B = 2, orthonormal and matched, scale 1, bias 0: log(1 + 1/e) + log 2 = 1.0064.
    """
    logit_BB = scale * image_BD @ text_BD.T + bias
    sign_BB = 2 * torch.eye(len(logit_BB), device=logit_BB.device, dtype=logit_BB.dtype) - 1
    return -functional.logsigmoid(sign_BB * logit_BB).sum() / len(logit_BB)


def softmax_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
    """Mean of the two cross-entropies, image to caption and caption to image; unit vectors in, a scalar out.

    Example: B = 2, orthonormal and matched, scale 1: log(1 + 1/e) = 0.3133.
    """
    logit_BB = scale * image_BD @ text_BD.T
    target_B = torch.arange(len(logit_BB), device=logit_BB.device)
    return (functional.cross_entropy(logit_BB, target_B) + functional.cross_entropy(logit_BB.T, target_B)) / 2
