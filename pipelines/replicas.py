"""A worker's side of data-parallel forward gradients: replicas of the learner, kept in step by numbers alone.

A process keeps its replicas between tasks, under (run, rank). A replica that is missing or behind says so, and the
driver sends what it lacks: the updates since, or the learner as it was at the start and all updates. An update is
replayed in the time of making its tangents and of one optimiser step.
"""

# B examples, D embedding width, K tangents, r touched rows

from __future__ import annotations

import hashlib
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from curate.errors import CurateError
from curate.estimators.forward import Forward, Pushed
from curate.estimators.problem import Embeddings, Problem, trainable
from curate.estimators.replay import part_report, push_part, replay, together
from curate.estimators.report import GradReport, RowSlopes
from curate.estimators.tangents import dimensions

IDLE_SECONDS = 3600.0  # then a replica whose driver has gone makes room for others


@dataclass(frozen=True, slots=True)
class Rows:
    """`RowSlopes` in bytes: numbers of the parameters int32, of the rows int32 [r], slopes float64 [K, r]."""

    parameters: bytes
    rows: bytes
    values: bytes


@dataclass(frozen=True, slots=True)
class Numbers:
    """A report without what both sides know: seed, slopes [K] and slopes through the loss [K], both float64."""

    seed: int
    step: int
    loss: float
    coefficient: float
    slopes: bytes
    loss_slopes: bytes
    rows: tuple[Rows, ...]

    @property
    def nbytes(self) -> int:
        """What has to travel, without the envelope."""
        inner = sum(len(part.parameters) + len(part.rows) + len(part.values) for part in self.rows)
        return 32 + len(self.slopes) + len(self.loss_slopes) + inner


@dataclass(frozen=True, slots=True)
class Update:
    """A step of the driver's optimiser: the gradient in numbers, and each group's options at that step."""

    parts: tuple[Numbers, ...]
    options: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ClippedStep:
    """What is done with `.grad`: clip its norm, take the optimiser's step, bound exp(logit_scale). None: not that."""

    clip: float | None = 1.0
    most_scale: float | None = 100.0

    def __call__(self, module: Any, optimiser: torch.optim.Optimizer) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), self.clip)
        optimiser.step()
        if self.most_scale is not None and hasattr(module, "logit_scale"):
            with torch.no_grad():
                module.logit_scale.clamp_(max=math.log(self.most_scale))


Finish = Callable[[Any, torch.optim.Optimizer], None]


@dataclass(frozen=True, slots=True)
class History:
    """Updates from number `first` on; `birth` is the learner before it (problem, optimiser), pickled, if it is sent."""

    first: int
    updates: tuple[Update, ...]
    birth: bytes | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked in a step: to embed `part` of the batch (`history`), or to settle (`gathered`)."""

    run: str
    rank: int
    estimator: Forward
    finish: Finish
    seed: int
    step: int
    driver: int  # process
    threads: tuple[int, int]  # of torch: for embedding, and the driver's own, which decide how sums are rounded
    part: Any = None
    history: History | None = None
    gathered: Embeddings | None = None
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Behind:
    """The replica has made so many updates; -1: there is none."""

    made: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A digest of all trainable bits, and sum and norm of each parameter for a comparison across kinds of machines."""

    digest: str
    figures: tuple[float, ...]

    def deviation(self, other: Fingerprint) -> float:
        """0 for the same bits; else the largest difference of a figure, relative to it or to 1."""
        if self.digest == other.digest:
            return 0.0
        return max(abs(a - b) / max(abs(a), abs(b), 1.0) for a, b in zip(self.figures, other.figures, strict=True))


@dataclass(slots=True)
class _Replica:
    problem: Problem
    optimiser: torch.optim.Optimizer
    made: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    pushed: tuple[int, int, Pushed] | None = None  # seed, step
    used: float = field(default_factory=time.monotonic)


_replicas: dict[tuple[str, int], _Replica] = {}
_replicas_lock = threading.Lock()
_tangents_lock = threading.Lock()  # torch has one level of forward derivatives in a process, not in a thread


def push(task: Task) -> Embeddings | Behind:
    """Bring the replica up to date, push the tangents through `task.part` of the batch, and answer its embeddings."""
    with _up_to_date(task) as replica:
        if isinstance(replica, Behind):
            return replica
        _use_threads(task, 0)
        with _tangents_lock:
            pushed = push_part(task.estimator, replica.problem, task.part, seed=task.seed, step=task.step)
        replica.pushed = (task.seed, task.step, pushed)
    return tuple(z.cpu() for z in pushed.embeddings)


def settle(task: Task) -> Numbers | Behind:
    """This worker's part of the slopes, from everybody's embeddings."""
    replica = _find(task)
    assert task.gathered is not None
    if replica is None:
        return Behind(-1)
    with replica.lock:
        if replica.pushed is None or replica.pushed[:2] != (task.seed, task.step):
            return Behind(replica.made)
        pushed, replica.pushed = replica.pushed[2], None
        like = pushed.embeddings
        gathered = tuple(z.to(own.device) for z, own in zip(task.gathered, like, strict=True))
        _use_threads(task, 0)
        report = part_report(
            task.estimator, replica.problem, pushed, gathered, first=task.first_row, seed=task.seed, step=task.step
        )
    return numbers_of(report)


