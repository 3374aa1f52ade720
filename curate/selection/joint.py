"""Draw a sub-batch chunk by chunk. Compares B x b pairs, keeps b; memory O(B d), time that of 8 B b d FLOPs.

Chunk 1 is drawn by each pair's own score, later chunks by the score given all that was drawn before. A chunk is drawn
without replacement with probability proportional to exp(logit), by adding Gumbel noise and taking the largest; noise
comes from a hash of the sample id (`noise.py`), ties go to the smaller id, and the arithmetic is laid out in the order
of the ids. So the selection does not depend on the order of the rows or on the number of threads.

Source: Evans et al. 2024, arXiv 2406.17711, Algorithms 2 and 3, errata mended: no overflow of exp at gain 100, the
reference scored with its own scale and bias, exactly `size` members, chosen candidates at -inf instead of -1e8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import UsageError
from curate.kernels.selection import Loss, PairKernel, Side, native, on_gpu
from curate.kernels.selection.native import NativePairs
from curate.kernels.selection.tiled import TiledPairs
from curate.machine import cores
from curate.selection.criteria import Criterion, check_loss, require_models
from curate.selection.noise import gumbel

# B candidates (the super-batch), b drawn (the sub-batch), D width
_MOST_CHUNKS = 2**15  # Draw.chunk_b is int16
Choose = Callable[[NDArray[np.float64], NDArray[np.int64], int], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """L2-normalised embeddings [B, D] (fp16, bf16, fp32 or fp64, on the CPU) of one model, with its own scale and bias.

    The logit of a pair is scale * <image, text> + bias, as in SigLIP and open_clip; the softmax loss ignores the bias.
    """

    image_BD: Tensor
    text_BD: Tensor
    scale: float
    bias: float


@dataclass(frozen=True, slots=True)
class Draw:
    """A sub-batch in the order drawn. Positions are the caller's rows; logits include the gain, not the noise."""

    index_b: NDArray[np.int64]
    chunk_b: NDArray[np.int16]
    logit_b: NDArray[np.float32]  # when drawn
    logit_B: NDArray[np.float32]  # of a chosen one when drawn, of the others at the last chunk
    kernel: str  # whose arithmetic it was: two kernels agree to rounding, which at a near tie is another member


def draw_joint(
    reference: Pairs | None,
    learner: Pairs | None,
    sample_ids: NDArray[np.uint8],
    *,
    size: int,
    chunks: int = 16,
    criterion: Criterion = "learnability",
    loss: Loss,
    gain: float = 100.0,
    seed: int = 0,
    step: int = 0,
    threads: int | None = None,
) -> Draw:
    """Draw `size` of B pairs jointly, in `chunks` parts.

    `sample_ids` is uint8 [B, 16], all different. Arithmetic is fp64 if an embedding that counts is fp64, else fp32.
    `chunks` above `size` means one sample per chunk. Raises `UsageError` for what cannot be met: an unknown criterion
    or loss, a model that the criterion needs but is missing, shapes that disagree, a duplicate id, an embedding with
    NaN or inf, a size outside 1..B.

    >>> eye = torch.eye(4)
    >>> pairs = Pairs(eye, eye[[0, 1, 3, 2]], scale=10.0, bias=-5.0)  # 0 and 1 match their captions, 2 and 3 do not
    >>> ids = np.arange(64, dtype=np.uint8).reshape(4, 16)
    >>> draw = draw_joint(pairs, None, ids, size=2, chunks=2, criterion="easy-reference", loss="sigmoid")
    >>> sorted(draw.index_b.tolist())
    [0, 1]
    """
    kernel = joint_kernel(reference, learner, sample_ids, criterion=criterion, loss=loss, threads=threads)
    return draw_with(kernel, sample_ids, size=size, chunks=chunks, gain=gain, seed=seed, step=step)


def joint_kernel(
    reference: Pairs | None,
    learner: Pairs | None,
    sample_ids: NDArray[np.uint8],
    *,
    criterion: Criterion,
    loss: Loss,
    threads: int | None = None,
) -> PairKernel:
    """The fresh kernel of `draw_joint`, its input checked. Errors: as there."""
    check_loss(loss)
    order_B = torch.from_numpy(canonical_order(sample_ids))
    sides = sides_of(reference, learner, sample_ids, criterion)
    threads = cores().usable if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads is {threads}; give 1 or more, or leave it out for all cores")
    return pair_kernel(sides, loss, order_B, threads)


def sides_of(
    reference: Pairs | None, learner: Pairs | None, sample_ids: NDArray[np.uint8], criterion: Criterion
) -> list[Side]:
    """What the criterion weighs of the two models, learner first. Errors: as `draw_joint`."""
    weight = require_models(criterion, reference=reference is not None, learner=learner is not None)
    return [
        _side(name, pairs, factor, sample_ids)
        for name, pairs, factor in (("learner", learner, weight.learner), ("reference", reference, weight.reference))
        if pairs is not None and factor
    ]


def pair_kernel(sides: Sequence[Side], loss: Loss, order_B: Tensor, threads: int) -> PairKernel:
    """The quickest kernel for where the embeddings lie: Triton on their GPU, else on the CPU C++, else torch."""
    on_cpu = all(side.image_BD.device.type == "cpu" and side.text_BD.device.type == "cpu" for side in sides)
    if not on_cpu and on_gpu.supports(sides):
        return on_gpu.GpuPairs(sides, loss, order_B)
    if not on_cpu:
        sides = [replace(side, image_BD=side.image_BD.cpu(), text_BD=side.text_BD.cpu()) for side in sides]
    return (NativePairs if native.supports(sides) else TiledPairs)(sides, loss, order_B, threads=threads)


