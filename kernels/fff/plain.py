"""Fast feedforward as its mathematics states it: every token gathers its own weights. The oracle of the other kernels.

Costs T copies of a leaf (or of a path), in memory and in time: for checks, not for work. Any dtype; half precision is
computed in fp32 and rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curate.kernels.fff import (
    Activation,
    LeafTangents,
    Leaves,
    Paths,
    PathTangents,
    check_leaves,
    check_paths,
    depth_of,
)
from curate.kernels.fff.activations import activate, slope

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N nodes of a tree, K trees, P levels of a path


def leaf_forward(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `LeafKernel`."""
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    x, own = _wide(x_TD), _of_tokens(leaves, leaf_T)
    pre_TH = torch.einsum("td,tdh->th", x, own.w1) + own.b1
    y_TE = torch.einsum("th,the->te", activate(pre_TH, activation), own.w2) + own.b2
    return (_gates(gate_T, x)[:, None] * y_TE).to(x_TD.dtype), pre_TH.to(x_TD.dtype)


def leaf_backward(
    grad_TE: Tensor,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    pre_TH: Tensor,
    leaves: Leaves,
    activation: Activation,
) -> tuple[Tensor, Tensor, Leaves]:
    """See `LeafKernel`."""
    grad, x, pre, own = _wide(grad_TE), _wide(x_TD), _wide(pre_TH), _of_tokens(leaves, leaf_T)
    act_TH = activate(pre, activation)
    dgate_T = (grad * (torch.einsum("th,the->te", act_TH, own.w2) + own.b2)).sum(1)
    dy_TE = _gates(gate_T, x)[:, None] * grad
    dpre_TH = torch.einsum("te,the->th", dy_TE, own.w2) * slope(pre, activation)
    dx_TD = torch.einsum("th,tdh->td", dpre_TH, own.w1)
    summed = Leaves(
        _sum_by(leaf_T, x[:, :, None] * dpre_TH[:, None, :], leaves.w1),
        _sum_by(leaf_T, dpre_TH, leaves.b1),
        _sum_by(leaf_T, act_TH[:, :, None] * dy_TE[:, None, :], leaves.w2),
        _sum_by(leaf_T, dy_TE, leaves.b2),
    )
    return dx_TD.to(x_TD.dtype), dgate_T.to(x_TD.dtype), summed


def leaf_jvp(
    tangents: LeafTangents,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    pre_TH: Tensor,
    leaves: Leaves,
    activation: Activation,
) -> Tensor:
    """See `LeafKernel`."""
    x, pre, own = _wide(x_TD), _wide(pre_TH), _of_tokens(leaves, leaf_T)
    dpre_TH = torch.zeros_like(pre)
    if tangents.x is not None:
        dpre_TH = dpre_TH + torch.einsum("td,tdh->th", _wide(tangents.x), own.w1)
    if tangents.w1 is not None:
        dpre_TH = dpre_TH + torch.einsum("td,tdh->th", x, _wide(tangents.w1)[leaf_T])
    if tangents.b1 is not None:
        dpre_TH = dpre_TH + _wide(tangents.b1)[leaf_T]
    act_TH = activate(pre, activation)
    dy_TE = torch.einsum("th,the->te", slope(pre, activation) * dpre_TH, own.w2)
    if tangents.w2 is not None:
        dy_TE = dy_TE + torch.einsum("th,the->te", act_TH, _wide(tangents.w2)[leaf_T])
    if tangents.b2 is not None:
        dy_TE = dy_TE + _wide(tangents.b2)[leaf_T]
    dy_TE = _gates(gate_T, x)[:, None] * dy_TE
    if tangents.gate is not None:
        y_TE = torch.einsum("th,the->te", act_TH, own.w2) + own.b2
        dy_TE = dy_TE + _wide(tangents.gate)[:, None] * y_TE
    return dy_TE.to(x_TD.dtype)


