"""Penalties of fast feedforward layers in the loss that estimators see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators.forward import Forward
from curate.estimators.names import make_estimator
from curate.estimators.penalised import Penalised, penalises
from curate.estimators.probe import probe
from curate.estimators.problem import DualEncoderProblem, ModuleProblem, trainable
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.dense import Where
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.penalties import penalty
from curate.feedforward.surgery import replace_feedforward
from tests.oracle.estimator_cases import dual_encoder, exact, gradient, pairs


def small(**settings: Any) -> tuple[Penalised, Any]:
    """Two fast layers in float64 whose nodes have penalties."""
    dice = torch.Generator().manual_seed(0)
    settings = {"balance": 0.3, "hardening": 0.2, **settings}
    layers = [FastFeedforward(3, width_out=5, depth=2, leaf_width=3, generator=dice, **settings),
              FastFeedforward(5, width_out=4, depth=2, leaf_width=2, generator=dice, **settings)]  # fmt: skip
    module = nn.Sequential(*layers).double().train()
    batch = (torch.randn(9, 3, generator=dice).double(), torch.randint(0, 4, (9,), generator=dice))
    return Penalised(ModuleProblem(module, functional.cross_entropy)), batch


def towers(where: Where = "all") -> Penalised:
    """An open_clip model with penalised layers."""
    module = dual_encoder()
    replace_feedforward(module, FeedforwardConfig(depth=2, leaf_width=6, balance=0.5, hardening=0.5), where=where)
    return Penalised(DualEncoderProblem(module))


def test_the_gradient_is_that_of_loss_plus_penalty() -> None:
    """Backprop, with checkpoints too, gives that of `loss + penalty(model)`; no graph is left behind."""
    problem, batch = towers("vision"), pairs()  # with checkpoints more tokens of a caption run
    named = trainable(problem.module)
    loss = problem.inner.loss(*problem.inner.embed(batch)) + penalty(problem.module)
    wanted = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(named.values()))])
    torch.testing.assert_close(exact(problem, batch), wanted)
    assert penalty(problem.module) == 0.0
    report = make_estimator("backprop-checkpoint").estimate(problem, batch, seed=0, step=0)
    torch.testing.assert_close(gradient(problem), wanted, rtol=1e-4, atol=1e-5)  # captions are not trimmed
    assert report.loss == pytest.approx(float(loss.detach()))


def test_a_tangent_for_every_number_gives_the_gradient() -> None:
    """forward-exact is backprop, nodes that no token met included."""
    problem, batch = small()
    wanted = exact(problem, batch)
    make_estimator("forward-exact").estimate(problem, batch, seed=0, step=0)
    torch.testing.assert_close(gradient(problem), wanted, rtol=1e-5, atol=1e-7)  # penalties are float32


@pytest.mark.parametrize("estimator", [Forward(), Forward("forward-dense", "dense")])
def test_forward_gradients_are_unbiased(estimator: Forward) -> None:
    """The mean over seeds is the gradient, within its own standard error."""
    problem, batch = small()
    wanted, made = exact(problem, batch), []
    for seed in range(300):
        estimator.estimate(problem, batch, seed=seed, step=0)
        made.append(gradient(problem))
    found_SP = torch.stack(made)
    spread_P = (found_SP.var(0) / len(found_SP)).sqrt().clamp(min=1e-12)
    assert float(((found_SP.mean(0) - wanted) / spread_P).abs().max()) < 4.5


def test_slopes_are_right_through_both_towers() -> None:
    """The probe compares each derivative with backprop's, and finds heads without the layers' nodes among them."""
    problem = towers()
    report = probe(Forward(tangents=2), problem, pairs(), seeds=3, repeats=1)
    assert report.heads_progress is not None
    assert report.heads < 400
    rules = "*.mlp.node_*:backprop,*.mlp.*:forward,*:backprop"
    assert not probe(make_estimator("hybrid", rules=rules), problem, pairs(), seeds=2, repeats=1).ratio < 0.5


def test_without_penalties_nothing_changes() -> None:
    """Layers without penalties, and evaluation, give the loss itself."""
    problem, batch = small(balance=0.0, hardening=0.0)
    assert not penalises(problem.module)
    loss, plain = problem.loss(*problem.embed(batch)), problem.inner.loss(*problem.inner.embed(batch))
    assert torch.equal(loss, plain)
    problem, batch = small()
    assert penalises(problem.module)
    assert problem.embed(batch)[-1] > 0.1
    problem.module.eval()
    assert problem.embed(batch)[-1] == 0


@pytest.mark.parametrize("name", ["local-backprop", "forward-local"])
def test_local_losses_refuse_them(name: str) -> None:
    """A block's loss has no place for a penalty; the error says what does."""
    with pytest.raises(UsageError, match="no place for the penalties"):
        make_estimator(name).estimate(towers(), pairs(), seed=0, step=0)
