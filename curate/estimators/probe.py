"""What an estimator is worth on one batch, before a run is spent on it.

Of several seeds: R = E|g_hat|^2 / |g|^2 and the cosine with backprop's gradient g. With the best step size, one along
g_hat makes (E<g_hat, g>)^2 / (E|g_hat|^2 |g|^2) of a backprop step's progress, which is 1 / R where E g_hat = g; so

    progress per second relative to backprop = (t_backprop / t) / R       biased estimators: times (E<g_hat, g>/|g|^2)^2

The control trains only the heads, exactly: what an estimator for the whole model has to beat to be worth anything.
Costs a backprop, `seeds` estimates, and a few more of each for times and memory; .grad and buffers are as found after.
"""

# N seeds, P numbers of the model

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curate.errors import CurateError, UsageError
from curate.estimators.backprop import Backprop
from curate.estimators.forward import Forward
from curate.estimators.local import heads_of
from curate.estimators.memory import peak_bytes
from curate.estimators.problem import Problem, trainable
from curate.estimators.report import GradientEstimator, GradReport
from curate.estimators.swapping import Rewind, only_trainable
from curate.estimators.tangents import dimensions
from curate.evaluation.interval import half_width

HOPELESS = 0.5  # of backprop's progress per second
SLOPE_TOLERANCE = 1e-2  # of |g|: rounding of a derivative through a deep model in float32, with room
_UNBIASED = ("rank-1", "dense", "basis", "activity", "exact", "mixed", "sum")


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """`ratio` is R and `ratio_low`, `ratio_high` its 95 % interval over seeds; `cosine` the mean over seeds; times in
    milliseconds per step, medians; peaks in MiB above the weights; `heads_progress` is that of the control, None where
    no heads could be told apart."""

    estimator: str
    dimensions: int
    tangents: int
    seeds: int
    loss: float
    cosine: float
    ratio: float
    ratio_low: float
    ratio_high: float
    milliseconds: float
    backprop_milliseconds: float
    peak_mib: float
    backprop_peak_mib: float
    progress: float
    heads: int
    heads_progress: float | None

    @property
    def hopeless(self) -> bool:
        """Less than half of backprop's progress per second."""
        return self.progress < HOPELESS


def probe(
    estimator: GradientEstimator,
    problem: Problem,
    batch: Any,
    *,
    seeds: int = 16,
    repeats: int = 3,
    seed: int = 0,
    tolerance: float = SLOPE_TOLERANCE,
) -> ProbeReport:
    """Measure an estimator against backprop on one batch.

    `tolerance` is the largest deviation of a directional derivative from backprop's, over |g|.
    Example: `probe(make_estimator("forward"), DualEncoderProblem(model), batch).hopeless` is True for d = 200,000.
    Errors: UsageError for fewer than 2 seeds; CurateError where a directional derivative is not what backprop says,
    so that some layer's forward derivative is missing or wrong.
    """
    if seeds < 2 or repeats < 1:
        raise UsageError(f"probe: {seeds} seeds and {repeats} repeats; at least 2 and 1 are needed")
    module, again = problem.module, Rewind(problem.module)
    with _gradients_kept(problem):
        exact = _run(Backprop(), problem, batch, seed, again)
        g_P = _flat(problem)
        estimates = []
        for n in range(seeds):
            report = _run(estimator, problem, batch, seed + n, again)
            estimates.append((report, _flat(problem)))
            _check_slopes(report, problem, estimator, g_P, tolerance)
        heads_time, heads_share, heads = _heads(problem, batch, g_P, repeats, again)
        ours, theirs = (_milliseconds(e, problem, batch, repeats, again) for e in (estimator, Backprop()))
        peaks = [_peak(e, problem, batch, again) for e in (estimator, Backprop())]
    square = float(g_P.square().sum())
    ratios = [float(h_P.square().sum()) / square for _, h_P in estimates]
    along = [float(h_P @ g_P) / square for _, h_P in estimates]
    low, high = _interval(ratios)
    unbiased = estimates[0][0].layout in _UNBIASED
    gain = 1.0 if unbiased else max(statistics.fmean(along), 0.0)  # uphill is no progress
    ratio = statistics.fmean(ratios)
    return ProbeReport(
        estimator=estimator.name,
        dimensions=dimensions(trainable(module)),
        tangents=estimates[0][0].tangents,
        seeds=seeds,
        loss=exact.loss,
        cosine=statistics.fmean(a / math.sqrt(r) if r else 0.0 for a, r in zip(along, ratios, strict=True)),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        milliseconds=ours,
        backprop_milliseconds=theirs,
        peak_mib=peaks[0],
        backprop_peak_mib=peaks[1],
        progress=theirs / ours * gain**2 / ratio if ratio else 0.0,
        heads=heads,
        heads_progress=theirs / heads_time * heads_share if heads else None,
    )


