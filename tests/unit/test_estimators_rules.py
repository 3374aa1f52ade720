"""Names, hybrid rules, replaying a step and joining workers' parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from curate.errors import UsageError
from curate.estimators.forward import Forward
from curate.estimators.local import heads_of
from curate.estimators.names import NAMES, make_estimator, parse_rules
from curate.estimators.problem import DualEncoderProblem
from curate.estimators.replay import combine, replay
from tests.oracle.estimator_cases import classifier, dual_encoder, exact, gradient, pairs, with_leaves

RULES = "logit_*:exact,*mlp.w[12]:forward,*mlp.b[12]:forward,*mlp.node*:forward,*:backprop"


def test_every_name_makes_an_estimator_of_that_name() -> None:
    """The names are those of the documentation; a hybrid needs its rules."""
    for name in NAMES:
        assert make_estimator(name, rules="*:backprop" if name == "hybrid" else "").name == name
    with pytest.raises(UsageError, match="none of backprop"):
        make_estimator("forwards")
    with pytest.raises(UsageError, match="backprop has no tangents"):
        make_estimator("backprop", tangents=2)
    with pytest.raises(UsageError, match="zeroth-order has no disjoint"):
        make_estimator("zeroth-order", disjoint=True)


@pytest.mark.parametrize(
    ("estimator", "leaves"),
    [(Forward(), True), (Forward(tangents=3, disjoint=True), True), (Forward("forward-dense", "dense", 2), True),
     (make_estimator("zeroth-order", tangents=2), True), (make_estimator("forward-activity", tangents=2), False),
     (make_estimator("forward-activity", tangents=2), True)],
    ids=str,
)  # fmt: skip
def test_replay_gives_the_same_bits(estimator: Any, leaves: bool) -> None:
    """From the report (and, for activities, the batch) another copy of the model gets the identical gradient."""
    problem = with_leaves() if leaves else DualEncoderProblem(dual_encoder())
    batch = pairs()
    report = estimator.estimate(problem, batch, seed=11, step=7)
    other = with_leaves() if leaves else DualEncoderProblem(dual_encoder())
    other.module.load_state_dict(problem.module.state_dict())
    replay(report, other.module, problem=other, batch=batch)
    for mine, theirs in zip(problem.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_steps_and_seeds_draw_anew() -> None:
    """The same seed and step repeat an estimate bit for bit; another step does not."""
    problem, batch = classifier()
    found = []
    for step in (0, 0, 1):
        Forward().estimate(problem, batch, seed=0, step=step)
        found.append(gradient(problem))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_replay_refuses_what_numbers_do_not_hold() -> None:
    """Backprop's gradient, activities without their batch, and reports of another model."""
    problem, batch = classifier()
    with pytest.raises(UsageError, match="estimate again"):
        replay(make_estimator("backprop").estimate(problem, batch, seed=0, step=0), problem.module)
    report = make_estimator("forward-activity").estimate(problem, batch, seed=0, step=0)
    with pytest.raises(UsageError, match="problem= and batch="):
        replay(report, problem.module)
    with pytest.raises(UsageError, match="not of a batch of 5"):
        replay(report, problem.module, problem=problem, batch=(batch[0][:5], batch[1][:5]))
    with pytest.raises(UsageError, match="another model"):
        replay(Forward().estimate(problem, batch, seed=0, step=0), dual_encoder())


def test_only_parts_of_one_step_combine() -> None:
    """Different steps are refused by name; so are estimators whose gradients must travel, and no reports at all."""
    problem, batch = classifier()
    report = Forward().estimate(problem, batch, seed=0, step=0)
    with pytest.raises(UsageError, match="differ in step: 0 and 1"):
        combine([report, replace(report, step=1)])
    with pytest.raises(UsageError, match=r"sum \.grad"):
        combine([make_estimator("backprop").estimate(problem, batch, seed=0, step=0)])
    with pytest.raises(UsageError, match="no reports"):
        combine([])


