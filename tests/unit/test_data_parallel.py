"""Data-parallel forward gradients: the single process's result, equal weights everywhere, and workers that die."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.errors import CurateError, UsageError
from curate.estimators.forward import Forward
from curate.estimators.probe import probe
from curate.estimators.problem import DualEncoderProblem, ModuleProblem, Problem, trainable
from curate.estimators.replay import together
from curate.pipelines.data_parallel import ForwardTeam, seed_of
from curate.pipelines.engine import Inline, OnDask, open_engine
from curate.pipelines.replicas import ClippedStep, fingerprint_of, forget
from tests.oracle.estimator_cases import classifier, dual_encoder, exact, gradient, pairs, with_leaves

STEPS = 4
# In float64 parts differ from the whole only by the order of sums; AdamW then divides by the root of a mean square,
# which magnifies a relative error little as long as the slope is not itself rounding.
DOUBLE = 1e-10
# In float32 each part is multiplied in blocks of another size, so embeddings differ by a few units of 6e-8, slopes by
# that times the number of terms that cancel.
SINGLE = 2e-4


@pytest.fixture(scope="module")
def threads() -> Iterator[OnDask]:
    with open_engine(workers=2, mode="threads") as engine:
        assert isinstance(engine, OnDask)
        yield engine


@pytest.fixture(scope="module")
def processes() -> Iterator[OnDask]:
    with open_engine(workers=2, mode="processes") as engine:
        assert isinstance(engine, OnDask)
        yield engine


def in_double(fast: bool = False) -> tuple[ModuleProblem, tuple[Tensor, Tensor]]:
    """A small classifier in float64."""
    problem, (points, labels) = classifier(fast=fast)
    problem.module.double()
    return problem, (points.double(), labels)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """With two groups, as trainers have it."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def steps(estimator: Any, problem: Problem, optimiser: Any, batch: Any, count: int = STEPS, first: int = 0) -> Any:
    """Train with a schedule; the last report."""
    report = None
    for step in range(first, first + count):
        report = estimator.estimate(problem, batch, seed=7, step=step)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        ClippedStep()(problem.module, optimiser)
    return report


def weights(problem: Problem) -> Tensor:
    """All numbers in one vector."""
    return torch.cat([p.detach().flatten().double() for p in trainable(problem.module).values()])


def alone(estimator: Forward, problem: Problem, batch: Any) -> tuple[Tensor, Any]:
    """Weights and last report of a single process."""
    report = steps(estimator, problem, adam(problem.module), batch)
    return weights(problem), report


def teamed(engine: Any, estimator: Forward, problem: Problem, batch: Any, workers: int) -> tuple[Tensor, Any]:
    """The same of a team, whose replicas have the driver's bits at the end."""
    optimiser = adam(problem.module)
    with ForwardTeam(engine, problem, optimiser, estimator, workers=workers) as team:
        report = steps(team, problem, optimiser, batch)
        assert team.check() == 0.0
        assert team.updates == STEPS
    return weights(problem), report


