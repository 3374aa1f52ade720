"""The scores of joint selection, streamed: a tile of 1,024 candidates x 128 chosen per thread, nothing larger.

A tile holds both directions (candidate images with chosen texts, candidate texts with chosen images). The pair loss is
applied and reduced inside the tile, the models are subtracted, and only then does the sum enter an fp64 accumulator
per candidate. Rows already chosen are left out, which at a filtering ratio of 0.8 saves a tenth of the matrix
products.

The same bits for any number of threads and any order of the caller's rows: tiles are cut from `order_B` in fixed
sizes, one thread with one intra-op thread computes a tile, and a block of candidates adds its tiles in the order of
the chosen.

Cost per element of a tile, D = 512, one core of an AVX2 EPYC: 15-16 ns matrix product, 3 ns sigmoid, 2 ns softmax.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from curate.kernels.selection import Loss, Side, check_sides, compute_dtype, own_scores

# B candidates, n a block of them, c newly chosen, k a block of those, D width, S sides, 2 directions
CANDIDATES_PER_TILE = 1024
CHOSEN_PER_TILE = 128
_OWN_BLOCK = 128  # rows of fp64 that stay in a core's second-level cache while a pair is compared with itself
_FOLDS = 3  # products of 2**3 factors, each in (1, 2]: they cannot overflow in any dtype

T = TypeVar("T")
R = TypeVar("R")
Chosen = tuple[tuple[Tensor, ...], ...]  # texts, images; each in blocks [k, D]

# One pool at a time: torch keeps one process-wide default of intra-op threads, which we lower and put back.
_ONE_POOL = threading.Lock()


def softplus_sums(x_kn: Tensor, linear_kn: Tensor) -> Tensor:
    """Sum of softplus over the rows of a tile, fp64 [n]; overwrites the tile and `linear_kn`, of the same shape.

    softplus(x) = max(x, 0) + log1p(e) with e = exp(-|x|), and a sum of log1p is the log1p of a product: two factors (1
    + e) and (1 + f) fold to e + f + e f, again the excess over 1. Never adding the 1 keeps the relative precision
    where e is tiny: against fp64 the sums are within 4e-7 relative for x anywhere in -60..110 in fp32, while a log of
    a product of (1 + e) is off by 1e-4 near x = -10 and by all of it near x = -30. One log1p in eight makes it 1.8 ns
    per element; torch's softplus takes 3.3 ns, and the matrix product before it 15.
    """
    linear_n = torch.clamp_min(x_kn, 0, out=linear_kn).sum(0)
    excess_kn = x_kn.abs_().neg_().exp_()
    for _ in range(_FOLDS):
        half = len(excess_kn) // 2
        if half * 2 != len(excess_kn):
            break
        excess_kn = excess_kn[half:].addcmul_(excess_kn[:half], excess_kn[half:]).add_(excess_kn[:half])
    return excess_kn.log1p_().sum(0).double() + linear_n.double()


def log_sum_exp_pair(x_kn: Tensor) -> tuple[Tensor, Tensor]:
    """(max, sum of exp(x - max)) over the rows of a tile, fp64 [n] each; overwrites the tile."""
    max_n = x_kn.amax(0)
    return max_n.double(), x_kn.sub_(max_n).exp_().sum(0).double()


def merge_log_sum_exp(running_2n: Tensor, max_n: Tensor, sum_n: Tensor) -> None:
    """Merge a tile's (max, sum) into a running one, in place; the empty set is (-inf, 0): exp(-inf) = 0."""
    top_n = torch.maximum(running_2n[0], max_n)
    running_2n[1] = running_2n[1] * torch.exp(running_2n[0] - top_n) + sum_n * torch.exp(max_n - top_n)
    running_2n[0] = top_n


class Scratch:
    """Buffers of one worker, by name, kept from tile to tile: a fresh megabyte costs page faults."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; what `name` held before is gone."""
        count = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or len(flat) < count:
            flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
        return flat[:count].view(shape)


class Block:
    """Candidates that still stand, side by side in memory: a gather per chunk would cost a sixth of the whole draw.

    Rows that are drawn are overwritten by rows from the end, so a block stays contiguous at the price of moving as many
    rows as were drawn; where a row lies depends on what was drawn before and on nothing else.
    """

    def __init__(self, sides: Sequence[Side], rows_n: Tensor, dtype: torch.dtype) -> None:
        self._rows_n = rows_n.clone()
        self._sides = [tuple(tensor_BD[rows_n].to(dtype) for tensor_BD in (s.image_BD, s.text_BD)) for s in sides]
        self._count = len(rows_n)

    @property
    def rows(self) -> Tensor:
        """The caller's numbers of the rows, int64 [n]."""
        return self._rows_n[: self._count]

    def pair(self, side: int) -> tuple[Tensor, Tensor]:
        """Image and text embeddings of the rows, [n, D] each."""
        image_nD, text_nD = self._sides[side]
        return image_nD[: self._count], text_nD[: self._count]

    def drop(self, gone_B: Tensor) -> None:
        """Leave out the rows that are marked."""
        stands_n = ~gone_B[self.rows]
        count = int(stands_n.sum())
        holes = (~stands_n[:count]).nonzero().flatten()
        movers = stands_n[count:].nonzero().flatten() + count
        for tensor in (self._rows_n, *(tensor_nD for pair in self._sides for tensor_nD in pair)):
            tensor[holes] = tensor[movers]
        self._count = count