def render(report: ProbeReport) -> str:
    """The report as a short table with a verdict."""
    control = "no heads found" if report.heads_progress is None else f"{report.heads_progress:.3g}"
    lines = [
        f"estimator             {report.estimator}",
        f"numbers, tangents     d = {report.dimensions:,}, K = {report.tangents}",
        f"cosine to backprop    {report.cosine:.4f}",
        f"E|g_hat|^2/|g|^2      {report.ratio:,.4g} ({report.ratio_low:,.4g} to {report.ratio_high:,.4g}, "
        f"{report.seeds} seeds)",
        f"time per step         {report.milliseconds:.1f} ms (backprop {report.backprop_milliseconds:.1f} ms)",
        f"peak memory           {report.peak_mib:.1f} MiB (backprop {report.backprop_peak_mib:.1f} MiB)",
        f"progress per second   {report.progress:.3g} of backprop's",
        f"heads only, exact     {control} of backprop's, for {report.heads:,} numbers",
    ]
    if report.hopeless:
        lines.append(f"hopeless: below {HOPELESS} of backprop's progress per second")
    elif report.heads_progress is not None and report.progress < report.heads_progress:
        lines.append("training the heads alone makes more progress per second")
    return "\n".join(lines)


@contextmanager
def _gradients_kept(problem: Problem) -> Iterator[None]:
    before = [(p, p.grad) for p in problem.module.parameters()]
    buffers = Rewind(problem.module)
    try:
        yield
    finally:
        buffers.rewind()
        for parameter, gradient in before:
            parameter.grad = gradient


def _run(estimator: GradientEstimator, problem: Problem, batch: Any, seed: int, again: Rewind) -> GradReport:
    again.rewind()
    return estimator.estimate(problem, batch, seed=seed, step=0)


def _flat(problem: Problem) -> Tensor:
    """.grad of all trainable parameters in one vector [P], float64."""
    return torch.cat([p.grad.flatten().double() for p in trainable(problem.module).values() if p.grad is not None])


def _check_slopes(
    report: GradReport, problem: Problem, estimator: GradientEstimator, g_P: Tensor, tolerance: float
) -> None:
    """The derivative along each tangent must be <g, v>: a layer that drops tangents is found here."""
    if not isinstance(estimator, Forward):
        return
    tangents = estimator.directions(problem.module, seed=report.seed, step=report.step)
    for k, slope in enumerate(report.slopes):
        v_P = torch.cat([tangents.whole(name, k).flatten().double() for name in tangents.parameters])
        found, wanted = slope + report.loss_slopes[k], float(v_P @ g_P)
        if abs(found - wanted) > tolerance * float(g_P.norm()):
            raise CurateError(f"{report.estimator}: the derivative along tangent {k} is {found:.6g} and should be "
                              f"{wanted:.6g}; a layer loses or miscounts forward derivatives")  # fmt: skip


def _heads(problem: Problem, batch: Any, g_P: Tensor, repeats: int, again: Rewind) -> tuple[float, float, int]:
    """Milliseconds of their exact gradient, their share of |g|^2, and how many numbers they are."""
    again.rewind()
    try:
        heads = heads_of(problem, batch)
    except UsageError:  # no blocks, hence no heads
        return 0.0, 0.0, 0
    names = trainable(problem.module)
    of_P = torch.cat([torch.full((p.numel(),), name in heads) for name, p in names.items()]).to(g_P.device)
    with only_trainable(problem.module, heads):
        taken = _milliseconds(Backprop("exact"), problem, batch, repeats, again)
    share = float(g_P[of_P].square().sum() / g_P.square().sum())
    return taken, share, int(of_P.sum())


def _milliseconds(estimator: GradientEstimator, problem: Problem, batch: Any, repeats: int, again: Rewind) -> float:
    _run(estimator, problem, batch, 0, again)
    times = []
    for n in range(repeats):
        _wait(problem)
        began = time.perf_counter()
        _run(estimator, problem, batch, n, again)
        _wait(problem)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def _peak(estimator: GradientEstimator, problem: Problem, batch: Any, again: Rewind) -> float:
    for parameter in problem.module.parameters():
        parameter.grad = None
    return peak_bytes(lambda: _run(estimator, problem, batch, 0, again), _device(problem)) / 2**20


def _wait(problem: Problem) -> None:
    if _device(problem).type == "cuda":
        torch.cuda.synchronize(_device(problem))


def _device(problem: Problem) -> torch.device:
    return next(problem.module.parameters()).device


def _interval(values: list[float]) -> tuple[float, float]:
    """The mean's 95 % interval by Student's t."""
    mean, reach = statistics.fmean(values), half_width(values)
    return max(mean - reach, 0.0), mean + reach
