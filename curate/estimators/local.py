"""Gradients of local losses: each block serves the loss by itself, and no gradient crosses from block to block.

A block's output is read as an embedding, through its tower's own last norm and projection (`Problem.read`), or else
as the mean over tokens or pixels times a fixed random sign matrix. That replaces its tower's embedding in the loss,
against the final embedding of the other tower (or the labels). What comes before the first block learns with it;
what comes after the last learns from the real loss. (Towers of four and three blocks, after 20 steps: cosine with
backprop 0.12 with the tower's own head, 0.01 with random signs.)
`local-backprop` uses these gradients as they are: 4 forward passes, memory for one block, biased.
`forward-local` takes them as a guess v and scales each tower's part by its exact slope, from one jvp:

    g_hat = <g, v> / |v|^2 v        <g_hat, g> >= 0: never uphill in expectation or otherwise

After Ren et al. (arXiv 2210.03310) and Fournier et al. (arXiv 2306.06968).
"""

# B batch, T tokens, W width of a block, D embedding width

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators.backprop import blocks_of
from curate.estimators.problem import Embeddings, Problem, head_of, trainable
from curate.estimators.products import RankOneProducts
from curate.estimators.report import GradReport
from curate.estimators.signs import key_of, signs
from curate.estimators.swapping import Rewind, attention_for_tangents, swapped
from curate.estimators.tangents import dimensions


@dataclass(frozen=True, slots=True)
class LocalBackprop:
    """`local-backprop`. Errors: UsageError for a model without blocks, for a block that does not run as a module, and
    for embeddings that are not [B, D]."""

    name: str = "local-backprop"

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`. `seed` and `step` draw nothing: the projections are fixed."""
        began, named = time.perf_counter(), trainable(problem.module)
        gradient, embeddings, _ = local_gradients(problem, batch)
        for name, parameter in named.items():
            parameter.grad = gradient[name]
        with torch.no_grad():
            loss = float(problem.loss(*embeddings))
        return _report(self.name, named, loss, seed, step, began)


@dataclass(frozen=True, slots=True)
class ForwardLocal:
    """`forward-local`: guess directions, exact slopes. 7 forward passes at most. Errors: those of LocalBackprop."""

    name: str = "forward-local"

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`. `slopes` are <g, v> / |v| of each tower; heads keep their exact gradient."""
        began, named = time.perf_counter(), trainable(problem.module)
        again = Rewind(problem.module)
        gradient, embeddings, heads = local_gradients(problem, batch)
        guess = {name: direction for name, direction in gradient.items() if name not in heads}
        share = _exact_slopes(problem, batch, {named[name]: v for name, v in guess.items()}, again)
        slopes = []
        for side in sorted(set(map(problem.side, guess)), key=str):
            own = [name for name in guess if problem.side(name) == side]
            square = sum(float(guess[name].double().square().sum()) for name in own)
            slope = sum(share) if side is None else share[side]
            for name in own:
                gradient[name] = guess[name] * (slope / square if square else 0.0)
            slopes.append(slope / math.sqrt(square) if square else 0.0)
        for name, parameter in named.items():
            parameter.grad = gradient[name]
        with torch.no_grad():
            loss = float(problem.loss(*embeddings))
        return replace(_report(self.name, named, loss, seed, step, began), slopes=tuple(slopes), tangents=1)


def local_gradients(problem: Problem, batch: Any) -> tuple[dict[str, Tensor], Embeddings, frozenset[str]]:
    """Gradients of the local losses, of the real one for the heads, for every trainable parameter; Z; the heads."""
    named, again = trainable(problem.module), Rewind(problem.module)
    with torch.no_grad():
        final = problem.embed(batch)
    if not all(z.ndim for z in final):
        raise UsageError("local losses have no place for the penalties of fast feedforward layers; use backprop, "
                         "forward or a hybrid of them, or set balance and hardening to 0")  # fmt: skip
    again.rewind()
    gradient = {name: torch.zeros_like(p) for name, p in named.items()}

    def learn(side: int, output: Tensor) -> None:
        read = problem.read(side, output, batch)
        local = readout(output, final[side]) if read is None else read
        loss = problem.loss(*(local if i == side else z for i, z in enumerate(final)))
        for name, own in _gradients(named, loss).items():
            gradient[name] += own

    with torch.enable_grad(), _severed(problem, learn):
        exact = _gradients(named, problem.loss(*problem.embed(batch)))
    gradient |= exact  # in place of what the local losses made of the heads
    return gradient, final, frozenset(exact)


def heads_of(problem: Problem, batch: Any) -> dict[str, nn.Parameter]:
    """Parameters behind the last block of each tower, the loss's own among them: what is cheap to learn exactly."""
    named, again = trainable(problem.module), Rewind(problem.module)
    with torch.enable_grad(), _severed(problem, None):
        # penalties arise within blocks: what they reach is no head
        loss = problem.loss(*(z if z.ndim else z.detach() for z in problem.embed(batch)))
    found = _gradients(named, loss)
    again.rewind()
    return {name: named[name] for name in found}


