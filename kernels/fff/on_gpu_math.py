# mypy: ignore-errors
"""The activations of `activations.py` and a matrix product, as Triton functions over fp32 values in registers.

Only exp and erf are used, which the interpreter knows as well. `import triton` is at the top: import this file late.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The constants of activations.py: sqrt(1/2), 1/sqrt(2 pi), 2 sqrt(2/pi), its cube term, quick_gelu's factor. They stand
# on the right of products: in the interpreter a constexpr on the left swallows the tensor.
_HALF_ROOT = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)
_TANH = tl.constexpr(1.5957691216057308)
_CUBE = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp may overflow to inf, which gives 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 values; (1 + tanh u) / 2 is sigmoid(2 u). NaN stays NaN."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _HALF_ROOT))
    if ACTIVATION == "gelu_tanh":
        return x * sigmoid((x + x * x * x * _CUBE) * _TANH)
    if ACTIVATION == "quick_gelu":
        return x * sigmoid(x * _QUICK)
    return tl.where(x < 0, 0.0, x)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate`; 0 at 0 for relu."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * _HALF_ROOT)) + x * tl.exp(-0.5 * x * x) * _DENSITY
    if ACTIVATION == "gelu_tanh":
        share = sigmoid((x + x * x * x * _CUBE) * _TANH)
        return share + x * share * (1.0 - share) * _TANH * (1.0 + x * x * 3.0 * _CUBE)
    if ACTIVATION == "quick_gelu":
        share = sigmoid(x * _QUICK)
        return share * (1.0 + x * _QUICK * (1.0 - share))
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b in fp32; the interpreter would multiply the bit patterns of bf16, so it gets fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def leaf_rows(tile_leaf, tile_first, tile_end, order, ROWS: tl.constexpr):
    """(leaf, token of each row, whether the row is one) of this program's tile; leaf -1 marks a surplus tile."""
    tile = tl.program_id(0)
    leaf = tl.load(tile_leaf + tile)
    row = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    inside = row < tl.load(tile_end + tile)
    token = tl.load(order + row, mask=inside, other=0)
    return leaf.to(tl.int64), token.to(tl.int64), inside


@triton.jit(do_not_specialize=["tiles"])  # it changes with the number of tokens: one compilation will do
def map_tiles(
    starts, leaf_out, first_out, end_out, L, tiles, ROWS: tl.constexpr, LEAVES: tl.constexpr, MANY: tl.constexpr
):
    """Cut the segment of every leaf into tiles of ROWS: per tile its leaf, first row and the end of the segment."""
    leaf = tl.arange(0, LEAVES)
    first = tl.load(starts + leaf, mask=leaf < L, other=0)
    count = (tl.load(starts + leaf + 1, mask=leaf < L, other=0) - first + ROWS - 1) // ROWS
    until = tl.cumsum(count, 0)
    tile = tl.program_id(0) * MANY + tl.arange(0, MANY)
    of_tile = tl.sum(((until[None, :] <= tile[:, None]) & (leaf[None, :] < L)).to(tl.int32), 1)
    before = tl.sum(tl.where(leaf[None, :] < of_tile[:, None], count[None, :], 0), 1)
    found, mine = of_tile < L, tile < tiles
    row = tl.load(starts + of_tile, mask=found, other=0) + (tile - before) * ROWS
    tl.store(leaf_out + tile, tl.where(found, of_tile, -1), mask=mine)
    tl.store(first_out + tile, row, mask=mine)
    tl.store(end_out + tile, tl.load(starts + of_tile + 1, mask=found, other=0), mask=mine)
