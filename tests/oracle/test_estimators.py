"""Gradient estimators against backprop: exact slopes, no bias, the variance that the mathematics promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.errors import CurateError
from curate.estimators.activity import ForwardActivity
from curate.estimators.forward import Forward, ForwardExact
from curate.estimators.names import make_estimator
from curate.estimators.probe import probe
from curate.estimators.problem import DualEncoderProblem, ModuleProblem, trainable
from curate.estimators.replay import combine, part_report, push_part, replay
from tests.oracle.estimator_cases import (
    classifier,
    dual_encoder,
    estimates,
    exact,
    gradient,
    pairs,
    with_leaves,
)

# P all numbers of a model, n seeds
RANK_ONE, DENSE = Forward(), Forward("forward-dense", "dense")


def slopes_fit(estimator: Forward, problem: Any, batch: Any) -> None:
    """<g, v> of backprop against the slope that came back, for three seeds; to float32 rounding of |g|."""
    g_P = exact(problem, batch)
    for seed in range(3):
        report = estimator.estimate(problem, batch, seed=seed, step=1)
        tangents = estimator.directions(problem.module, seed=seed, step=1)
        for k in range(tangents.count):
            v_P = torch.cat([tangents.whole(name, k).flatten().double() for name in tangents.parameters])
            assert abs(float(v_P @ g_P) - report.slopes[k] - report.loss_slopes[k]) < 1e-4 * float(g_P.norm())


def unbiased(found_nP: Tensor, g_P: Tensor) -> None:
    """The mean of n estimates lies where n estimates of this spread around g put it.

    Two views: along g, within 4 standard errors; and all directions together: |mean - g|^2 has the expectation
    (sum of variances) / n, of which 1.5 times is allowed.
    """
    n, along_n = len(found_nP), found_nP @ g_P / g_P.square().sum()
    assert abs(float(along_n.mean()) - 1) < 4 * float(along_n.std()) / n**0.5
    assert float((found_nP.mean(0) - g_P).square().sum()) < 1.5 * float(found_nP.var(0).sum()) / n


@pytest.mark.parametrize("estimator", [RANK_ONE, DENSE, Forward(tangents=3, disjoint=True)], ids=str)
@pytest.mark.parametrize("case", ["sigmoid", "softmax", "convolutional", "leaves", "evaluation"])
def test_slopes_are_those_of_backprop(estimator: Forward, case: str) -> None:
    """Along every tangent the derivative is <g, v>: transformers, convolutions, batch norms, leaves, both losses."""
    if case == "leaves":
        slopes_fit(estimator, with_leaves(), pairs())
        return
    module = dual_encoder("softmax" if case == "softmax" else "sigmoid", convolutional=case == "convolutional")
    module.train(case != "evaluation")
    slopes_fit(estimator, DualEncoderProblem(module), pairs(pixels=32 if case == "convolutional" else 16))


def test_frozen_weights_keep_their_products() -> None:
    """With every second parameter frozen the slopes still are those of backprop, for what is not."""
    module = dual_encoder()
    for parameter in list(module.parameters())[::2]:
        parameter.requires_grad_(False)
    slopes_fit(RANK_ONE, DualEncoderProblem(module), pairs())


@pytest.mark.parametrize(
    "estimator",
    [RANK_ONE, DENSE, Forward(tangents=4), Forward(tangents=3, disjoint=True), ForwardActivity()],
    ids=str,
)
def test_no_bias_on_a_classifier(estimator: Any) -> None:
    """The mean over 200 seeds is the gradient, to its standard error."""
    problem, batch = classifier()
    unbiased(estimates(estimator, problem, batch, 200), exact(problem, batch))


@pytest.mark.parametrize("estimator", [RANK_ONE, ForwardActivity()], ids=str)
def test_no_bias_on_a_contrastive_loss(estimator: Any) -> None:
    """The same for a dual encoder, whose examples meet in the loss; vocabulary rows have slopes of their own."""
    problem, batch = DualEncoderProblem(dual_encoder(width=8)), pairs()
    unbiased(estimates(estimator, problem, batch, 100), exact(problem, batch))


def test_no_bias_in_a_convolutional_tower() -> None:
    """The same for activities of a ResNet with an attention pool, in evaluation mode."""
    problem, batch = DualEncoderProblem(dual_encoder(convolutional=True, width=8).eval()), pairs(pixels=32)
    with torch.no_grad():
        for name, parameter in problem.module.named_parameters():
            parameter.requires_grad_(name.startswith("visual.") and parameter.numel() < 2000)
            if name.endswith("bn3.weight"):
                parameter.fill_(0.5)
    unbiased(estimates(ForwardActivity(), problem, batch, 60), exact(problem, batch))


def test_no_bias_with_leaf_attribution() -> None:
    """The same with fast feedforward layers, whose leaves and nodes have slopes of their own."""
    problem, batch = classifier(fast=True)
    unbiased(estimates(RANK_ONE, problem, batch, 200), exact(problem, batch))


def test_zeroth_order_has_no_bias_but_its_step() -> None:
    """Two evaluations of the loss give the same mean, since eps is small."""
    problem, batch = classifier()
    unbiased(estimates(make_estimator("zeroth-order"), problem, batch, 200), exact(problem, batch))


@pytest.mark.parametrize("layout", ["rank-1", "dense"])
@pytest.mark.parametrize(("tangents", "disjoint"), [(1, False), (4, False), (2, True)])
def test_second_moment(layout: Any, tangents: int, disjoint: bool) -> None:
    """E|g_hat|^2 / |g|^2 is d for one tangent, 1 + (d - 1) / K for K, d / K for disjoint ones; within 4 errors."""
    problem, batch = classifier()
    d = len(exact(problem, batch))
    wanted = d / tangents if disjoint else 1 + (d - 1) / tangents
    estimator = Forward(layout=layout, tangents=tangents, disjoint=disjoint)
    g_P = exact(problem, batch)
    ratio_n = estimates(estimator, problem, batch, 250).square().sum(1) / g_P.square().sum()
    assert abs(float(ratio_n.mean()) - wanted) < 4 * float(ratio_n.std()) / 250**0.5


def test_disjoint_tangents_for_every_number_are_exact() -> None:
    """With as many tangents as a vector has numbers, and each its own, the estimate is the gradient."""
    problem, batch = classifier()
    for name, parameter in problem.module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    wanted_P = exact(problem, batch)
    Forward(tangents=len(wanted_P), disjoint=True).estimate(problem, batch, seed=5, step=0)
    torch.testing.assert_close(gradient(problem), wanted_P, rtol=1e-5, atol=1e-6)


def test_forward_exact_is_backprop() -> None:
    """One tangent per number gives backprop's gradient to 1e-5."""
    for problem, batch in (classifier(), classifier(fast=True)):
        wanted_P = exact(problem, batch)
        ForwardExact().estimate(problem, batch, seed=0, step=0)
        torch.testing.assert_close(gradient(problem), wanted_P, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convolutional", [False, True])
def test_checkpointed_backprop_is_backprop(convolutional: bool) -> None:
    """Blocks computed twice give the same gradient, and batch statistics move once."""
    batch = pairs(pixels=32 if convolutional else 16)
    problem = DualEncoderProblem(dual_encoder(layers=2, convolutional=convolutional))
    before = {name: buffer.clone() for name, buffer in problem.module.named_buffers()}
    wanted_P = exact(problem, batch)
    after = {name: buffer.clone() for name, buffer in problem.module.named_buffers()}
    for name, buffer in problem.module.named_buffers():
        buffer.copy_(before[name])
    make_estimator("backprop-checkpoint").estimate(problem, batch, seed=0, step=0)
    torch.testing.assert_close(gradient(problem), wanted_P, rtol=1e-4, atol=1e-5 * float(wanted_P.abs().max()))
    for name, buffer in problem.module.named_buffers():
        torch.testing.assert_close(buffer, after[name])


def test_attributed_activities_vary_far_less_than_weights() -> None:
    """On a contrastive loss the embedding split has less than a tenth of the variance of one scalar for all weights."""
    problem, batch = DualEncoderProblem(dual_encoder(width=32, layers=2)), pairs(16)
    problem.module.token_embedding.weight.requires_grad_(False)  # its rows would be attributed
    square = float(exact(problem, batch).square().sum())
    activity_n, weight_n = (
        estimates(e, problem, batch, 30).square().sum(1) / square for e in (ForwardActivity(), RANK_ONE)
    )
    d = sum(p.numel() for p in trainable(problem.module).values())
    assert float(weight_n.mean()) == pytest.approx(d, abs=4 * float(weight_n.std()) / 30**0.5)
    assert float(activity_n.mean()) + 4 * float(activity_n.std()) / 30**0.5 < d / 10


def test_leaf_attribution_divides_the_variance() -> None:
    """One token per example and 8 leaves: the leaves' part of the variance falls to less than half of what it was."""
    problem, batch = classifier(fast=True)
    own = {name: p for name, p in problem.module.named_parameters() if name.startswith(("1.w", "1.b"))}
    for name, parameter in problem.module.named_parameters():
        parameter.requires_grad_(name in own)
    square = float(exact(problem, batch).square().sum())
    attributed = float(estimates(RANK_ONE, problem, batch, 150).square().sum(1).mean()) / square
    touched = sum(
        p[torch.unique(problem.module[1].leaf_indices(problem.module[0](batch[0])))].numel() for p in own.values()
    )
    assert attributed < touched / 2  # without attribution, and masked, it is the number of touched weights


@pytest.mark.parametrize("build", [lambda: DualEncoderProblem(dual_encoder()), with_leaves], ids=["dense", "leaves"])
@pytest.mark.parametrize("split", [(4, 4), (3, 5)])
def test_workers_find_what_one_process_finds(build: Any, split: tuple[int, int]) -> None:
    """Two workers that send embeddings and slopes only arrive at the single process's gradient."""
    problem, (image_BCHW, token_BT) = build(), pairs(8)
    alone = RANK_ONE.estimate(problem, (image_BCHW, token_BT), seed=4, step=9)
    wanted_P = gradient(problem)
    place: Any = {"seed": 4, "step": 9}
    batches = list(zip(image_BCHW.split(split), token_BT.split(split), strict=True))
    pushed = [push_part(RANK_ONE, problem, batch, **place) for batch in batches]
    gathered = tuple(torch.cat(side) for side in zip(*(part.embeddings for part in pushed), strict=True))
    reports = [
        part_report(RANK_ONE, problem, part, gathered, first=first, **place)
        for part, first in zip(pushed, (0, split[0]), strict=True)
    ]
    joined = combine(reports)
    assert joined.loss == pytest.approx(alone.loss, rel=1e-5)
    replay(joined, problem.module)
    torch.testing.assert_close(gradient(problem), wanted_P, rtol=1e-3, atol=1e-4 * float(wanted_P.abs().max()))


class LostTangent(torch.autograd.Function):
    """The identity with a planted fault: its forward derivative is zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(_ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


class Loses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return LostTangent.apply(x)  # type: ignore[no-any-return]


def test_a_planted_zero_derivative_turns_the_oracle_red() -> None:
    """A layer in the middle that drops tangents is found by the slope test, and by the probe, which says so."""
    problem, batch = classifier()
    broken = ModuleProblem(nn.Sequential(problem.module[0], Loses(), *problem.module[1:]), problem.criterion)
    with pytest.raises(AssertionError):
        slopes_fit(RANK_ONE, broken, batch)
    with pytest.raises(CurateError, match="loses or miscounts forward derivatives"):
        probe(RANK_ONE, broken, batch, seeds=2, repeats=1)


def test_a_tangent_that_never_arrives_is_an_error() -> None:
    """Where the last layer drops tangents, every estimator that pushes some says so instead of filling in zeros."""
    problem, batch = classifier()
    broken = ModuleProblem(nn.Sequential(problem.module, Loses()), problem.criterion)
    for estimator in (RANK_ONE, DENSE, ForwardActivity()):
        with pytest.raises(CurateError, match="arrived at the embeddings"):
            estimator.estimate(broken, batch, seed=0, step=0)
