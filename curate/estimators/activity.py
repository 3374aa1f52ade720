"""Perturb activations instead of weights, and tell every example its own share of the derivative ("embedding split").

Noise u is added to the tangent of each operation that meets a parameter. With the exact G = dL/dZ at the embeddings,
c_n = <G_n, zdot_n> is example n's share, and the operation's parameters get the gradient of c_n u, locally:

    g_hat = sum over operations and examples of c_n / sigma^2 (d operation_n / d parameter)^T u_n,   u = +-sigma

with sigma the root mean square of the operation's output: against unit noise that divided the variance by 6 to 80 on
vision transformers of width 64 and 128, where a few operations of small output otherwise drown the rest. Unbiased where
examples do not meet before the embeddings. There are as many directions as activations of *one* example, fewer than
weights, and no example suffers from another's noise (with one scalar for all it is worse than perturbing weights).
Two passes, 4 forward passes' worth of work, memory flat in depth: the second pass rebuilds the noise. The loss's own
parameters get their exact gradient. After Ren et al. (arXiv 2210.03310).

In a fast feedforward layer (`curate.estimators.branches`) a token disturbs what its own leaf or path computes, and
where a gate tells the loss of a decision, the logits of its own path: leaves and nodes that no token used get exactly
zero. A mean over the batch, as the penalties of such layers are (`Penalised`), is treated like the loss: its exact
gradient at the logits is multiplied with their tangents, which gives each example its share; and the nodes' own part,
a product of two small matrices, is exact. So nothing is left out, and no noise is added.
"""

# B batch, C columns: activations of one example, K tangents, S sides: embeddings with a derivative, and penalties last

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from curate.errors import CurateError, UsageError
from curate.estimators.branches import examples_first, idle
from curate.estimators.noise import NoiseGradient, TangentNoise
from curate.estimators.problem import Head, Problem, head_of, trainable
from curate.estimators.report import GradReport
from curate.estimators.swapping import Rewind, attention_for_tangents
from curate.estimators.tangents import dimensions
from curate.estimators.touched import coupled


@dataclass(frozen=True, slots=True)
class ForwardActivity:
    """`forward-activity`, with K = `tangents` independent draws of the noise, averaged.

    Errors: UsageError for K < 1, for BatchNorm in training, and for a parameter that meets no torch operation with a
    row per example (one in a kernel of somebody else's): leave those to `forward` in a hybrid.
    """

    name: str = "forward-activity"
    tangents: int = 1

    def __post_init__(self) -> None:
        if self.tangents < 1:
            raise UsageError(f"{self.name}: {self.tangents} tangents; at least 1 is needed")

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`."""
        began, named = time.perf_counter(), trainable(problem.module)
        if coupled(problem.module):
            raise UsageError("forward-activity: BatchNorm in training couples the examples of a batch, so that none "
                             "has a share of its own; put it in evaluation mode, or use forward")  # fmt: skip
        _refuse_time_first(problem.module)
        again, slopes, loss = Rewind(problem.module), [], 0.0
        for k in range(self.tangents):
            again.rewind()
            share_SB, head = _measure(problem, batch, named, (seed, step, k))
            slopes += share_SB.flatten().tolist()
            loss = head.loss
        report = GradReport(
            estimator=self.name,
            layout="activity",
            loss=loss,
            seed=seed,
            step=step,
            tangents=self.tangents,
            names=tuple(named),
            dimensions=dimensions(named),
            seconds=time.perf_counter() - began,
            slopes=tuple(slopes),
            coefficient=1 / self.tangents,
        )
        again.rewind()
        fill_activity(report, problem, batch)
        return report


def fill_activity(report: GradReport, problem: Problem, batch: Any) -> None:
    """The second pass: `.grad` from a report and the batch it was made of. Errors: UsageError for another batch."""
    every = dict(problem.module.named_parameters())
    named = {name: every[name] for name in report.names}
    gradient = {name: torch.zeros_like(p) for name, p in named.items()}
    again, head = Rewind(problem.module), None
    for k in range(report.tangents):
        again.rewind()
        noise = NoiseGradient(named, problem, gradient, report, k)
        with torch.no_grad(), forward_ad.dual_level(), attention_for_tangents(), noise:
            embeddings = problem.embed(noise.sized(batch))
        head = head_of(problem, embeddings)
    assert head is not None
    sides = sum(g is not None for g in head.gradient)
    if len(report.slopes) != report.tangents * sides * noise.examples:
        raise UsageError("the report is of another problem: one of the two has the penalties of its layers in the loss")
    for name, parameter in named.items():
        own = head.parameters.get(name)
        parameter.grad = gradient[name] if own is None else gradient[name] + own


def _measure(
    problem: Problem, batch: Any, named: dict[str, nn.Parameter], place: tuple[int, int, int]
) -> tuple[Tensor, Head]:
    """The first pass: shares [S, B] float64, and the loss."""
    noise = TangentNoise(named, problem, place)
    given = noise.sized(batch)
    with torch.no_grad(), forward_ad.dual_level(), attention_for_tangents():
        with examples_first(problem.module, noise.examples), noise:
            embeddings = problem.embed(given)
        unpacked = [forward_ad.unpack_dual(z) for z in embeddings]
        primal = tuple(z.primal.detach() for z in unpacked)
        of_noise = [None if z.tangent is None else z.tangent.detach() for z in unpacked]
    head = head_of(problem, primal)
    if not all(z.ndim for z in (primal[:-1] if noise.penalised else primal)):
        raise UsageError("forward-activity: an embedding without dimensions belongs to no example; use forward")
    if unmet := sorted(set(named) - noise.met - set(head.parameters) - idle(problem.module)):
        raise UsageError(f"forward-activity: {unmet[0]} meets no torch operation that noise could be added to; freeze "
                         "it if the model does not use it, or give it to forward in a hybrid")  # fmt: skip
    if noise.met and not any(z is not None and bool(z.any()) for z in of_noise):
        raise CurateError(
            "forward-activity: no tangent arrived at the embeddings; some layer drops forward derivatives"
        )
    rows = [
        torch.zeros(len(z), dtype=torch.float64) if t is None else (g.double() * t.double()).flatten(1).sum(1).cpu()
        for z, g, t in zip(primal, head.gradient, of_noise, strict=True)
        if g is not None and z.ndim
    ]
    return torch.stack([*rows, noise.penalty_B] if noise.penalised else rows), head


def _refuse_time_first(module: nn.Module) -> None:
    for path, owner in module.named_modules():
        if isinstance(owner, nn.MultiheadAttention) and not owner.batch_first:
            raise UsageError(f"forward-activity: {path} is not batch_first, and examples are looked for in the first "
                             "dimension; build the model with batch_first=True, or use forward")  # fmt: skip
