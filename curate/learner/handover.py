"""When selection by the reference ends, and what follows: the rule, or a fixed schedule. `watch` measures.

A weak reference speeds up a young learner and holds an older one back: joint selection ends at the reference's own
accuracy. The rule, in nats of information about captions (`watch.Measure.information`), on a trusted set:

    selecting   until the learner knows three quarters of what the reference knows
    trimming    if the pool has noise: from 1 / (1 - noise) as many candidates are drawn those that learner and
                reference together hold for clean and for unknown as yet; the scales at which they speak are fitted
                anew at each observation, so the reference's word fades as the learner grows
    uniform     if so little would be left out that a look at the candidates is not worth it; nothing is scored then

Why not later, at the reference's level: with a clean pool plain training catches up with joint selection before that,
and by then the lead is lost (figures: examples/replication). A phase never returns. A controller is a value: state in,
state out, JSON both ways, so that a resumed run hands over at the same step for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final, Literal

from curate.errors import UsageError
from curate.learner.plan import Plan
from curate.learner.watch import Estimate, Measure, View, calibrate, measure
from curate.selection.criteria import CRITERIA

Mode = Literal["auto", "off", "schedule"]
CLOSED: Final = 0.75  # the share of the reference's information at which it has done its work
VAGUE: Final = 0.1  # an error of the noise share from which on it counts as unknown
WORTH: Final = 0.9  # a kept share from which on trimming is not worth a look
LEAST_KEPT: Final = 0.05  # 20 candidates for each that is trained on
_WEIGHED: Final = ("learnability", "easy-reference")


@dataclass(frozen=True, slots=True)
class Observation:
    """What the watch says after `step` steps. `scales` are the learner's and the reference's, fitted together."""

    step: int
    learner: Measure
    reference: Measure | None = None
    noise: Estimate | None = None
    scales: tuple[float, float] = (0.0, 0.0)

    @property
    def kept(self) -> float:
        """The share of the pool to keep: all of it where the noise is known no better than to a tenth, or by nobody."""
        if self.noise is None or self.noise.error > VAGUE or max(self.scales) == 0:
            return 1.0
        return min(1.0, max(LEAST_KEPT, 1.0 - self.noise.value))

    def as_json(self) -> dict[str, Any]:
        """The figures for a line of kind "watch" in the journal."""
        return {
            "step": self.step,
            "learner": self.learner.as_json(),
            "reference": None if self.reference is None else self.reference.as_json(),
            "noise": None if self.noise is None or self.noise.error == float("inf") else self.noise.value,
        }


@dataclass(frozen=True, slots=True)
class Event:
    """A change of phase after `step` steps, and one sentence with the figures that caused it."""

    step: int
    before: str
    after: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """A line of the journal."""
        return {"kind": "handover", "step": self.step, "from": self.before, "to": self.after, "why": self.why}


@dataclass(frozen=True, slots=True)
class Controller:
    """`plan` is what a step does now. `moves` are the entries of a fixed schedule that are still to come."""

    mode: Mode
    plan: Plan
    moves: tuple[tuple[int, Plan], ...] = ()
    events: tuple[Event, ...] = ()

    def observe(self, seen: Observation) -> Controller:
        """The controller after an observation; only "auto" listens, as long as a reference is weighed or it trims."""
        if not self.listens:
            return self
        if self.plan.phase == "trimming":
            return self._moved(seen.step, after(self.plan, seen), _still(seen))
        why = _cause(seen)
        return self if why is None else self._moved(seen.step, after(self.plan, seen), f"{why}; {_then(seen)}")

    def at(self, step: int) -> Controller:
        """The controller once `step` steps are done: a fixed schedule's entries up to there have come into force."""
        controller = self
        while controller.moves and controller.moves[0][0] <= step:
            (due, plan), rest = controller.moves[0], controller.moves[1:]
            controller = replace(controller, moves=rest)._moved(due, plan, f"the schedule says so at step {due}")
        return controller

    @property
    def listens(self) -> bool:
        """Does an observation still change anything?"""
        selecting = self.plan.phase == "selecting" and self.plan.criterion in _WEIGHED
        return self.mode == "auto" and (selecting or self.plan.phase == "trimming")

    def _moved(self, step: int, plan: Plan, why: str) -> Controller:
        """A new plan; an event only where more changes than the figures of a phase that moves by itself."""
        same = plan.phase == self.plan.phase and (self.mode == "auto" or plan == self.plan)
        event = () if same else (Event(step, _name(self, self.plan), _name(self, plan), why),)
        return replace(self, plan=plan, events=self.events + event)

    def as_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "plan": self.plan.as_json(),
            "moves": [[step, plan.as_json()] for step, plan in self.moves],
            "events": [asdict(event) for event in self.events],
        }


def from_json(state: Mapping[str, Any]) -> Controller:
    """The inverse of `Controller.as_json`."""
    return Controller(
        state["mode"],
        Plan(**state["plan"]),
        tuple((int(step), Plan(**plan)) for step, plan in state["moves"]),
        tuple(Event(**event) for event in state["events"]),
    )


def controller(text: str, first: Plan) -> Controller:
    """The controller that `--handover TEXT` asks for: auto, off, or a fixed schedule (see `parse_schedule`).

    >>> controller("0:10,300:uniform", Plan("selecting", "learnability", 100.0, 0.2)).plan.gain
    10.0
    """
    if text in ("auto", "off"):
        return Controller("auto" if text == "auto" else "off", first)
    moves = parse_schedule(text, first)
    start = moves[0][1] if moves[0][0] == 0 else first
    return Controller("schedule", start, tuple(move for move in moves if move[0] > 0))


