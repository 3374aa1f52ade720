# mypy: ignore-errors
"""Grouped products of the leaf variant: a tile of tokens of one leaf, gathered on load and scattered on store.

Sums in fp32. Rows beyond a leaf's segment are loaded as zeros and not stored, so a NaN stays in its own token.
`import triton` is at the top: import this file late.
"""

from __future__ import annotations

import triton
import triton.language as tl

from curate.kernels.fff.on_gpu_math import activate, dot, leaf_rows, slope

# a [T, K] rows of tokens, w [L, K, N] by its strides (wl, wk, wn), bias [L, N], pre and out contiguous [T, ...]


@triton.jit
def _add_product(acc, a, a_row, w, wk, wn, inside, n, N, K, BK: tl.constexpr, INTERPRETED: tl.constexpr):
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a_mk = tl.load(a + a_row[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        w_kn = tl.load(w + k[:, None] * wk + n[None, :] * wn, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(a_mk, w_kn, acc, INTERPRETED)
    return acc


@triton.jit
def product(
    out, a1, w1, a2, w2, bias, pre, tile_leaf, tile_first, tile_end, order, N, K, row1, row2, wl, wk, wn,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = a1 w1 + a2 w2 + bias, times the slope at `pre`; whatever is None is left out."""
    leaf, token, inside = leaf_rows(tile_leaf, tile_first, tile_end, order, BM)
    if leaf < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if a1 is not None:
        acc = _add_product(acc, a1, token * row1, w1 + leaf * wl, wk, wn, inside, n, N, K, BK, INTERPRETED)
    if a2 is not None:
        acc = _add_product(acc, a2, token * row2, w2 + leaf * wl, wk, wn, inside, n, N, K, BK, INTERPRETED)
    if bias is not None:
        acc += tl.load(bias + leaf * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at, valid = token[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :]
    if pre is not None:
        acc *= slope(tl.load(pre + at, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid)


@triton.jit
def leave(
    out, pre, w2, b2, gate, tile_leaf, tile_first, tile_end, order, N, K,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = gate (act(pre) w2 + b2); the activation is taken anew for every block of columns."""
    leaf, token, inside = leaf_rows(tile_leaf, tile_first, tile_end, order, BM)
    if leaf < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        pre_mk = tl.load(pre + token[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        at_kn = leaf * K * N + k[:, None] * N + n[None, :]
        w_kn = tl.load(w2 + at_kn, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(activate(pre_mk.to(tl.float32), ACTIVATION).to(pre_mk.dtype), w_kn, acc, INTERPRETED)
    acc += tl.load(b2 + leaf * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        acc *= tl.load(gate + token, mask=inside, other=0.0).to(tl.float32)[:, None]
    valid = inside[:, None] & (n < N)[None, :]
    tl.store(out + token[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=valid)


@triton.jit
def leave_jvp(
    out, pre, da, gate, dgate, w2, dw2, b2, db2, tile_leaf, tile_first, tile_end, order, N, K,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = (gate da + dgate act) w2 + gate act dw2 + gate db2 + dgate b2, `da` being the tangent of act(pre)."""
    leaf, token, inside = leaf_rows(tile_leaf, tile_first, tile_end, order, BM)
    if leaf < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.full((BM,), 1.0, tl.float32)
    if gate is not None:
        g = tl.load(gate + token, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at_mk, valid_mk = token[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
        at_kn, valid_kn = leaf * K * N + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :]
        pre_mk = tl.load(pre + at_mk, mask=valid_mk, other=0.0)
        act_mk = activate(pre_mk.to(tl.float32), ACTIVATION)
        left_mk = tl.zeros((BM, BK), tl.float32)
        if da is not None:
            left_mk = g[:, None] * tl.load(da + at_mk, mask=valid_mk, other=0.0).to(tl.float32)
        if dgate is not None:
            left_mk += tl.load(dgate + token, mask=inside, other=0.0).to(tl.float32)[:, None] * act_mk
        w_kn = tl.load(w2 + at_kn, mask=valid_kn, other=0.0)
        acc = dot(left_mk.to(w_kn.dtype), w_kn, acc, INTERPRETED)
        if dw2 is not None:
            dw_kn = tl.load(dw2 + at_kn, mask=valid_kn, other=0.0)
            acc = dot((g[:, None] * act_mk).to(dw_kn.dtype), dw_kn, acc, INTERPRETED)
    if db2 is not None:
        acc += g[:, None] * tl.load(db2 + leaf * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if dgate is not None:
        dg = tl.load(dgate + token, mask=inside, other=0.0).to(tl.float32)
        acc += dg[:, None] * tl.load(b2 + leaf * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    valid = inside[:, None] & (n < N)[None, :]
    tl.store(out + token[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=valid)
