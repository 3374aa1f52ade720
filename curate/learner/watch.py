"""What learner and reference are worth on a small trusted set, and what share of a pool is noise. No truth is needed.

The similarity of a contrastive model estimates, up to its scale, the log of p(image, caption) / p(image) p(caption). So
a model is asked what it is good for, whatever its own scale and bias: the cross-entropy of image -> distinct caption at
the scale that suits the trusted set best, captions weighted by how often they occur there. A model that knows nothing
has the entropy of the captions; what it is below that is information. T x K similarities, a few Newton steps: 0.1 s at
500 x 500. Two models together are the sum of their scaled similarities, both scales fitted at once (a product of
experts): the word of a reference that the learner has overtaken fades by itself.

The noise of a pool is a mixture: matched similarities there are a share 1 - noise of pairs as in the trusted set and a
share noise of pairs drawn at random. Means of both parts are known, so the share follows from the mean of the mixture.
"""

# T trusted images, K distinct captions of theirs, B pairs of a pool, D width, M models (1 or 2)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_RIDGE: Final = 1e-8  # keeps scales finite where a model gets every trusted pair right
_NEWTON_STEPS: Final = 40


@dataclass(frozen=True, slots=True)
class View:
    """How a model sees the trusted set: similarities [T, K] to the distinct captions, and each image's own caption."""

    sim_TK: Floats
    caption_T: NDArray[np.int64]

    def own(self) -> Floats:
        """The similarity of each image to its own caption [T]."""
        own_T: Floats = self.sim_TK[np.arange(len(self.caption_T)), self.caption_T]
        return own_T

    def frequency(self) -> Floats:
        """The share of each caption [K]."""
        return np.bincount(self.caption_T, minlength=self.sim_TK.shape[1]) / len(self.caption_T)


@dataclass(frozen=True, slots=True)
class Measure:
    """A model on the trusted set: calibrated cross-entropy in nats with its standard error, recall at 1, best scale.

    `chance` is the loss of a model that knows nothing, the entropy of the captions.
    """

    loss: float
    error: float
    recall: float
    scale: float
    chance: float

    @property
    def information(self) -> float:
        """Nats that the model knows of an image's caption."""
        return self.chance - self.loss

    def as_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PoolSums:
    """Of `count` pool pairs: sum and sum of squares of matched similarities, and the mean similarity of mismatched ones
    times `count`. Sums of two super-batches add up."""

    count: int = 0
    matched: float = 0.0
    squares: float = 0.0
    mismatched: float = 0.0

    def __add__(self, other: PoolSums) -> PoolSums:
        return PoolSums(
            self.count + other.count,
            self.matched + other.matched,
            self.squares + other.squares,
            self.mismatched + other.mismatched,
        )


