"""Two learners side by side: what joint selection took to reach what uniform draws reached, in steps and in FLOPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.learner.report.history import number, read_history
from curate.learner.report.metrics import Reached, measured


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
    theirs, ours = _trained(uniform), _trained(joint)
    target = max((at.value for at in theirs), default=0.0)
    sides = (_side(at, next((one for one in at if one.value >= target), None)) for at in (theirs, ours))
    return LearnerRace(target, *sides)


def _trained(run: Path) -> list[Reached]:
    """The measurements of a run but for the one before its first step."""
    return [at for at in measured(read_history(run), "recall") if number(at.record, "step")]


def _side(found: list[Reached], at: Reached | None) -> Side:
    highest = max((one.value for one in found), default=0.0)
    if at is None:
        return Side(highest, None, None)
    return Side(highest, int(number(at.record, "step") or 0), _learner_flops(at))


def _learner_flops(at: Reached) -> float:
    """All that was spent but the reference's part, which was scored for the selection anyway."""
    return (number(at.record, "flops") or 0.0) - (number(at.record, "ledger", "reference", "flops") or 0.0)


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"
