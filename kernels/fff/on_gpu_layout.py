"""Which rows a program works on: tokens sorted by leaf and cut into tiles, all on the device and without a wait.

The number of tiles is known beforehand only within L: `tiles` plans cdiv(T, rows) + L programs, of which the surplus
return at once. Up to `FEW` tokens each token is a tile of its own and nothing is sorted. Block shapes come from a rule,
not from timings, so that a call gives the same bits in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# T tokens, L leaves (or nodes: whatever tokens are sorted by)
FEW = 64
_WANTED_PROGRAMS = 112  # an H200 has 132 multiprocessors: smaller tiles rather than idle ones
_INT16 = 1 << 15
_COMPARED = 8192  # elements of the comparison by which a program of `map_tiles` finds its leaves


@dataclass(frozen=True, slots=True)
class Sorted:
    """Tokens in the order of their leaves: `order_T`, and where each leaf's segment starts, int32 [L + 1]."""

    order_T: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """One entry per program: leaf (-1: surplus), first row and end of its leaf's segment, as places in `order_T`."""

    order_T: Tensor
    leaf: Tensor
    first: Tensor
    end: Tensor
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """The shape of a product's block: rows x columns, `depth` of the sum at a time, warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """The arguments of a launch."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def sort_by(index_T: Tensor, L: int) -> Sorted:
    """Stable sort by an index in 0..L-1; 16-bit keys where they fit take a quarter of the passes of 64-bit ones."""
    keys_T = index_T.to(torch.int16 if L < _INT16 else torch.int32)
    sorted_T, order_T = torch.sort(keys_T, stable=True)
    bounds = torch.arange(L + 1, dtype=keys_T.dtype, device=keys_T.device)
    return Sorted(order_T, torch.searchsorted(sorted_T, bounds, out_int32=True))


def tiles_of(given: Sorted, rows: int) -> Tiles:
    """Tiles of at most `rows` tokens of one leaf; at most min(T, cdiv(T, rows) + L) of them."""
    from curate.kernels.fff.on_gpu_math import map_tiles

    T, L = len(given.order_T), len(given.starts) - 1
    count = min(T, cdiv(T, rows) + L)
    leaf, first, end = torch.empty(3, count, dtype=torch.int32, device=given.starts.device)
    leaves = power_of_two(L, 2)
    many = max(1, _COMPARED // leaves)
    map_tiles[(cdiv(count, many),)](
        given.starts, leaf, first, end, L, count, ROWS=rows, LEAVES=leaves, MANY=many, num_warps=4
    )
    return Tiles(given.order_T, leaf, first, end, rows)


def one_by_one(leaf_T: Tensor, L: int) -> Tiles:
    """Every token its own tile, unsorted: for few tokens, where sorting would take longer than the products."""
    place_T = torch.arange(len(leaf_T), dtype=torch.int32, device=leaf_T.device)
    leaf_T = torch.where(leaf_T < L, leaf_T, -1).to(torch.int32)  # a leaf that is none must not be read
    return Tiles(place_T, leaf_T, place_T, place_T + 1, 16)


def block_for(dtype: torch.dtype, T: int, L: int, columns: int, depth: int, most: int = 128) -> Block:
    """The block of a grouped product [T, depth] x [L, depth, columns].

    Rows: the largest of `most`, ..., 32, 16 that a leaf's share of the tokens half fills and that gives nearly every
    multiprocessor a program; `most` is 64 for kernels whose activations would not fit into the registers beside 128.
    Half precision takes 64 of the sum at a time in 3-4 stages, some 96 KiB of shared memory; fp32 has no matrix unit
    that adds as IEEE does, and takes the blocks that registers hold.
    """
    half = dtype != torch.float32
    wide = min(128 if half else 64, power_of_two(columns))
    rows = min(most, 128 if half else 64)
    while rows > 16 and (rows * L > 2 * T or (cdiv(T, rows) + L // 2) * cdiv(columns, wide) < _WANTED_PROGRAMS):
        rows //= 2
    if rows == 16:
        wide = min(wide, 64)
    deep = min(64 if half else 32, power_of_two(depth))
    return Block(rows, wide, deep, 8 if rows * wide >= 64 * 128 else 4, (4 if rows < 128 else 3) if half else 2)


def power_of_two(n: int, least: int = 16) -> int:
    """The next power of two, and at least 16, which is the smallest side of a matrix unit."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(n: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-n // by)
