"""Charts of what was drawn: scores by chunk, sharpness, clean share, repeats, schedule, and the age of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Final

from curate.learner.report.course import Course, Group, curve, over_steps, points, value
from curate.learner.report.history import History, Record, chunks_of, number
from curate.learner.report.selection_findings import repeats_of
from curate.learner.report.words import numbered, shared
from curate.reporting.bars import bar_chart
from curate.reporting.charts import Level, Series, line_chart
from curate.reporting.curves import spread
from curate.reporting.page import Figure
from curate.reporting.scales import Axis, short

MOST_BARS: Final = 8
_SCORE: Final = Axis("mean score of the drawn pairs")
_CAPTIONS: Final = {
    "chunks": "Means over the steps that selected, by thirds. Later chunks are scored given the earlier ones: what is "
    "left over, and what fits to them.",
    "score": "Learnability closes towards 0 as the learner approaches the reference.",
    "effective": "From how many candidates the first chunk was in effect drawn: near 1 the choice is forced.",
    "clean": "Of the pairs chosen and of the candidates they were drawn from, where the truth is known.",
    "repeats": "How many samples were trained on so many times, in the first seed. A few samples far to the right mean "
    "that selection keeps returning to them.",
    "keep": "How much of each super-batch was trained on; 1 is uniform sampling.",
    "lag": "How well scores that are some steps old stand for fresh ones.",
}


def selection_figures(groups: Sequence[Group], course: Course) -> Iterator[Figure]:
    """What the logs hold of the first group's draws, and repeats of every group."""
    runs = groups[0].runs
    yield from _per_chunk(runs)
    ends = [_at_chunk("first chunk", runs, 0, 0), _at_chunk("last chunk", runs, -1, 1)]
    yield from over_steps(course, "Score over time", ends, _SCORE, _CAPTIONS["score"])
    yield from _effective(runs, course)
    clean = [curve("chosen", runs, "clean", 0), curve("candidates", runs, "clean_pool", 1)]
    share = Axis("share with a true caption", include=(0, 1))
    yield from over_steps(course, "Clean share", clean, share, _CAPTIONS["clean"])
    yield from _repeats(groups)
    yield from _schedule(runs, course)
    pairs = (("rank correlation", "rank_correlation"), ("overlap of the draws", "overlap"))
    ages = [
        spread(name, [points(run.lags, value(key)) for run in runs], slot=slot)
        for slot, (name, key) in enumerate(pairs)
    ]
    yield from over_steps(course, "Lag", ages, Axis("agreement with fresh scores", include=(0, 1)), _CAPTIONS["lag"])


def _per_chunk(runs: Sequence[History]) -> Iterator[Figure]:
    """Mean score of each chunk, early, in the middle and late: what the joint draw adds from chunk to chunk."""
    scored = [[found for step in run.steps if (found := chunks_of(step))] for run in runs]
    lines = [
        _third(name, [row for chunks in scored for row in _part(chunks, part)], part)
        for part, name in enumerate(("first third", "middle third", "last third"))
    ]
    lines = [line for line in lines if line.x]
    if lines:
        chart = line_chart("Score per chunk", lines, x=Axis("chunk", whole=True), y=_SCORE)
        yield Figure(chart, _CAPTIONS["chunks"])


def _part(chunks: Sequence[list[float]], part: int) -> Sequence[list[float]]:
    return chunks[part * len(chunks) // 3 : (part + 1) * len(chunks) // 3]


def _third(name: str, rows: Sequence[list[float]], slot: int) -> Series:
    wide = max(map(len, rows), default=0)
    means = [fmean(row[n] for row in rows if len(row) > n) for n in range(wide)]
    return Series(name, [float(n + 1) for n in range(wide)], means, slot=slot)


def _at_chunk(name: str, runs: Sequence[History], at: int, slot: int) -> Series:
    return spread(name, [points(run.steps, _chunk(at)) for run in runs], slot=slot)


def _chunk(at: int) -> Callable[[Record], float | None]:
    return lambda record: chunks[at] if (chunks := chunks_of(record)) else None


def _effective(runs: Sequence[History], course: Course) -> Iterator[Figure]:
    line, of = curve("effective candidates", runs, "effective", 0), number(runs[0].start, "super_batch")
    levels = [Level(of, f"all {of:,.0f} candidates: a uniform draw")] if of else []
    y = Axis("exp(entropy)", log=True, include=(1.0,))
    yield from over_steps(course, "Effective candidates", [line], y, _CAPTIONS["effective"], levels=levels)


def _repeats(groups: Sequence[Group]) -> Iterator[Figure]:
    """How many samples were trained on how often, in the first run of each group; seeds differ little."""
    found = [(group.name, group.runs[0], repeats_of(group.runs[0])) for group in groups]
    found = [(name, run, counts) for name, run, counts in found if counts]
    if not found:
        return
    ranges = _ranges(max(max(counts) for _, _, counts in found))
    labels = [short(low) if low == high else f"{short(low)}\u2013{short(high)}" for low, high in ranges]
    bars = [(name, [_within(run, counts, low, high) for low, high in ranges]) for name, run, counts in found]
    chart = bar_chart("Repeats", labels, bars, x=Axis("times trained on"), y=Axis("samples"))
    yield Figure(chart, _CAPTIONS["repeats"])


def _ranges(top: int) -> list[tuple[int, int]]:
    """0, 1, 2, ... each on its own up to a handful, then doubling. `_ranges(12)` ends in (2, 3), (4, 7), (8, 15)."""
    if top < MOST_BARS:
        return [(n, n) for n in range(top + 1)]
    return [(0, 0), (1, 1), *((2**power, 2 ** (power + 1) - 1) for power in range(1, top.bit_length()))]


def _within(run: History, counts: dict[int, int], low: int, high: int) -> float:
    if low == high == 0:
        return max((number(run.start, "samples") or 0) - sum(counts.values()), 0.0)
    return float(sum(n for times, n in counts.items() if low <= times <= high))


def _schedule(runs: Sequence[History], course: Course) -> Iterator[Figure]:
    """The share that is kept, which handover and schedules move; only where it changed."""
    changes = {id(run): _changes(run) for run in runs}
    if not any(len({share for _, share in found}) > 1 for found in changes.values()):
        return
    lines = []
    for slot, (_, of) in enumerate(shared((run, repr(changes[id(run)])) for run in runs)):
        at = changes[id(of[0])]
        lines.append(Series(numbered(of), [step for step, _ in at], [kept for _, kept in at], slot=slot, step=True))
    share = Axis("sub-batch over super-batch", include=(0, 1))
    yield from over_steps(course, "Kept share", lines, share, _CAPTIONS["keep"])


def _changes(run: History) -> list[tuple[float, float | None]]:
    """(step, share) where the share changes, and at the last step."""
    every = points(run.steps, value("keep"))
    ends = (0, len(every) - 1)
    return [at for n, at in enumerate(every) if n in ends or at[1] != every[n - 1][1]]
