"""What a run's log says, in sentences: what was trained, what came of it, and what it cost. Plain words, no praise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Final

from curate.costs.statement import Verdict
from curate.estimators.probe import HOPELESS
from curate.learner.report.cost_findings import cost_findings
from curate.learner.report.history import History, Record, number, word
from curate.learner.report.metric_findings import metric_findings
from curate.learner.report.policy import policy_findings
from curate.learner.report.race import Comparison
from curate.learner.report.selection_findings import selection_findings
from curate.learner.report.words import criterion_of, differing, numbered, over, seeds, shared
from curate.reporting.page import Finding, Tone
from curate.reports import duration

_TONES: Final[dict[Verdict, Tone]] = {"won": "good", "lost": "warning", "undecided": "plain"}


def findings(
    runs: Sequence[History],
    baselines: Sequence[History],
    race: Comparison | None,
    grams_per_kwh: float | None = None,
) -> list[Finding]:
    """Everything worth a sentence, most important first; what the log does not say is left out."""
    found = [Finding("Trained", _trained(runs))]
    found += _unfinished(runs, "run") + _unfinished(baselines, "baseline")
    found += _against(race, baselines) if race is not None else []
    found += _estimators(runs)
    found += metric_findings(runs, baselines)
    found += _handovers(runs)
    found += policy_findings(runs)
    found += cost_findings(runs, grams_per_kwh)
    found += selection_findings(runs)
    return [*found, *_log(runs)]


def _trained(runs: Sequence[History]) -> str:
    first = runs[0]
    size, samples = number(first.start, "parameters"), number(first.start, "samples")
    batch, pool = number(first.start, "sub_batch"), number(first.start, "super_batch")
    model = word(first.start, "model") or "a model that the log does not name"
    text = model + (f" ({size:,.0f} parameters)" if size else "")
    text += f" on {samples:,.0f} samples" if samples else ""
    text += f" for {fmean(run.last_step for run in runs):,.0f} steps"
    text += f" of {batch:,.0f} pairs" if batch else ""
    if batch and pool and pool > batch:
        text += f" out of {pool:,.0f} candidates (filtering ratio {1 - batch / pool:.3g})"
    text += f", drawn by {criterion_of(first)}"
    reference = word(first.start, "reference")
    text += f" against the reference {reference}" if reference else ""
    taken = over((_seconds(run) for run in runs), duration)
    text += f"; {seeds(runs)}" + (f"; {taken}" if taken else "") + "."
    unlike = differing(runs)
    return text + (f" The runs also differ in {', '.join(unlike)}: their means mix that." if unlike else "")


def _unfinished(runs: Sequence[History], what: str) -> list[Finding]:
    texts = []
    for run in runs:
        if run.end is None:
            planned = number(run.start, "steps")
            of = f" of {planned:,.0f}" if planned else ""
            texts.append(f"The log of {what} {run.path.name} ends at step {run.last_step:,}{of}.")
    return [Finding("Unfinished", " ".join(texts), "warning")] if texts else []


def _against(race: Comparison, baselines: Sequence[History]) -> Iterator[Finding]:
    if race.statement is None:
        yield Finding("Against IID", f"No statement is possible: {race.why}.", "warning")
        return
    text = race.statement.text
    if race.bare is not None and race.bare.ratio is not None:
        text += (
            f" Without the reference's cost the ratio is {race.bare.ratio:.2f}{_limits(race.bare.low, race.bare.high)}."
        )
    yield Finding("Against IID", f"{text} {_target(race)}", _TONES[race.statement.verdict])
    others = {criterion_of(run) for run in baselines} - {"uniform"}
    if others:
        yield Finding(
            "Baseline", f"The baselines drew by {', '.join(sorted(others))}, so IID means that here.", "warning"
        )
    if race.unpaired:
        yield Finding("Not compared", f"{race.unpaired} logs have no partner with the same seed.", "warning")


def _target(race: Comparison) -> str:
    if race.given:
        return "The target was given."
    return (
        "The target is the lowest of the baselines' best values, which each of them reached; it was chosen after the "
        "fact. A run is charged up to its first evaluation at or above it."
    )


def _limits(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (interval {low:.2f} to {high:.2f})"


def _estimators(runs: Sequence[History]) -> Iterator[Finding]:
    """A hopeless estimator was announced before the run; it is said again here."""
    seen = {word(probe, "estimator"): probe for run in runs for probe in run.probes}
    for name, probe in seen.items():
        progress, heads = number(probe, "progress"), number(probe, "heads_progress")
        if progress is None:
            continue
        text = f"{name or 'The estimator'} was probed at {progress:.3g} of backprop's progress per second"
        cosine = number(probe, "cosine")
        text += f" (cosine to its gradient {cosine:.3g})" if cosine is not None else ""
        text += f"; training only the heads, exactly, at {heads:.3g}" if heads is not None else ""
        if progress < HOPELESS:
            yield Finding("Hopeless estimator", f"{text}. Backprop would have learned faster.", "warning")
        else:
            yield Finding("Estimator", f"{text}.")


def _handovers(runs: Sequence[History]) -> list[Finding]:
    told = shared((run, _handover(event)) for run in runs for event in run.handovers)
    texts = [f"{text} ({numbered(of)})." if len(runs) > 1 else f"{text}." for text, of in told]
    if not texts and any(run.watches for run in runs):
        texts = ["None took place."]
    return [Finding("Handover", " ".join(texts))] if texts else []


def _handover(event: Record) -> str:
    why = (word(event, "why") or "the log gives no reason").rstrip(".")
    return f"At step {number(event, 'step') or 0:,.0f} from {word(event, 'from')} to {word(event, 'to')}: {why}"


def _log(runs: Sequence[History]) -> Iterator[Finding]:
    resumed, unreadable = sum(run.resumed for run in runs), sum(run.unreadable for run in runs)
    if resumed:
        yield Finding(
            "Resumed",
            f"{resumed} times; steps done again count once." if resumed > 1 else "Once; steps done again count once.",
        )
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable} lines"
        yield Finding("Damaged log", f"{lines} could not be read and cannot be in this report.", "warning")


def _seconds(run: History) -> float | None:
    return number(run.end, "seconds") or (number(run.steps[-1], "seconds") if run.steps else None)
