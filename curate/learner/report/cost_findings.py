"""What a run has cost, in sentences and a table: phases apart, factor expected and measured, energy with its marks.

CO2 stands there only where the user stated what a kilowatt-hour emits; there is no default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curate.costs.energy import PARTS, Joules, co2_grams
from curate.costs.ledger import PHASES, CostLedger, Phase, PhaseName
from curate.learner.report.history import History, last_ledger, number, word
from curate.learner.report.words import over, percent
from curate.reporting.page import Finding, Table
from curate.reports import amount, duration


def cost_findings(runs: Sequence[History], grams_per_kwh: float | None = None) -> Iterator[Finding]:
    """FLOPs by phase, the factor over IID, joules and CO2; nothing of what the logs do not hold."""
    ledgers = ledgers_of(runs)
    if any(ledger.flops() for ledger in ledgers):
        yield Finding("Cost", _flops(ledgers))
    if any(run.before.flops() for run in runs):
        yield Finding("Spent before", _before(runs))
    yield from (Finding("Factor over IID", text) for text in _factor(runs))
    if ledgers:
        yield Finding("Energy", _energy(ledgers))
    if ledgers and grams_per_kwh is not None:
        yield Finding("CO2", _emitted(ledgers, grams_per_kwh))


def ledgers_of(runs: Sequence[History]) -> list[CostLedger]:
    """The latest ledger of each run that has one."""
    return [ledger for run in runs if (ledger := last_ledger(run)) is not None]


def cost_table(runs: Sequence[History], name: str, grams_per_kwh: float | None = None) -> list[Table]:
    """A row for each phase of each run that cost something; with a stated intensity a column of CO2."""
    rows = [
        (_run(run, runs), *_row(phase, getattr(ledger, phase)), *_co2(getattr(ledger, phase), grams_per_kwh))
        for run in runs
        if (ledger := last_ledger(run)) is not None
        for phase in PHASES
        if getattr(ledger, phase) != Phase()
    ]
    head = ["run", "phase", "samples", "FLOP", "of the optimiser", "time", "energy"]
    head += [] if grams_per_kwh is None else [f"CO2 at {grams_per_kwh:g} g/kWh"]
    return [Table(f"Cost by phase: {name}", head, rows, numeric=tuple(range(2, len(head))))] if rows else []


def _flops(ledgers: Sequence[CostLedger]) -> str:
    whole = sum(ledger.flops() for ledger in ledgers)
    total = over((ledger.flops() for ledger in ledgers), _flop)
    parts = [_part(ledgers, name, whole) for name in ("training", "scoring", "reference")]
    evaluation = over((ledger.evaluation.flops for ledger in ledgers), _flop)
    beside = f"; evaluation, not counted in any comparison, {evaluation}" if evaluation else ""
    return f"{total} in all: {', '.join(parts)}{beside}."


def _before(runs: Sequence[History]) -> str:
    """What earlier parts of a recipe have cost; the phases of this run do not hold it, every comparison does."""
    ledgers = [run.before for run in runs]
    whole = sum(ledger.flops() for ledger in ledgers)
    parts = ", ".join(_part(ledgers, name, whole) for name in ("training", "scoring", "reference"))
    total = over((ledger.flops() for ledger in ledgers), _flop)
    return f"{total} by earlier parts of the recipe, counted in every comparison: {parts}."


def _part(ledgers: Sequence[CostLedger], name: PhaseName, whole: float) -> str:
    phases = [getattr(ledger, name) for ledger in ledgers]
    spent = [phase.flops + phase.optimiser for phase in phases]
    of = f"{name} with its optimiser" if name == "training" else name
    if name == "reference" and not any(spent):
        return "reference 0 (cached by an earlier run, or none used)"
    return f"{of} {over(spent, _flop)} ({percent(sum(spent) / whole)})"


def _factor(runs: Sequence[History]) -> Iterator[str]:
    expected = over({number(run.start, "factor") for run in runs}, "{:.2f}".format)
    found = over((number(run.end, "factor") for run in runs), "{:.2f}".format)
    if not expected and not found:
        return
    text = word(runs[0].start, "factor_text")
    detail = f" ({text.rstrip('.')})" if text else ""
    before = f"expected {expected}{detail}" if expected else "expected nothing that the log holds"
    after = f"measured {found}" if found else "not measured, since no run has ended"
    yield f"A step costs so many times a plain step on as many pairs: {before}; {after}."


def _energy(ledgers: Sequence[CostLedger]) -> str:
    """Parts of the machine with how each is known; over several runs the sum."""
    total = sum(ledgers[1:], ledgers[0]).total.energy
    parts = ", ".join(f"{part} {getattr(total, part)}" for part in PARTS)
    every = total.total
    known = "" if every.complete or every.joules is None else ", so the sum is a lower bound"
    return f"{'All runs together: ' if len(ledgers) > 1 else ''}{parts}{known}."


def _emitted(ledgers: Sequence[CostLedger], grams_per_kwh: float) -> str:
    """CO2 of all runs, as far as their joules are known."""
    energy = sum(ledgers[1:], ledgers[0]).total.energy.total
    at = f"at the stated {grams_per_kwh:g} g/kWh"
    grams = co2_grams(energy, grams_per_kwh)
    if grams is None:
        return f"Unavailable {at}, since no joules are known."
    text = f"{'' if energy.complete else 'at least '}{_grams(grams)} {at}, from energy that is {energy.mark}."
    return f"All runs together: {text}" if len(ledgers) > 1 else text[0].upper() + text[1:]


def _co2(phase: Phase, grams_per_kwh: float | None) -> tuple[str, ...]:
    if grams_per_kwh is None:
        return ()
    grams = co2_grams(phase.energy.total, grams_per_kwh)
    return ("unavailable" if grams is None else _grams(grams) + _partly(phase.energy.total),)


def _grams(value: float) -> str:
    return f"{value / 1000:,.3g} kg" if value >= 1000 else f"{value:.3g} g"


def _partly(energy: Joules) -> str:
    return "" if energy.complete or energy.joules is None else ", in part"


def _row(name: str, phase: Phase) -> tuple[str, ...]:
    total = phase.energy.total
    energy = "unavailable" if total.joules is None else f"{total.joules:,.0f} J {total.mark}"
    flops = (_flop(phase.flops), _flop(phase.optimiser) if phase.optimiser else "")
    return (name, f"{phase.samples:,}", *flops, duration(phase.seconds), energy + _partly(total))


def _run(run: History, runs: Sequence[History]) -> str:
    return f"seed {run.seed}" if run.seed is not None else f"run {runs.index(run) + 1}"


def _flop(value: float) -> str:
    return amount(value, "FLOP")
