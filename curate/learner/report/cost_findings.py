"""What a run has cost, in sentences and a table: phases apart, factor expected and measured, energy with its marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curate.costs.energy import PARTS
from curate.costs.ledger import PHASES, CostLedger, Phase, PhaseName
from curate.learner.report.history import History, last_ledger, number, word
from curate.learner.report.words import over, percent
from curate.reporting.page import Finding, Table
from curate.reports import amount, duration


def cost_findings(runs: Sequence[History]) -> Iterator[Finding]:
    """FLOPs by phase, the factor over IID, and joules; nothing of what the logs do not hold."""
    ledgers = ledgers_of(runs)
    if any(ledger.flops() for ledger in ledgers):
        yield Finding("Cost", _flops(ledgers))
    yield from (Finding("Factor over IID", text) for text in _factor(runs))
    if ledgers:
        yield Finding("Energy", _energy(ledgers))


def ledgers_of(runs: Sequence[History]) -> list[CostLedger]:
    """The latest ledger of each run that has one."""
    return [ledger for run in runs if (ledger := last_ledger(run)) is not None]


def cost_table(runs: Sequence[History], name: str) -> list[Table]:
    """A row for each phase of each run that cost something."""
    rows = [
        (_run(run, runs), *_row(phase, getattr(ledger, phase)))
        for run in runs
        if (ledger := last_ledger(run)) is not None
        for phase in PHASES
        if getattr(ledger, phase) != Phase()
    ]
    head = ("run", "phase", "samples", "FLOP", "of the optimiser", "seconds", "energy")
    return [Table(f"Cost by phase: {name}", head, rows, numeric=(2, 3, 4, 5, 6))] if rows else []


def _flops(ledgers: Sequence[CostLedger]) -> str:
    whole = sum(ledger.flops() for ledger in ledgers)
    total = over((ledger.flops() for ledger in ledgers), _flop)
    parts = [_part(ledgers, name, whole) for name in ("training", "scoring", "reference")]
    evaluation = over((ledger.evaluation.flops for ledger in ledgers), _flop)
    beside = f"; evaluation, not counted in any comparison, {evaluation}" if evaluation else ""
    return f"{total} in all: {', '.join(parts)}{beside}."


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


def _row(name: str, phase: Phase) -> tuple[str, ...]:
    total = phase.energy.total
    energy = "unavailable" if total.joules is None else f"{total.joules:,.0f} J {total.mark}"
    partly = "" if total.complete or total.joules is None else ", in part"
    flops = (_flop(phase.flops), _flop(phase.optimiser) if phase.optimiser else "")
    return (name, f"{phase.samples:,}", *flops, duration(phase.seconds), energy + partly)


def _run(run: History, runs: Sequence[History]) -> str:
    return f"seed {run.seed}" if run.seed is not None else f"run {runs.index(run) + 1}"


def _flop(value: float) -> str:
    return amount(value, "FLOP")
