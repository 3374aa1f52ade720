"""The C++ selection kernel against the plain one in fp64, to the bit over threads and row orders, and its absence."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.kernels.selection import Loss, Side, native
from curate.kernels.selection.native import NativePairs, Products
from curate.kernels.selection.plain import PlainPairs
from curate.selection.joint import Pairs, draw_joint

# Relative to the largest score, on the embeddings as stored: fp32 products of up to 1,030 terms under an exponential,
# 3e-7 measured; bf16 products are of what the oracle sees too, where the storage is bf16.
TOLERANCE = 3e-6
LOSSES: tuple[Loss, ...] = get_args(Loss)

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernel: {native.why_not()}")


def made(size: int, width: int, dtype: torch.dtype, *, scales: tuple[float, ...] = (60.0, 25.0)) -> list[Side]:
    """One side per scale: learner, then reference; matched pairs with noise."""
    generator = torch.Generator().manual_seed(size * 1000 + width)
    sides = []
    for scale, weight in zip(scales, (1.0, -1.0), strict=False):
        image_BD, noise_BD = torch.randn(2, size, width, generator=generator)
        rows = (torch.nn.functional.normalize(each_BD, dim=1) for each_BD in (image_BD, image_BD + noise_BD))
        sides.append(Side(*(each_BD.to(dtype) for each_BD in rows), scale, -scale / 6, weight))
    return sides


def doubled(sides: list[Side]) -> list[Side]:
    return [replace(side, image_BD=side.image_BD.double(), text_BD=side.text_BD.double()) for side in sides]


def scored(kernel: NativePairs | PlainPairs, order_B: Tensor, sizes: list[int]) -> Tensor:
    start = 0
    for size in sizes:
        kernel.update(order_B[start : start + size])
        start += size
    return kernel.scores()


def error(sides: list[Side], loss: Loss, sizes: list[int], products: Products | None = None, threads: int = 1) -> float:
    """The largest difference from the oracle, relative to the largest score."""
    order_B = torch.randperm(len(sides[0].image_BD), generator=torch.Generator().manual_seed(3))
    exact_B = scored(PlainPairs(doubled(sides), loss, order_B), order_B, sizes)
    found_B = scored(NativePairs(sides, loss, order_B, threads=threads, products=products), order_B, sizes)
    return float((exact_B - found_B).abs().max() / exact_B.abs().max())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 80, 129])
@pytest.mark.parametrize("sizes", [[1], [5, 0, 6, 7], [49, 48, 1, 200]])
def test_scores_are_those_of_the_plain_kernel(loss: Loss, dtype: torch.dtype, width: int, sizes: list[int]) -> None:
    """For odd numbers of candidates, of chosen and of columns, after several updates, one of them empty."""
    assert error(made(333, width, dtype), loss, sizes) < TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 129, 1500])
def test_any_number_of_candidates_is_right(loss: Loss, size: int) -> None:
    """Down to one candidate, which is then chosen itself, and over several blocks and threads."""
    assert error(made(size, 33, torch.float32), loss, [(size + 1) // 2, size // 2], threads=2) < TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
def test_one_model_and_wide_rows_are_right(loss: Loss) -> None:
    """A single side; D = 1,030, where a block holds few panels; more chosen than are packed at a time."""
    assert error(made(150, 1030, torch.float32, scales=(40.0,)), loss, [70]) < TOLERANCE
    assert error(made(2 * native.CHOSEN_AT_A_TIME, 4, torch.float32), loss, [native.CHOSEN_AT_A_TIME + 7]) < TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("scale", "bias"), [(85.0, 25.0), (30.0, -30.0), (200.0, -20.0), (1.0, 0.0), (0.0, -12.0)])
def test_extreme_scales_keep_their_precision(loss: Loss, scale: float, bias: float) -> None:
    """x from -60 to 110, also where every softplus is 1e-13 or the maximum is far from the rest."""
    image_BD = torch.linspace(-1, 1, 301)[:, None]
    text_BD = torch.linspace(1, -1, 301)[torch.randperm(301, generator=torch.Generator().manual_seed(0))][:, None]
    side = Side(image_BD, text_BD.contiguous(), scale, bias, 1.0)
    assert error([side], loss, [100, 101]) < TOLERANCE


def test_tiny_losses_keep_their_relative_precision() -> None:
    """With x near -30 the sums are 1e-11, and still within 1e-5 of fp64, relative."""
    side = Side(*torch.nn.functional.normalize(torch.randn(2, 200, 16), dim=2), 3.0, -30.0, 1.0)
    order_B = torch.arange(200)
    kernels = [PlainPairs(doubled([side]), "sigmoid", order_B), NativePairs([side], "sigmoid", order_B)]
    given = [scored(kernel, order_B, [100])[100:] - kernel._own_B[100:] for kernel in kernels]
    pair_n = [kernel._pair_B[100:] if isinstance(kernel, PlainPairs) else kernel._state[100:] for kernel in kernels]
    assert given[0].abs().max() < 10
    assert ((pair_n[1] - pair_n[0]) / pair_n[0]).abs().max() < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_products_of_bf16_are_right_where_they_are_asked_for(loss: Loss, stored: torch.dtype) -> None:
    """On numbers that bf16 holds the result is that of fp32; others are rounded to bf16 before they are multiplied."""
    sides = made(301, 81, stored)
    assert error(sides, loss, [50, 51], "bf16") < (TOLERANCE if stored == torch.bfloat16 else 2e-2)
    rounded = [
        replace(side, image_BD=side.image_BD.bfloat16().float(), text_BD=side.text_BD.bfloat16().float())
        for side in sides
    ]
    assert error(rounded, loss, [50, 51], "bf16") < TOLERANCE


def test_the_check_of_bf16_products_passes_here_and_guards_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile compared at load agrees exactly; where it would not, bf16 is widened instead."""
    library = native._built()
    assert library.pairs_bf16_error() == 0.0
    sides = made(5, 3, torch.bfloat16)

    class Library:
        def __init__(self, error: float) -> None:
            self.error = error

        def pairs_multiplies_bf16(self) -> int:
            return 1

        def pairs_bf16_error(self) -> float:
            return self.error

    for wrong, products in ((0.0, "bf16"), (1e-3, "fp32"), (float("nan"), "fp32")):
        native.multiplies_bf16.cache_clear()
        monkeypatch.setattr(native, "_library", functools.partial(Library, wrong))
        assert native.products_of(sides) == products
        assert native.products_of(made(5, 3, torch.float32)) == "fp32"
    native.multiplies_bf16.cache_clear()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_threads_and_row_order_change_no_bit(loss: Loss, products: Products) -> None:
    """1, 2 and 3 threads and a shuffled input give the same bits, over several blocks and updates."""
    sides, sizes = made(1700, 24, torch.float32), [301, 200, 1]
    order_B = torch.randperm(1700, generator=torch.Generator().manual_seed(1))
    scores = [
        scored(NativePairs(sides, loss, order_B, threads=threads, products=products), order_B, sizes)
        for threads in (1, 2, 3)
    ]
    shuffled = torch.randperm(1700, generator=torch.Generator().manual_seed(2))  # row i becomes row shuffled^-1[i]
    moved = [replace(side, image_BD=side.image_BD[shuffled], text_BD=side.text_BD[shuffled]) for side in sides]
    order_of_moved_B = torch.argsort(shuffled)[order_B]
    other_B = scored(NativePairs(moved, loss, order_of_moved_B, products=products), order_of_moved_B, sizes)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores[0][shuffled], other_B)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_candidates_bits_do_not_depend_on_its_neighbours(loss: Loss) -> None:
    """The same candidate among 40 and among 300 others, given the same chosen, has the same score."""
    sides = made(340, 19, torch.float32)
    few = [replace(side, image_BD=side.image_BD[:70], text_BD=side.text_BD[:70]) for side in sides]
    chosen = torch.arange(30)
    many_B = scored(NativePairs(sides, loss, torch.arange(340).flip(0)), chosen, [30])
    few_B = scored(NativePairs(few, loss, torch.arange(70)), chosen, [30])
    assert torch.equal(many_B[:70], few_B)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_two_models_may_differ_in_width(loss: Loss, products: Products) -> None:
    """A learner of 7 columns beside a reference of 130, and the other way round."""
    narrow, wide = made(200, 7, torch.bfloat16)[0], made(200, 130, torch.bfloat16)[1]
    assert error([narrow, wide], loss, [50, 51], products) < TOLERANCE
    assert error([wide, narrow], loss, [50, 51], products) < TOLERANCE


