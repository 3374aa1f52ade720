"""Curves over the steps of a run, with its handovers marked; the same axis in every chart of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from curate.learner.report.history import History, Record, number, word
from curate.learner.report.words import numbered, shared
from curate.reporting.charts import Level, Marker, Series, line_chart
from curate.reporting.curves import Points, spread
from curate.reporting.page import Figure
from curate.reporting.scales import Axis

MOST_MARKERS: Final = 6


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ by their seed, under one name and one colour."""

    name: str
    runs: Sequence[History]
    slot: int


@dataclass(frozen=True, slots=True)
class Course:
    """The steps of all groups as an axis, and the first group's handovers."""

    x: Axis
    events: Sequence[Marker]


def course_of(groups: Sequence[Group]) -> Course:
    """From step 0 to the last step of the longest run; handovers of the runs in the first group."""
    last = max((run.last_step for group in groups for run in group.runs), default=0)
    return Course(Axis("step", whole=True, include=(0.0, float(last))), handovers(groups[0].runs))


def handovers(runs: Sequence[History]) -> list[Marker]:
    """One marker for equal ones; those of the first run where several runs have too many to tell apart."""
    steps = {_moved(event): number(event, "step") or 0.0 for run in runs for event in run.handovers}
    told = shared((run, _moved(event)) for run in runs for event in run.handovers)
    if len(told) > MOST_MARKERS:
        told = [(text, of) for text, of in told if runs[0] in of]
    return [Marker(steps[text], f"{text} ({numbered(of)})" if len(runs) > 1 else text) for text, of in told]


def over_steps(
    course: Course, title: str, lines: Sequence[Series], y: Axis, caption: str, *, levels: Sequence[Level] = ()
) -> Iterator[Figure]:
    """A chart over the steps, or nothing where the logs have none of its lines."""
    shown = [line for line in lines if line.x]
    if shown:
        yield Figure(line_chart(title, shown, x=course.x, y=y, markers=course.events, levels=levels), caption)


def curve(name: str, runs: Sequence[History], key: str, slot: int) -> Series:
    """A figure of the step records, as the mean over runs."""
    return spread(name, [points(run.steps, value(key)) for run in runs], slot=slot)


def points(records: Sequence[Record], figure: Callable[[Record], float | None]) -> Points:
    """(step, figure) of each record; no points at all where none of them has the figure."""
    found = [(number(record, "step") or 0.0, figure(record)) for record in records]
    return found if any(at is not None for _, at in found) else []


def value(*keys: str) -> Callable[[Record], float | None]:
    """A function that reads the number under these nested keys."""
    return lambda record: number(record, *keys)


def _moved(event: Record) -> str:
    return f"{word(event, 'from')} to {word(event, 'to')}, step {number(event, 'step') or 0:,.0f}"
