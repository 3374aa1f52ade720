"""Train a model on candidates from its first step or its last state to its end: engine, journal, states, measures."""

# N pairs, T tokens

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from curate.costs.energy import meter
from curate.costs.flops import Size
from curate.errors import CurateError
from curate.estimators.names import make_estimator
from curate.estimators.penalised import Penalised, penalises
from curate.estimators.problem import Problem
from curate.learner.candidates import Candidates
from curate.learner.chosen_log import ChosenLog
from curate.learner.drawing import Drawer
from curate.learner.engine import Course, Engine, Progress, Taken
from curate.learner.events import EventWriter
from curate.learner.handover import controller
from curate.learner.journal import Journal
from curate.learner.keeping import keep, resume
from curate.learner.optimiser import make_optimiser
from curate.learner.order import Order
from curate.learner.plan import Plan, first_plan
from curate.learner.policing import Enforcer
from curate.learner.problem import LearnerProblem, repeated, wants_bf16
from curate.learner.reading_ahead import Ahead, read_ahead
from curate.learner.resolution import FlexiProblem, low_size
from curate.learner.reuse import Reuse
from curate.learner.running import Extras, Running
from curate.learner.scoring_pass import Scorer
from curate.learner.settings import TrainSettings
from curate.learner.start import Start
from curate.learner.state import states
from curate.learner.stepping import Stepper
from curate.learner.telling import closed, handed_over, measured, opened, tallied, watched, written
from curate.learner.trust import watch_over
from curate.learner.vocabulary import AsItIs, Vocabulary, occurring
from curate.learner.work import PassCosts
from curate.models.precision import choose_device

ALIGNED = 128  # trusted pairs whose gradient alignment follows


def fit(start: Start, candidates: Candidates, settings: TrainSettings, extras: Extras | None = None) -> Course:
    """Train `start.module` in place; returns the course with the loss of each step, counts and costs.

    With files, the run resumes from its last state, and leaves one where it is interrupted: at the first SIGINT or
    SIGTERM after the step that is going on. Errors: CurateError, naming step, samples and the last good state, where
    something is not finite; StorageError.
    """
    extras = extras or Extras()
    device = choose_device(settings.device)
    module: Any = start.module
    module.to(device).train()
    module.to(memory_format=torch.channels_last)  # as `encoder_of` leaves it: a measurement must not move weights
    trusted = extras.trusted
    tokens = candidates.pairs.token_NT
    if trusted is not None and settings.criterion == "alignment":  # its gradient moves these rows, too
        tokens = torch.cat([tokens, trusted.token_TC])
    with ExitStack() as stack:
        vocabulary = stack.enter_context(occurring(module, tokens))
        engine = _engine(start, candidates, settings, extras, vocabulary, device)
        order = Order(len(candidates), settings.seed)
        ahead = stack.enter_context(read_ahead(candidates.pairs, candidates.row_M, order))
        size = resume(engine, extras.files, ahead)
        if extras.team is not None:
            stepper = engine.stepper
            team = stack.enter_context(extras.team(stepper.problem, stepper.optimiser, stepper.estimator))
            engine = replace(engine, stepper=replace(stepper, estimator=team))
        journal = None
        if extras.files is not None:
            again = size or extras.files.events.is_dir()  # a run that was killed before its first state left some, too
            events = EventWriter(extras.files.events, purge_step=engine.course.step + 1 if again else None)
            stack.callback(events.close)
            journal = Journal(extras.files.log, size, events.record)
        chosen = None if extras.files is None else ChosenLog(extras.files.chosen, candidates.pairs.places)
        if journal is not None:
            stack.callback(journal.close)
        watch = None if trusted is None or not engine.course.control.listens else watch_over(trusted, candidates)
        _train(Running(start, settings, engine, vocabulary, extras, journal, chosen, watch), ahead)
    module.to(memory_format=torch.contiguous_format).eval()
    return engine.course


def _engine(
    start: Start,
    candidates: Candidates,
    settings: TrainSettings,
    extras: Extras,
    vocabulary: Vocabulary | AsItIs,
    device: torch.device,
) -> Engine:
    module: Any = start.module
    low = low_size(module) if settings.scoring == "flexi" else None
    kind = LearnerProblem if low is None else FlexiProblem
    distinct = repeated(candidates.pairs.token_NT) and not settings.parts_examples
    problem = kind(module, bf16=wants_bf16(settings.precision, device), distinct=distinct)
    costs = PassCosts(module, distinct=problem.distinct)
    estimator = make_estimator(settings.estimator, tangents=settings.tangents, rules=settings.rules)
    optimiser = make_optimiser(module, settings)
    first = first_plan(settings)
    reuse = _reuse(problem, settings, first, candidates, low)
    scorer = Scorer(problem, vocabulary.compact, device, _width(start), low, reuse)
    trusted = None
    if settings.criterion == "alignment" and extras.trusted is not None:
        token_TC = vocabulary.compact(extras.trusted.token_TC)
        trusted = extras.trusted.image_TCHW[:ALIGNED].to(device), token_TC[:ALIGNED].to(device)
    enforcer = _enforcer(candidates, settings, extras)
    course = Course(
        controller(settings.handover, first),
        np.zeros(len(candidates.pairs), np.int32),
        ledger=extras.ledger,
        tally=None if enforcer is None else enforcer.begin(),
    )
    return Engine(
        settings,
        candidates,
        Drawer(settings, candidates, scorer, costs, trusted, enforcer),
        Stepper(
            settings, _penalised(problem, settings), estimator, optimiser, vocabulary.compact, device, costs, low, reuse
        ),
        course,
        settings.total_steps(len(candidates)),
    )