def draw_with(
    kernel: PairKernel,
    sample_ids: NDArray[np.uint8],
    *,
    size: int,
    chunks: int,
    gain: float,
    seed: int,
    step: int,
    choose: Choose | None = None,
) -> Draw:
    """`draw_joint` with any fresh kernel: Gumbel-top-k per chunk, an update after all but the last.

    `choose` takes a chunk's members in place of `largest`: (values [B], standing rows, how many) to rows.
    """
    choose = largest if choose is None else choose
    if not 1 <= size <= len(sample_ids):
        raise UsageError(f"cannot draw {size} of {len(sample_ids)} candidates; give a size from 1 to {len(sample_ids)}")
    if not (math.isfinite(gain) and gain >= 0):
        raise UsageError(f"gain is {gain}; give a finite number, 0 or more (100 is the paper's)")
    parts = chunk_sizes(size, chunks)
    standing = canonical_order(sample_ids)
    drawn: list[NDArray[np.int64]] = []
    for chunk, part in enumerate(parts):
        if drawn:
            kernel.update(torch.from_numpy(drawn[-1]))
        logit_B = _finite(gain * kernel.scores().numpy(), sample_ids)
        noisy_B = logit_B + gumbel(sample_ids, seed=seed, step=step, chunk=chunk)
        drawn.append(choose(noisy_B, standing, part))
        standing = without(standing, drawn[-1])
    index_b = np.concatenate(drawn)
    chunk_b = np.repeat(np.arange(len(parts), dtype=np.int16), parts)
    return Draw(
        index_b, chunk_b, logit_B[index_b].astype(np.float32), logit_B.astype(np.float32), type(kernel).__name__
    )


def chunk_sizes(size: int, chunks: int) -> list[int]:
    """Sizes that sum to exactly `size` and differ by at most one: `chunk_sizes(10, 4)` is [3, 3, 2, 2]."""
    if chunks < 1:
        raise UsageError(f"chunks is {chunks}; give 1 or more (16 is the paper's)")
    chunks = min(chunks, size)
    if chunks > _MOST_CHUNKS:
        raise UsageError(f"{chunks} chunks are more than {_MOST_CHUNKS}; give fewer")
    part, rest = divmod(size, chunks)
    return [part + (chunk < rest) for chunk in range(chunks)]


def largest(value_B: NDArray[np.float64], standing: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` rows of `standing` with the largest values, largest first; ties keep the order of `standing`."""
    return standing[np.argsort(-value_B[standing], kind="stable")[:count]]


def without(standing: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """`standing` less the rows just drawn, in the same order; what is gone has probability zero, without any -1e8."""
    return standing[~np.isin(standing, drawn)]


def canonical_order(sample_ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Rows sorted by sample id; `UsageError` for the wrong shape or an id that occurs twice."""
    if sample_ids.ndim != 2 or sample_ids.shape[1] != 16 or sample_ids.dtype != np.uint8 or not len(sample_ids):
        raise UsageError(f"sample ids are {sample_ids.dtype} {sample_ids.shape}; give uint8 [B, 16] with B at least 1")
    word_B2 = np.ascontiguousarray(sample_ids).view(">u8").astype(np.uint64)
    order = np.lexsort((word_B2[:, 1], word_B2[:, 0]))
    twice = np.flatnonzero((word_B2[order[1:]] == word_B2[order[:-1]]).all(axis=1))
    if len(twice):
        first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise UsageError(
            f"rows {first} and {second} have the same sample id {sample_ids[first].tobytes().hex()}; deduplicate first"
        )
    return order.astype(np.int64)


def _side(name: str, pairs: Pairs, weight: float, sample_ids: NDArray[np.uint8]) -> Side:
    """The kernel's view of a model, or `UsageError` saying what is wrong with it, and with which sample."""
    image_BD, text_BD = pairs.image_BD.detach(), pairs.text_BD.detach()
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape or len(image_BD) != len(sample_ids):
        raise UsageError(
            f"{name}: images {tuple(image_BD.shape)} and texts {tuple(text_BD.shape)} "
            f"for {len(sample_ids)} sample ids; give [B, D] for both, one row per id"
        )
    if not (image_BD.is_floating_point() and text_BD.is_floating_point()):
        raise UsageError(f"{name}: embeddings are {image_BD.dtype} and {text_BD.dtype}; give floating point")
    if not (math.isfinite(pairs.scale) and math.isfinite(pairs.bias)):
        raise UsageError(f"{name}: scale {pairs.scale} and bias {pairs.bias} must be finite")
    for kind, tensor_BD in (("image", image_BD), ("text", text_BD)):
        row = _first_not_finite(tensor_BD)
        if row is not None:
            raise UsageError(
                f"{name}: the {kind} embedding of row {row} (sample {sample_ids[row].tobytes().hex()}) has NaN or inf; "
                "leave the sample out, or embed it again"
            )
    return Side(image_BD, text_BD, float(pairs.scale), float(pairs.bias), weight)


def _first_not_finite(tensor_BD: Tensor) -> int | None:
    """First row with a NaN or an infinity; its sum is not finite, and the reverse is checked."""
    for row in (~torch.isfinite(tensor_BD.sum(1))).nonzero().flatten().tolist():
        if not torch.isfinite(tensor_BD[row]).all():
            return int(row)
    return None


def _finite(logit_B: NDArray[np.float64], sample_ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    bad = np.flatnonzero(~np.isfinite(logit_B))
    if len(bad):
        name = sample_ids[bad[0]].tobytes().hex()
        raise UsageError(f"the logit of row {bad[0]} (sample {name}) overflows; L2-normalise the embeddings")
    return logit_B
