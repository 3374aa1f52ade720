"""From a few numbers back to a gradient: replay a step, or join what data-parallel workers found.

Workers push the same tangents through their own part of a batch, exchange embeddings (as data-parallel CLIP does
anyway), compute G = dL/dZ each for itself, and send K slopes (and those of touched rows): no gradient travels.

    pushed = push_part(estimator, problem, my_batch, seed=0, step=0)       my embeddings, and how they move
    gathered = ...                                                        everybody's embeddings, in order
    report = part_report(estimator, problem, pushed, gathered, first=64, seed=0, step=0)
    replay(combine(everybody's reports), problem.module)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from curate.errors import UsageError
from curate.estimators.activity import fill_activity
from curate.estimators.forward import Forward, Pushed, push, settle
from curate.estimators.problem import Embeddings, Problem, head_of
from curate.estimators.report import GradReport, RowSlopes
from curate.estimators.tangents import fill_from

_FROM_NUMBERS = ("rank-1", "dense", "basis")


def replay(report: GradReport, module: nn.Module, *, problem: Problem | None = None, batch: Any = None) -> None:
    """Fill `.grad` with the bits that the estimate gave, from seed and scalars (`forward-activity`: and the batch).

    Errors: UsageError for a report of another model, for `forward-activity` without problem and batch, and for
    estimates that are functions of the batch alone (backprop, local losses).
    """
    if report.layout == "mixed":
        for part in report.parts:
            replay(part, module, problem=problem, batch=batch)
    elif report.layout == "sum":
        _replay_sum(report, module)
    elif report.layout in _FROM_NUMBERS:
        fill_from(report, dict(module.named_parameters()))
    elif report.layout == "activity" and problem is not None and batch is not None:
        fill_activity(report, problem, batch)
    else:
        wanted = "pass problem= and batch=" if report.layout == "activity" else "estimate again on the same batch"
        raise UsageError(f"{report.estimator}: its gradient depends on the batch, not on numbers alone; {wanted}")


def push_part(estimator: Forward, problem: Problem, batch: Any, *, seed: int, step: int) -> Pushed:
    """First half of a worker's step: `embeddings` is what to send."""
    return push(problem, batch, estimator.directions(problem.module, seed=seed, step=step))


def part_report(
    estimator: Forward, problem: Problem, pushed: Pushed, gathered: Embeddings, *, first: int, seed: int, step: int
) -> GradReport:
    """Second half: this worker's part of the slopes. `gathered` are all embeddings, its own from row `first` on."""
    tangents = estimator.directions(problem.module, seed=seed, step=step)
    return settle(problem, pushed, tangents, head_of(problem, gathered), name=estimator.name, first=first)


def combine(reports: Sequence[GradReport]) -> GradReport:
    """One report from the workers' parts: what a single process would have found, to the rounding of sums.

    Errors: UsageError for none, for reports of different steps, and for estimators whose gradients must travel.
    """
    if not reports:
        raise UsageError("no reports to combine")
    first = reports[0]
    if first.layout not in _FROM_NUMBERS or first.estimator == "zeroth-order":
        raise UsageError(f"{first.estimator}: parts of a batch do not combine from numbers; sum .grad over the workers")
    for other in reports[1:]:
        for what in ("estimator", "seed", "step", "tangents", "disjoint", "names", "dimensions"):
            if getattr(other, what) != getattr(first, what):
                raise UsageError(f"reports differ in {what}: {getattr(first, what)} and {getattr(other, what)}")
    return replace(
        first,
        slopes=tuple(map(sum, zip(*(report.slopes for report in reports), strict=True))),
        rows=_joined([rows for report in reports for rows in report.rows]),
        seconds=max(report.seconds for report in reports),
    )


def together(reports: Sequence[GradReport]) -> GradReport:
    """One report from parts that each had tangents of their own (other seeds): their gradients add up.

    Unbiased, since every example's share meets one tangent only. With parts g_w of the gradient the variance is
    d sum |g_w|^2 in place of d |sum g_w|^2: N times less where N parts agree, as much where they are orthogonal, and
    more where they cancel, as they do when the loss is nearly as low as it gets.
    Each part carries 1/N of the loss's own slopes, which all know. Errors: UsageError as for `combine`, and for seeds
    that repeat.
    """
    if not reports or len({report.seed for report in reports}) != len(reports):
        raise UsageError("parts with tangents of their own need a seed each")
    for report in reports:
        combine([replace(reports[0], rows=()), replace(report, seed=reports[0].seed, rows=())])  # refuses what differs
    share = 1 / len(reports)
    parts = [replace(r, loss_slopes=tuple(share * slope for slope in r.loss_slopes)) for r in reports]
    return replace(
        reports[0],
        layout="sum",
        tangents=sum(report.tangents for report in reports),
        seconds=max(report.seconds for report in reports),
        slopes=(),
        loss_slopes=(),
        rows=(),
        parts=tuple(parts),
    )


def _replay_sum(report: GradReport, module: nn.Module) -> None:
    named = dict(module.named_parameters())
    total: dict[str, Tensor] = {}
    for part in report.parts:
        fill_from(part, named)
        for name in part.names:
            own = named[name].grad
            assert own is not None
            total[name] = total[name].add_(own) if name in total else own
    for name, gradient in total.items():
        named[name].grad = gradient


def _joined(parts: list[RowSlopes]) -> tuple[RowSlopes, ...]:
    """Sum what different workers found for the same row."""
    found: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(dict)
    for part in parts:
        for i, row in enumerate(part.rows):
            total = found[part.names].setdefault(row, [0.0] * len(part.values))
            for k, values in enumerate(part.values):
                total[k] += values[i]
        _ = found[part.names]  # touched nowhere is still known
    joined = []
    for names, rows in found.items():
        order = sorted(rows)
        columns = [rows[row] for row in order]
        K = max(len(part.values) for part in parts if part.names == names)
        joined.append(RowSlopes(names, tuple(order), tuple(tuple(column[k] for column in columns) for k in range(K))))
    return tuple(joined)