class TiledPairs:
    """`PairKernel` in O(B D) memory; see the package for the contract.

    The arithmetic of a tile is fp64 if any embedding is, else fp32 (half-precision rows are widened block by block).
    """

    def __init__(self, sides: Sequence[Side], loss: Loss, order_B: Tensor, *, threads: int = 1) -> None:
        check_sides(sides, loss, order_B)
        self._sides, self._loss, self._threads = tuple(sides), loss, threads
        self._dtype = compute_dtype(sides)
        blocks = order_B.split(CANDIDATES_PER_TILE)
        self._blocks = each_on_one_core(lambda rows_n: Block(self._sides, rows_n, self._dtype), blocks, threads)
        self._own_B = torch.zeros(len(order_B), dtype=torch.float64)
        each_on_one_core(self._fill_own, order_B.split(_OWN_BLOCK), threads)
        self._score_B: Tensor = self._own_B.clone()
        shape = (len(order_B),) if loss == "sigmoid" else (len(order_B), len(sides), 2, 2)
        self._sum = torch.zeros(shape, dtype=torch.float64)  # softmax: candidate, side, direction, (max, sum)
        if loss == "softmax":
            self._sum[..., 0] = -torch.inf
        self._idle: list[Scratch] = []

    def update(self, chosen_c: Tensor) -> None:
        """Add the pairs of `chosen_c` with every row that still stands; 4 c D multiply-adds per row for two models."""
        if not len(chosen_c):
            return
        gone_B = torch.zeros(len(self._own_B), dtype=torch.bool)
        gone_B[chosen_c] = True
        chosen = [self._scaled_chosen(side, chosen_c) for side in self._sides]
        add = self._add_sigmoid if self._loss == "sigmoid" else self._add_softmax

        def work(block: Block) -> None:
            block.drop(gone_B)
            scratch = self._idle.pop() if self._idle else Scratch()
            add(block, chosen, scratch)
            self._idle.append(scratch)

        each_on_one_core(work, self._blocks, self._threads)

    def scores(self) -> Tensor:
        """fp64 [B]; see `PairKernel`."""
        score_B: Tensor = self._score_B.clone()
        return score_B

    def _fill_own(self, rows_n: Tensor) -> None:
        self._own_B[rows_n] = own_scores(self._sides, self._loss, rows_n)

    def _scaled_chosen(self, side: Side, chosen_c: Tensor) -> Chosen:
        """Texts and images of the newly chosen, times the scale: cheaper there than on every tile."""
        return tuple(
            (tensor_BD[chosen_c].to(self._dtype) * side.scale).split(CHOSEN_PER_TILE)
            for tensor_BD in (side.text_BD, side.image_BD)
        )

    def _tiles(self, block: Block, side: int, chosen: Chosen, scratch: Scratch) -> Iterator[Tensor]:
        """Scaled similarities [2, k, n], tile by tile: chosen texts with candidate images, then the other way round."""
        image_nD, text_nD = block.pair(side)
        for text_kD, image_kD in zip(*chosen, strict=True):
            x_2kn = scratch.take("tile", (2, len(text_kD), len(image_nD)), self._dtype)
            torch.mm(text_kD, image_nD.T, out=x_2kn[0])
            torch.mm(image_kD, text_nD.T, out=x_2kn[1])
            yield x_2kn

    def _add_sigmoid(self, block: Block, chosen: Sequence[Chosen], scratch: Scratch) -> None:
        rows_n = block.rows
        sum_n = self._sum[rows_n]
        streams = [self._tiles(block, side, of_side, scratch) for side, of_side in enumerate(chosen)]
        for _ in chosen[0][0]:
            gap_n = torch.zeros_like(sum_n)
            for side, stream in zip(self._sides, streams, strict=True):
                x_kn = next(stream).flatten(0, 1).add_(side.bias)
                gap_n += side.weight * softplus_sums(x_kn, scratch.take("linear", tuple(x_kn.shape), self._dtype))
            sum_n += gap_n
        self._sum[rows_n] = sum_n
        self._score_B[rows_n] = self._own_B[rows_n] + sum_n

    def _add_softmax(self, block: Block, chosen: Sequence[Chosen], scratch: Scratch) -> None:
        rows_n = block.rows
        sum_nS22, given_n = self._sum[rows_n], torch.zeros(len(rows_n), dtype=torch.float64)
        for index, (side, of_side) in enumerate(zip(self._sides, chosen, strict=True)):
            running_22n = sum_nS22[:, index].movedim(0, -1)
            for x_2kn in self._tiles(block, index, of_side, scratch):
                for running_2n, x_kn in zip(running_22n, x_2kn, strict=True):
                    merge_log_sum_exp(running_2n, *log_sum_exp_pair(x_kn))
            given_n += side.weight * (running_22n[:, 0] + running_22n[:, 1].log()).mean(0)
        self._sum[rows_n] = sum_nS22
        self._score_B[rows_n] = self._own_B[rows_n] + given_n


def each_on_one_core(work: Callable[[T], R], blocks: Sequence[T], threads: int) -> list[R]:
    """The results of `work` on every block, one core each; torch's intra-op threads stay as the caller had them.

    The lowering happens inside the workers, since the setting of a thread that exists is its own; what is shared is the
    default for new threads, which is put back to the caller's number.
    """
    with _ONE_POOL:
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(work, blocks))
        finally:
            torch.set_num_threads(before)
