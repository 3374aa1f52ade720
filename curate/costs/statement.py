"""The sentence a report may print: what joint selection needed for a metric against IID, over seeds. It can lose.

Each seed is a pair of runs up to the first time a metric reached a target. The ratio of their FLOPs is averaged on the
log scale, where 2 times fewer and 2 times more cancel, with Student's interval over the seeds. Runs that never got
there are counted by name and are in no average. Costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from curate.costs.ledger import CostLedger
from curate.errors import UsageError
from curate.evaluation.interval import half_width

Verdict = Literal["won", "lost", "undecided"]


@dataclass(frozen=True, slots=True)
class Race:
    """One seed: ledgers of both runs, up to reaching the target or, where one did not, to its end."""

    seed: int
    selected: CostLedger
    iid: CostLedger
    selected_reached: bool = True
    iid_reached: bool = True


@dataclass(frozen=True, slots=True)
class Statement:
    """FLOPs are means over the seeds in which both got there; `ratio` is IID's over ours (above 1: we needed fewer)."""

    metric: str
    target: float
    training: float
    scoring: float
    reference: float | None
    iid: float
    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    seeds: int
    selected_reached: int
    iid_reached: int
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return self.text


def state(
    metric: str,
    target: float,
    races: Sequence[Race],
    *,
    name: str = "JEST",
    count_reference: bool = True,
    confidence: float = 0.95,
) -> Statement:
    """Compare over seeds. `count_reference` False leaves the reference's FLOPs out, and the sentence says so.

    "lost": the interval lies below 1 (or the only ratio does), or a run with selection missed the target where IID
    reached it; "won": the interval lies above 1, or IID missed the target and no ratio is below 1; "undecided":
    neither, or both. Example: three seeds with 5.1, 4.7 and 5.6 times fewer FLOPs
    give 5.12 (95 % interval 4.12 to 6.37). Errors: UsageError for no races, or a ledger without training FLOPs.
    """
    if not races or not 0 < confidence < 1:
        raise UsageError("a statement needs at least one seed, and a confidence between 0 and 1")
    both = [race for race in races if race.selected_reached and race.iid_reached]
    if any(not race.selected.training.flops or not race.iid.training.flops for race in both):
        raise UsageError("a ledger without training FLOPs cannot have reached anything")
    ratios = [race.iid.flops() / race.selected.flops(reference=count_reference) for race in both]
    ratio, low, high = interval(ratios, confidence) if ratios else (None, None, None)
    ours = [race.selected for race in both]
    mine, theirs = sum(race.selected_reached for race in races), sum(race.iid_reached for race in races)
    found = Statement(
        metric=metric,
        target=target,
        training=_mean([ledger.training.flops + ledger.training.optimiser for ledger in ours]),
        scoring=_mean([ledger.scoring.flops for ledger in ours]),
        reference=_mean([ledger.reference.flops for ledger in ours]) if count_reference else None,
        iid=_mean([race.iid.flops() for race in both]),
        ratio=ratio,
        low=low,
        high=high,
        confidence=confidence,
        seeds=len(races),
        selected_reached=mine,
        iid_reached=theirs,
        verdict=_verdict(races, ratio, low, high),
        text="",
    )
    return replace(found, text=_sentence(found, name, len(both)))


def interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """(geometric mean, lower, upper bound): Student's t on the logarithms; None for the bounds of a single ratio."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), None, None
    half = half_width(logs, confidence)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _verdict(races: Sequence[Race], ratio: float | None, low: float | None, high: float | None) -> Verdict:
    missed = any(race.iid_reached and not race.selected_reached for race in races)
    gained = any(race.selected_reached and not race.iid_reached for race in races)
    behind = (ratio is not None and ratio < 1) if high is None else high < 1
    ahead = (ratio is not None and ratio > 1) if low is None else low > 1
    bad, good = missed or behind, ahead or (gained and (ratio is None or ratio > 1))
    return "lost" if bad and not good else "won" if good and not bad else "undecided"


def _sentence(found: Statement, name: str, both: int) -> str:
    goal = f"{found.metric} {found.target:g}"
    if found.ratio is None:
        head = f"{name} and IID never both reached {goal}, so there is no ratio."
    else:
        reference = " (reference not counted)" if found.reference is None else f" + {found.reference:.3g} (reference)"
        head = (
            f"{name} reached {goal} with {found.training:.3g} (training) + {found.scoring:.3g} (scoring){reference} "
            f"FLOPs against IID {found.iid:.3g}: {_times(found.ratio)}{_bounds(found, both)}."
        )
    missed = [
        f"{who} did not reach it in {found.seeds - reached} of {found.seeds} seeds."
        for who, reached in ((name, found.selected_reached), ("IID", found.iid_reached))
        if reached < found.seeds
    ]
    closing = {
        "won": f"{name} won.",
        "lost": f"{name} lost: IID was cheaper or got further.",
        "undecided": "Which of the two is cheaper stays undecided.",
    }[found.verdict]
    return " ".join([head, *missed, closing])


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times fewer" if ratio >= 1 else f"{1 / ratio:.2f} times more (ratio {ratio:.2f})"


def _bounds(found: Statement, both: int) -> str:
    if found.low is None or found.high is None:
        return ", from one seed, so without an interval"
    return f", {100 * found.confidence:g} % interval of the ratio {found.low:.2f} to {found.high:.2f} over {both} seeds"


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
