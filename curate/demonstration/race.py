"""Two learners side by side: what joint selection took to reach what uniform draws reached, in steps and in FLOPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.learner.report.history import number, read_history
from curate.learner.report.metrics import Reached, best, first_at, measured


@dataclass(frozen=True, slots=True)
class Side:
    """One learner: its best recall at 1, and when it first reached the target; None where it never did."""

    best: float
    steps: int | None
    flops: float | None


@dataclass(frozen=True, slots=True)
class LearnerRace:
    """`target` is the best recall of the learner with uniform draws; FLOPs count scoring, not the reference."""

    target: float
    uniform: Side
    joint: Side

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What happened, in a sentence or two; it says so where joint selection lost."""
        head = f"Learners: drawn uniformly one reached a recall of {self.target:.1%} in step {self.uniform.steps}"
        if self.joint.steps is None or self.joint.flops is None:
            return [f"{head}; drawn jointly it never did (best {self.joint.best:.1%}): selection lost here."]
        steps = (self.uniform.steps or 0) / self.joint.steps
        flops = (self.uniform.flops or 0.0) / self.joint.flops
        return [
            f"{head}, drawn jointly in step {self.joint.steps} and {self.joint.best:.1%} at best:",
            f"  {_times(steps)} steps, {_times(flops)} FLOPs with scoring.",
        ]


def race(uniform: Path, joint: Path) -> LearnerRace:
    """Compare two finished runs that were evaluated on the same held-out pairs."""
    ours, theirs = read_history(joint), read_history(uniform)
    top, mine = best(theirs, "recall"), best(ours, "recall")
    target = 0.0 if top is None else top.value
    reached = [first_at(run, "recall", target) if measured(run, "recall") else None for run in (theirs, ours)]
    return LearnerRace(target, _side(target, reached[0]), _side(0.0 if mine is None else mine.value, reached[1]))


def _side(highest: float, at: Reached | None) -> Side:
    if at is None:
        return Side(highest, None, None)
    return Side(highest, int(number(at.record, "step") or 0), _learner_flops(at))


def _learner_flops(at: Reached) -> float:
    """All that was spent but the reference's part, which was scored for the selection anyway."""
    return (number(at.record, "flops") or 0.0) - (number(at.record, "ledger", "reference", "flops") or 0.0)


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"
