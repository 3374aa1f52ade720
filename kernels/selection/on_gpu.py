"""The scores of joint selection on a GPU, in Triton: a similarity is reduced in the registers it was summed in.

Memory: the embeddings as stored, the newly chosen rows of one model, and up to eight numbers per candidate; nothing of
size B x c. Products are of the stored dtype with fp32 sums (fp32 embeddings: IEEE, not TF32), the pair loss and the sum
over a tile of chosen are fp32, and a tile's sum enters an fp64 accumulator. The models are subtracted there: beside an
fp64 accumulator that costs no digit, and it lets one model's block stay in the second-level cache.

Rows already chosen are left out of the products. An update waits for nothing on the device but the copy of `chosen_c`
where that lies on the host; reading `scores()` on the host waits. No atomic additions: the same bits every time, for
any order of the caller's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curate.kernels import gpu
from curate.kernels.selection import Loss, Side, check_sides, own_scores

# B candidates, c newly chosen, D width, 2 directions: images with texts, texts with images
_OWN_BLOCK = 8192  # rows of fp64 compared with themselves at a time
_FEW_CANDIDATES = 132 * 64  # with fewer than this, blocks of 128 would leave multiprocessors of an H200 idle
_FOLD = 32


@dataclass(frozen=True, slots=True)
class _Model:
    """One side on the device, in the order of the tiles, and its accumulators."""

    rows_2BD: Tensor  # images, texts
    side: Side
    top_2B: Tensor  # softmax: the running maximum, fp32
    sum_2B: Tensor  # softmax: the running sum, fp64


def supports(sides: Sequence[Side], device: torch.device | str | None = None) -> bool:
    """Whether this kernel takes these embeddings: bf16, fp16 or fp32, on a GPU or under Triton's interpreter."""
    tensors = [tensor for side in sides for tensor in (side.image_BD, side.text_BD)]
    if any(tensor.dtype not in gpu.DTYPES for tensor in tensors) or not tensors:
        return False
    where = torch.device(tensors[0].device if device is None else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return False
    return gpu.usable(torch.empty(0, dtype=tensors[0].dtype, device=where))


class GpuPairs:
    """`PairKernel` in O(B D) memory of a GPU; see the package for the contract.

    `device` is where the arithmetic happens, by default where the first side's images lie. Scores come back where
    `order_B` lies. ValueError where `supports` says no.
    """

    def __init__(
        self, sides: Sequence[Side], loss: Loss, order_B: Tensor, *, device: torch.device | str | None = None
    ) -> None:
        check_sides(sides, loss, order_B)
        self._device = torch.device(sides[0].image_BD.device if device is None else device)
        if not supports(sides, self._device):
            raise ValueError(f"on_gpu takes bf16, fp16 and fp32 on a GPU with Triton, not {_what(sides, self._device)}")
        order_B, self._home = order_B.to(self._device), order_B.device
        self._loss, self._left = loss, len(order_B)
        self._place_B = torch.empty_like(order_B)  # where a row of the caller's lies in the tiles
        self._place_B[order_B] = torch.arange(len(order_B), device=self._device)
        self._models = [_placed(side, order_B, loss) for side in sides]
        self._gone_B = torch.zeros(len(order_B), dtype=torch.uint8, device=self._device)
        self._own_B = _own([model.side for model in self._models], loss, len(order_B), self._device)
        self._score_B: Tensor = self._own_B.clone()
        self._sum_2B = torch.zeros(2, len(order_B), dtype=torch.float64, device=self._device)

    def update(self, chosen_c: Tensor) -> None:
        """Add the pairs of `chosen_c` with every row that still stands; 4 c D multiply-adds per row for two models."""
        if not len(chosen_c):
            return
        place_c = self._place_B[chosen_c.to(self._device)]
        self._gone_B.index_fill_(0, place_c, 1)
        self._left -= len(chosen_c)
        if self._left <= 0:
            return
        # the rows that stand, in order: how many they are is known here, so nothing waits for the device
        standing = torch.sort(self._gone_B, stable=True).indices[: self._left]
        with torch.cuda.device_of(self._gone_B):
            for model in self._models:
                self._add(model, model.rows_2BD.flip(0)[:, place_c].contiguous(), standing)
        self._score_B = torch.where(self._gone_B.bool(), self._score_B, self._own_B + self._given())

    def scores(self) -> Tensor:
        """fp64 [B]; see `PairKernel`."""
        return self._score_B[self._place_B].to(self._home)

    def _add(self, model: _Model, chosen_2cD: Tensor, standing: Tensor) -> None:
        from curate.kernels.selection.on_gpu_tiles import add_sigmoid, add_softmax

        (_, B, D), c = model.rows_2BD.shape, chosen_2cD.shape[1]
        shape = _block(model.rows_2BD.dtype, self._left)
        grid = (-(-self._left // shape["BM"]), 2)
        tensors, sizes = (model.rows_2BD, chosen_2cD, standing), (self._left, B, c, D)
        scale, interpreted = float(model.side.scale), gpu.interpreting()
        if self._loss == "sigmoid":
            add_sigmoid[grid](
                self._sum_2B, *tensors, *sizes, scale, float(model.side.bias), float(model.side.weight),
                FOLD=min(_FOLD, shape["BN"] // 2), INTERPRETED=interpreted, **shape,
            )  # fmt: skip
        else:
            add_softmax[grid](model.top_2B, model.sum_2B, *tensors, *sizes, scale, INTERPRETED=interpreted, **shape)

    def _given(self) -> Tensor:
        """What the chosen add to a candidate's own score, fp64 [B]."""
        if self._loss == "sigmoid":
            return self._sum_2B.sum(0)
        given_B = torch.zeros_like(self._own_B)
        for model in self._models:
            given_B += model.side.weight * (model.top_2B.double() + model.sum_2B.log()).mean(0)
        return given_B


def _placed(side: Side, order_B: Tensor, loss: Loss) -> _Model:
    image_BD, text_BD = (tensor.detach().to(order_B.device)[order_B] for tensor in (side.image_BD, side.text_BD))
    dtype = torch.promote_types(image_BD.dtype, text_BD.dtype)
    rows_2BD = torch.stack([image_BD.to(dtype), text_BD.to(dtype)])
    size = (2, len(order_B) if loss == "softmax" else 0)
    top_2B = torch.full(size, -torch.inf, dtype=torch.float32, device=order_B.device)
    placed = Side(rows_2BD[0], rows_2BD[1], side.scale, side.bias, side.weight)
    return _Model(rows_2BD, placed, top_2B, torch.zeros(size, dtype=torch.float64, device=order_B.device))


def _own(sides: Sequence[Side], loss: Loss, B: int, device: torch.device) -> Tensor:
    """`own_scores` block by block on the device."""
    with device:
        blocks = torch.arange(B).split(_OWN_BLOCK)
        return torch.cat([own_scores(sides, loss, rows_n) for rows_n in blocks])


def _block(dtype: torch.dtype, candidates: int) -> dict[str, int]:
    """The shape of a tile, and how it is launched.

    Half precision: 128 x 128 in 96 KiB and 128 registers, so that two programs share a multiprocessor and the loss of
    one hides behind the products of the other; fp32, without a matrix unit: what registers hold.
    """
    if gpu.interpreting():
        return {"BM": 16, "BN": 16, "BK": 32}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    few = candidates < _FEW_CANDIDATES
    half = {"BN": 128, "BK": 64, "num_stages": 3, "maxnreg": 128}
    return half | ({"BM": 64, "num_warps": 4} if few else {"BM": 128, "num_warps": 8})


def _what(sides: Sequence[Side], device: torch.device) -> str:
    dtypes = sorted({str(tensor.dtype) for side in sides for tensor in (side.image_BD, side.text_BD)})
    return f"{', '.join(dtypes)} on {device}"
