"""Forward gradients over several workers: embeddings and a few numbers travel, gradients never do.

Each of W workers keeps a replica of the learner and pushes the same tangents through its part of the batch. Embeddings
are gathered and handed round, every worker settles its own part of the K slopes, the slopes are added up, and all
replay the same update, the driver too, from seed and slopes: weights stay equal, bit for bit on machines of one kind.

    with open_engine(workers=3, mode="processes") as engine:
        with ForwardTeam(engine, problem, optimiser, Forward(), workers=3, finish=ClippedStep()) as team:
            report = team.estimate(problem, batch, seed=0, step=0)      a GradientEstimator: fills .grad
            ClippedStep()(problem.module, optimiser)                    the team sees that the optimiser took a step
            print(team.traffic)

Per step 2 B D numbers go up and W 2 B D down for a dual encoder, beside the examples themselves; d up and d down per
worker for averaged gradients. A worker that died is replaced by replaying every step onto the learner as it was.
"""

# B batch, D embedding width, K tangents, W workers, d numbers of the model

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from curate.errors import CurateError, UsageError
from curate.estimators.forward import Forward
from curate.estimators.problem import Problem, trainable
from curate.estimators.replay import combine
from curate.estimators.report import GradReport
from curate.estimators.touched import coupled
from curate.pipelines.engine import Inline, OnDask, _result
from curate.pipelines.replicas import (
    Behind,
    ClippedStep,
    Finish,
    History,
    Numbers,
    Task,
    Update,
    fill,
    fingerprint,
    fingerprint_of,
    forget,
    numbers_of,
    push,
    report_of,
    settle,
)

