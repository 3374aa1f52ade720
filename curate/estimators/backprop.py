"""The exact gradient by reverse mode: 3 forward passes' worth of work, memory for every layer's activations.

`backprop-checkpoint` keeps only what goes into each block and computes the block again on the way back (Chen et al.,
arXiv 1604.06174): 4 forward passes, memory for one block and the blocks' inputs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from curate.errors import UsageError
from curate.estimators.problem import Problem, trainable
from curate.estimators.report import GradReport
from curate.estimators.tangents import dimensions


@dataclass(frozen=True, slots=True)
class Backprop:
    """`backprop`, `backprop-checkpoint` and, in a hybrid, `exact`. Parameters that the loss does not use get zeros."""

    name: str = "backprop"
    checkpointed: bool = False

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`. Errors: UsageError where `checkpointed` finds no blocks."""
        began, named = time.perf_counter(), trainable(problem.module)
        around = checkpointed(problem.module) if self.checkpointed else contextlib.nullcontext()
        with torch.enable_grad(), around:
            loss = problem.loss(*problem.embed(batch))
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        return GradReport(
            estimator=self.name,
            layout="exact",
            loss=float(loss.detach()),
            seed=seed,
            step=step,
            tangents=0,
            names=tuple(named),
            dimensions=dimensions(named),
            seconds=time.perf_counter() - began,
        )


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of a model: children of its outermost ModuleLists and Sequentials that hold parameters.

    Example: an open_clip CLIP has "visual.transformer.resblocks.0" and so on, and "transformer.resblocks.0" for text.
    """
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= {f"{name}.{inner}": block for inner, block in blocks_of(child).items()}
    return found


@contextlib.contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Recompute every block in the backward pass. Errors: UsageError without blocks."""
    blocks = list(blocks_of(module).values())
    if not blocks:
        raise UsageError("no ModuleList or Sequential in the model, so there are no blocks to checkpoint")
    try:
        for block in blocks:
            object.__setattr__(block, "forward", _recomputed(block))
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _recomputed(block: nn.Module) -> Any:
    forward = block.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def run(*inner: Any, **options: Any) -> Any:
            for buffer, before in kept:  # empty the first time
                buffer.copy_(before)  # or running statistics would move twice
            kept[:] = kept or [(buffer, buffer.clone()) for buffer in block.buffers()]
            return forward(*inner, **options)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return twice
