"""The trusted set of a run: what learner and reference are measured on for the handover, and what alignment follows.

A few hundred clean pairs that neither the reference nor the learner is trained on. Without any, pairs of the pool are
held out: they compare the two models as well, but are as noisy as the pool, so its noise cannot be told from them. A
look costs the learner's forward pass over the trusted images and their distinct captions.
"""

# T trusted pairs, K distinct captions of theirs, N pairs of the pool, H, W height and width, C channels or tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.learner.candidates import Candidates, Reference
from curate.learner.handover import Observation, observe
from curate.learner.scoring_pass import Scorer
from curate.learner.watch import Estimate, PoolSums, View, distinct, noise_share, pool_sums, view
from curate.learner.work import PassCosts

MOST = 512  # pairs; the standard error of a loss is then some 0.05 nats
HELD_OUT = 0.05  # of the pool, where nothing is trusted
_SUMMED = 4096  # pool pairs at a time


@dataclass(frozen=True, slots=True)
class Trusted:
    """uint8 images and token ids of trusted pairs, and the reference's embeddings of them where it is weighed.

    `clean` is False for pairs of the pool itself.
    """

    image_TCHW: Tensor
    token_TC: Tensor
    reference: Reference | None = None
    clean: bool = True

    def __len__(self) -> int:
        return len(self.token_TC)


@dataclass(frozen=True, slots=True)
class Watch:
    """Looks at a learner beside the reference. Made by `watch_over`."""

    image_TCHW: Tensor
    token_KC: Tensor
    caption_T: NDArray[np.int64]
    reference: View | None
    noise: Estimate | None

    def look(self, scorer: Scorer, step: int) -> Observation:
        """What the trusted set says after `step` steps."""
        pairs = scorer(self.image_TCHW, self.token_KC)
        return observe(step, view(pairs.image_BD, pairs.text_BD, self.caption_T), self.reference, self.noise)

    def flops(self, costs: PassCosts) -> float:
        """What a look costs."""
        return costs.forward(len(self.image_TCHW), self.token_KC)


def watch_over(trusted: Trusted, candidates: Candidates) -> Watch:
    """A watch on a run; the pool's noise is told from the reference's cached embeddings, once."""
    token_KC, caption_T = distinct(trusted.token_TC)
    theirs = None
    if trusted.reference is not None:
        pairs = trusted.reference.pairs(np.arange(len(trusted)))
        first_K = np.unique(caption_T, return_index=True)[1]
        theirs = view(pairs.image_BD, pairs.text_BD[torch.from_numpy(first_K)], caption_T)
    noise = None
    if theirs is not None and trusted.clean and candidates.reference is not None:
        noise = noise_share(theirs, _pool(candidates, candidates.reference))
    return Watch(trusted.image_TCHW, token_KC, caption_T, theirs, noise)


def held_out(candidates: Candidates, seed: int) -> tuple[Trusted, Candidates]:
    """Pairs of the pool to watch by, and the candidates without them."""
    dice = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63 + 1], np.uint64)))
    count = min(MOST, max(2, round(HELD_OUT * len(candidates))), len(candidates))
    row_n, image_nCHW, token_nC = candidates.pairs.read(dice.choice(candidates.row_M, count, replace=False))
    reference = None if candidates.reference is None else candidates.reference.rows(row_n)
    return Trusted(image_nCHW, token_nC, reference, clean=False), candidates.without(row_n)


def _pool(candidates: Candidates, reference: Reference) -> PoolSums:
    total = PoolSums()
    for start in range(0, len(candidates), _SUMMED):
        pairs = reference.pairs(candidates.row_M[start : start + _SUMMED])
        total = total + pool_sums(pairs.image_BD, pairs.text_BD)
    return total
