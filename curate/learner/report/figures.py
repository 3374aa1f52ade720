"""Charts of how well a run does: loss, the watch over learner and reference, and each metric against what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from curate.learner.report.course import Course, Group, curve, over_steps, points, value
from curate.learner.report.history import number
from curate.learner.report.metrics import NAMES, measured, spent_at
from curate.reporting.charts import Level, Series, line_chart
from curate.reporting.curves import aligned, spread
from curate.reporting.page import Figure
from curate.reporting.scales import Axis

_AGAINST: Final = (
    ("samples", "samples", "pairs trained on"),
    ("flops", "FLOPs", "FLOPs"),
    ("seconds", "wall-clock", "seconds"),
)
_CAPTIONS: Final = {
    "samples": "Equal iterations: pairs trained on, whatever it cost to choose them.",
    "flops": "Equal FLOPs: training, optimiser, scoring and reference together; evaluation is not counted.",
    "seconds": "Time of the training loop on the machine it ran on.",
    "loss": "Mean over stretches of steps and over seeds; the band holds every step. Selected batches are harder or "
    "easier than uniform ones: compare runs by the metrics rather than by these losses.",
    "watch": "On the trusted set. Once the learner has passed the reference, selection by that reference has nothing "
    "left to teach, and the run hands over.",
}


def loss_figures(groups: Sequence[Group], course: Course) -> Iterator[Figure]:
    """Training loss of every group, and the watch over learner and reference of the first."""
    lines = [curve(group.name, group.runs, "loss", group.slot) for group in groups]
    yield from over_steps(course, "Training loss", lines, Axis("loss of the batch trained on"), _CAPTIONS["loss"])
    runs = groups[0].runs
    for key, label in (("loss", "loss"), ("recall", "recall at 1")):
        sides = [
            spread(side, [points(run.watches, value(side, key)) for run in runs], slot=slot)
            for slot, side in enumerate(("learner", "reference"))
        ]
        yield from over_steps(course, f"Learner and reference: {label}", sides, Axis(label), _CAPTIONS["watch"])


def metric_figures(groups: Sequence[Group], judged: str | None, target: float | None) -> Iterator[Figure]:
    """Each metric against samples, FLOPs and wall-clock, every group in the same chart."""
    for metric, label in NAMES.items():
        if metric in ("image_to_text", "text_to_image") and metric != judged:
            continue
        levels = [Level(target, f"target {target:.4g}")] if metric == judged and target is not None else []
        y = Axis(label.partition(" (")[0], include=(0.0,))
        for key, against, unit in _AGAINST:
            lines = [line for group in groups if (line := _metric(group, metric, key)).x]
            if lines:
                lines, unit = _timed(lines) if key == "seconds" else (lines, unit)
                title = f"{label[0].upper()}{label[1:]} against {against}"
                chart = line_chart(title, lines, x=Axis(unit, include=(0.0,)), y=y, levels=levels)
                yield Figure(chart, _CAPTIONS[key])


def _metric(group: Group, metric: str, key: str) -> Series:
    runs = [
        [
            (int(number(at.record, "step") or 0), spent, at.value)
            for at in measured(run, metric)
            if (spent := spent_at(run, at.record, key)) is not None
        ]
        for run in group.runs
    ]
    return aligned(group.name, runs, slot=group.slot)


def _timed(lines: Sequence[Series]) -> tuple[list[Series], str]:
    """Seconds in the unit that suits the longest run."""
    longest = max(at for line in lines for at in line.x)
    unit, size = ("seconds", 1.0) if longest < 300 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
    return [replace(line, x=[at / size for at in line.x]) for line in lines], unit
