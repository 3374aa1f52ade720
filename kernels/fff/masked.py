"""Fast feedforward at the price of the dense layer: every leaf is computed for every token, and all but one left out.

Two large products instead of many small ones. It wins where products are quick and calls are not: half precision with a
matrix unit and a handful of tokens per leaf, without a compiler. Dispatch can fall back to it, so that no layer needs
to be slower than the dense one that it replaces. Memory L T H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curate.kernels.fff import Activation, Leaves, check_leaves
from curate.kernels.fff.activations import activate
from curate.kernels.fff.grouped import leaf_backward, leaf_jvp

__all__ = ["leaf_backward", "leaf_forward", "leaf_jvp"]

# T tokens, D width in, E width out, L leaves, H neurons of a leaf


def leaf_forward(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `LeafKernel`."""
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    (L, _, H), T = leaves.w1.shape, len(x_TD)
    row_T = torch.arange(T, device=x_TD.device)
    pre_TH = torch.matmul(x_TD, leaves.w1)[leaf_T, row_T] + leaves.b1[leaf_T]
    act_TLH = x_TD.new_zeros(T, L, H)
    act_TLH[row_T, leaf_T] = activate(pre_TH, activation)
    y_TE = act_TLH.view(T, L * H) @ leaves.w2.reshape(L * H, -1) + leaves.b2[leaf_T]
    return y_TE if gate_T is None else y_TE * gate_T[:, None], pre_TH
