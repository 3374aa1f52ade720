"""What was drawn, in sentences: how clean, how sharply, how often the same samples, and what old scores were worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from curate.learner.report.history import History, number
from curate.learner.report.words import over, percent, seeds
from curate.reporting.page import Finding


def selection_findings(runs: Sequence[History]) -> Iterator[Finding]:
    """What the logs hold of the draws."""
    chosen, pool = (over((_late(run, key) for run in runs), percent) for key in ("clean", "clean_pool"))
    if chosen and pool:
        text = f"In the last tenth of the steps {chosen} of the chosen pairs were clean, of the candidates {pool}."
        yield Finding("Clean share", text)
    if effective := over((_late(run, "effective") for run in runs), "{:,.0f}".format):
        of = number(runs[0].start, "super_batch")
        text = f"Over the last tenth of the steps that selected, the first chunk was in effect drawn from {effective}"
        yield Finding("Sharpness", f"{text}{f' of {of:,.0f}' if of else ''} candidates; near 1 the choice is forced.")
    yield from (Finding("Repeats", text) for text in _repeats(runs))
    kept = [over((number(run.lags[-1], key) for run in runs if run.lags), "{:.3f}".format)
            for key in ("rank_correlation", "overlap")]  # fmt: skip
    steps = next((number(run.lags[-1], "lag") for run in runs if run.lags), None)
    if kept[0] and kept[1]:
        text = f"Scores {steps or 0:.0f} steps old ranked candidates with a correlation of {kept[0]} to fresh ones"
        yield Finding("Lag", f"{text}; {kept[1]} of a draw was the same.")


def _repeats(runs: Sequence[History]) -> Iterator[str]:
    counts = repeats_of(runs[0])
    samples = number(runs[0].start, "samples")
    if not counts:
        return
    seen, most = sum(counts.values()), max(counts)
    of = f"Of {samples:,.0f} samples " if samples else ""
    never = f", and {samples - seen:,.0f} never" if samples and samples > seen else ""
    where = f" ({seeds(runs[:1])})" if len(runs) > 1 else ""
    text = (
        f"{of}{counts.get(1, 0):,} were trained on once, {seen - counts.get(1, 0):,} more often (up to {most:,} times)"
    )
    yield f"{text}{never}{where}."


def repeats_of(run: History) -> dict[int, int]:
    """How many samples were trained on so many times, by the log's last line; empty where it has none."""
    found = (run.end or {}).get("repeats")
    items = found.items() if isinstance(found, dict) else ()
    counts = {int(times): number({"n": n}, "n") for times, n in items if str(times).isdecimal()}
    return {times: int(n) for times, n in sorted(counts.items()) if n and times}


def _late(run: History, key: str) -> float | None:
    """The mean over the last tenth of the steps that have the figure."""
    values = [value for step in run.steps if (value := number(step, key)) is not None]
    return fmean(values[-max(1, len(values) // 10) :]) if values else None
