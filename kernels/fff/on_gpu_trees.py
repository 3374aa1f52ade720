# mypy: ignore-errors
"""Kernels of the path variant: one program per token, trees side by side, so that their weights arrive together.

A level needs the one before it, but the trees need nothing from each other: a block holds TREES rows of weights, one
per tree. On the way back the nodes are known, and a block holds that many pairs (tree, level) instead.
`import triton` is at the top: import this file late.
"""

from __future__ import annotations

import triton
import triton.language as tl

from curate.kernels.fff.on_gpu_math import activate, slope

# one token t; d over the width in, e over the width out, j over trees or over pairs (tree, level)


@triton.jit
def _rows_of(weights, at_j, inside_j, column, width):
    mask = inside_j[:, None] & (column < width)[None, :]
    return tl.load(weights + at_j[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def walk(
    y, pre, node, x, w1, b1, w2, b2, x_row, D, E, K, N, P,
    ACTIVATION: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, TREES: tl.constexpr,
):  # fmt: skip
    """Down every tree: at each level z = <x, w1[node]> + b1[node], y += act(z) w2[node], right if z > 0."""
    t = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    x_d = tl.load(x + t * x_row + d, mask=d < D, other=0.0).to(tl.float32)
    y_e = tl.load(b2 + e, mask=e < E, other=0.0).to(tl.float32)
    for first in range(0, K, TREES):
        tree_j = first + tl.arange(0, TREES)
        inside_j, node_j = tree_j < K, tl.zeros((TREES,), tl.int64)
        for level in range(P):
            at_j = tree_j * N + node_j
            z_j = tl.sum(_rows_of(w1, at_j, inside_j, d, D) * x_d[None, :], 1)
            z_j += tl.load(b1 + at_j, mask=inside_j, other=0.0).to(tl.float32)
            y_e += tl.sum(activate(z_j, ACTIVATION)[:, None] * _rows_of(w2, at_j, inside_j, e, E), 0)
            out_j = (t * K + tree_j) * P + level
            tl.store(pre + out_j, z_j.to(pre.dtype.element_ty), mask=inside_j)
            tl.store(node + out_j, node_j, mask=inside_j)
            node_j = 2 * node_j + 1 + (z_j > 0).to(tl.int64)
    tl.store(y + t * E + e, y_e.to(y.dtype.element_ty), mask=e < E)


@triton.jit
def walk_backward(
    dx, dpre, grad, pre, node, w1, w2, grad_row, D, E, K, N, P,
    ACTIVATION: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """dpre = <grad, w2[node]> slope(pre) of every pair (fp32), and dx = sum of dpre w1[node]."""
    t = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    grad_e = tl.load(grad + t * grad_row + e, mask=e < E, other=0.0).to(tl.float32)
    dx_d = tl.zeros((BD,), tl.float32)
    for first in range(0, K * P, PAIRS):
        pair_j = first + tl.arange(0, PAIRS)
        inside_j = pair_j < K * P
        at_j = (pair_j // P) * N + tl.load(node + t * K * P + pair_j, mask=inside_j, other=0)
        pre_j = tl.load(pre + t * K * P + pair_j, mask=inside_j, other=0.0).to(tl.float32)
        dpre_j = tl.sum(_rows_of(w2, at_j, inside_j, e, E) * grad_e[None, :], 1) * slope(pre_j, ACTIVATION)
        tl.store(dpre + t * K * P + pair_j, dpre_j, mask=inside_j)
        dx_d += tl.sum(dpre_j[:, None] * _rows_of(w1, at_j, inside_j, d, D), 0)
    tl.store(dx + t * D + d, dx_d.to(dx.dtype.element_ty), mask=d < D)


@triton.jit
def walk_jvp(
    dy, x, dx, pre, node, w1, dw1, db1, w2, dw2, db2, x_row, dx_row, D, E, K, N, P,
    ACTIVATION: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """dz = <dx, w1> + <x, dw1> + db1 and dy = sum of slope dz w2 + act dw2, plus db2; None is left out."""
    t = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    dy_e = tl.zeros((BE,), tl.float32)
    if db2 is not None:
        dy_e += tl.load(db2 + e, mask=e < E, other=0.0).to(tl.float32)
    for first in range(0, K * P, PAIRS):
        pair_j = first + tl.arange(0, PAIRS)
        inside_j = pair_j < K * P
        at_j = (pair_j // P) * N + tl.load(node + t * K * P + pair_j, mask=inside_j, other=0)
        pre_j = tl.load(pre + t * K * P + pair_j, mask=inside_j, other=0.0).to(tl.float32)
        dz_j = tl.zeros((PAIRS,), tl.float32)
        if dx is not None:
            dx_d = tl.load(dx + t * dx_row + d, mask=d < D, other=0.0).to(tl.float32)
            dz_j += tl.sum(_rows_of(w1, at_j, inside_j, d, D) * dx_d[None, :], 1)
        if dw1 is not None:
            x_d = tl.load(x + t * x_row + d, mask=d < D, other=0.0).to(tl.float32)
            dz_j += tl.sum(_rows_of(dw1, at_j, inside_j, d, D) * x_d[None, :], 1)
        if db1 is not None:
            dz_j += tl.load(db1 + at_j, mask=inside_j, other=0.0).to(tl.float32)
        dy_e += tl.sum((slope(pre_j, ACTIVATION) * dz_j)[:, None] * _rows_of(w2, at_j, inside_j, e, E), 0)
        if dw2 is not None:
            dy_e += tl.sum(activate(pre_j, ACTIVATION)[:, None] * _rows_of(dw2, at_j, inside_j, e, E), 0)
    tl.store(dy + t * E + e, dy_e.to(dy.dtype.element_ty), mask=e < E)


@triton.jit
def sum_tiles(
    part, part_bias, factor, rows, order, tile_node, tile_first, tile_end, rows_row, W, per_token,
    ACTIVATION: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A tile's share of a node's gradient: sum of factor[pair] rows[token of pair], fp32; and of `factor` alone."""
    tile = tl.program_id(0).to(tl.int64)
    if tl.load(tile_node + tile) < 0:
        return
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    first = tl.load(tile_first + tile)
    end = tl.minimum(first + SPAN, tl.load(tile_end + tile))
    sum_w, bias = tl.zeros((BW,), tl.float32), 0.0
    for start in range(first, end, STEP):
        place_j = start + tl.arange(0, STEP)
        inside_j = place_j < end
        pair_j = tl.load(order + place_j, mask=inside_j, other=0).to(tl.int64)
        factor_j = tl.load(factor + pair_j, mask=inside_j, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            factor_j = activate(factor_j, ACTIVATION)
        mask = inside_j[:, None] & (w < W)[None, :]
        rows_jw = tl.load(rows + (pair_j // per_token)[:, None] * rows_row + w[None, :], mask=mask, other=0.0)
        sum_w += tl.sum(factor_j[:, None] * rows_jw.to(tl.float32), 0)
        bias += tl.sum(factor_j, 0)
    tl.store(part + tile * W + w, sum_w, mask=w < W)
    if part_bias is not None and tl.program_id(1) == 0:
        tl.store(part_bias + tile, bias)


@triton.jit
def sum_nodes(out, part, starts, W, BW: tl.constexpr):
    """The shares of a node's tiles, which lie one after the other, added in order; a node without tokens gets zero."""
    node = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    first, end = tl.load(starts + node).to(tl.int64), tl.load(starts + node + 1).to(tl.int64)
    sum_w = tl.zeros((BW,), tl.float32)
    for tile in range(first, end):
        sum_w += tl.load(part + tile * W + w, mask=w < W, other=0.0)
    tl.store(out + node * W + w, sum_w.to(out.dtype.element_ty), mask=w < W)
