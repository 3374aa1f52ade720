# mypy: ignore-errors
"""Kernels of the leaf variant's backward pass, no atomic additions: every element is summed by one program, in order.

`import triton` is at the top: import this file late.
"""

from __future__ import annotations

import triton
import triton.language as tl

from curate.kernels.fff.on_gpu_math import activate, dot, leaf_rows, slope


@triton.jit(do_not_specialize=["T"])
def enter_backward(
    dpre, dgate, grad, pre, w2, b2, gate, tile_leaf, tile_first, tile_end, order, T, H, E, row,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dpre = gate slope(pre) (grad w2^T), and this block's part of dgate, [blocks, T].

    dgate = <grad, act w2 + b2> = <act, grad w2^T> + <grad, b2> comes from the same product: no second one, and the
    output need not be kept. The part of b2 is added by the first block.
    """
    leaf, token, inside = leaf_rows(tile_leaf, tile_first, tile_end, order, BM)
    if leaf < 0:
        return
    h = tl.program_id(1) * BN + tl.arange(0, BN)
    acc, of_bias = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(0, E, BK):
        e = start + tl.arange(0, BK)
        grad_me = tl.load(grad + token[:, None] * row + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
        at_eh = leaf * H * E + e[:, None] + h[None, :] * E
        w_eh = tl.load(w2 + at_eh, mask=(e < E)[:, None] & (h < H)[None, :], other=0.0)
        acc = dot(grad_me, w_eh, acc, INTERPRETED)
        b_e = tl.load(b2 + leaf * E + e, mask=e < E, other=0.0).to(tl.float32)
        of_bias += tl.sum(grad_me.to(tl.float32) * b_e[None, :], 1)
    at, valid = token[:, None] * H + h[None, :], inside[:, None] & (h < H)[None, :]
    pre_mh = tl.load(pre + at, mask=valid, other=0.0).to(tl.float32)
    part = tl.sum(acc * activate(pre_mh, ACTIVATION), 1) + tl.where(tl.program_id(1) == 0, of_bias, 0.0)
    tl.store(dgate + tl.program_id(1) * T + token, part, mask=inside)
    acc *= slope(pre_mh, ACTIVATION)
    if gate is not None:
        acc *= tl.load(gate + token, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(dpre + at, acc.to(dpre.dtype.element_ty), mask=valid)


@triton.jit
def weights_backward(
    dw, db, a, b, gate, starts, order, M, N, a_row, b_row,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dw[leaf] = a^T (gate b) and db[leaf] = sum of gate b over the leaf's tokens; ACTIVATION, if any, goes over a."""
    leaf = tl.program_id(0).to(tl.int64)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    first, end = tl.load(starts + leaf), tl.load(starts + leaf + 1)
    acc, total = tl.zeros((BM, BN), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(first, end, BK):
        row = start + tl.arange(0, BK)
        inside = row < end
        token = tl.load(order + row, mask=inside, other=0).to(tl.int64)
        a_tm = tl.load(a + token[:, None] * a_row + m[None, :], mask=inside[:, None] & (m < M)[None, :], other=0.0)
        if ACTIVATION is not None:
            a_tm = activate(a_tm.to(tl.float32), ACTIVATION).to(a_tm.dtype)
        b_tn = tl.load(b + token[:, None] * b_row + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0)
        if gate is not None:
            g = tl.load(gate + token, mask=inside, other=0.0).to(tl.float32)
            gated_tn = b_tn.to(tl.float32) * g[:, None]
            total += tl.sum(gated_tn, 0)
            b_tn = gated_tn.to(b_tn.dtype)
        else:
            total += tl.sum(b_tn.to(tl.float32), 0)
        acc = dot(tl.trans(a_tm), b_tn, acc, INTERPRETED)
    at_mn = leaf * M * N + m[:, None] * N + n[None, :]
    tl.store(dw + at_mn, acc.to(dw.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    if tl.program_id(1) == 0:
        tl.store(db + leaf * N + n, total.to(db.dtype.element_ty), mask=n < N)
