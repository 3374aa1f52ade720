"""What a policy costs: the learnability given up against the draw that no policy touched.

The score of a batch is what the sampler climbs, summed over the batch: for the sigmoid loss sum_ij S_ij over its pairs,
for the softmax loss each member's loss within the batch, weighed by the criterion. Both come from the sampler's own
kernel, run on each member and a copy of it: once all members are chosen, a copy's score holds its pairs with them all.
Cost: 4 b^2 d multiply-adds per model and direction; and a second draw where any candidate was passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.kernels.selection import Loss, Side, own_scores
from curate.machine import cores
from curate.policy.drawing import ConstrainedDraw, draw_constrained
from curate.policy.quotas import Quota
from curate.selection.criteria import Criterion
from curate.selection.joint import Pairs, draw_joint, pair_kernel, sides_of

# b drawn


@dataclass(frozen=True, slots=True)
class Price:
    """Summed scores of the batches drawn under the policy, and of those drawn without it from the same candidates."""

    constrained: float
    plain: float
    members: int

    @property
    def given_up(self) -> float:
        """Per member; below 0 where the policy's batch happens to score higher (a draw is random)."""
        return (self.plain - self.constrained) / self.members

    def __add__(self, other: Price) -> Price:
        return Price(self.constrained + other.constrained, self.plain + other.plain, self.members + other.members)

    def as_json(self) -> dict[str, Any]:
        return {
            "score_with_policy": self.constrained, "score_without": self.plain, "members": self.members,
            "given_up_per_member": self.given_up,
        }  # fmt: skip


def price(
    drawn: ConstrainedDraw,
    reference: Pairs | None,
    learner: Pairs | None,
    sample_ids: NDArray[np.uint8],
    *,
    chunks: int = 16,
    criterion: Criterion = "learnability",
    loss: Loss,
    gain: float = 100.0,
    seed: int = 0,
    step: int = 0,
    threads: int | None = None,
) -> Price:
    """The price of one draw; the arguments are those of `draw_constrained`. Errors: as there."""
    sides = sides_of(reference, learner, sample_ids, criterion)
    threads = cores().usable if threads is None else threads
    own = batch_score(sides, loss, drawn.draw.index_b, threads=threads)
    if not drawn.passed_over:
        return Price(own, own, drawn.quota.size)
    plain = draw_joint(
        reference, learner, sample_ids,
        size=drawn.quota.size, chunks=chunks, criterion=criterion, loss=loss,
        gain=gain, seed=seed, step=step, threads=threads,
    )  # fmt: skip
    return Price(own, batch_score(sides, loss, plain.index_b, threads=threads), drawn.quota.size)


def draw_priced(
    reference: Pairs | None,
    learner: Pairs | None,
    sample_ids: NDArray[np.uint8],
    groups: NDArray[np.generic],
    quota: Quota,
    **how: Any,
) -> tuple[ConstrainedDraw, Price]:
    """`draw_constrained` and its price; `how` are the further arguments of both. Errors: as there."""
    drawn = draw_constrained(reference, learner, sample_ids, groups, quota, **how)
    return drawn, price(drawn, reference, learner, sample_ids, **how)


def batch_score(sides: Sequence[Side], loss: Loss, index_b: NDArray[np.int64], *, threads: int = 1) -> float:
    """The score of the batch of the rows `index_b`, in units of the loss (no gain), summed over its members."""
    size = len(index_b)
    twice = torch.from_numpy(np.concatenate([index_b, index_b]))
    copied = [replace(side, image_BD=side.image_BD[twice], text_BD=side.text_BD[twice]) for side in sides]
    kernel = pair_kernel(copied, loss, torch.arange(2 * size), threads)
    own_b = kernel.scores()[:size]
    kernel.update(torch.arange(size))
    all_b = kernel.scores()[size:]
    if loss == "softmax":
        return float(all_b.sum())
    # a copy's pairs: both directions, so half of them; and twice with its own original, which is no pair of the batch
    flipped = [replace(side, scale=-side.scale, bias=-side.bias) for side in copied]
    return float(own_b.sum() + (all_b - own_b).sum() / 2 - own_scores(flipped, loss, torch.arange(size)).sum())
