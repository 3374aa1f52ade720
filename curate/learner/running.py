"""A run that stands ready: its engine, its data, and where it tells and keeps what happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from curate.costs.ledger import CostLedger
from curate.estimators.problem import Problem
from curate.estimators.report import GradientEstimator
from curate.learner.chosen_log import ChosenLog
from curate.learner.engine import Engine, Progress
from curate.learner.files import RunFiles
from curate.learner.held_out import HeldOut
from curate.learner.journal import Journal
from curate.learner.policing import Policing
from curate.learner.settings import TrainSettings
from curate.learner.start import Start
from curate.learner.trust import Trusted, Watch
from curate.learner.vocabulary import AsItIs, Vocabulary

Report = Callable[[Progress], None]
Team = Callable[[Problem, torch.optim.Optimizer, GradientEstimator], AbstractContextManager[GradientEstimator]]


@dataclass(frozen=True, slots=True)
class Extras:
    """What a run may have beside model, data and settings; every part is optional.

    `say` is told what is worth a line, `kept` is called after each state that was written, `team` shares an
    estimator's work among workers, `policing` is the policy that draws keep to, `held_out` says how many
    of the held-out pairs are in the pool, `before` is what was spent for the run before it began.
    """

    files: RunFiles | None = None
    measure: Callable[[], dict[str, Any]] | None = None
    trusted: Trusted | None = None
    ledger: CostLedger = field(default_factory=CostLedger)
    progress: Report | None = None
    say: Callable[[str], None] | None = None
    team: Team | None = None
    kept: Callable[[], None] | None = None
    policing: Policing | None = None
    held_out: tuple[HeldOut, ...] = ()
    before: CostLedger = field(default_factory=CostLedger)


@dataclass(frozen=True, slots=True)
class Running:
    """A run that stands ready."""

    start: Start
    settings: TrainSettings
    engine: Engine
    vocabulary: Vocabulary | AsItIs
    extras: Extras
    journal: Journal | None
    chosen: ChosenLog | None
    watch: Watch | None = None
