"""What keeps a tree healthy while it learns: leaves used evenly, decisions that are sharp. Cost O(T L) on node logits.

Sources: balance after Charalampopoulos et al. (arXiv 2405.16836) and the switch transformer's loss (arXiv 2101.03961);
hardening after Belcak & Wattenhofer (arXiv 2308.14711).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from curate.kernels.fff import depth_of

# T tokens, N nodes in breadth-first order, L = N + 1 leaves, P levels


def leaf_probabilities(logits_TN: Tensor) -> Tensor:
    """Probability of every leaf [T, L]: the product of the decisions above it; a row sums to 1.

    Example: depth 1 and logit 0.0 give (0.5, 0.5); depth 0 gives one column of ones.
    """
    right_TN = torch.sigmoid(logits_TN)
    reached_TL = logits_TN.new_ones(len(logits_TN), 1)
    for level in range(depth_of(logits_TN.shape[1] + 1)):
        right = right_TN[:, 2**level - 1 : 2 ** (level + 1) - 1]
        reached_TL = torch.stack((reached_TL * (1 - right), reached_TL * right), dim=2).flatten(1)
    return reached_TL


def log_path_probability(logits_TN: Tensor, leaf_T: Tensor) -> Tensor:
    """log of the probability of each token's own leaf, fp32 at least [T]: sum of log sigmoid(+-z) on its path."""
    depth = depth_of(logits_TN.shape[1] + 1)
    level_P = torch.arange(depth, device=leaf_T.device)
    node_TP = ((leaf_T[:, None] + 2**depth) >> (depth - level_P)) - 1
    sign_TP = ((leaf_T[:, None] >> (depth - 1 - level_P)) & 1) * 2 - 1
    logits_TP = logits_TN.gather(1, node_TP)
    wide_TP = logits_TP if logits_TP.dtype == torch.float64 else logits_TP.float()
    return functional.logsigmoid(sign_TP * wide_TP).sum(1)


def balance_loss(logits_TN: Tensor, leaf_T: Tensor) -> Tensor:
    """L sum over leaves of (share of tokens) x (mean probability): 1 when even, up to L when all sit in one leaf.

    The shares are counts and have no gradient; the probabilities have one.
    """
    if not len(leaf_T):
        return logits_TN.sum()
    leaves = logits_TN.shape[1] + 1
    share_L = torch.bincount(leaf_T, minlength=leaves) / len(leaf_T)
    return leaves * (share_L * leaf_probabilities(logits_TN.float()).mean(0)).sum()


def hardening_loss(logits_TN: Tensor, *, least: float = 1e-6) -> Tensor:
    """Mean entropy of the decisions in nats, log 2 = 0.693 at most; probabilities are clamped to [least, 1 - least]."""
    if not logits_TN.numel():
        return logits_TN.sum()
    p_TN = torch.sigmoid(logits_TN.float()).clamp(least, 1 - least)
    return -(p_TN * p_TN.log() + (1 - p_TN) * (1 - p_TN).log()).mean()


def weighed(logits_TN: Tensor, leaf_T: Tensor, balance: float, hardening: float) -> Tensor:
    """Both with their weights, as a layer keeps them. A `TorchFunctionMode` sees each call."""
    if has_torch_function_unary(logits_TN):
        seen: Tensor = handle_torch_function(weighed, (logits_TN,), logits_TN, leaf_T, balance, hardening)
        return seen
    return balance * balance_loss(logits_TN, leaf_T) + hardening * hardening_loss(logits_TN)


def penalty(model: nn.Module) -> Tensor | float:
    """Sum of the penalties of all fast feedforward layers in their last forward pass in training; 0.0 without any.

    Add it to the loss: `(loss + penalty(model)).backward()`.
    """
    found = (getattr(module, "penalty", None) for module in model.modules())
    return sum((one for one in found if isinstance(one, Tensor)), start=0.0)