def path_forward(x_TD: Tensor, paths: Paths, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """See `PathKernel`."""
    check_paths(x_TD, paths, activation)
    x = _wide(x_TD)
    K, P = len(paths.w1), depth_of(paths.w1.shape[1] + 1)
    tree_K = torch.arange(K, device=x.device)
    node_TK = torch.zeros(len(x), K, dtype=torch.int64, device=x.device)
    y_TE = _wide(paths.b2).expand(len(x), -1)
    pre, passed = [], []
    for _ in range(P):
        z_TK = torch.einsum("td,tkd->tk", x, _wide(paths.w1[tree_K, node_TK])) + _wide(paths.b1[tree_K, node_TK])
        y_TE = y_TE + torch.einsum("tk,tke->te", activate(z_TK, activation), _wide(paths.w2[tree_K, node_TK]))
        pre.append(z_TK)
        passed.append(node_TK)
        node_TK = 2 * node_TK + 1 + (z_TK > 0)
    return y_TE.to(x_TD.dtype), torch.stack(pre, -1).to(x_TD.dtype), torch.stack(passed, -1)


def path_backward(
    grad_TE: Tensor, x_TD: Tensor, pre_TKP: Tensor, node_TKP: Tensor, paths: Paths, activation: Activation
) -> tuple[Tensor, Paths]:
    """See `PathKernel`."""
    grad, x, pre = _wide(grad_TE), _wide(x_TD), _wide(pre_TKP)
    K, N = paths.w1.shape[:2]
    flat_TKP = node_TKP + N * torch.arange(K, device=x.device)[:, None]
    w1_TKPD, w2_TKPE = _wide(paths.w1.flatten(0, 1)[flat_TKP]), _wide(paths.w2.flatten(0, 1)[flat_TKP])
    dpre_TKP = torch.einsum("te,tkpe->tkp", grad, w2_TKPE) * slope(pre, activation)
    dx_TD = torch.einsum("tkp,tkpd->td", dpre_TKP, w1_TKPD)
    at = flat_TKP.flatten()

    def summed(each: Tensor, like: Tensor) -> Tensor:
        return _sum_by(at, each.flatten(0, 2), like.flatten(0, 1)).view(like.shape)

    return dx_TD.to(x_TD.dtype), Paths(
        summed(dpre_TKP[..., None] * x[:, None, None, :], paths.w1),
        summed(dpre_TKP, paths.b1),
        summed(activate(pre, activation)[..., None] * grad[:, None, None, :], paths.w2),
        grad.sum(0).to(paths.b2.dtype),
    )


def path_jvp(
    tangents: PathTangents,
    x_TD: Tensor,
    pre_TKP: Tensor,
    node_TKP: Tensor,
    paths: Paths,
    activation: Activation,
) -> Tensor:
    """See `PathKernel`."""
    x, pre = _wide(x_TD), _wide(pre_TKP)
    tree_K1 = torch.arange(paths.w1.shape[0], device=x.device)[:, None]
    dpre_TKP = torch.zeros_like(pre)
    if tangents.x is not None:
        dpre_TKP = dpre_TKP + torch.einsum("td,tkpd->tkp", _wide(tangents.x), _wide(paths.w1[tree_K1, node_TKP]))
    if tangents.w1 is not None:
        dpre_TKP = dpre_TKP + torch.einsum("td,tkpd->tkp", x, _wide(tangents.w1[tree_K1, node_TKP]))
    if tangents.b1 is not None:
        dpre_TKP = dpre_TKP + _wide(tangents.b1[tree_K1, node_TKP])
    dact_TKP = slope(pre, activation) * dpre_TKP
    dy_TE = torch.einsum("tkp,tkpe->te", dact_TKP, _wide(paths.w2[tree_K1, node_TKP]))
    if tangents.w2 is not None:
        act_TKP = activate(pre, activation)
        dy_TE = dy_TE + torch.einsum("tkp,tkpe->te", act_TKP, _wide(tangents.w2[tree_K1, node_TKP]))
    if tangents.b2 is not None:
        dy_TE = dy_TE + _wide(tangents.b2)
    return dy_TE.to(x_TD.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _of_tokens(leaves: Leaves, leaf_T: Tensor) -> Leaves:
    """The weights of every token's own leaf, [T, ...] each."""
    return Leaves(*(_wide(tensor[leaf_T]) for tensor in (leaves.w1, leaves.b1, leaves.w2, leaves.b2)))


def _gates(gate_T: Tensor | None, x_TD: Tensor) -> Tensor:
    return x_TD.new_ones(len(x_TD)) if gate_T is None else _wide(gate_T)


def _sum_by(index_n: Tensor, each: Tensor, like: Tensor) -> Tensor:
    """Sums of `each` [n, ...] over equal indices, shaped and typed like `like`; zero where no index points."""
    return torch.zeros(like.shape, dtype=each.dtype, device=each.device).index_add_(0, index_n, each).to(like.dtype)
