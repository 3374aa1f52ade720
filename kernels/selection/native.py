"""The scores of joint selection in C++: the pair loss is applied to a tile while it is in the first-level cache.

Memory beyond the embeddings as stored: packed panels of at most 2,064 chosen rows, half a megabyte per thread, three
numbers per candidate (softmax: ten). Nothing is copied or widened for good. At D = 512 on one core of an AVX2 Zen 4 an
update takes 0.86-0.94 of the time of its matrix products by torch.mm; `tiled.py` takes 1.3.

Sums over the width D are fp32, as in `tiled.py`, in another order, so the two agree to rounding and not to the bit. The
bits of a candidate depend on its own embeddings and on the chosen in their order, not on the number of threads or on
other rows. Where all embeddings are stored in bf16 and the processor multiplies bf16 (AVX512_BF16), it does so: such
products are exact in fp32, only the order of the sum changes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from curate.kernels import compiled
from curate.kernels.selection import Loss, Side, check_sides, own_scores
from curate.kernels.selection.tiled import each_on_one_core

# B candidates, n a block of them, c newly chosen, D width, S sides, 2 directions
T = TypeVar("T")
R = TypeVar("R")
Products = Literal["fp32", "bf16"]
SOURCE = "selection/pairs.cpp"
CHOSEN_AT_A_TIME = 43 * 48  # whole groups of pairs.cpp; at D = 512 four megabytes for a model and a direction
_MOST_CANDIDATES, _FEWEST_CANDIDATES = 1536, 192  # of a call: whole blocks of pairs.cpp for most D
_OWN_BLOCK = 128
_SMALL = 2**25  # multiply-adds, a millisecond: starting threads takes longer
_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ERRORS = {1: MemoryError("no memory for a block of candidates"), 2: ValueError("a row is out of range")}


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("stored", ctypes.c_int32),
    )


class _Direction(ctypes.Structure):
    _fields_ = (
        ("candidates", _Rows),
        ("chosen", ctypes.c_void_p),
        ("weight", ctypes.c_double),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_float),
    )


def supports(sides: Sequence[Side]) -> bool:
    """Whether this kernel is built and takes these embeddings: fp32, fp16 or bf16, on the CPU."""
    tensors = [tensor for side in sides for tensor in (side.image_BD, side.text_BD)]
    return all(each.dtype in _STORED and each.device.type == "cpu" for each in tensors) and _library() is not None


def why_not() -> str | None:
    """Why there is no native kernel on this machine; None where there is."""
    return compiled.why_not(SOURCE)


def products_of(sides: Sequence[Side]) -> Products:
    """What is multiplied: bf16 where everything is stored so and the processor does it right, else fp32."""
    stored = {tensor.dtype for side in sides for tensor in (side.image_BD, side.text_BD)}
    return "bf16" if stored == {torch.bfloat16} and multiplies_bf16() else "fp32"


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16, and gives the exact result where one exists; checked on one tile."""
    library = _library()
    return library is not None and bool(library.pairs_multiplies_bf16()) and library.pairs_bf16_error() == 0.0


