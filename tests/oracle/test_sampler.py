"""The sampler against a brute-force one, sample by sample in the order drawn, and proof that it can fail."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curate.kernels.selection import Side, native, tiled
from curate.kernels.selection.native import NativePairs
from curate.kernels.selection.plain import PlainPairs
from curate.kernels.selection.tiled import TiledPairs, softplus_sums
from curate.selection import joint
from curate.selection.criteria import CRITERIA, LOSSES
from curate.selection.joint import Draw, Pairs, draw_joint, draw_with
from curate.selection.noise import gumbel

_SPEC = importlib.util.spec_from_file_location(
    "brute_force_sampler", Path(__file__).with_name("brute_force_sampler.py")
)
brute: Any = importlib.util.module_from_spec(_SPEC)  # by path: pytest's importlib mode puts no folder on sys.path
_SPEC.loader.exec_module(brute)

# Relative to the largest logit. fp64: sums of at most 662 terms in another order, exp and log1p a few ulps apart.
# fp32: products of 80 terms of 2**-24, times scales up to 100 inside an exponential.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


# Which kernel draws, and how its embeddings are stored; brute force gets the same numbers in fp64.
KERNELS = [("TiledPairs", torch.float64), ("TiledPairs", torch.float32), ("NativePairs", torch.float32)]


@pytest.fixture(params=KERNELS, ids=lambda param: f"{param[0]}-{str(param[1])[6:]}")
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype to store embeddings in; makes `draw_joint` take the kernel."""
    name, dtype = request.param
    if name == "NativePairs" and native.why_not() is not None:
        pytest.skip(f"no native kernel: {native.why_not()}")
    if name == "TiledPairs":
        monkeypatch.setattr(native, "supports", lambda _: False)
    return dtype


def unit_rows(seed: int, size: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(size, width, generator=generator, dtype=torch.float64), dim=1)


def model(seed: int, size: int, width: int, scale: float, bias: float, dtype: torch.dtype = torch.float64) -> Pairs:
    image_BD = unit_rows(seed, size, width)
    text_BD = torch.nn.functional.normalize(image_BD + unit_rows(seed + 1, size, width), dim=1)
    return Pairs(image_BD.to(dtype), text_BD.to(dtype), scale, bias)


def ids_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, 16), dtype=np.uint8)


def numbers(pairs: Pairs | None) -> brute.Model | None:
    if pairs is None:
        return None
    return pairs.image_BD.double().numpy(), pairs.text_BD.double().numpy(), pairs.scale, pairs.bias


def brute_force(
    reference: Pairs, learner: Pairs, size: int, chunks: int, criterion: str, loss: str, gain: float, seed=0
):
    ids = ids_of(len(reference.image_BD))
    noise_NB = np.stack([gumbel(ids, seed=seed, step=0, chunk=chunk) for chunk in range(chunks)])
    return brute.sample(
        numbers(reference), numbers(learner), noise_NB, size=size, criterion=criterion, loss=loss, gain=gain
    )


def same(draw: Draw, expected: tuple[list[int], list[float]]) -> bool:
    index, logits = expected
    bound = 1e-5 * max(1.0, *(abs(logit) for logit in logits))  # Draw carries fp32
    return draw.index_b.tolist() == index and bool(np.abs(draw.logit_b - np.array(logits)).max() <= bound)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("size", "width"), [(1, 3), (2, 1), (7, 3), (97, 80), (97, 1), (331, 3)])
