"""Runs against baselines, seed by seed: what a target cost, and how far each got at equal budgets. Selection can lose.

The target is, unless it is given, the lowest of the baselines' best values: the highest level that every baseline
reached, so that no pair lacks a ratio because its baseline drew an unlucky seed. It is found after the fact, from the
evaluations in the logs, and a run is charged up to the first evaluation at or above it: with what was spent before it
began, too, as in earlier rounds of a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from curate.costs.statement import Race, Statement, state
from curate.errors import UsageError
from curate.evaluation.interval import half_width
from curate.learner.report.history import History, last_ledger, ledger_of
from curate.learner.report.metrics import NAMES, best, first_at, measured, spent_at, up_to

BUDGETS: Final = (("equal iterations", "step"), ("equal FLOPs", "flops"), ("equal candidates", "candidates"))


@dataclass(frozen=True, slots=True)
class Level:
    """Both sides within one budget: means over the pairs, their difference, half its 95 % interval (None: one pair)."""

    budget: str
    limit: float
    ours: float
    theirs: float
    difference: float
    half: float | None
    pairs: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """`statement` is None where nothing can be stated; `why` says then why not. `bare` leaves the reference out, where
    the runs paid for one."""

    metric: str | None
    target: float | None
    given: bool
    pairs: Sequence[tuple[History, History]]
    unpaired: int
    statement: Statement | None
    bare: Statement | None
    levels: Sequence[Level]
    why: str


def compare(
    runs: Sequence[History], baselines: Sequence[History], metric: str | None, target: float | None, *, name: str
) -> Comparison:
    """Pair by the seed in the settings and judge. Errors: UsageError for two runs of one side with one seed."""
    pairs = _paired(runs, baselines)
    unpaired = len(runs) + len(baselines) - 2 * len(pairs)
    given = target is not None
    if not pairs or metric is None:
        why = "the logs have no common metric" if pairs else "no run and baseline have the same seed in their settings"
        return Comparison(metric, target, given, pairs, unpaired, None, None, (), why)
    if target is None:
        target = min(at.value for _, theirs in pairs if (at := best(theirs, metric)))
    found, bare, why = _stated(pairs, metric, target, name)
    levels = tuple(level for budget, key in BUDGETS if (level := _level(pairs, metric, budget, key)))
    return Comparison(metric, target, given, pairs, unpaired, found, bare, levels, why)


def _paired(runs: Sequence[History], baselines: Sequence[History]) -> list[tuple[History, History]]:
    ours, theirs = _by_seed(runs, "runs"), _by_seed(baselines, "baselines")
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _by_seed(runs: Sequence[History], side: str) -> dict[int, History]:
    found: dict[int, History] = {}
    for run in runs:
        if run.seed is None:
            continue
        if (other := found.setdefault(run.seed, run)) is not run:
            raise UsageError(
                f"{other.path} and {run.path}: two {side} with seed {run.seed}; pairs are made by seed, "
                "and two runs of one seed are not two observations. Give one of them"
            )
    return found


def _stated(
    pairs: Sequence[tuple[History, History]], metric: str, target: float, name: str
) -> tuple[Statement | None, Statement | None, str]:
    races = [race for ours, theirs in pairs if (race := _race(ours, theirs, metric, target))]
    if len(races) < len(pairs):
        return None, None, "an evaluation in the logs has no cost ledger"
    try:
        whole = state(NAMES[metric], target, races, name=name)
        paid = any(race.selected.reference.flops for race in races)
        return whole, state(NAMES[metric], target, races, name=name, count_reference=False) if paid else None, ""
    except UsageError as error:
        return None, None, str(error)


def _race(ours: History, theirs: History, metric: str, target: float) -> Race | None:
    """None where a ledger is missing."""
    at, there = first_at(ours, metric, target), first_at(theirs, metric, target)
    mine = ledger_of(at.record) if at else last_ledger(ours)
    iid = ledger_of(there.record) if there else last_ledger(theirs)
    if mine is None or iid is None:
        return None
    mine, iid = ours.before + mine, theirs.before + iid
    return Race(ours.seed or 0, mine, iid, selected_reached=at is not None, iid_reached=there is not None)


def _level(pairs: Sequence[tuple[History, History]], metric: str, budget: str, key: str) -> Level | None:
    """Both at their last evaluation within what the cheaper of the two spent, pair by pair."""
    limits, ours, theirs = [], [], []
    for mine, other in pairs:
        spent = [max((spent_at(run, at.record, key) or 0.0 for at in measured(run, metric)), default=0.0)
                 for run in (mine, other)]  # fmt: skip
        at, there = (up_to(run, metric, key, min(spent)) for run in (mine, other))
        if at is None or there is None:
            return None
        limits.append(min(spent))
        ours.append(at.value)
        theirs.append(there.value)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Level(budget, fmean(limits), fmean(ours), fmean(theirs), fmean(gaps), _half(gaps), len(pairs))


def _half(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t."""
    if len(values) < 2:
        return None
    return half_width(values)
