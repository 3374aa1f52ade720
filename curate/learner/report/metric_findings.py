"""How well runs do, in sentences: loss, zero-shot accuracy and retrieval, beside guessing and the baselines; and
whether what they were measured on was held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from curate.evaluation.interval import wilson
from curate.learner.held_out import OPTIONS, HeldOut
from curate.learner.report.history import History, number, word
from curate.learner.report.metrics import NAMES, Reached, best, measured
from curate.learner.report.words import criterion_of, numbered, over, shared
from curate.reporting.page import Finding


def metric_findings(runs: Sequence[History], baselines: Sequence[History]) -> Iterator[Finding]:
    """Loss first, then each metric that the logs hold, and how much of the held-out pairs was trained on."""
    yield from _loss(runs)
    yield from (Finding("Zero-shot", text) for text in _zeroshot(runs, baselines))
    yield from (Finding("Retrieval", text) for text in _retrieval(runs, baselines))
    yield from _held_out(runs, "run")
    yield from _held_out(baselines, "baseline")


def _loss(runs: Sequence[History]) -> list[Finding]:
    first = over((_tenth(run, last=False) for run in runs), "{:.3f}".format)
    last = over((number(run.end, "loss") or _tenth(run, last=True) for run in runs), "{:.3f}".format)
    if not first or not last:
        return []
    missing = sum(number(step, "loss") is None for run in runs for step in run.steps)
    gap = f" {missing} steps have no finite loss." if missing else ""
    text = f"The mean training loss went from {first} in the first tenth of the steps to {last} in the last.{gap}"
    drawn = any(criterion_of(run) != "uniform" for run in runs)
    text += " It is taken on the chosen pairs, which are not those that IID would draw." if drawn else ""
    return [Finding("Loss", text, "warning" if missing else "plain")]


def _zeroshot(runs: Sequence[History], baselines: Sequence[History]) -> Iterator[str]:
    last = [at[-1] for run in runs if (at := measured(run, "accuracy"))]
    if not last:
        return
    value = over((at.value for at in last), "{:.3f}".format)
    of, classes = (number(last[0].record, "zeroshot", key) for key in ("samples", "classes"))
    among = f" among {classes:.0f}; guessing gives {1 / classes:.3f}" if classes else ""
    text = f"Accuracy {value}{_sampled(last, of)} at the last evaluation: the share of {_count(of, 'held-out samples')}"
    yield f"{text} whose class was ranked first{among}.{_peak(runs, 'accuracy')}{_beside(baselines, 'accuracy')}"


def _retrieval(runs: Sequence[History], baselines: Sequence[History]) -> Iterator[str]:
    last = [at[-1].record for run in runs if (at := measured(run, "recall"))]
    if not last:
        return
    texts, images = (
        over((number(record, "retrieval", way) for record in last), "{:.3f}".format)
        for way in ("image_to_text", "text_to_image")
    )
    pairs, pool = (number(last[0], "retrieval", key) for key in ("pairs", "pool"))
    out_of = f", out of {pool:,.0f}; guessing gives {1 / pool:.3g}" if pool else ""
    text = f"Recall at 1 at the last evaluation: {texts} of images rank their own caption first, {images} of captions"
    text += f" their own image{out_of} ({_count(pairs, 'held-out pairs')})."
    yield f"{text}{_peak(runs, 'recall')}{_beside(baselines, 'recall')}"


def _peak(runs: Sequence[History], metric: str) -> str:
    tops = [(top, measured(run, metric)[-1]) for run in runs if (top := best(run, metric))]
    if all(top.value == last.value for top, last in tops):
        return ""
    value = over((top.value for top, _ in tops), "{:.3f}".format)
    step = over((number(top.record, "step") for top, _ in tops), "{:,.0f}".format)
    return f" The best {NAMES[metric]} was {value}, at step {step}."


def _sampled(last: Sequence[Reached], of: float | None) -> str:
    """What the number of held-out samples leaves open; over several seeds their range is given instead."""
    if len(last) > 1 or not of or of < 1 or not 0 <= last[0].value <= 1:
        return ""
    share = wilson(round(last[0].value * int(of)), int(of))
    return f" (95 % interval {share.low:.3f} to {share.high:.3f})"


def _beside(baselines: Sequence[History], metric: str) -> str:
    """The baselines' figures for the same metric."""
    last = over((at[-1].value for run in baselines if (at := measured(run, metric))), "{:.3f}".format)
    top = over((high.value for run in baselines if (high := best(run, metric))), "{:.3f}".format)
    which = "" if metric == "accuracy" else f" in {NAMES[metric]}"
    return f" Baselines ended at {last}{which}; their best was {top}." if last else ""


def _tenth(run: History, *, last: bool) -> float | None:
    values = [value for step in run.steps if (value := number(step, "loss")) is not None]
    count = max(1, len(values) // 10)
    return fmean(values[-count:] if last else values[:count]) if values else None


def _count(value: float | None, what: str) -> str:
    return f"{value:,.0f} {what}" if value else what


def _held_out(runs: Sequence[History], what: str) -> Iterator[Finding]:
    """For each option that holds pairs out, what the logs say of pairs that were trained on all the same."""
    for one, of in shared((run, held_out) for run in runs for held_out in _overlaps(run)):
        who = "" if what == "run" and len(of) == len(runs) else f" ({what}: {numbered(of)})"
        if one.trained:
            memory = "what is measured on these is memory as well."
            yield Finding("Not held out", f"{one.text}{who}; {memory}", "warning")
        else:
            yield Finding("Held out", f"{one.text}{who}.")


def _overlaps(run: History) -> Iterator[HeldOut]:
    listed = run.start.get("held_out")
    for record in listed if isinstance(listed, list) else ():
        counts = [number(record, name) for name in ("pairs", "trained", "captions")]
        option = word(record, "option") if isinstance(record, Mapping) else None
        if option in OPTIONS.values() and None not in counts:
            yield HeldOut(str(option), *(int(count or 0) for count in counts))