def fingerprint(task: Task) -> Fingerprint | Behind:
    """Bring the replica up to date, and answer what its weights are."""
    with _up_to_date(task) as replica:
        return replica if isinstance(replica, Behind) else fingerprint_of(replica.problem.module)


def forget(run: str) -> None:
    """Drop a run's replicas in this process."""
    with _replicas_lock:
        for key in [key for key in _replicas if key[0] == run]:
            del _replicas[key]


def fingerprint_of(module: nn.Module) -> Fingerprint:
    """Of the trainable parameters."""
    digest, figures = hashlib.blake2b(digest_size=16), []
    for parameter in trainable(module).values():
        values = parameter.detach().cpu().contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
        figures += [float(values.double().sum()), float(values.double().norm())]
    return Fingerprint(digest.hexdigest(), tuple(figures))


def numbers_of(report: GradReport) -> Numbers:
    """A report of layout rank-1 or dense for the wire."""
    place = {name: i for i, name in enumerate(report.names)}
    return Numbers(
        report.seed,
        report.step,
        report.loss,
        report.coefficient,
        np.asarray(report.slopes, np.float64).tobytes(),
        np.asarray(report.loss_slopes, np.float64).tobytes(),
        tuple(
            Rows(
                np.asarray([place[name] for name in rows.names], np.int32).tobytes(),
                np.asarray(rows.rows, np.int32).tobytes(),
                np.asarray(rows.values, np.float64).tobytes(),
            )
            for rows in report.rows
        ),
    )


def report_of(numbers: Numbers, estimator: Forward, module: nn.Module) -> GradReport:
    """The report again."""
    named = trainable(module)
    names = tuple(named)
    return GradReport(
        estimator=estimator.name,
        layout=estimator.layout,
        loss=numbers.loss,
        seed=numbers.seed,
        step=numbers.step,
        tangents=estimator.tangents,
        names=names,
        dimensions=dimensions(named),
        seconds=0.0,
        slopes=_floats(numbers.slopes),
        loss_slopes=_floats(numbers.loss_slopes),
        coefficient=numbers.coefficient,
        disjoint=estimator.disjoint,
        rows=tuple(_row_slopes(rows, names, estimator.tangents) for rows in numbers.rows),
    )


def fill(parts: tuple[Numbers, ...], estimator: Forward, module: nn.Module) -> GradReport:
    """`.grad` from the numbers of a step: the same bits wherever it is called."""
    reports = [report_of(part, estimator, module) for part in parts]
    report = reports[0] if len(reports) == 1 else together(reports)
    replay(report, module)
    return report


def _row_slopes(rows: Rows, names: tuple[str, ...], tangents: int) -> RowSlopes:
    row_r = np.frombuffer(rows.rows, np.int32)
    value_Kr = np.frombuffer(rows.values, np.float64).reshape(tangents, len(row_r))
    own = tuple(names[i] for i in np.frombuffer(rows.parameters, np.int32))
    return RowSlopes(own, tuple(row_r.tolist()), tuple(tuple(values) for values in value_Kr.tolist()))


def _floats(data: bytes) -> tuple[float, ...]:
    return tuple(np.frombuffer(data, np.float64).tolist())


@contextmanager
def _up_to_date(task: Task) -> Iterator[_Replica | Behind]:
    """The replica, locked, with every update of `task.history`."""
    history = task.history
    assert history is not None
    if history.birth is not None:
        problem, optimiser = pickle.loads(history.birth)
        with _replicas_lock:
            _replicas[task.run, task.rank] = _Replica(problem, optimiser, history.first)
    replica = _find(task)
    if replica is None:
        yield Behind(-1)
        return
    with replica.lock:
        if history.first <= replica.made <= history.first + len(history.updates):
            _use_threads(task, 1)
            for update in history.updates[replica.made - history.first :]:
                _repeat(replica, update, task)
            yield replica
        else:
            yield Behind(replica.made)


def _find(task: Task) -> _Replica | None:
    """The replica of a task, if it is here. Idle ones of other runs go."""
    now = time.monotonic()
    with _replicas_lock:
        for other in [key for key, r in _replicas.items() if key[0] != task.run and now - r.used > IDLE_SECONDS]:
            del _replicas[other]
        replica = _replicas.get((task.run, task.rank))
        if replica is not None:
            replica.used = now
        return replica


def _repeat(replica: _Replica, update: Update, task: Task) -> None:
    groups = replica.optimiser.param_groups
    if len(groups) != len(update.options):
        raise CurateError(f"the replica's optimiser has {len(groups)} groups, the driver's {len(update.options)}")
    fill(update.parts, task.estimator, replica.problem.module)
    for group, options in zip(groups, update.options, strict=True):
        group.update(options)
    task.finish(replica.problem.module, replica.optimiser)
    replica.made += 1


def _use_threads(task: Task, which: int) -> None:
    """Torch's threads, unless this is the driver's own process; whoever computes next sets what it needs."""
    if os.getpid() != task.driver and torch.get_num_threads() != task.threads[which]:
        torch.set_num_threads(task.threads[which])
