"""Fast feedforward with nothing but torch: tokens sorted by leaf, two matrix products per leaf that has any.

The kernel where there is no compiler, and the one that reaches a processor's bf16 units (AMX) through torch's own
products. Costs a copy of the tokens in leaf order and about 10 us of calls per leaf in use; the counts of tokens per
leaf are read back from the device, so on a GPU it waits once per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curate.kernels.fff import Activation, LeafTangents, Leaves, check_leaves
from curate.kernels.fff.activations import activate, slope

# T tokens, n of them in one leaf, D width in, E width out, L leaves, H neurons of a leaf


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Tokens in the order of their leaves (stable), and where each leaf's tokens begin and end in it."""

    order_T: Tensor
    segments: tuple[tuple[int, slice], ...]

    @staticmethod
    def of(leaf_T: Tensor, leaves: int) -> _Sorted:
        if len(leaf_T) and not 0 <= int(leaf_T.min()) <= int(leaf_T.max()) < leaves:
            raise ValueError(f"leaf indices {int(leaf_T.min())}..{int(leaf_T.max())} for {leaves} leaves")
        ends = torch.bincount(leaf_T, minlength=leaves).cumsum(0).tolist()
        pairs = ((leaf, slice(start, end)) for leaf, (start, end) in enumerate(zip([0, *ends], ends, strict=False)))
        return _Sorted(torch.argsort(leaf_T, stable=True), tuple((leaf, s) for leaf, s in pairs if s.stop > s.start))

    def products(self, a_Tk: Tensor, weight_Lkm: Tensor, out_Tm: Tensor) -> Tensor:
        """Rows of every leaf times that leaf's matrix, into `out_Tm`; all in sorted order."""
        for leaf, rows in self.segments:
            torch.mm(a_Tk[rows], weight_Lkm[leaf], out=out_Tm[rows])
        return out_Tm

    def back(self, sorted_Tm: Tensor) -> Tensor:
        """From sorted order to the caller's."""
        return torch.empty_like(sorted_Tm).index_copy_(0, self.order_T, sorted_Tm)


def leaf_forward(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `LeafKernel`."""
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    by_leaf = _Sorted.of(leaf_T, len(leaves.w1))
    x, leaf_n = x_TD[by_leaf.order_T], leaf_T[by_leaf.order_T]
    pre_TH = by_leaf.products(x, leaves.w1, x.new_empty(len(x), leaves.w1.shape[2])) + leaves.b1[leaf_n]
    y_TE = by_leaf.products(activate(pre_TH, activation), leaves.w2, x.new_empty(len(x), leaves.w2.shape[2]))
    y_TE += leaves.b2[leaf_n]
    if gate_T is not None:
        y_TE *= gate_T[by_leaf.order_T, None]
    return by_leaf.back(y_TE), by_leaf.back(pre_TH)


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
    by_leaf = _Sorted.of(leaf_T, len(leaves.w1))
    grad, x, pre = (tensor[by_leaf.order_T] for tensor in (grad_TE, x_TD, pre_TH))
    act_TH = activate(pre, activation)
    raw_TH = by_leaf.products(grad, leaves.w2.mT, torch.empty_like(pre))
    dgate_T = (act_TH * raw_TH).sum(1, dtype=_wide(x)) + (grad * leaves.b2[leaf_T[by_leaf.order_T]]).sum(1)
    if gate_T is not None:
        gate_T1 = gate_T[by_leaf.order_T, None]
        grad, raw_TH = grad * gate_T1, raw_TH * gate_T1
    dpre_TH = raw_TH * slope(pre, activation)
    dx_TD = by_leaf.products(dpre_TH, leaves.w1.mT, torch.empty_like(x))
    summed = Leaves(*(torch.zeros_like(w) for w in (leaves.w1, leaves.b1, leaves.w2, leaves.b2)))
    for leaf, rows in by_leaf.segments:
        torch.mm(x[rows].T, dpre_TH[rows], out=summed.w1[leaf])
        torch.mm(act_TH[rows].T, grad[rows], out=summed.w2[leaf])
        summed.b1[leaf] = dpre_TH[rows].sum(0)
        summed.b2[leaf] = grad[rows].sum(0)
    return by_leaf.back(dx_TD), by_leaf.back(dgate_T.to(x.dtype)), summed


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
    by_leaf = _Sorted.of(leaf_T, len(leaves.w1))
    order_T, leaf_n = by_leaf.order_T, leaf_T[by_leaf.order_T]
    x, pre = x_TD[order_T], pre_TH[order_T]
    act_TH = activate(pre, activation)

    def summed(terms: Iterator[tuple[Tensor, Tensor]], bias_Lm: Tensor | None, like: Tensor) -> Tensor:
        total = torch.zeros_like(like) if bias_Lm is None else bias_Lm[leaf_n]
        for a_Tk, weight_Lkm in terms:
            total = total + by_leaf.products(a_Tk, weight_Lkm, torch.empty_like(like))
        return total

    def first() -> Iterator[tuple[Tensor, Tensor]]:
        if tangents.x is not None:
            yield tangents.x[order_T], leaves.w1
        if tangents.w1 is not None:
            yield x, tangents.w1

    def second(dact_TH: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield dact_TH, leaves.w2
        if tangents.w2 is not None:
            yield act_TH, tangents.w2

    y_like = x.new_empty(len(x), leaves.w2.shape[2])
    dact_TH = slope(pre, activation) * summed(first(), tangents.b1, pre)
    dy_TE = summed(second(dact_TH), tangents.b2, y_like)
    if gate_T is not None:
        dy_TE = dy_TE * gate_T[order_T, None]
    if tangents.gate is not None:
        y_TE = by_leaf.products(act_TH, leaves.w2, y_like) + leaves.b2[leaf_n]
        dy_TE = dy_TE + tangents.gate[order_T, None] * y_TE
    return by_leaf.back(dy_TE)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