def test_a_hybrid_gives_each_group_its_own_estimator() -> None:
    """Exact and backprop groups equal backprop; leaves are estimated forward, with the slopes of touched rows."""
    problem, batch = with_leaves(), pairs()
    exact(problem, batch)
    true = {name: p.grad.clone() for name, p in problem.module.named_parameters()}
    report = make_estimator("hybrid", rules=RULES).estimate(problem, batch, seed=0, step=0)
    assert [part.estimator for part in report.parts] == ["forward", "backprop"]
    leaves = {name for part in report.parts if part.estimator == "forward" for name in part.names}
    assert {name.rpartition(".")[2] for name in leaves} == {"w1", "b1", "w2", "b2", "node_weight", "node_bias"}
    for name, parameter in problem.module.named_parameters():
        assert parameter.requires_grad
        if name in leaves:
            assert not torch.allclose(parameter.grad, true[name]), name
        else:
            torch.testing.assert_close(parameter.grad, true[name], rtol=1e-4, atol=1e-5 * float(true[name].abs().max()))


def test_hybrid_rules_cover_every_parameter() -> None:
    """A parameter that no rule matches, a rule that decides nothing, and a rule that is none are errors."""
    problem, batch = DualEncoderProblem(dual_encoder()), pairs()
    with pytest.raises(UsageError, match="no rule matches positional_embedding"):
        make_estimator("hybrid", rules="logit_*:exact").estimate(problem, batch, seed=0, step=0)
    with pytest.raises(UsageError, match=r"rule visual\.prj decides about no parameter"):
        make_estimator("hybrid", rules="visual.prj:exact,*:backprop").estimate(problem, batch, seed=0, step=0)
    for text in ("*", ":backprop", "*:hybrid", "*:nothing"):
        with pytest.raises(UsageError, match="write pattern:estimator"):
            parse_rules(text)
    with pytest.raises(UsageError, match="no rules"):
        make_estimator("hybrid")


def test_heads_are_what_stands_behind_the_last_block() -> None:
    """Final norms, projections and the loss's own numbers; local losses leave them their exact gradient."""
    problem, batch = DualEncoderProblem(dual_encoder(layers=2)), pairs()
    exact(problem, batch)
    true = {name: p.grad.clone() for name, p in problem.module.named_parameters()}
    heads = heads_of(problem, batch)
    assert set(heads) == {
        "logit_scale", "logit_bias", "text_projection", "visual.proj",
        "ln_final.weight", "ln_final.bias", "visual.ln_post.weight", "visual.ln_post.bias",
    }  # fmt: skip
    for name in ("local-backprop", "forward-local"):
        make_estimator(name).estimate(problem, batch, seed=0, step=0)
        for head, parameter in heads.items():
            torch.testing.assert_close(parameter.grad, true[head], rtol=1e-4, atol=1e-5)


def test_forward_local_never_points_uphill() -> None:
    """Its product with the true gradient is that of the heads plus the squared slope of each tower."""
    problem, batch = DualEncoderProblem(dual_encoder(layers=2)), pairs()
    g_P = exact(problem, batch)
    report = make_estimator("forward-local").estimate(problem, batch, seed=0, step=0)
    found = float(gradient(problem) @ g_P)
    heads = sum(float(p.grad.double().square().sum()) for p in heads_of(problem, batch).values())
    assert len(report.slopes) == 2
    assert found == pytest.approx(heads + sum(slope**2 for slope in report.slopes), rel=1e-4)
    assert found > 0


def test_local_losses_need_blocks() -> None:
    """A model without repeated parts is refused."""
    problem, batch = classifier()
    single = replace(problem, module=problem.module[0])
    for name in ("local-backprop", "backprop-checkpoint"):
        with pytest.raises(UsageError, match="no ModuleList or Sequential"):
            make_estimator(name).estimate(single, batch, seed=0, step=0)