def readout(output: Tensor, like_BD: Tensor) -> Tensor:
    """Read an embedding [B, D] from a block's output [B, W], [B, T, W] or [B, C, H, W]; unit vectors if Z has those."""
    pooled_BW = (
        output.mean((2, 3)) if output.ndim == 4 else output.flatten(1, -2).mean(1) if output.ndim > 2 else output
    )
    if len(pooled_BW) != len(like_BD) or like_BD.ndim != 2:
        raise UsageError(f"a block makes {tuple(output.shape)}, from which no embedding like {tuple(like_BD.shape)} "
                         "can be read; local losses need a row per example and embeddings [B, D]")  # fmt: skip
    W, D = pooled_BW.shape[1], like_BD.shape[1]
    projection_WD = signs(key_of(0, 0, 0, "readout"), W, D, device=output.device, dtype=pooled_BW.dtype) / math.sqrt(W)
    read_BD = pooled_BW @ projection_WD
    unit = bool(torch.allclose(like_BD.norm(dim=1), like_BD.new_ones(len(like_BD)), atol=1e-3))
    return functional.normalize(read_BD, dim=-1) if unit else read_BD


@contextmanager
def _severed(problem: Problem, learn: Any) -> Iterator[None]:
    """Cut the graph behind every block, and show `learn` what came out of it. Without `learn`, the heads remain."""
    blocks = {name: block for name, block in blocks_of(problem.module).items() if _learns(block)}
    if not blocks:
        raise UsageError("no ModuleList or Sequential with trainable blocks, so there is nothing to give a local loss")
    ran: set[str] = set()
    hooks = [block.register_forward_hook(_cut(problem, name, learn, ran)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if idle := sorted(set(blocks) - ran):
        raise UsageError(f"block {idle[0]} never ran as a module, so it has no local loss; let Problem.embed call it")


def _learns(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def _cut(problem: Problem, name: str, learn: Any, ran: set[str]) -> Any:
    side = problem.side(f"{name}.")

    def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or side is None:
            raise UsageError(f"block {name} makes {type(output).__name__} for side {side}; local losses need a tensor "
                             "that belongs to one embedding")  # fmt: skip
        ran.add(name)
        if learn is not None:
            learn(side, output)
        return output.detach()

    return hook


def _gradients(named: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: own for name, own in zip(named, found, strict=True) if own is not None}


def _exact_slopes(problem: Problem, batch: Any, guess: dict[nn.Parameter, Tensor], again: Rewind) -> list[float]:
    """<G, zdot> of every embedding along the guess: one jvp."""
    again.rewind()
    with torch.no_grad(), attention_for_tangents(), forward_ad.dual_level():
        dual = {p: forward_ad.make_dual(p.detach(), v) for p, v in guess.items()}
        with swapped(problem.module, dual), RankOneProducts({}, _no_factors):
            embeddings = problem.embed(batch)
        unpacked = [forward_ad.unpack_dual(z) for z in embeddings]
        primal, moved = [z.primal.detach() for z in unpacked], [z.tangent for z in unpacked]
    head = head_of(problem, tuple(primal))
    pairs = zip(head.gradient, moved, strict=True)
    return [0.0 if g is None or t is None else float((g.double() * t.double()).sum()) for g, t in pairs]


def _no_factors(name: str) -> tuple[Tensor, Tensor]:
    raise AssertionError(name)


def _report(name: str, named: dict[str, nn.Parameter], loss: float, seed: int, step: int, began: float) -> GradReport:
    return GradReport(
        estimator=name,
        layout="local",
        loss=loss,
        seed=seed,
        step=step,
        tangents=0,
        names=tuple(named),
        dimensions=dimensions(named),
        seconds=time.perf_counter() - began,
    )