def test_strided_and_mixed_storage_is_read_in_place() -> None:
    """Rows cut from a wider tensor, columns that are not dense, images in fp16 beside texts in fp32."""
    (side,) = made(90, 20, torch.float32, scales=(30.0,))
    wide_BD = torch.randn(90, 50)
    wide_BD[:, 7:27] = side.image_BD
    for image_BD in (wide_BD[:, 7:27], side.image_BD.T.contiguous().T, side.image_BD.half()):
        assert error([replace(side, image_BD=image_BD)], "sigmoid", [10, 11]) < TOLERANCE


def test_not_a_number_stays_with_its_candidate() -> None:
    """A NaN in the text of one candidate makes that score NaN and no other."""
    sides = made(60, 8, torch.float32)
    sides[0].text_BD[40, 3] = torch.nan
    for loss in LOSSES:
        kernel = NativePairs(sides, loss, torch.arange(60))
        assert scored(kernel, torch.arange(20), [20]).isnan().nonzero().flatten().tolist() == [40]
        assert kernel._state.reshape(60, -1).isnan().any(1).nonzero().flatten().tolist() == [40]


def test_what_the_kernel_does_not_take_is_refused() -> None:
    """fp64 embeddings and rows out of range are errors in Python, not a crash."""
    assert not native.supports(made(4, 3, torch.float64))
    with pytest.raises(ValueError, match=r"no native kernel for embeddings in torch\.float64"):
        NativePairs(made(4, 3, torch.float64), "sigmoid", torch.arange(4))
    kernel, rows = NativePairs(made(4, 3, torch.float32), "sigmoid", torch.arange(4)), torch.tensor([9])
    with pytest.raises(IndexError):
        kernel.update(rows)
    with pytest.raises(ValueError, match="out of range"):
        kernel._packed(torch.zeros(4, 3), rows)
    with pytest.raises(ValueError, match="out of range"):
        kernel.update(torch.tensor([-1]))  # torch counts from the end, the library does not


