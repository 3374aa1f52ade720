"""Zeroth-order gradients (MeZO, Malladi et al., arXiv 2305.17333): two evaluations of the loss, no derivative at all.

    s_k = (L(w + eps v_k) - L(w - eps v_k)) / (2 eps),   g_hat = 1/K sum_k s_k v_k

Works with any operation, costs 2 forward passes a tangent, and has the variance of forward gradients with an error of
order eps^2 and of rounding (about 1e-7 L / eps in float32) on top. Weights are perturbed in place from the seed. They
are put back from a copy, which lies in `.grad` until the gradient does: adding the tangent back instead leaves a
rounding error in every weight at every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curate.errors import UsageError
from curate.estimators.problem import Problem, trainable
from curate.estimators.report import GradReport
from curate.estimators.swapping import Rewind
from curate.estimators.tangents import Tangents, dimensions, fill_from


@dataclass(frozen=True, slots=True)
class ZerothOrder:
    """`zeroth-order` with K = `tangents` dense sign tangents and step `epsilon`. The loss it reports is the mean of
    both sides. Errors: UsageError for K < 1 or an epsilon that is not positive."""

    name: str = "zeroth-order"
    tangents: int = 1
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if self.tangents < 1 or not self.epsilon > 0:
            raise UsageError(f"zeroth-order: tangents {self.tangents} and epsilon {self.epsilon} must be positive")

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`."""
        began, named = time.perf_counter(), trainable(problem.module)
        tangents = Tangents(named, "dense", seed, step, self.tangents)
        again, pairs = Rewind(problem.module), []
        with torch.no_grad(), _kept(named):
            for k in range(self.tangents):
                pairs.append([self._loss_at(problem, batch, tangents, k, sign, again) for sign in (1, -1)])
        report = GradReport(
            estimator=self.name,
            layout="dense",
            loss=sum(map(sum, pairs)) / (2 * len(pairs)),
            seed=seed,
            step=step,
            tangents=self.tangents,
            names=tuple(named),
            dimensions=dimensions(named),
            seconds=time.perf_counter() - began,
            slopes=tuple((above - below) / (2 * self.epsilon) for above, below in pairs),
            coefficient=1 / self.tangents,
        )
        fill_from(report, named)
        return report

    def _loss_at(self, problem: Problem, batch: Any, tangents: Tangents, k: int, sign: int, again: Rewind) -> float:
        again.rewind()
        for name, parameter in tangents.parameters.items():
            assert parameter.grad is not None
            torch.add(parameter.grad, tangents.whole(name, k), alpha=sign * self.epsilon, out=parameter.data)
        loss: Tensor = problem.loss(*problem.embed(batch))
        return float(loss)


@contextmanager
def _kept(named: dict[str, nn.Parameter]) -> Iterator[None]:
    """Weights in `.grad` meanwhile; back, bit for bit, at the end."""
    for parameter in named.values():
        parameter.grad = parameter.detach().clone()
    try:
        yield
    finally:
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.data.copy_(parameter.grad)
            parameter.grad = None
