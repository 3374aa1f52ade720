# mypy: ignore-errors
"""Triton kernels of joint selection: similarities of a block of candidates with all newly chosen, reduced on the spot.

A program holds a block of candidates and one direction (images with texts, or texts with images) of one model, walks
over the chosen tile by tile, and adds to one or two numbers per candidate. `import triton` is at the top: import this
file late.
"""

from __future__ import annotations

import triton
import triton.language as tl

# B candidates, n a block of them, c newly chosen, k a tile of those, D width; rows [2, B, D], chosen [2, c, D]


@triton.jit
def _similarities(
    a_n, inside_n, b_k, inside_k, D, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, UP: tl.constexpr
):
    s_nk = tl.zeros((N, K), tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        a_nd = tl.load(a_n[:, None] + d[None, :], mask=inside_n[:, None] & (d < D)[None, :], other=0.0)
        b_dk = tl.load(b_k[None, :] + d[:, None], mask=inside_k[None, :] & (d < D)[:, None], other=0.0)
        if UP:  # the interpreter would multiply the bit patterns of bf16
            a_nd, b_dk = a_nd.to(tl.float32), b_dk.to(tl.float32)
        s_nk = tl.dot(a_nd, b_dk, s_nk, input_precision="ieee")
    return s_nk


@triton.jit
def _fold(e, f):
    return e + f + e * f


@triton.jit
def _log1p(f):
    """log(1 + f) to full relative precision for small f: the rounding of 1 + f cancels."""
    u = 1.0 + f
    return tl.where(u == 1.0, f, tl.log(u) * (f / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["left"])  # it changes with every update: one compilation will do
def add_sigmoid(
    sum_2B, rows_2BD, chosen_2cD, standing, left, B, c, D, scale, bias, weight,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FOLD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum += weight sum of softplus(scale s + bias) over the chosen.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)), and FOLD factors (1 + e) fold to one, as in `tiled.softplus_sums`: one
    logarithm in FOLD elements. A factor is at most 2, so 32 of them cannot overflow.
    """
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    direction, inside_n = tl.program_id(1).to(tl.int64), n < left
    row_n = tl.load(standing + n, mask=inside_n, other=0)
    a_n, sum_n = rows_2BD + (direction * B + row_n) * D, tl.zeros((BM,), tl.float64)
    for first in range(0, c, BN):
        k = first + tl.arange(0, BN)
        b_k = chosen_2cD + (direction * c + k) * D
        s_nk = _similarities(a_n, inside_n, b_k, k < c, D, BM, BN, BK, INTERPRETED)
        x_nk = tl.where((k < c)[None, :], s_nk * scale + bias, float("-inf"))
        linear_n = tl.sum(tl.maximum(x_nk, 0.0), 1)
        excess = tl.reduce(tl.reshape(tl.exp(-tl.abs(x_nk)), (BM, BN // FOLD, FOLD)), 2, _fold)
        sum_n += (linear_n + tl.sum(_log1p(excess), 1)).to(tl.float64)
    at_n = sum_2B + direction * B + row_n
    tl.store(at_n, tl.load(at_n, mask=inside_n, other=0.0) + weight * sum_n, mask=inside_n)


@triton.jit(do_not_specialize=["left"])
def add_softmax(
    top_2B, sum_2B, rows_2BD, chosen_2cD, standing, left, B, c, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Merge (max, sum of exp(x - max)) of x = scale s over the chosen into the running pair; (-inf, 0) is empty."""
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    direction, inside_n = tl.program_id(1).to(tl.int64), n < left
    row_n = tl.load(standing + n, mask=inside_n, other=0)
    a_n, at_n = rows_2BD + (direction * B + row_n) * D, direction * B + row_n
    top_n = tl.load(top_2B + at_n, mask=inside_n, other=float("-inf"))
    sum_n = tl.load(sum_2B + at_n, mask=inside_n, other=0.0)
    for first in range(0, c, BN):
        k = first + tl.arange(0, BN)
        b_k = chosen_2cD + (direction * c + k) * D
        s_nk = _similarities(a_n, inside_n, b_k, k < c, D, BM, BN, BK, INTERPRETED)
        x_nk = tl.where((k < c)[None, :], s_nk * scale, float("-inf"))
        higher_n = tl.maximum(top_n, tl.max(x_nk, 1))
        sum_n = sum_n * tl.exp(top_n - higher_n).to(tl.float64)
        sum_n += tl.sum(tl.exp(x_nk - higher_n[:, None]), 1).to(tl.float64)
        top_n = higher_n
    tl.store(top_2B + at_n, top_n, mask=inside_n)
    tl.store(sum_2B + at_n, sum_n, mask=inside_n)