def test_the_sampler_draws_what_brute_force_draws(
    size: int, width: int, loss: str, criterion: str, stored: torch.dtype
) -> None:
    """For odd sizes, widths and chunk counts the fast draw equals the brute-force draw, member by member."""
    reference, learner = model(1, size, width, 30.0, -8.0, stored), model(5, size, width, 12.0, -3.0, stored)
    for chunks, part in itertools.product((1, 3, 16, 50), (1, (size + 2) // 3, size)):
        if size == 331 and (chunks not in (3, 16) or part == size):
            continue
        gain = 1.0 if part == size else 100.0
        draw = draw_joint(
            reference, learner, ids_of(size), size=part, chunks=chunks, criterion=criterion, loss=loss, gain=gain
        )
        assert same(draw, brute_force(reference, learner, part, chunks, criterion, loss, gain)), (chunks, part)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("candidates", "chosen", "threads"), [(16, 5, 1), (16, 5, 3), (7, 64, 2), (1, 1, 2)])
def test_small_tiles_and_several_threads_draw_the_same(
    candidates: int, chosen: int, threads: int, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many blocks that lose rows between chunks, chosen in many pieces, equal the brute-force draw as one does."""
    monkeypatch.setattr(tiled, "CANDIDATES_PER_TILE", candidates)
    monkeypatch.setattr(tiled, "CHOSEN_PER_TILE", chosen)
    reference, learner = model(1, 97, 8, 30.0, -8.0), model(5, 97, 8, 12.0, -3.0)
    draw = draw_joint(reference, learner, ids_of(97), size=60, chunks=7, loss=loss, gain=20.0, threads=threads)
    assert same(draw, brute_force(reference, learner, 60, 7, "learnability", loss, 20.0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gain", [0.0, 1.0, 100.0, 1e4])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, 10.0), (117.3, -12.9), (200.0, -20.0), (200.0, 10.0)])
def test_extreme_scales_biases_and_gains_change_nothing(
    scale: float, bias: float, gain: float, loss: str, stored: torch.dtype
) -> None:
    """Gains up to 1e4, scales up to 200 and biases from -20 to 10 neither overflow nor leave the brute-force draw."""
    reference = model(1, 61, 4, scale, bias, stored)
    learner = model(5, 61, 4, 201.0 - scale, -10.0 - bias, stored)
    draw = draw_joint(reference, learner, ids_of(61), size=20, chunks=6, loss=loss, gain=gain)
    assert same(draw, brute_force(reference, learner, 20, 6, "learnability", loss, gain))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["identical rows", "one row for all", "opposite rows"])
def test_degenerate_similarities_change_nothing(kind: str, loss: str, stored: torch.dtype) -> None:
    """Rows that repeat, similarities that are all equal, and similarities of -1 give the brute-force draw."""
    pairs = model(1, 40, 3, 20.0, -5.0, stored)
    if kind == "identical rows":
        pairs = replace(
            pairs, image_BD=pairs.image_BD[torch.arange(40) // 8], text_BD=pairs.text_BD[torch.arange(40) // 8]
        )
    elif kind == "one row for all":
        one_BD = torch.tensor([[1.0, 0.0, 0.0]], dtype=stored).repeat(40, 1)
        pairs = replace(pairs, image_BD=one_BD, text_BD=one_BD)
    else:
        pairs = replace(pairs, text_BD=-pairs.image_BD)
    learner = replace(pairs, scale=10.0, bias=-2.0)
    draw = draw_joint(pairs, learner, ids_of(40), size=13, chunks=5, loss=loss, gain=10.0)
    assert same(draw, brute_force(pairs, learner, 13, 5, "learnability", loss, 10.0))


def test_the_brute_force_sigmoid_logit_is_the_marginal_gain_of_the_batch() -> None:
    """Enumerated: adding i to the chosen raises the sum of S over all pairs of the batch by exactly the logit."""
    score = brute.score_matrix(
        numbers(model(1, 6, 3, 9.0, -2.0)), numbers(model(5, 6, 3, 7.0, -1.0)), "learnability", 3.0
    )

    def total(batch: tuple[int, ...]) -> float:
        return sum(score[i, j] for i in batch for j in batch)

    for count in range(6):
        for chosen in itertools.permutations(range(6), count):
            for i in set(range(6)) - set(chosen):
                assert brute.sigmoid_logit(score, i, list(chosen)) == pytest.approx(total((*chosen, i)) - total(chosen))


def test_the_brute_force_softmax_logit_is_a_difference_of_two_cross_entropies() -> None:
    """Naive double loops over probabilities: mean -log of i's match among the chosen, learner less reference."""
    pairs = [model(1, 6, 3, 5.0, 0.0), model(5, 6, 3, 3.0, 0.0)]
    similarity = [brute.similarities(numbers(one)) for one in pairs]
    chosen, i = [4, 0, 2], 5
    losses = []
    for one in pairs:
        image, text, scale, _ = numbers(one)
        loss = 0.0
        for rows, columns in ((image, text), (text, image)):
            total = 0.0
            for k in chosen:
                total += np.exp(scale * sum(rows[i][d] * columns[k][d] for d in range(3)))
            loss -= 0.5 * np.log(np.exp(scale * sum(image[i][d] * text[i][d] for d in range(3))) / total)
        losses.append(loss)
    logit = brute.softmax_logit(similarity[0], similarity[1], "learnability", 2.0, i, chosen)
    assert logit == pytest.approx(2.0 * (losses[1] - losses[0]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("size", "width", "chosen"), [(7, 3, 3), (700, 80, 1), (1100, 33, 301)])
def test_the_tiled_kernel_scores_as_the_plain_one(
    size: int, width: int, chosen: int, loss: str, dtype: torch.dtype
) -> None:
    """Across tile boundaries and after three updates, streamed scores equal those of the plain kernel in fp64."""
    sides = [Side(*numbers_as(model(1, size, width, 100.0, -10.0), torch.float64), 1.0)]
    sides.append(Side(*numbers_as(model(5, size, width, 60.0, -9.0), torch.float64), -1.0))
    stored = [replace(side, image_BD=side.image_BD.to(dtype), text_BD=side.text_BD.to(dtype)) for side in sides]
    order_B = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    plain, tiled = PlainPairs(sides, loss, order_B), TiledPairs(stored, loss, order_B, threads=2)
    for rows_c in order_B[: min(3 * chosen, size)].split(chosen):
        plain.update(rows_c)
        tiled.update(rows_c)
    bound = TOLERANCE[dtype] * plain.scores().abs().max()
    assert (plain.scores() - tiled.scores()).abs().max() <= bound


@pytest.mark.parametrize(("mean", "spread"), [(-30, 5), (-16, 3), (-10, 1), (-10, 5), (0, 1), (0, 5), (20, 30)])
@pytest.mark.parametrize("rows", [1, 2, 51, 204, 512])
def test_sums_of_softplus_keep_their_relative_precision(rows: int, mean: float, spread: float) -> None:
    """Also where softplus is 1e-13, a fp32 sum over a tile is within 1e-6 of the fp64 one, relative."""
    generator = torch.Generator().manual_seed(rows)
    x_kn = torch.randn(rows, 64, generator=generator).mul_(spread).add_(mean)
    exact_n = torch.logaddexp(x_kn.double(), torch.zeros((), dtype=torch.float64)).sum(0)
    sums_n = softplus_sums(x_kn, torch.empty_like(x_kn))
    assert ((sums_n - exact_n) / exact_n).abs().max() < 1e-6


def numbers_as(pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, float]:
    return pairs.image_BD.to(dtype), pairs.text_BD.to(dtype), pairs.scale, pairs.bias


class _OneDirection(PlainPairs):
    """Wrong: forgets the texts of candidates against the chosen images."""

    def _tiles(self, side: Side, chosen_c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super()._tiles(side, chosen_c)[:1]


class _OneDirectionNative(NativePairs):
    """Wrong in the same way."""

    def _ways(self) -> Iterator[tuple[Side, Tensor, Tensor]]:
        return itertools.islice(super()._ways(), 0, None, 2)


def _truncated(size: int, chunks: int) -> list[int]:
    return [int(size / chunks)] * chunks


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "wrong", ["none", "bias sign", "learner for reference", "one direction", "chosen not masked", "truncated chunks"]
)
@pytest.mark.parametrize(
    ("right_kernel", "wrong_kernel", "dtype"),
    [(PlainPairs, _OneDirection, torch.float64), (NativePairs, _OneDirectionNative, torch.float32)],
)
def test_a_planted_wrong_sampler_is_caught(
    right_kernel: Any, wrong_kernel: Any, dtype: torch.dtype, wrong: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of five plausible mistakes leaves the brute-force draw; the same comparison without one passes."""
    if right_kernel is NativePairs and native.why_not() is not None:
        pytest.skip(f"no native kernel: {native.why_not()}")
    reference, learner = model(1, 61, 5, 20.0, -4.0, dtype), model(5, 61, 5, 6.0, -1.0, dtype)
    expected = brute_force(reference, learner, 23, 4, "learnability", loss, 20.0)
    if wrong == "bias sign":
        reference, learner = replace(reference, bias=4.0), replace(learner, bias=1.0)
    if wrong == "learner for reference":
        reference = replace(reference, scale=learner.scale, bias=learner.bias)
    if wrong == "chosen not masked":
        monkeypatch.setattr(joint, "without", lambda standing, _: standing)
    if wrong == "truncated chunks":
        monkeypatch.setattr(joint, "chunk_sizes", _truncated)
    sides = [Side(*numbers_as(pairs, dtype), weight) for pairs, weight in ((learner, 1.0), (reference, -1.0))]
    kernel = (wrong_kernel if wrong == "one direction" else right_kernel)(sides, loss, torch.arange(61))
    draw = draw_with(kernel, ids_of(61), size=23, chunks=4, gain=20.0, seed=0, step=0)
    agrees = len(draw.index_b) == 23 and same(draw, expected)
    softmax_has_no_bias = wrong == "bias sign" and loss == "softmax"
    assert agrees == (wrong == "none" or softmax_has_no_bias)