class NativePairs:
    """`PairKernel` in C++; see the package for the contract.

    `products` overrides `products_of`: "bf16" rounds embeddings of any storage, and is slow where the processor has no
    such instruction. ValueError for embeddings that are not fp32, fp16 or bf16 on the CPU, or if there is no library.
    """

    def __init__(
        self, sides: Sequence[Side], loss: Loss, order_B: Tensor, *, threads: int = 1, products: Products | None = None
    ) -> None:
        check_sides(sides, loss, order_B)
        if not supports(sides):
            stored = ", ".join(
                sorted({str(tensor.dtype) for side in sides for tensor in (side.image_BD, side.text_BD)})
            )
            raise ValueError(f"no native kernel for embeddings in {stored}: {why_not() or 'give fp32, fp16 or bf16'}")
        self._sides, self._loss, self._threads = tuple(map(_with_dense_rows, sides)), loss, threads
        self._bf16 = (products or products_of(sides)) == "bf16"
        self._standing_n = order_B.to(torch.int64).clone()
        self._own_B = torch.zeros(len(order_B), dtype=torch.float64)
        each_on_one_core(self._fill_own, order_B.split(_OWN_BLOCK), threads)
        self._score_B: Tensor = self._own_B.clone()
        shape = (len(order_B),) if loss == "sigmoid" else (len(order_B), len(sides), 2, 2)
        self._state = torch.zeros(shape, dtype=torch.float64)  # softmax: candidate, side, direction, (max, sum)
        if loss == "softmax":
            self._state[..., 0] = -torch.inf

    def update(self, chosen_c: Tensor) -> None:
        """Add the pairs of `chosen_c` with every row that still stands; 4 c D multiply-adds per row for two models."""
        chosen_c = chosen_c.to(torch.int64).contiguous()
        gone_B = torch.zeros(len(self._own_B), dtype=torch.bool)
        gone_B[chosen_c] = True
        self._standing_n = self._standing_n[~gone_B[self._standing_n]]
        if len(chosen_c) and len(self._standing_n):
            for some_c in chosen_c.split(CHOSEN_AT_A_TIME):
                self._add(some_c)

    def scores(self) -> Tensor:
        """fp64 [B]; see `PairKernel`."""
        score_B: Tensor = self._score_B.clone()
        return score_B

    def _fill_own(self, rows_n: Tensor) -> None:
        self._own_B[rows_n] = own_scores(self._sides, self._loss, rows_n)

    def _add(self, chosen_c: Tensor) -> None:
        ways = list(self._ways())
        width = sum(candidates_BD.shape[1] for _, candidates_BD, _ in ways)
        small = len(self._standing_n) * len(chosen_c) * width < _SMALL
        spread = _here if small else each_on_one_core
        packed = spread(lambda way: self._packed(way[2], chosen_c), ways, self._threads)
        directions = (_Direction * len(packed))(
            *(
                _Direction(_rows(candidates_BD), panels.data_ptr(), side.weight, side.scale, side.bias)
                for (side, candidates_BD, _), panels in zip(ways, packed, strict=True)
            )
        )

        def work(rows_n: Tensor) -> None:
            status = _built().pairs_add(
                directions, len(packed), self._loss == "softmax", self._bf16, len(chosen_c),
                rows_n.data_ptr(), len(rows_n),
                self._state.data_ptr(), self._own_B.data_ptr(), self._score_B.data_ptr(),
            )  # fmt: skip
            _check(status)

        size = len(self._standing_n) // (4 * self._threads) // _FEWEST_CANDIDATES * _FEWEST_CANDIDATES
        size = min(max(size, _FEWEST_CANDIDATES), _MOST_CANDIDATES)
        spread(work, self._standing_n.split(size), self._threads)

    def _ways(self) -> Iterator[tuple[Side, Tensor, Tensor]]:
        """(model, candidates, chosen): images among texts, then texts among images."""
        for side in self._sides:
            yield side, side.image_BD, side.text_BD
            yield side, side.text_BD, side.image_BD

    def _packed(self, embeddings_BD: Tensor, chosen_c: Tensor) -> Tensor:
        library, rows = _built(), _rows(embeddings_BD)
        panels = torch.empty(library.pairs_chosen_bytes(len(chosen_c), rows.width, self._bf16), dtype=torch.uint8)
        _check(
            library.pairs_pack_chosen(
                ctypes.byref(rows), self._bf16, chosen_c.data_ptr(), len(chosen_c), panels.data_ptr()
            )
        )
        return panels


def _here(work: Callable[[T], R], blocks: Sequence[T], threads: int) -> list[R]:  # noqa: ARG001
    """`each_on_one_core` without threads: the library's calls use none of torch's."""
    return [work(block) for block in blocks]


def _rows(tensor_BD: Tensor) -> _Rows:
    return _Rows(tensor_BD.data_ptr(), *tensor_BD.shape, tensor_BD.stride(0), _STORED[tensor_BD.dtype])


def _with_dense_rows(side: Side) -> Side:
    image_BD, text_BD = (
        tensor_BD.detach() if tensor_BD.stride(1) == 1 else tensor_BD.detach().contiguous()
        for tensor_BD in (side.image_BD, side.text_BD)
    )
    return Side(image_BD, text_BD, side.scale, side.bias, side.weight)


def _check(status: int) -> None:
    if status:
        raise _ERRORS[status]


def _built() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library(SOURCE)
    if library is None:
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.pairs_bf16_error.restype = ctypes.c_float
    library.pairs_chosen_bytes.argtypes = (size, size, number)
    library.pairs_chosen_bytes.restype = size
    library.pairs_pack_chosen.argtypes = (pointer, number, pointer, size, pointer)
    library.pairs_add.argtypes = (
        pointer, number, number, number, size, pointer, size, pointer, pointer, pointer,
    )  # fmt: skip
    return library
