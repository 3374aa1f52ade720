"""What a training run has cost, by phase: samples, FLOPs, seconds and joules. Frozen values that add up.

Phases are kept apart so that a claim can say what it counts: `reference` (embedding candidates with the reference),
`scoring` (the learner's scoring pass and the draw), `training` (steps; the optimiser's own FLOPs stand beside them) and
`evaluation`. A resumed run's ledger is the sum of its parts (`a + b`); processes that ran side by side are put
`together`, since their seconds do not add up and one machine's energy counters were read by each of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal, get_args

from curate.costs.energy import PARTS, Energy, Joules
from curate.errors import UsageError

PhaseName = Literal["reference", "scoring", "training", "evaluation"]
PHASES: Final[tuple[PhaseName, ...]] = get_args(PhaseName)
FORMAT: Final = "curate-cost-ledger"
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase has cost. `flops` are matrix products, `optimiser` the FLOPs of the updates."""

    samples: int = 0
    flops: float = 0.0
    optimiser: float = 0.0
    seconds: float = 0.0
    energy: Energy = field(default_factory=Energy)

    def __add__(self, other: Phase) -> Phase:
        return Phase(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class CostLedger:
    """The four phases, and the machine whose counters were read ("" where it does not matter).

    Example: CostLedger("node-7").add("training", samples=128, flops=128 * 44.1e9, seconds=1.2) is a new ledger with
    5.64e12 FLOPs of training; `as_json` and `from_json` keep it over a resume.
    """

    machine: str = ""
    reference: Phase = field(default_factory=Phase)
    scoring: Phase = field(default_factory=Phase)
    training: Phase = field(default_factory=Phase)
    evaluation: Phase = field(default_factory=Phase)

    def add(
        self,
        phase: PhaseName,
        *,
        samples: int = 0,
        flops: float = 0.0,
        optimiser: float = 0.0,
        seconds: float = 0.0,
        energy: Energy | None = None,
    ) -> CostLedger:
        """A ledger with this added. Errors: UsageError for an unknown phase, and for a figure below 0 or not finite."""
        if phase not in PHASES:
            raise UsageError(f"{phase!r} is none of the phases {', '.join(PHASES)}")
        for name, value in (("samples", samples), ("flops", flops), ("optimiser", optimiser), ("seconds", seconds)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{phase}: {name} {value} is not a finite number of 0 or more")
        entry = Phase(samples, float(flops), float(optimiser), float(seconds), energy or Energy())
        return _changed(self, {phase: getattr(self, phase) + entry})

    def __add__(self, other: CostLedger) -> CostLedger:
        """One after the other, as where a run is resumed; another machine's name is joined on."""
        return CostLedger(_machines(self, other), *(getattr(self, name) + getattr(other, name) for name in PHASES))

    @property
    def total(self) -> Phase:
        """All phases together."""
        return sum((getattr(self, name) for name in PHASES), Phase())

    def flops(self, *, reference: bool = True) -> float:
        """What a claim has to count: training with its optimiser, scoring, and the reference unless it was cached for
        other runs anyway. Evaluation is the same for every method and is left out."""
        training = self.training.flops + self.training.optimiser
        return training + self.scoring.flops + (self.reference.flops if reference else 0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers with format and version, for JSON."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(value: Any) -> CostLedger:
        """The same ledger again. Errors: UsageError for another format or version, a field that is missing or unknown,
        a figure that is not a number, below 0 or not finite."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UsageError(f"not a cost ledger: `format` is not {FORMAT!r}")
        if value.get("version") != VERSION:
            raise UsageError(f"cost ledger of version {value.get('version')!r}; this curate reads version {VERSION}")
        given = {name: part for name, part in value.items() if name not in ("format", "version")}
        _exactly("cost ledger", given, ("machine", *PHASES))
        if not isinstance(given["machine"], str):
            raise UsageError("cost ledger: `machine` is no text")
        return CostLedger(given["machine"], *(_phase(name, given[name]) for name in PHASES))

    def __str__(self) -> str:
        """A line for each phase that cost something."""
        return "\n".join(f"{name}: {_line(getattr(self, name))}" for name in PHASES if getattr(self, name) != Phase())


def dumps(ledger: CostLedger) -> str:
    """One line of JSON, keys in order: equal ledgers give equal text."""
    return json.dumps(ledger.as_json(), sort_keys=True, allow_nan=False)


def loads(text: str) -> CostLedger:
    """Read what `dumps` wrote. Errors: UsageError, also for a text that is no JSON."""
    try:
        return CostLedger.from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise UsageError(f"cost ledger: no JSON ({error})") from error


def together(ledgers: Sequence[CostLedger]) -> CostLedger:
    """Processes that ran side by side: samples and FLOPs add up, seconds are the longest, energy counts once a machine.

    Of one named machine the largest reading is taken; a ledger without a name stands for a machine of its own.
    """
    total = CostLedger()
    for ledger in ledgers:
        total = total + ledger
    return _changed(total, {name: _side_by_side(ledgers, name, getattr(total, name)) for name in PHASES})


def _side_by_side(ledgers: Sequence[CostLedger], name: PhaseName, total: Phase) -> Phase:
    phases = [(ledger.machine or n, getattr(ledger, name)) for n, ledger in enumerate(ledgers)]
    readings: dict[str | int, Energy] = {}
    for machine, phase in phases:
        readings[machine] = max(readings.get(machine, Energy()), phase.energy, key=_extent)
    energy = sum(readings.values(), Energy())
    return replace(total, seconds=max((phase.seconds for _, phase in phases), default=0.0), energy=energy)


def _extent(energy: Energy) -> tuple[float, float]:
    total = energy.total
    return total.joules or 0.0, total.measured_seconds + total.estimated_seconds + total.unavailable_seconds


def factor_over_iid(
    super_over_sub: float,
    *,
    forward: float = 1.0,
    scoring: float | None = None,
    reference: float = 0.0,
    reused: bool = False,
    low_share: float = 0.0,
    low_cost: float = 1.0,
    selection: float = 0.0,
) -> float:
    """Cost of scoring B candidates and training on b of them, over training on b plainly, which is 3 F each.

    `super_over_sub` is B / b. FLOPs per sample, in any unit: `forward` is F; `scoring` the learner's pass over a
    candidate (None: F, or `low_cost` F where part of the batch is trained at low resolution), `reference` the
    reference's (0: cached), `selection` the draw's per candidate. `reused`: the scoring pass is the forward pass of the
    samples trained at its resolution. `low_share` of the sub-batch is trained at `low_cost` of the price.

    Examples at filtering ratio 0.8 (B / b = 5): 2.33 reusing the scoring pass, 2.67 without, 4 and 4.33 with a
    reference of the same size and no cache, 1.04 at low_share 0.5 and low_cost 0.25. Source: Evans et al. 2024,
    arXiv 2406.17711, section 4. Errors: UsageError for shares outside 0 to 1, or B smaller than b.
    """
    if not super_over_sub >= 1:
        raise UsageError(f"B / b = {super_over_sub}: a super-batch is at least as large as its sub-batch")
    if not (0 <= low_share <= 1 and low_cost >= 0 and forward > 0):
        raise UsageError(
            f"low share {low_share}, low cost {low_cost}, forward {forward}: a share and two positive costs"
        )
    scored = forward * (low_cost if low_share else 1.0) if scoring is None else scoring
    training = 3 * forward * (1 - low_share + low_share * low_cost)
    saved = scored * (low_share or 1.0) if reused else 0.0
    return (training - saved + super_over_sub * (scored + reference + selection)) / (3 * forward)


def _changed(ledger: CostLedger, phases: Mapping[PhaseName, Phase]) -> CostLedger:
    values: dict[str, Any] = {str(name): phase for name, phase in phases.items()}
    return replace(ledger, **values)


def _machines(*ledgers: CostLedger) -> str:
    names = dict.fromkeys(name for ledger in ledgers for name in ledger.machine.split(", ") if name)
    return ", ".join(names)


def _exactly(where: str, given: Any, names: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise UsageError(f"{where}: an object is expected, not {type(given).__name__}")
    if missing := sorted(set(names) - given.keys()):
        raise UsageError(f"{where}: {', '.join(missing)} is missing")
    if unknown := sorted(given.keys() - set(names)):
        raise UsageError(f"{where}: {', '.join(map(str, unknown))} is unknown")


def _phase(name: str, value: Any) -> Phase:
    _exactly(name, value, [f.name for f in fields(Phase)])
    _exactly(f"{name}.energy", value["energy"], PARTS)
    if type(value["samples"]) is not int or value["samples"] < 0:
        raise UsageError(f"{name}.samples: {value['samples']!r} is not a whole number of 0 or more")
    numbers = {key: _figure(f"{name}.{key}", value[key]) for key in ("flops", "optimiser", "seconds")}
    energy = Energy(*(_joules(f"{name}.energy.{part}", value["energy"][part]) for part in PARTS))
    return Phase(samples=value["samples"], energy=energy, **numbers)


def _joules(where: str, value: Any) -> Joules:
    names = [f.name for f in fields(Joules)]
    _exactly(where, value, names)
    reasons = value["reasons"]
    if not isinstance(reasons, list | tuple) or not all(isinstance(reason, str) for reason in reasons):
        raise UsageError(f"{where}.reasons: a list of texts is expected")
    numbers = {key: _figure(f"{where}.{key}", value[key]) for key in names if key != "reasons"}
    return Joules(reasons=tuple(reasons), **numbers)


def _figure(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{where}: {value!r} is not a finite number of 0 or more")
    return float(value)


def _line(phase: Phase) -> str:
    optimiser = f" and {phase.optimiser:.3g} of the optimiser" if phase.optimiser else ""
    return (
        f"{phase.samples:,} samples, {phase.flops:.3g} FLOPs{optimiser}, {phase.seconds:,.1f} s; energy: {phase.energy}"
    )
