"""From a super-batch and what the models think of it to the sub-batch of a step.

The joint sampler does the work (`curate.selection.joint`); here stands what a step records of it. What leaves out noise
is `curate.learner.trimming`.
"""

# B candidates, b drawn, D embedding width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from curate.policy.drawing import ConstrainedDraw, Limit, draw_constrained
from curate.policy.fixed_scores import draw_alone_within
from curate.policy.price import Price
from curate.selection.criteria import LossName, weights
from curate.selection.independent import draw_alone
from curate.selection.joint import Pairs, chunk_sizes, draw_joint


@dataclass(frozen=True, slots=True)
class Chosen:
    """Positions in the super-batch in the order drawn, their chunks and logits; and what the journal says of the draw.

    `effective` is exp(entropy) of the first chunk's probabilities, `chunk_scores` the mean score of each chunk (logit
    over gain); both None where nothing was weighed. `kept` is how the draw kept to a policy, `price` what a draw by
    scores of single candidates gave up for it.
    """

    index_b: NDArray[np.int64]
    chunk_b: NDArray[np.int16]
    logit_b: NDArray[np.float32]
    effective: float | None = None
    chunk_scores: tuple[float, ...] | None = None
    kept: ConstrainedDraw | None = None
    price: Price | None = None


class _How(TypedDict):
    gain: float
    seed: int
    step: int


def everything(count: int) -> Chosen:
    """The uniform draw: the order of the epoch is random already."""
    return Chosen(np.arange(count), np.zeros(count, np.int16), np.zeros(count, np.float32))


def jointly(
    reference: Pairs | None,
    learner: Pairs | None,
    id_B16: NDArray[np.uint8],
    *,
    size: int,
    criterion: Any,
    loss: LossName,
    gain: float,
    chunks: int,
    seed: int,
    step: int,
    limit: Limit | None = None,
) -> Chosen:
    """`draw_joint`, within a policy's limit if there is one, and its figures. Errors: as there."""
    how: Any = {"criterion": criterion, "loss": loss, "gain": gain, "chunks": chunks, "seed": seed, "step": step}
    kept = None if limit is None else draw_constrained(reference, learner, id_B16, limit.member_BG, limit.quota, **how)
    draw = draw_joint(reference, learner, id_B16, size=size, **how) if kept is None else kept.draw
    own_B = gain * own_scores(reference, learner, criterion, loss)
    ends = np.cumsum(chunk_sizes(size, chunks))[:-1]
    means = tuple(float(part.mean()) / gain if gain else 0.0 for part in np.split(draw.logit_b, ends))
    return Chosen(draw.index_b, draw.chunk_b, draw.logit_b, effective_candidates(own_B), means, kept)


def own_scores(reference: Pairs | None, learner: Pairs | None, criterion: str, loss: LossName) -> Tensor:
    """The score of each pair alone, float64 [B]: what the first chunk is drawn by, before the gain."""
    weight = weights(criterion)
    sides = [(learner, weight.learner), (reference, weight.reference)]
    parts = [factor * own_loss(pairs, loss) for pairs, factor in sides if pairs is not None and factor]
    return torch.stack(parts).sum(0)


def own_loss(pairs: Pairs, loss: LossName) -> Tensor:
    """softplus(-(a s_ii + b)) for sigmoid, -a s_ii for softmax, float64 [B]."""
    sim_B = (pairs.image_BD.double() * pairs.text_BD.double()).sum(1)
    return functional.softplus(-(pairs.scale * sim_B + pairs.bias)) if loss == "sigmoid" else -pairs.scale * sim_B


def effective_candidates(logit_B: Tensor) -> float:
    """exp(entropy) of softmax: B where all are equal, 1 where one takes all. Example: [0, 0, -1e9] gives 2."""
    log_B = functional.log_softmax(logit_B.double(), dim=0)
    return float(torch.exp(-(log_B.exp() * log_B.clamp(min=-1e30)).sum()))


def alone(
    score_B: Tensor,
    id_B16: NDArray[np.uint8],
    *,
    size: int,
    gain: float,
    seed: int,
    step: int,
    limit: Limit | None = None,
) -> Chosen:
    """`size` drawn by a score of each candidate alone (`curate.selection.independent`), within a policy's limit."""
    value_B, how = score_B.double().numpy(), _How(gain=gain, seed=seed, step=step)
    kept, price = None, None
    if limit is not None:
        kept, price = draw_alone_within(value_B, id_B16, limit.member_BG, limit.quota, **how)
    draw = draw_alone(value_B, id_B16, size=size, **how) if kept is None else kept.draw
    effective = effective_candidates(torch.from_numpy(draw.logit_B))
    scores = (float(draw.logit_b.mean()) / (gain or 1.0),)
    return Chosen(draw.index_b, draw.chunk_b, draw.logit_b, effective, scores, kept, price)