_ATTEMPTS = 3  # at one worker's part of one step
MOST_REPLAYED = 2_000  # updates; then the learner is sent as it is now, which costs one message of its size
MOST_DEVIATION = 1e-3  # of a parameter's sum or norm, between kinds of machines


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step in both directions over all workers. `gradients`: what averaging gradients would have sent."""

    workers: int
    examples: int
    embeddings: int
    numbers: int
    gradients: int

    def __str__(self) -> str:
        return (
            f"{self.workers} workers, per step: {self.embeddings + self.numbers:,} bytes ({self.embeddings:,} of "
            f"embeddings, {self.numbers:,} of seeds and slopes) in place of {self.gradients:,} bytes of gradients; "
            f"besides {self.examples:,} bytes of examples"
        )


class ForwardTeam:
    """A `GradientEstimator` whose work is shared by `workers` replicas of `problem`.

    `finish` is what the driver does with `.grad` (`ClippedStep`); it travels, and so do problem and optimiser, once.
    Options of the optimiser's groups (rates) travel with each step, so that any schedule is followed. `own_seeds` gives
    every worker tangents of its own: W times less variance where the workers' parts of the gradient agree, more than
    without where they contradict each other (`curate.estimators.replay.together`). Every `check_every` steps
    the weights are compared. A context manager: at its end the workers forget the replicas.

    Errors: UsageError for BatchNorm or dropout in training (examples of different workers would not be treated as
    those of one process), for a batch smaller than the team, for another problem; CurateError where a replica is lost
    again and again, or has drifted away.
    """

    def __init__(
        self,
        engine: Inline | OnDask,
        problem: Problem,
        optimiser: torch.optim.Optimizer,
        estimator: Forward,
        *,
        workers: int,
        finish: Finish | None = None,
        own_seeds: bool = False,
        check_every: int = 100,
    ) -> None:
        if workers < 1:
            raise UsageError(f"{workers} workers; at least 1 is needed")
        _check_separable(problem.module)
        self.name, self.estimator, self.workers, self.own_seeds = estimator.name, estimator, workers, own_seeds
        self.traffic: Traffic | None = None
        self._problem, self._optimiser = problem, optimiser
        self._crew = _Crew(engine, workers)
        self._task = Task(
            os.urandom(8).hex(), 0, estimator, finish or ClippedStep(), 0, 0, os.getpid(),
            (engine.threads_per_unit, torch.get_num_threads()),
        )  # fmt: skip
        self._check_every, self._checked = check_every, 0
        self._birth, self._first, self._log = self._snapshot(), 0, list[Update]()
        self._known = [-1] * workers  # updates that each replica has made
        self._parts: tuple[Numbers, ...] | None = None  # of the last estimate
        self._hook = optimiser.register_step_post_hook(lambda *_: self._noted())

    def __enter__(self) -> ForwardTeam:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._crew.forget(self._task.run)

    @property
    def updates(self) -> int:
        """Steps of the optimiser so far."""
        return self._first + len(self._log)

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`. What the optimiser did since the last call is repeated by the replicas first."""
        began = time.perf_counter()
        if problem.module is not self._problem.module:
            raise UsageError("this team follows another module; make a team for each problem")
        _check_separable(problem.module)
        if self._check_every and self.updates >= self._checked + self._check_every:
            self.check()
        self._shorten()
        parts = _split(batch, self.workers)
        seeds = [seed_of(seed, rank) if self.own_seeds else seed for rank in range(self.workers)]
        tasks = [replace(self._task, rank=rank, seed=seeds[rank], step=step, part=part)
                 for rank, part in enumerate(parts)]  # fmt: skip
        found = self._settled(tasks, self._pushed(tasks))
        self._parts = found if self.own_seeds else (self._combined(found),)
        report = fill(self._parts, self.estimator, problem.module)
        return replace(report, seconds=time.perf_counter() - began)

    def check(self) -> float:
        """Bring all replicas up to date and compare their weights with the driver's: 0.0 for the same bits, else the
        largest relative difference of a parameter's sum or norm. Errors: CurateError above a thousandth."""
        asked = [replace(self._task, rank=rank, history=self._since(self._known[rank])) for rank in range(self.workers)]
        found = self._retried(fingerprint, asked, self._informed)
        self._known, self._checked = [self.updates] * self.workers, self.updates
        ours = fingerprint_of(self._problem.module)
        worst = max(ours.deviation(their) for their in found)
        if worst > MOST_DEVIATION:
            raise CurateError(f"after {self.updates} steps a worker's weights differ from the driver's by {worst:.2g}; "
                              "does the driver do with .grad what `finish` does?")  # fmt: skip
        return worst

    def _pushed(self, tasks: list[Task]) -> list[tuple[Tensor, ...]]:
        asked = [replace(task, history=self._since(self._known[task.rank])) for task in tasks]
        found = self._retried(push, asked, self._informed)
        self._known = [self.updates] * self.workers
        return found

    def _settled(self, tasks: list[Task], embeddings: list[tuple[Tensor, ...]]) -> tuple[Numbers, ...]:
        if not all(z.ndim for z in embeddings[0]):
            raise UsageError("penalties of fast feedforward layers are of a whole batch, and workers see a part each; "
                             "leave them out")  # fmt: skip
        gathered = tuple(torch.cat(own) for own in zip(*embeddings, strict=True))
        first, asked = 0, []
        for task, own in zip(tasks, embeddings, strict=True):
            asked.append(replace(task, part=None, gathered=gathered, first_row=first))
            first += len(own[0])

        def pushed_again(task: Task, made: int) -> Task:
            self._retried(push, [self._informed(tasks[task.rank], made)], self._informed)
            return task

        found = tuple(self._retried(settle, asked, pushed_again))
        self._count(tasks, gathered, found)
        return found

    def _retried(self, unit: Callable[[Task], Any], tasks: list[Task], mend: Callable[[Task, int], Task]) -> list[Any]:
        """Answers in the order of the tasks; one whose replica is behind is asked again with what it lacks."""
        answers = self._crew.run(unit, tasks)
        for _ in range(_ATTEMPTS):
            late = [i for i, answer in enumerate(answers) if isinstance(answer, Behind)]
            if late:
                self._crew.look_round()
                again = self._crew.run(unit, [mend(tasks[i], answers[i].made) for i in late])
                for i, answer in zip(late, again, strict=True):
                    answers[i] = answer
        if any(isinstance(answer, Behind) for answer in answers):
            raise CurateError(f"step {tasks[0].step}: a worker lost its replica {_ATTEMPTS} times; give it more "
                              "memory, or use fewer workers")  # fmt: skip
        return answers

    def _informed(self, task: Task, made: int) -> Task:
        return replace(task, history=self._since(made))

    def _since(self, made: int) -> History:
        """What a replica with so many updates lacks."""
        if made < self._first or made > self.updates:
            return History(self._first, tuple(self._log), self._birth)
        return History(made, tuple(self._log[made - self._first :]))

    def _combined(self, found: Sequence[Numbers]) -> Numbers:
        module = self._problem.module
        return numbers_of(combine([report_of(numbers, self.estimator, module) for numbers in found]))

    def _noted(self) -> None:
        if self._parts is None:
            raise CurateError("the optimiser took a step that no estimate of the team preceded; its replicas cannot "
                              "follow that")  # fmt: skip
        options = tuple({k: v for k, v in group.items() if k != "params"} for group in self._optimiser.param_groups)
        self._log.append(Update(self._parts, options))
        self._parts = None

    def _snapshot(self) -> bytes:
        return pickle.dumps((self._problem, self._optimiser))

    def _shorten(self) -> None:
        if len(self._log) > MOST_REPLAYED and min(self._known) >= self._first:
            # those that are not up to date are born again
            self._birth, self._first, self._log = self._snapshot(), self.updates, []

    def _count(self, tasks: list[Task], gathered: tuple[Tensor, ...], found: Sequence[Numbers]) -> None:
        W, up = self.workers, sum(numbers.nbytes for numbers in found)
        down = W * (up if self.own_seeds else found[0].nbytes)
        embeddings = sum(z.nbytes for z in gathered)
        examples = sum(leaf.nbytes for task in tasks for leaf in tree_leaves(task.part) if isinstance(leaf, Tensor))
        gradients = 2 * W * sum(p.numel() * p.element_size() for p in trainable(self._problem.module).values())
        self.traffic = Traffic(W, examples, (1 + W) * embeddings, up + down, gradients)


