"""The tables of a training report: runs, equal budgets, settings."""

from __future__ import annotations

from collections.abc import Sequence

from curate.learner.report.course import Group
from curate.learner.report.history import History, last_ledger, number
from curate.learner.report.metrics import NAMES, best, measured
from curate.learner.report.race import Comparison
from curate.learner.report.words import criterion_of, plain
from curate.reporting.page import Table
from curate.reporting.scales import short
from curate.reports import amount, duration

_FACTS = ("model", "reference", "criterion", "samples", "steps", "super_batch", "sub_batch", "chunks", "parameters",
          "flops_per_sample")  # fmt: skip


def run_table(groups: Sequence[Group]) -> Table:
    """A row for each run: how far it got, and what it cost."""
    metrics = [name for name in ("accuracy", "recall") if any(measured(r, name) for g in groups for r in g.runs)]
    head = ["run", "drawn by", "seed", "steps", "time", "loss", "FLOP"]
    head += [f"{NAMES[name]}: {which}" for name in metrics for which in ("last", "best")]
    rows = [_run(run, metrics) for group in groups for run in group.runs]
    return Table("Runs", head, rows, numeric=tuple(range(2, len(head))))


def budget_table(race: Comparison | None, name: str) -> list[Table]:
    """Both sides at equal iterations, FLOPs and candidates; each budget answers another question."""
    if race is None or race.metric is None or not race.levels:
        return []
    rows = []
    for level in race.levels:
        spread = (
            "one pair"
            if level.half is None
            else f"{level.difference - level.half:+.3f} to {level.difference + level.half:+.3f}"
        )
        values = (f"{level.ours:.3f}", f"{level.theirs:.3f}", f"{level.difference:+.3f}", spread)
        rows.append((level.budget, short(level.limit), *values))
    head = ("budget", "up to", name, "IID", "difference", "95 % interval")
    caption = (f"{NAMES[race.metric][0].upper()}{NAMES[race.metric][1:]} at the last evaluation within equal budgets, "
               f"{len(race.pairs)} pairs")  # fmt: skip
    return [Table(caption, head, rows, numeric=(1, 2, 3, 4, 5))]


def settings_table(groups: Sequence[Group]) -> Table:
    """Every setting of the first run of each group; the seeds are in the table of runs."""
    columns = [_settings(group.runs[0]) for group in groups]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return Table("Settings", ("setting", *(group.name for group in groups)), rows, folded=True)


def _run(run: History, metrics: Sequence[str]) -> tuple[str, ...]:
    ledger = last_ledger(run)
    seconds = number(run.end, "seconds") or (number(run.steps[-1], "seconds") if run.steps else None)
    loss = number(run.end, "loss")
    facts = (
        "" if run.seed is None else str(run.seed),
        f"{run.last_step:,}" + ("" if run.end else " (unfinished)"),
        "" if seconds is None else duration(seconds),
        "" if loss is None else f"{loss:.3f}",
        "" if ledger is None else amount(ledger.flops(), "FLOP"),
    )
    return (run.path.name, criterion_of(run), *facts, *(text for name in metrics for text in _scores(run, name)))


def _scores(run: History, metric: str) -> tuple[str, str]:
    values, top = measured(run, metric), best(run, metric)
    if not values or top is None:
        return "", ""
    return f"{values[-1].value:.3f}", f"{top.value:.3f} at step {number(top.record, 'step') or 0:,.0f}"


def _settings(run: History) -> dict[str, str]:
    facts = {name: plain(run.start[name]) for name in _FACTS if name in run.start}
    return facts | {str(name): plain(value) for name, value in run.settings.items() if name not in (*facts, "seed")}