def _enforcer(candidates: Candidates, settings: TrainSettings, extras: Extras) -> Enforcer | None:
    if extras.policing is None:
        return None
    steps = settings.total_steps(len(candidates))
    return Enforcer(extras.policing, candidates, steps, settings.window, settings.seed)


def _penalised(problem: LearnerProblem, settings: TrainSettings) -> Problem:
    """With the penalties of fast feedforward layers in the loss, where the estimator can learn from them."""
    return Penalised(problem) if settings.penalised and penalises(problem.module) else problem


def _reuse(
    problem: LearnerProblem, settings: TrainSettings, first: Plan, candidates: Candidates, low: Size | None
) -> Reuse | None:
    """Keep the scoring pass for training where that is exact and pays: both see the same images, weights and mode."""
    plain = settings.estimator in ("backprop", "backprop-checkpoint") and not settings.lag and not settings.augment
    if not plain or not first.uses_learner:
        return None
    module: Any = problem.module
    limit = settings.memory_gb * 1e9
    reuse = Reuse(module, size=low, limit_bytes=limit, bf16=problem.bf16, distinct=problem.distinct)
    tokens = int((candidates.pairs.token_NT[: settings.super_batch] != 0).sum(1).max())
    return reuse if reuse.pays(first.candidates(settings.batch), settings.batch, tokens) else None


def _width(start: Start) -> int:
    return int(start.architecture["embed_dim"])


def _train(running: Running, ahead: Ahead) -> None:
    engine, course = running.engine, running.engine.course
    if course.step == 0:
        opened(running, ahead)
        measured(running)
    with _stopping() as stopped:
        steps, pace = _steps(running, ahead), _Pace(course.trained, time.perf_counter())
        while course.step < engine.steps:
            with meter() as metered:
                asked = _up_to_a_state(running, steps, pace, stopped)
            course.spend("training", energy=metered.energy)  # of all phases: counters know the machine only
            keep(running)
            if asked:
                raise KeyboardInterrupt
    closed(running)


@dataclass(frozen=True, slots=True)
class _Pace:
    """Where this process began, for its rate."""

    trained: int
    began: float

    def rate(self, trained: int) -> float:
        return (trained - self.trained) / (time.perf_counter() - self.began)


def _up_to_a_state(running: Running, steps: Iterator[Taken], pace: _Pace, stopped: threading.Event) -> bool:
    """Steps until a state is due. Was the run asked to stop?"""
    course, report = running.engine.course, running.extras.progress
    for taken in steps:
        written(running, taken)
        _now_and_then(running, taken)
        note = "" if course.plan.phase in ("uniform", "selecting") else course.plan.phase
        try:
            if report is not None:
                rate = pace.rate(course.trained)
                report(Progress(course.step, running.engine.steps, taken.loss, rate, note))
        except KeyboardInterrupt:
            return True
        if stopped.is_set():
            return True
        if course.step % running.settings.checkpoint_every == 0:
            return False
    return False


def _now_and_then(running: Running, taken: Taken) -> None:
    """What is done at some steps: look at the trusted set, hand over, measure."""
    course, settings = running.engine.course, running.settings
    last = course.step == running.engine.steps
    if course.step % settings.watch_every == 0 and not last:
        watched(running)
    if course.step % settings.watch_every == 0 or last:
        tallied(running)
    handed_over(running, taken.events)
    if last or (settings.eval_every and course.step % settings.eval_every == 0):
        measured(running)


def _steps(running: Running, ahead: Ahead) -> Iterator[Taken]:
    """The engine's steps; an error of theirs names the last good state."""
    try:
        yield from running.engine.run(ahead)
    except CurateError as error:
        files = running.extras.files
        kept = [] if files is None else states(files.state)
        last = f"; the last good state is {kept[-1][1]} (step {kept[-1][0]})" if kept else "; no state was kept yet"
        raise type(error)(f"{error}{last if files is not None else ''}") from error


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event, the second interrupts at once; only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not from Python