def test_one_direction_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake, candidate texts left out, is far beyond the tolerance; without it the same check passes."""
    sides = made(100, 9, torch.float32)
    whole = NativePairs._ways
    for loss in LOSSES:
        assert error(sides, loss, [20, 20]) < TOLERANCE
        with monkeypatch.context() as patch:
            patch.setattr(NativePairs, "_ways", lambda self: [way for at, way in enumerate(whole(self)) if at % 2 == 0])
            assert error(sides, loss, [20, 20]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(torch.float32, "NativePairs"), (torch.float16, "NativePairs"), (torch.float64, "TiledPairs")],
)
def test_a_draw_names_the_kernel_it_came_from(dtype: torch.dtype, kernel: str) -> None:
    """The native one for every storage that it takes, else the one in torch."""
    pairs = Pairs(torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype), 10.0, -5.0)
    ids = np.arange(64, dtype=np.uint8).reshape(4, 16)
    assert draw_joint(pairs, None, ids, size=2, criterion="easy-reference", loss="sigmoid").kernel == kernel


def test_without_a_compiler_torch_draws() -> None:
    """CURATE_NO_COMPILER=1: the kernel says why it is absent, and a draw comes from the torch kernel."""
    code = (
        "import torch, numpy as np\n"
        "from curate.kernels.selection import native\n"
        "from curate.selection.joint import Pairs, draw_joint\n"
        "eye = torch.eye(4)\n"
        "ids = np.arange(64, dtype=np.uint8).reshape(4, 16)\n"
        "draw = draw_joint(Pairs(eye, eye[[0, 1, 3, 2]], 10.0, -5.0), None, ids,\n"
        "                  size=2, chunks=2, criterion='easy-reference', loss='sigmoid')\n"
        "print(native.why_not(), draw.kernel, sorted(draw.index_b.tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CURATE_NO_COMPILER": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[0] == "CURATE_NO_COMPILER is set TiledPairs [0, 1]"
