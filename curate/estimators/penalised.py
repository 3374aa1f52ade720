"""A problem whose loss holds the penalties of its fast feedforward layers too (load balance, hardening).

The sum of penalties joins the embeddings as a number without dimensions: it belongs to no example, but has a tangent
like the rest, so that backprop, forward gradients, zeroth-order and hybrids of them learn from it alike. Costs the
logits of all nodes, which layers with a penalty compute in training anyway. Every node has a share in the penalties,
touched or not, so nodes lose their attribution; leaves keep it, and each touched one gets the penalties' whole slope.
Perturbed activations split it by example instead, exactly (`curate.estimators.activity`); local losses refuse it. The
balance is over all tokens that run: where captions are not trimmed (`backprop-checkpoint` hooks blocks), those behind
the pooled one count too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curate.estimators.problem import Embeddings, Problem
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.penalties import penalty


@dataclass(frozen=True, slots=True)
class Penalised:
    """`inner` with penalties. Without layers that have any, and in evaluation, they are 0.

    Example: `Backprop().estimate(Penalised(DualEncoderProblem(model)), batch, seed=0, step=0).loss`.
    """

    inner: Problem

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    def embed(self, batch: Any) -> Embeddings:
        _clear(self.module)
        embeddings = self.inner.embed(batch)
        total = penalty(self.module)
        _clear(self.module)  # or the last graph would stay in memory
        return *embeddings, total if isinstance(total, Tensor) else torch.zeros((), device=embeddings[0].device)

    def loss(self, *embeddings: Tensor) -> Tensor:
        return self.inner.loss(*embeddings[:-1]) + embeddings[-1]

    def side(self, name: str) -> int | None:
        return self.inner.side(name)

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:
        return self.inner.read(side, output, batch)


def penalises(module: nn.Module) -> bool:
    """Has any layer a penalty, were it trained?"""
    layers = (m for m in module.modules() if isinstance(m, FastFeedforward))
    return any(layer.depth and (layer.balance or layer.hardening) for layer in layers)


def _clear(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, FastFeedforward):
            layer.penalty = None