def observe(step: int, learner: View, reference: View | None, noise: Estimate | None) -> Observation:
    """Measure learner and reference on the same trusted set, after `step` steps. `noise` is `watch.noise_share`'s."""
    if reference is None:
        return Observation(step, measure(learner), None, noise, (calibrate([learner])[0], 0.0))
    of_learner, of_reference = calibrate([learner, reference])
    return Observation(step, measure(learner), measure(reference), noise, (of_learner, of_reference))


def after(plan: Plan, seen: Observation) -> Plan:
    """What follows selection by the reference: trimming with the figures of an observation, or uniform."""
    if seen.kept >= WORTH:
        return Plan("uniform", "uniform")
    learner, reference = seen.scales
    return replace(
        plan,
        phase="trimming",
        criterion="trim",
        gain=0.0,
        keep=seen.kept,
        learner_scale=learner,
        reference_scale=reference,
    )


def parse_schedule(text: str, first: Plan) -> tuple[tuple[int, Plan], ...]:
    """Entries STEP:WHAT, joined by commas, steps ascending. WHAT is one of

        100                 the first criterion with another gain
        learnability@10     a criterion, with or without a gain
        trim@0.6            trimming as for a pool with 40 % noise, by the learner alone
        uniform             no selection

    >>> [(step, plan.phase) for step, plan in parse_schedule("0:100,300:uniform", Plan("selecting", "learnability"))]
    [(0, 'selecting'), (300, 'uniform')]
    """
    moves = tuple(_entry(part.strip(), first) for part in text.split(","))
    steps = [step for step, _ in moves]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise UsageError(f"handover {text!r}: the steps {steps} must ascend")
    return moves


def _entry(part: str, first: Plan) -> tuple[int, Plan]:
    step, colon, what = part.partition(":")
    if not colon or not step.isdecimal() or not what:
        raise UsageError(
            f"handover {part!r} is neither auto, off nor an entry STEP:WHAT such as 0:100, 300:learnability@10, "
            "300:trim@0.6 or 300:uniform"
        )
    return int(step), _what(part, what, first)


def _what(part: str, what: str, first: Plan) -> Plan:
    name, at, figure = what.partition("@")
    if not at and name not in (*CRITERIA, "trim", "uniform"):
        name, figure = first.criterion, name
    if name == "uniform" and not at:
        return Plan("uniform", "uniform")
    if name == "trim":
        return Plan("trimming", "trim", keep=_number(part, figure, least=LEAST_KEPT, most=1.0))
    if name == "uniform":
        raise UsageError(f"handover {part!r}: uniform has no gain; name a criterion, as in 0:learnability@100")
    if name not in (*CRITERIA, first.criterion):
        raise UsageError(f"handover {part!r}: {name!r} is unknown; choose {', '.join(CRITERIA)}, trim or uniform")
    if name in _WEIGHED and first.criterion not in _WEIGHED:
        raise UsageError(f"handover {part!r}: {name} needs a reference, and criterion {first.criterion} has none")
    gain = first.gain if not figure and not at else _number(part, figure, least=0.0, most=1e6)
    return replace(first, phase="selecting", criterion=name, gain=gain)


def _number(part: str, figure: str, *, least: float, most: float) -> float:
    try:
        value = float(figure)
    except ValueError:
        raise UsageError(f"handover {part!r}: {figure!r} is not a number") from None
    if not least <= value <= most:
        raise UsageError(f"handover {part!r}: {value:g} is not between {least:g} and {most:g}")
    return value


def _cause(seen: Observation) -> str | None:
    """Why the reference has done its work; None while it has not."""
    learner, reference = seen.learner, seen.reference
    if reference is None:
        return None
    if reference.information <= 2 * reference.error:
        return f"the reference knows {reference.information:.2f} nats of a trusted caption, no more than chance would"
    if learner.information > 2 * learner.error and learner.information >= CLOSED * reference.information:
        return (
            f"of a trusted caption the learner knows {learner.information:.2f} nats, the reference "
            f"{reference.information:.2f}: more than {CLOSED:.0%} of it"
        )
    return None


def _then(seen: Observation) -> str:
    if seen.noise is None or seen.noise.error > VAGUE:
        return "the pool's noise is not known well enough to trim by, hence uniform from here"
    if seen.kept >= WORTH:
        return f"{max(0.0, seen.noise.value):.0%} of the pool seems noise, too little to trim, hence uniform from here"
    return f"{seen.noise.value:.0%} of the pool seems noise, so {seen.kept:.0%} of the candidates are kept from here"


def _still(seen: Observation) -> str:
    return f"only {1 - seen.kept:.0%} of the pool seems noise, too little to trim"


def _name(owner: Controller, plan: Plan) -> str:
    """A phase's name; in a schedule the figure belongs to it."""
    if owner.mode != "schedule" or plan.phase == "uniform":
        return plan.phase
    return f"trim@{plan.keep:g}" if plan.criterion == "trim" else f"{plan.criterion}@{plan.gain:g}"


def names(events: Sequence[Event]) -> list[str]:
    """The phases that a run went through, in order."""
    return [event.before for event in events[:1]] + [event.after for event in events]
