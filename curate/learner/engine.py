"""The loop: read a super-batch, let the learner score it, draw, train on what was drawn; over and over, resumably.

A step is a function of the weights, the position in the data and the number of the step; the random numbers of the
draw, of augmentation and of forward gradients are counter-based. So a run that was stopped and taken up again ends with
the bits of one that was not, on the same machine and number of threads; on a GPU as far as torch's kernels there repeat
their own bits (convolutions and attention backwards may not).
Source: Evans et al. 2024, arXiv 2406.17711, Algorithm 1.
"""

# B candidates, b drawn, C channels, H, W height and width, T tokens, N pairs of the source

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.costs.ledger import CostLedger, PhaseName
from curate.errors import CurateError, UsageError
from curate.learner.candidates import Candidates
from curate.learner.choosing import Chosen
from curate.learner.drawing import Drawer
from curate.learner.handover import Controller
from curate.learner.plan import Plan
from curate.learner.policing import Tally
from curate.learner.reading_ahead import Ahead, SuperBatch
from curate.learner.settings import TrainSettings
from curate.learner.stepping import Stepper
from curate.selection.joint import Pairs


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run after `step` of `steps`: the batch's loss and the rate so far in samples per second."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """A super-batch that waits for its turn: where it began in the data, the plan it was scored under, what the learner
    thought of it."""

    start: int
    plan: Plan
    batch: SuperBatch
    learner: Pairs | None


@dataclass(slots=True)
class Course:
    """Everything of a run that changes beside weights and optimiser; what a state holds of it."""

    control: Controller
    times_N: NDArray[np.int32]
    step: int = 0
    position: int = 0
    trained: int = 0
    scored: int = 0
    seconds: float = 0.0
    plain: float = 0.0
    ledger: CostLedger = field(default_factory=CostLedger)
    losses: list[float] = field(default_factory=list)
    waiting: deque[Scored] = field(default_factory=deque)
    tally: Tally | None = None  # under a policy

    @property
    def plan(self) -> Plan:
        """What the next super-batch is looked at for."""
        return self.control.plan

    def spend(self, phase: PhaseName, **figures: Any) -> None:
        """Write cost into the ledger."""
        self.ledger = self.ledger.add(phase, **figures)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step did: the rows of the pair source that it trained on, in the order drawn, and its figures.

    `events` is how many changes of phase there were before it ended.
    """

    step: int
    row_b: NDArray[np.int64]
    chosen: Chosen
    plan: Plan
    loss: float
    rate: float
    candidates: NDArray[np.int64]
    events: int
    lag: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A learner, its data and how to draw; `run` trains to the last step."""

    settings: TrainSettings
    candidates: Candidates
    drawer: Drawer
    stepper: Stepper
    course: Course
    steps: int

    def run(self, ahead: Ahead) -> Iterator[Taken]:
        """Train step by step; what is yielded has happened, and the state may be taken then."""
        while self.course.step < self.steps:
            yield self._take(ahead)

    def wanted(self, plan: Plan) -> int:
        """How many candidates a step under this plan reads: what the plan asks for, as far as there are so many."""
        return min(plan.candidates(self.settings.batch), len(self.candidates))

    def _take(self, ahead: Ahead) -> Taken:
        course, began = self.course, time.perf_counter()
        while len(course.waiting) <= min(self.settings.lag, self.steps - course.step - 1):  # none for after the end
            course.waiting.append(self._scored(ahead))
        scored = course.waiting.popleft()
        with self._clock("scoring"):
            drawn_from, chosen = self.drawer.draw(
                scored.plan, scored.batch, scored.learner, step=course.step, tally=course.tally
            )
            lag = self._lag(scored, chosen)
        self._count(scored, chosen, substitutes=len(drawn_from) - len(scored.batch))
        row_b = drawn_from.row_B[chosen.index_b]
        index_b = torch.from_numpy(chosen.index_b)
        batch = (drawn_from.image_BCHW[index_b], drawn_from.token_BT[index_b])
        with self._clock("training"):
            reused = scored.learner is not None and not self.settings.lag
            loss, rate = self._update(batch, row_b, index_b if reused else None)
        course.step += 1
        known = len(course.control.events)
        course.control = course.control.at(course.step)
        course.trained += len(row_b)
        course.times_N[row_b] += 1
        course.losses.append(loss)
        course.seconds += time.perf_counter() - began
        return Taken(course.step, row_b, chosen, scored.plan, loss, rate, scored.batch.row_B, known, lag)

    def _scored(self, ahead: Ahead) -> Scored:
        """The next super-batch with two readable candidates at least."""
        course, batch = self.course, self.settings.batch
        for _ in range(2 + len(self.candidates) // batch):
            start, plan = course.position, course.plan
            read = ahead.get(start, self.wanted(plan))
            course.position = read.position
            if len(read) > 1:
                return Scored(start, plan, read, self._looked_at(plan, read))
        raise UsageError("no batch with two readable images in a whole epoch; `curate inspect` shows why")

    def _looked_at(self, plan: Plan, read: SuperBatch) -> Pairs | None:
        course = self.course
        course.scored += len(read)
        if plan.criterion == "uniform":
            return None
        with self._clock("scoring"):
            learner = self.drawer.look(plan, read.image_BCHW, read.token_BT)
        flops = self.drawer.flops(plan, read, len(read))
        course.spend("scoring", samples=len(read), flops=flops)
        return learner

    def _count(self, scored: Scored, chosen: Chosen, *, substitutes: int) -> None:
        """Under a policy: what the draw owed, served and gave up goes into the tally."""
        course = self.course
        if course.tally is None or chosen.kept is None:
            return
        with self._clock("evaluation"):
            price = self.drawer.price(scored.plan, scored.batch, scored.learner, chosen, step=course.step)
        course.spend(
            "evaluation", flops=self.drawer.price_flops(scored.plan, len(scored.batch), chosen, step=course.step)
        )
        course.tally = course.tally.after(chosen.kept, scored.plan.criterion, price, substitutes)
        course.scored += substitutes

    def _lag(self, scored: Scored, chosen: Chosen) -> dict[str, float] | None:
        """Every so often, what the age of the scores has changed; the fresh look is counted as evaluation."""
        course = self.course
        if not self.settings.lag or scored.learner is None or course.step % self.settings.watch_every:
            return None
        with self._clock("evaluation"):
            found = self.drawer.ageing(
                scored.plan, scored.batch, scored.learner, chosen, step=course.step, tally=course.tally
            )
        flops = self.drawer.flops(scored.plan, scored.batch, 0)
        course.spend("evaluation", samples=len(scored.batch), flops=flops)
        return found

    def _update(
        self, batch: tuple[Tensor, Tensor], row_b: NDArray[np.int64], scored: Tensor | None
    ) -> tuple[float, float]:
        course, stepper = self.course, self.stepper
        update = stepper.step(batch, step=course.step, steps=self.steps, scored=scored)
        if update.loss is None:
            names = ", ".join(self.candidates.pairs.places.name(row) for row in row_b[:4].tolist())
            raise CurateError(
                f"the loss or its gradient is not finite at step {course.step + 1}; the step's samples: {names}"
                f"{' ...' if len(row_b) > 4 else ''}; lower lr (now {self.settings.lr}) or use precision fp32"
            )
        flops = max(0.0, stepper.flops(batch) - update.saved)
        course.spend("training", samples=len(row_b), flops=flops, optimiser=stepper.costs.update)
        course.plain += stepper.plain_flops(batch)
        return update.loss, update.rate

    @contextmanager
    def _clock(self, phase: PhaseName) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.course.spend(phase, seconds=time.perf_counter() - began)


def waiting_tensors(waiting: deque[Scored]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Super-batches that wait, for a state: the learner's embeddings, and where to read the rest again."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for number, scored in enumerate(waiting):
        learner = scored.learner
        entry: dict[str, Any] = {"start": scored.start, "plan": scored.plan.as_json(), "learner": None}
        if learner is not None:
            entry["learner"] = [learner.scale, learner.bias]
            tensors |= {f"waiting.{number}.image": learner.image_BD, f"waiting.{number}.text": learner.text_BD}
        plain.append(entry)
    return tensors, plain


def waiting_again(
    plain: list[dict[str, Any]], tensors: dict[str, Tensor], read: Callable[[int, Plan], SuperBatch]
) -> deque[Scored]:
    """The super-batches that waited, read anew; `read` takes where one began in the data, and its plan."""
    waiting: deque[Scored] = deque()
    for number, entry in enumerate(plain):
        plan = Plan(**entry["plan"])
        learner = None
        if entry["learner"] is not None:
            image_BD, text_BD = (tensors[f"waiting.{number}.{side}"] for side in ("image", "text"))
            learner = Pairs(image_BD, text_BD, *entry["learner"])
        waiting.append(Scored(entry["start"], plan, read(entry["start"], plan), learner))
    return waiting