def distinct(token_TC: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    """The distinct rows of tokens, sorted, and which of them each row is: captions are embedded once each.

    >>> distinct(torch.tensor([[7, 1], [3, 2], [7, 1]]))[1].tolist()
    [1, 0, 1]
    """
    unique_KC, caption_T = torch.unique(token_TC, dim=0, return_inverse=True)
    return unique_KC, caption_T.cpu().numpy().astype(np.int64)


def view(image_TD: Tensor, text_KD: Tensor, caption_T: NDArray[np.int64]) -> View:
    """Similarities of unit vectors [T, D] to the distinct captions [K, D]; `caption_T` holds rows of `text_KD`."""
    sim_TK = (image_TD.detach().double().cpu() @ text_KD.detach().double().cpu().T).numpy()
    return View(sim_TK, caption_T)


def calibrate(views: Sequence[View]) -> tuple[float, ...]:
    """The scales, none negative, at which the sum of scaled similarities has the lowest cross-entropy.

    One view or two of the same trusted set. The problem is convex, so a scale that would be negative is 0 and the other
    one is fitted alone. Example: a model whose similarities say nothing gets scale 0.
    """
    scale_M = _newton(views)
    if min(scale_M) >= 0:
        return scale_M
    if len(views) == 1:
        return (0.0,)
    alone = [(calibrate(views[:1])[0], 0.0), (0.0, calibrate(views[1:])[0])]
    return min(alone, key=lambda scales: float(losses(views, scales).mean()))


def losses(views: Sequence[View], scales: Sequence[float]) -> Floats:
    """Cross-entropy of each trusted image, in nats [T], at given scales.

    Example: two images, two captions, similarities of 1 where they match and 0 elsewhere, scale 2: log(1 + e^-2).
    """
    loss_T: Floats = -np.log(_probability(views, scales)[np.arange(len(views[0].caption_T)), views[0].caption_T])
    return loss_T


def measure(seen: View) -> Measure:
    """A model by itself. Recall at 1 is over the distinct captions, each counted once."""
    (scale,) = calibrate([seen])
    loss_T = losses([seen], [scale])
    hit_T = seen.sim_TK.argmax(1) == seen.caption_T
    share_K = seen.frequency()
    share_K = share_K[share_K > 0]
    chance = float(-(share_K * np.log(share_K)).sum())
    return Measure(float(loss_T.mean()), standard_error(loss_T), float(hit_T.mean()), scale, chance)


def compare(learner: View, reference: View) -> Estimate:
    """Learner's loss minus reference's, each at its own best scale; the error is that of paired differences."""
    difference_T = losses([learner], calibrate([learner])) - losses([reference], calibrate([reference]))
    return Estimate(float(difference_T.mean()), standard_error(difference_T))


def pool_sums(image_BD: Tensor, text_BD: Tensor) -> PoolSums:
    """Of B matched pairs of unit vectors; mismatched are all i, j with i != j. O(B D)."""
    image_BD, text_BD = image_BD.detach().double().cpu(), text_BD.detach().double().cpu()
    matched_B = (image_BD * text_BD).sum(1)
    count, matched = len(matched_B), float(matched_B.sum())
    everything = float((image_BD.sum(0) * text_BD.sum(0)).sum())
    mismatched = (everything - matched) / (count - 1) if count > 1 else 0.0
    return PoolSums(count, matched, float(matched_B.square().sum()), mismatched)


def noise_share(trusted: View, pool: PoolSums) -> Estimate:
    """The share of pool pairs whose caption belongs to another image, by one model; not clipped to 0..1.

    (m_trusted - m_pool) / (m_trusted - m_mismatched), error by the delta method. It holds for a model that was trained
    on neither set, such as the reference; one that has learnt pool pairs by heart sees too little noise. Without
    information the error is infinite.

    Example: matched pairs at 0.8 in the trusted set, 0.5 on average in the pool, mismatched at 0.2: half is noise.
    """
    mean_trusted, mean_pool = float(trusted.own().mean()), pool.matched / pool.count
    gap = mean_trusted - pool.mismatched / pool.count
    if gap <= 1e-9:
        return Estimate(0.0, math.inf)
    share = (mean_trusted - mean_pool) / gap
    pool_error = math.sqrt(max(0.0, pool.squares / pool.count - mean_pool**2) / pool.count)
    return Estimate(share, math.hypot((1 - share) * standard_error(trusted.own()), pool_error) / gap)


def standard_error(value_T: Floats) -> float:
    """Of a mean of independent values; infinite for fewer than two."""
    return float(value_T.std(ddof=1) / math.sqrt(len(value_T))) if len(value_T) > 1 else math.inf


def _probability(views: Sequence[View], scales: Sequence[float]) -> Floats:
    """p(caption | image) [T, K], captions weighted by their frequency."""
    logit_TK: Any = sum(scale * seen.sim_TK for scale, seen in zip(scales, views, strict=True))
    with np.errstate(divide="ignore"):
        logit_TK = logit_TK + np.log(views[0].frequency())
    weight_TK = np.exp(logit_TK - logit_TK.max(1, keepdims=True))
    probability_TK: Floats = weight_TK / weight_TK.sum(1, keepdims=True)
    return probability_TK.clip(1e-300)


def _newton(views: Sequence[View]) -> tuple[float, ...]:
    """The minimum of the mean loss plus a tiny ridge, by Newton's method with halved steps where it would climb."""
    scale_M, value = np.zeros(len(views)), _objective(views, np.zeros(len(views)))
    for _ in range(_NEWTON_STEPS):
        gradient_M, hessian_MM = _derivatives(views, scale_M)
        step_M = np.linalg.solve(hessian_MM, gradient_M)
        while (lower := _objective(views, scale_M - step_M)) > value and abs(step_M).max() > 1e-9:
            step_M = step_M / 2
        if not lower < value:
            break
        scale_M, value = scale_M - step_M, lower
    return tuple(float(scale) for scale in scale_M)


def _objective(views: Sequence[View], scale_M: Floats) -> float:
    return float(losses(views, scale_M.tolist()).mean() + _RIDGE / 2 * (scale_M**2).sum())


def _derivatives(views: Sequence[View], scale_M: Floats) -> tuple[Floats, Floats]:
    """Gradient and Hessian of `_objective`: expected minus own similarity, and their covariance under the model."""
    probability_TK = _probability(views, scale_M.tolist())
    mean_MT = np.stack([(probability_TK * seen.sim_TK).sum(1) for seen in views])
    own_MT = np.stack([seen.own() for seen in views])
    centred = [seen.sim_TK - mean_T[:, None] for seen, mean_T in zip(views, mean_MT, strict=True)]
    hessian_MM = np.array([[(probability_TK * a_TK * b_TK).sum(1).mean() for a_TK in centred] for b_TK in centred])
    return (mean_MT - own_MT).mean(1) + _RIDGE * scale_M, hessian_MM + _RIDGE * np.eye(len(views))
