"""Which figure a report judges by, and when a run first had it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from curate.errors import UsageError
from curate.learner.report.history import METRICS, History, Record, number, score_of

NAMES: Final = {
    "accuracy": "zero-shot accuracy",
    "recall": "recall at 1 (mean of both directions)",
    "image_to_text": "recall at 1, image to text",
    "text_to_image": "recall at 1, text to image",
}


@dataclass(frozen=True, slots=True)
class Reached:
    """A measurement of a run: the record of the evaluation, and the value there."""

    record: Record
    value: float


def chosen_metric(metric: str | None, runs: Sequence[History]) -> str | None:
    """The metric asked for, or the first of accuracy and recall that all runs have; None where there is none.

    Errors: UsageError for a metric that no run can have.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    offered = ("accuracy", "recall") if metric is None else (metric,)
    return next((name for name in offered if runs and all(measured(run, name) for run in runs)), None)


def measured(run: History, metric: str) -> list[Reached]:
    """Every evaluation that has the metric, in order."""
    found = ((record, score_of(record, metric)) for record in run.evals)
    return [Reached(record, value) for record, value in found if value is not None]


def best(run: History, metric: str) -> Reached | None:
    """The highest value, at the first evaluation that had it."""
    return max(measured(run, metric), key=lambda at: at.value, default=None)


def first_at(run: History, metric: str, target: float) -> Reached | None:
    """The first evaluation with at least `target`."""
    return next((at for at in measured(run, metric) if at.value >= target), None)


def up_to(run: History, metric: str, key: str, limit: float) -> Reached | None:
    """The last evaluation at which `key` ("samples", "flops", "candidates", "step") was at most `limit`."""
    within = [
        at for at in measured(run, metric) if (spent := spent_at(run, at.record, key)) is not None and spent <= limit
    ]
    return within[-1] if within else None


def spent_at(run: History, record: Record, key: str) -> float | None:
    """What an evaluation's record says of `key`, else what the step before it says; None where neither does.

    Candidates are at least the samples trained on: uniform steps score none, and use up what they train on. FLOPs count
    from before the run began.
    """
    found = number(record, key)
    if found is None:
        step = number(record, "step") or 0
        before = [number(one, key) for one in run.steps if (number(one, "step") or 0) <= step]
        found = before[-1] if before else None
    if key == "flops" and found is not None:
        found += run.before.flops()
    samples = number(record, "samples") if key == "candidates" else None
    known = [value for value in (found, samples) if value is not None]
    return max(known, default=None)