def seed_of(seed: int, rank: int) -> int:
    """A worker's own seed: rank 0 keeps the seed, so that a team of one is the single process."""
    if not rank:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=8, person=b"curate team").digest())


class _Crew:
    """Runs tasks where their replicas are, as far as those places still exist."""

    def __init__(self, engine: Inline | OnDask, workers: int) -> None:
        self._engine, self._places = engine, [""] * workers
        self.look_round()

    def look_round(self) -> None:
        """Give every rank whose worker is gone another one, the least busy."""
        if isinstance(self._engine, Inline):
            return
        there = sorted(self._engine.client.nthreads())
        if not there:
            raise CurateError("no Dask worker is left")
        self._places = [place if place in there else "" for place in self._places]
        for rank, place in enumerate(self._places):
            if not place:
                self._places[rank] = min(there, key=self._places.count)

    def run(self, unit: Callable[[Task], Any], tasks: list[Task]) -> list[Any]:
        """One answer per task, in order."""
        if isinstance(self._engine, Inline):
            return [unit(task) for task in tasks]
        futures = [
            # another worker may take it where the named one is gone: it will say that it has no replica
            self._engine.client.submit(
                unit, task, workers=[self._places[task.rank]], allow_other_workers=True, pure=False
            )
            for task in tasks
        ]
        return [_result(future) for future in futures]

    def forget(self, run: str) -> None:
        """Everywhere."""
        forget(run)
        if isinstance(self._engine, OnDask):
            self._engine.client.run(forget, run, on_error="ignore")


def _check_separable(module: nn.Module) -> None:
    if coupled(module):
        raise UsageError("BatchNorm in training couples the examples of a batch, and workers see a part each; put it "
                         "in evaluation mode, or choose a model without it")  # fmt: skip
    dropout = (m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    if any(m.p and m.training for m in dropout):
        raise UsageError("dropout in training draws differently in every worker; set it to 0")


def _split(batch: Any, workers: int) -> list[Any]:
    """Parts of nearly equal size along the first dimension of every tensor."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or len(tensors[0]) < workers:
        size = len(tensors[0]) if tensors else 0
        raise UsageError(f"a batch of {size} for {workers} workers; each needs an example at least")
    edges = [len(tensors[0]) * rank // workers for rank in range(workers + 1)]
    return [
        tree_map(lambda leaf: leaf[a:b].clone() if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)  # noqa: B023
        for a, b in itertools.pairwise(edges)
    ]
