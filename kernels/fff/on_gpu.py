"""Fast feedforward on a GPU, in Triton: tokens sorted by leaf there, gather and scatter fused into the products.

Forward of the leaf variant: one kernel gathers rows of x, multiplies by w1 and stores `pre`; a second applies the
activation as it loads, multiplies by w2, gates, and scatters. Bytes moved: x, pre twice, y and every weight once, so a
leaf of H neurons does about H operations per byte in half precision; an H200 wants some 200. Backward: one kernel for
dpre and dgate together, one for dx, one for each weight with its bias. Nothing waits for the device, so a call can be
captured in a CUDA graph; no atomic additions, so a call gives the same bits every time.

Takes bf16, fp16 and fp32 (fp32 as IEEE has it, not TF32) where `supports` says so. A leaf outside 0..L-1 gives an
undefined row of the output, and nothing outside of the tensors is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curate.kernels import gpu
from curate.kernels.fff import Activation, LeafTangents, Leaves, check_leaves
from curate.kernels.fff.on_gpu_layout import (
    FEW,
    Block,
    Sorted,
    Tiles,
    block_for,
    cdiv,
    one_by_one,
    power_of_two,
    sort_by,
    tiles_of,
)
from curate.kernels.fff.on_gpu_path import path_backward, path_forward, path_jvp

__all__ = ["leaf_backward", "leaf_forward", "leaf_jvp", "path_backward", "path_forward", "path_jvp", "supports"]

# T tokens, D width in, E width out, L leaves, H neurons of a leaf
Term = tuple[Tensor, Tensor]


def supports(x: Tensor) -> bool:
    """Whether the kernels here can take this tensor: bf16, fp16 or fp32 on a GPU, or under Triton's interpreter."""
    return gpu.usable(x)


