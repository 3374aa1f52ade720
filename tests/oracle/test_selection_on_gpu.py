"""The Triton kernel of joint selection against the oracle: on a GPU, else under Triton's interpreter.

Without a GPU the cases are skipped here and one test runs this file again in a process that has TRITON_INTERPRET set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from curate.kernels import gpu
from curate.kernels.selection import Loss, PairKernel, Side, on_gpu
from curate.kernels.selection.on_gpu import GpuPairs
from curate.kernels.selection.plain import PlainPairs
from tests.oracle.interpreted import passes_interpreted

# B candidates, c newly chosen, D width
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = gpu.usable(torch.zeros(1, device=DEVICE))
runs_here = pytest.mark.skipif(not HERE, reason="no GPU: run in a process of its own, under Triton's interpreter")
both_losses = pytest.mark.parametrize("loss", get_args(Loss))

# Scores here are below 500, sums of some hundred fp32 losses of up to 20. Products are exact in fp32 for either half
# precision, so the dtype of the embeddings does not matter: the oracle gets the same rounded numbers, in fp64.
TOLERANCE = 5e-5


@pytest.mark.skipif(HERE, reason="the cases run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_cases_hold_under_the_interpreter() -> None:
    """Every case of this file passes, and none is skipped, where Triton interprets."""
    passes_interpreted(__file__)


def sides_of(B: int, D: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[Side]:
    """A reference that counts negatively and a learner, of unit rows."""
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return normalize(torch.randn(B, D, generator=generator), dim=1).to(dtype)

    return [Side(rows(), rows(), 20.0, -4.0, -1.0), Side(rows(), rows(), 15.0, -3.0, 1.0)]


def order_of(B: int, seed: int = 1) -> Tensor:
    return torch.randperm(B, generator=torch.Generator().manual_seed(seed))


def difference(one: PairKernel, other: PairKernel, chunks: Sequence[Tensor]) -> float:
    """Largest difference of two kernels' scores, before and after every chunk; infinite where one is not finite."""
    worst = (one.scores() - other.scores()).abs().max()
    for chosen_c in chunks:
        one.update(chosen_c)
        other.update(chosen_c)
        worst = torch.maximum(worst, (one.scores() - other.scores()).abs().max())
    return float(worst.nan_to_num(torch.inf))


@runs_here
@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_after_several_updates(dtype: torch.dtype, loss: Loss) -> None:
    """Chunks of one, of less than a tile and of more, a width that no block divides, in every stored dtype."""
    sides, order_B = sides_of(33, 37, dtype), order_of(33)
    chunks = order_of(33, seed=2)[:28].split([1, 7, 20])
    kernel = GpuPairs(sides, loss, order_B, device=DEVICE)
    assert difference(kernel, PlainPairs(sides, loss, order_B, dtype=torch.float64), chunks) < TOLERANCE


@runs_here
@both_losses
def test_chosen_rows_keep_their_score(loss: Loss) -> None:
    """A row's score after it was chosen is the one before, to the bit; an empty chunk changes nothing."""
    kernel = GpuPairs(sides_of(20, 16), loss, order_of(20), device=DEVICE)
    first, second = torch.tensor([3, 11]), torch.tensor([0, 19, 7])
    kernel.update(first)
    before_B = kernel.scores()
    kernel.update(second)
    after_B = kernel.scores()
    both = torch.cat([first, second])
    assert torch.equal(before_B[both], after_B[both])
    assert (before_B != after_B).sum() == 15
    kernel.update(torch.tensor([], dtype=torch.int64))
    assert torch.equal(kernel.scores(), after_B)


@runs_here
@both_losses
def test_all_rows_may_be_chosen(loss: Loss) -> None:
    """When nothing stands any more an update still takes its rows."""
    kernel = GpuPairs(sides_of(5, 16), loss, order_of(5), device=DEVICE)
    kernel.update(torch.tensor([1, 2]))
    before_B = kernel.scores()
    kernel.update(torch.tensor([0, 3, 4]))
    assert torch.equal(kernel.scores(), before_B)


@runs_here
@both_losses
def test_the_order_of_rows_does_not_matter(loss: Loss) -> None:
    """The same candidates in other rows, tiled in the same intrinsic order, get the same bits."""
    sides, order_B, shuffle_B = sides_of(40, 24), order_of(40), order_of(40, seed=5)
    place_B = shuffle_B.argsort()  # where a row of the first call lies in the second
    moved = [replace(side, image_BD=side.image_BD[shuffle_B], text_BD=side.text_BD[shuffle_B]) for side in sides]
    one = GpuPairs(sides, loss, order_B, device=DEVICE)
    other = GpuPairs(moved, loss, place_B[order_B], device=DEVICE)
    chosen_c = torch.tensor([4, 30, 17])
    one.update(chosen_c)
    other.update(place_B[chosen_c])
    assert torch.equal(one.scores()[shuffle_B], other.scores())


@runs_here
def test_losses_of_any_size() -> None:
    """Sums of softplus keep their relative precision from x = -60 to 110, and at x = 0 everywhere do not overflow.

    A GPU's exponential rounds x log2(e) to fp32 first, which at -60 is a relative 3e-6.
    """
    for scale, bias in ((0.0, -60.0), (0.0, -12.0), (0.0, 0.0), (0.0, 110.0), (60.0, 10.0)):
        side = replace(sides_of(12, 16)[1], scale=scale, bias=bias)
        kernel, oracle = (K([side], "sigmoid", torch.arange(12)) for K in (on_device, PlainPairs))
        own_B = oracle.scores()
        for each in (kernel, oracle):
            each.update(torch.arange(9))
        torch.testing.assert_close(kernel.scores() - own_B, oracle.scores() - own_B, rtol=1e-5, atol=1e-20)


def on_device(sides: Sequence[Side], loss: Loss, order_B: Tensor) -> GpuPairs:
    return GpuPairs(sides, loss, order_B, device=DEVICE)


@runs_here
@both_losses
def test_nan_stays_in_its_candidate(loss: Loss) -> None:
    """A candidate with a NaN that is not chosen has a NaN for a score, and no other has."""
    sides = sides_of(20, 16)
    sides[0].text_BD[6, 2] = torch.nan
    kernel = GpuPairs(sides, loss, order_of(20), device=DEVICE)
    kernel.update(torch.tensor([0, 1, 2]))
    assert kernel.scores().isnan().nonzero().flatten().tolist() == [6]


@runs_here
@both_losses
def test_models_may_differ_in_width_and_dtype(loss: Loss) -> None:
    """Each model has its own width and stored dtype, and images may be stored otherwise than texts."""
    learner = sides_of(20, 48, torch.float16)[1]
    sides = [sides_of(20, 10)[0], replace(learner, text_BD=learner.text_BD.float())]
    kernel, oracle = GpuPairs(sides, loss, order_of(20), device=DEVICE), PlainPairs(sides, loss, order_of(20))
    assert difference(kernel, oracle, [torch.tensor([5, 2])]) < TOLERANCE


def test_what_has_no_kernel_is_refused() -> None:
    """fp64 is refused with its name, and so is a CPU where Triton does not interpret."""
    sides = sides_of(4, 8, torch.float64)
    assert not on_gpu.supports(sides, DEVICE)
    with pytest.raises(ValueError, match="float64"):
        GpuPairs(sides, "sigmoid", torch.arange(4), device=DEVICE)
    assert on_gpu.supports(sides_of(4, 8), DEVICE) == HERE
    assert on_gpu.supports(sides_of(4, 8), "cuda") == torch.cuda.is_available()