def part_of(problem: Problem, batch: Any, first: int, last: int) -> Tensor:
    """The gradient through some rows' embeddings only, the others held fixed."""
    z, labels = problem.embed(batch)
    kept = torch.zeros(len(z), 1, dtype=torch.bool)
    kept[first:last] = True
    named = trainable(problem.module)
    found = torch.autograd.grad(problem.loss(torch.where(kept, z, z.detach()), labels), list(named.values()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "estimator", [Forward(tangents=3), Forward("forward-dense", "dense", 2), Forward(tangents=4, disjoint=True)]
)
def test_a_team_is_the_single_process_in_double(workers: int, estimator: Forward) -> None:
    """Weights and slopes after several steps with a schedule are those of one process, to the rounding of sums."""
    (one, batch), (many, _) = in_double(), in_double()
    expected, report = alone(estimator, one, batch)
    found, shared = teamed(Inline(1), estimator, many, batch, workers)
    torch.testing.assert_close(found, expected, rtol=DOUBLE, atol=DOUBLE)
    assert shared.slopes == pytest.approx(report.slopes, rel=1e-8, abs=1e-10)
    assert shared.loss == pytest.approx(report.loss, rel=1e-9)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_leaves_keep_their_attribution(workers: int) -> None:
    """Rows that several workers touched get the sum of their shares."""
    (one, batch), (many, _) = in_double(fast=True), in_double(fast=True)
    expected, _ = alone(Forward(), one, batch)
    found, shared = teamed(Inline(1), Forward(), many, batch, workers)
    torch.testing.assert_close(found, expected, rtol=DOUBLE, atol=DOUBLE)
    assert shared.rows


@pytest.mark.parametrize("mode", ["inline", "threads", "processes"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_dual_encoder_learns_the_same_everywhere(mode: str, workers: int, threads: OnDask, processes: OnDask) -> None:
    """On every engine the contrastive loss over the gathered embeddings gives the single process's steps."""
    engine = {"inline": Inline(1), "threads": threads, "processes": processes}[mode]
    one, many = DualEncoderProblem(dual_encoder()), DualEncoderProblem(dual_encoder())
    expected, report = alone(Forward(tangents=2), one, pairs(8))
    found, shared = teamed(engine, Forward(tangents=2), many, pairs(8), workers)
    torch.testing.assert_close(found, expected, rtol=SINGLE, atol=SINGLE)
    assert shared.loss == pytest.approx(report.loss, rel=1e-5)


def test_fast_layers_in_both_towers() -> None:
    """Leaf and vocabulary rows travel as numbers of a few rows."""
    one, many = with_leaves(), with_leaves()
    expected, _ = alone(Forward(), one, pairs(8))
    found, shared = teamed(Inline(1), Forward(), many, pairs(8), 2)
    torch.testing.assert_close(found, expected, rtol=SINGLE, atol=SINGLE)
    assert any(name.endswith("mlp.w1") for rows in shared.rows for name in rows.names)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_by_replaying(processes: OnDask) -> None:
    """One of two processes is killed between steps: the next step goes on, all weights have the driver's bits."""
    one, many = DualEncoderProblem(dual_encoder()), DualEncoderProblem(dual_encoder())
    expected, _ = alone(Forward(), one, pairs(8))
    optimiser = adam(many.module)
    with ForwardTeam(processes, many, optimiser, Forward(), workers=2) as team:
        steps(team, many, optimiser, pairs(8), 2)
        victim = next(iter(processes.client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        steps(team, many, optimiser, pairs(8), STEPS - 2, first=2)
        assert team.check() == 0.0
    torch.testing.assert_close(weights(many), expected, rtol=SINGLE, atol=SINGLE)


def test_a_replica_that_is_lost_between_the_halves_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings were sent, then the replica vanished: it is born again, pushes again and settles."""
    (one, batch), (many, _) = in_double(), in_double()
    expected, _ = alone(Forward(), one, batch)
    optimiser = adam(many.module)
    with ForwardTeam(Inline(1), many, optimiser, Forward(), workers=2) as team:
        settled = team._settled
        calls = []

        def lossy(tasks: Any, embeddings: Any) -> Any:
            calls.append(tasks)
            if len(calls) == 3:
                forget(tasks[0].run)
            return settled(tasks, embeddings)

        monkeypatch.setattr(team, "_settled", lossy)
        steps(team, many, optimiser, batch)
        assert team.check() == 0.0
    torch.testing.assert_close(weights(many), expected, rtol=DOUBLE, atol=DOUBLE)


def test_a_long_log_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound the learner as it is replaces the log; replicas born after it are the same."""
    monkeypatch.setattr("curate.pipelines.data_parallel.MOST_REPLAYED", 1)
    (one, batch), (many, _) = in_double(), in_double()
    expected, _ = alone(Forward(), one, batch)
    optimiser = adam(many.module)
    with ForwardTeam(Inline(1), many, optimiser, Forward(), workers=2) as team:
        steps(team, many, optimiser, batch, 3)
        forget(team._task.run)
        steps(team, many, optimiser, batch, 1, first=3)
        assert team._first == 2
        assert team.check() == 0.0
    torch.testing.assert_close(weights(many), expected, rtol=DOUBLE, atol=DOUBLE)


def test_traffic_counts_what_travels() -> None:
    """Embeddings once up and once down per worker, K slopes and K more of the loss, against d numbers both ways."""
    problem = DualEncoderProblem(dual_encoder())
    optimiser = adam(problem.module)
    with ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=2) as team:
        team.estimate(problem, pairs(8), seed=0, step=0)
        traffic = team.traffic
    assert traffic is not None
    assert traffic.embeddings == 3 * (2 * 8 * 8 * 4)
    assert traffic.gradients == 2 * 2 * 4 * sum(p.numel() for p in problem.module.parameters())
    assert traffic.numbers < 4_000  # 48 bytes, and 12 for each word of the captions
    assert traffic.numbers < traffic.gradients / 20
    assert f"{traffic.gradients:,} bytes of gradients" in str(traffic)


def test_own_seeds_are_unbiased_and_vary_as_their_parts_disagree() -> None:
    """The mean is the gradient; E|g_hat|^2 is d sum |g_w|^2 + |g|^2 - sum |g_w|^2 for parts g_w of the gradient g."""
    problem, batch = in_double()
    g_P, edges = exact(problem, batch), (0, 4, 8, 12)
    square = sum(float(part_of(problem, batch, a, b).square().sum()) for a, b in itertools.pairwise(edges))
    with ForwardTeam(Inline(1), problem, adam(problem.module), Forward(), workers=3, own_seeds=True) as team:
        made = []
        for seed in range(120):
            team.estimate(problem, batch, seed=seed, step=0)
            made.append(gradient(problem))
    found_SP = torch.stack(made)
    wanted = (len(g_P) - 1) * square + float(g_P.square().sum())
    assert float(found_SP.square().sum(1).mean()) == pytest.approx(wanted, rel=0.25)
    spread_P = (found_SP.var(0) / len(found_SP)).sqrt()
    assert float(((found_SP.mean(0) - g_P) / spread_P).abs().max()) < 4.5


def test_own_seeds_keep_replicas_equal() -> None:
    """Every worker replays all workers' tangents."""
    problem, batch = in_double()
    optimiser = adam(problem.module)
    with ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=3, own_seeds=True) as team:
        report = steps(team, problem, optimiser, batch)
        assert team.check() == 0.0
    assert (report.layout, report.tangents, len(report.parts)) == ("sum", 3, 3)
    assert seed_of(5, 0) == 5
    assert len({seed_of(5, rank) for rank in range(100)}) == 100
    with pytest.raises(UsageError, match="a seed each"):
        together([report.parts[0], report.parts[0]])


def test_a_team_can_be_probed() -> None:
    """It is an estimator: `probe` measures it, repeating step 0 without an update."""
    problem = DualEncoderProblem(dual_encoder())
    optimiser = adam(problem.module)
    with ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=2) as team:
        report = probe(team, problem, pairs(8), seeds=2, repeats=1)
        assert (report.estimator, report.tangents, team.updates) == ("forward", 1, 0)


def test_a_driver_that_does_something_else_is_found_out() -> None:
    """Weights changed behind the team's back end in an error that says what to look at."""
    problem, batch = in_double()
    optimiser = adam(problem.module)
    with ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=2, check_every=1) as team:
        steps(team, problem, optimiser, batch, 1)
        with torch.no_grad():
            next(problem.module.parameters()).mul_(1.5)
        with pytest.raises(CurateError, match="weights differ from the driver's"):
            team.estimate(problem, batch, seed=7, step=1)


def test_what_a_team_refuses() -> None:
    """BatchNorm and dropout in training, a batch too small, another problem, no workers, a step without estimate."""
    problem, batch = in_double()
    optimiser = adam(problem.module)
    with pytest.raises(UsageError, match="0 workers"):
        ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=0)
    normed = DualEncoderProblem(dual_encoder(convolutional=True))
    with pytest.raises(UsageError, match="BatchNorm in training"):
        ForwardTeam(Inline(1), normed, adam(normed.module), Forward(), workers=2)
    dropped = ModuleProblem(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), problem.criterion)
    with pytest.raises(UsageError, match="dropout in training"):
        ForwardTeam(Inline(1), dropped, adam(dropped.module), Forward(), workers=2)
    with ForwardTeam(Inline(1), problem, optimiser, Forward(), workers=20) as team:
        with pytest.raises(UsageError, match="a batch of 12 for 20 workers"):
            team.estimate(problem, batch, seed=0, step=0)
        with pytest.raises(UsageError, match="another module"):
            team.estimate(in_double()[0], batch, seed=0, step=0)
        problem.module[0].weight.grad = torch.zeros_like(problem.module[0].weight)  # type: ignore[index,union-attr]
        with pytest.raises(CurateError, match="no estimate of the team preceded"):
            optimiser.step()
    optimiser.step()  # the team has let go
    assert fingerprint_of(problem.module).deviation(fingerprint_of(problem.module)) == 0