def leaf_forward(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `LeafKernel`."""
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    grouped = _Grouped(leaf_T, len(leaves.w1))
    with torch.cuda.device_of(x_TD):
        pre_TH = _product(grouped, leaves.w1, [(x_TD, leaves.w1)], leaves.b1, None, activation)
        return _leave(grouped, pre_TH, gate_T, leaves, activation), pre_TH


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
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    grouped, pre_TH, gate_T = _Grouped(leaf_T, len(leaves.w1)), pre_TH.contiguous(), _flat(gate_T)
    with torch.cuda.device_of(x_TD):
        dpre_TH, dgate_T = _enter_backward(grouped, grad_TE, pre_TH, gate_T, leaves, activation)
        dx_TD = _product(grouped, leaves.w1.mT, [(dpre_TH, leaves.w1.mT)], None, None, activation)
        dw1, db1 = _weights_backward(grouped.sorted, x_TD, dpre_TH, None, leaves.w1, None)
        dw2, db2 = _weights_backward(grouped.sorted, pre_TH, grad_TE, gate_T, leaves.w2, activation)
        return dx_TD, dgate_T, Leaves(dw1, db1, dw2, db2)


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
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    grouped, pre_TH = _Grouped(leaf_T, len(leaves.w1)), pre_TH.contiguous()
    pairs = ((tangents.x, leaves.w1), (x_TD, tangents.w1))
    terms = [(a, w) for a, w in pairs if a is not None and w is not None]
    with torch.cuda.device_of(x_TD):
        moves = terms or tangents.b1 is not None
        da_TH = _product(grouped, leaves.w1, terms, tangents.b1, pre_TH, activation) if moves else None
        return _leave_jvp(grouped, pre_TH, da_TH, gate_T, tangents, leaves, activation)


class _Grouped:
    """The tokens of one call: sorted when first asked, and not at all when they are few."""

    def __init__(self, leaf_T: Tensor, L: int) -> None:
        self.leaf_T, self.L = leaf_T, L
        self._sorted: Sorted | None = None
        self._tiles: dict[int, Tiles] = {}

    @property
    def sorted(self) -> Sorted:
        if self._sorted is None:
            self._sorted = sort_by(self.leaf_T, self.L)
        return self._sorted

    def tiles(self, dtype: torch.dtype, columns: int, depth: int, most: int = 64) -> tuple[Tiles, Block]:
        T = len(self.leaf_T)
        if T <= FEW:
            return one_by_one(self.leaf_T, self.L), block_for(dtype, 1, 1, columns, depth)
        block = block_for(dtype, T, self.L, columns, depth, most)
        if block.rows not in self._tiles:
            self._tiles[block.rows] = tiles_of(self.sorted, block.rows)
        return self._tiles[block.rows], block


def _product(
    grouped: _Grouped,
    like: Tensor,
    terms: Sequence[Term],
    bias: Tensor | None,
    pre_TH: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Sum of at most two terms a_t w[leaf_t], plus bias, times the slope at `pre`; weights are as `like` [L, K, N]."""
    from curate.kernels.fff.on_gpu_products import product

    terms = [(_rows(a), w) for a, w in terms]
    if any(w.stride() != terms[0][1].stride() for _, w in terms):
        terms = [(a, w.contiguous()) for a, w in terms]
    (a1, w1), (a2, w2) = (*terms, (None, None), (None, None))[:2]
    (_, K, N), T = like.shape, len(grouped.leaf_T)
    tiles, block = grouped.tiles(like.dtype, N, K, 128 if len(terms) == 1 and pre_TH is None else 64)
    out = torch.empty(T, N, dtype=like.dtype, device=like.device)
    if out.numel():
        product[(len(tiles.leaf), cdiv(N, block.columns))](
            out, a1, w1, a2, w2, _flat(bias), pre_TH, tiles.leaf, tiles.first, tiles.end, tiles.order_T, N, K,
            0 if a1 is None else a1.stride(0), 0 if a2 is None else a2.stride(0),
            *((0, 0, 0) if w1 is None else w1.stride()),
            ACTIVATION=activation, INTERPRETED=gpu.interpreting(), **block.launch,
        )  # fmt: skip
    return out


def _leave(grouped: _Grouped, pre_TH: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation) -> Tensor:
    from curate.kernels.fff.on_gpu_products import leave

    (T, H), E = pre_TH.shape, leaves.w2.shape[-1]
    tiles, block = grouped.tiles(pre_TH.dtype, E, H)
    out = torch.empty(T, E, dtype=pre_TH.dtype, device=pre_TH.device)
    if out.numel():
        leave[(len(tiles.leaf), cdiv(E, block.columns))](
            out, pre_TH, _flat(leaves.w2), _flat(leaves.b2), _flat(gate_T), tiles.leaf, tiles.first, tiles.end,
            tiles.order_T, E, H, ACTIVATION=activation, INTERPRETED=gpu.interpreting(), **block.launch,
        )  # fmt: skip
    return out


def _leave_jvp(
    grouped: _Grouped,
    pre_TH: Tensor,
    da_TH: Tensor | None,
    gate_T: Tensor | None,
    tangents: LeafTangents,
    leaves: Leaves,
    activation: Activation,
) -> Tensor:
    from curate.kernels.fff.on_gpu_products import leave_jvp

    (T, H), E = pre_TH.shape, leaves.w2.shape[-1]
    tiles, block = grouped.tiles(pre_TH.dtype, E, H)
    out = torch.empty(T, E, dtype=pre_TH.dtype, device=pre_TH.device)
    launch = block.launch | {"num_stages": 2}  # four operands: more stages would not fit smaller GPUs
    if out.numel():
        leave_jvp[(len(tiles.leaf), cdiv(E, block.columns))](
            out, pre_TH, da_TH, _flat(gate_T), _flat(tangents.gate), _flat(leaves.w2), _flat(tangents.w2),
            _flat(leaves.b2), _flat(tangents.b2), tiles.leaf, tiles.first, tiles.end, tiles.order_T, E, H,
            ACTIVATION=activation, INTERPRETED=gpu.interpreting(), **launch,
        )  # fmt: skip
    return out


def _enter_backward(
    grouped: _Grouped,
    grad_TE: Tensor,
    pre_TH: Tensor,
    gate_T: Tensor | None,
    leaves: Leaves,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """(dpre [T, H], dgate [T])."""
    from curate.kernels.fff.on_gpu_gradients import enter_backward

    (T, H), grad_TE = pre_TH.shape, _rows(grad_TE)
    tiles, block = grouped.tiles(pre_TH.dtype, H, grad_TE.shape[1])
    blocks = cdiv(H, block.columns)
    dpre_TH, parts = torch.empty_like(pre_TH), torch.empty(blocks, T, dtype=torch.float32, device=pre_TH.device)
    if dpre_TH.numel():
        enter_backward[(len(tiles.leaf), blocks)](
            dpre_TH, parts, grad_TE, pre_TH, _flat(leaves.w2), _flat(leaves.b2), gate_T, tiles.leaf, tiles.first,
            tiles.end, tiles.order_T, T, H, grad_TE.shape[1], grad_TE.stride(0),
            ACTIVATION=activation, INTERPRETED=gpu.interpreting(), **block.launch,
        )  # fmt: skip
    return dpre_TH, parts.sum(0).to(pre_TH.dtype)


def _weights_backward(
    by_leaf: Sorted,
    a: Tensor,
    b: Tensor,
    gate_T: Tensor | None,
    w: Tensor,
    activation: Activation | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of a weight [L, M, N] and of its bias [L, N]: one program per leaf and block, looping over tokens."""
    from curate.kernels.fff.on_gpu_gradients import weights_backward

    (L, M, N), a, b = w.shape, _rows(a), _rows(b)
    half = a.dtype != torch.float32
    side = 128 if half else 64
    block = Block(
        min(side, power_of_two(M)), min(side, power_of_two(N)), 64 if half else 32, 8 if half else 4, 3 if half else 2
    )
    dw, db = torch.empty(w.shape, dtype=w.dtype, device=w.device), torch.empty(L, N, dtype=w.dtype, device=w.device)
    if dw.numel():
        weights_backward[(L, cdiv(M, block.rows), cdiv(N, block.columns))](
            dw, db, a, b, gate_T, by_leaf.starts, by_leaf.order_T, M, N, a.stride(0), b.stride(0),
            ACTIVATION=activation, INTERPRETED=gpu.interpreting(), **block.launch,
        )  # fmt: skip
    return dw, db


def _rows(a: Tensor) -> Tensor:
    """Rows that lie contiguous in memory; their distance is free."""
    return a if a.stride(1) == 1 else a.contiguous()


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
