"""What a run says of itself in its journal: how it begins, each step, what is measured, how it ends."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from torch import Tensor

from curate.errors import CurateWarning
from curate.estimators.probe import SLOPE_TOLERANCE, probe
from curate.learner.engine import Taken
from curate.learner.forecast import forecast, measured_factor
from curate.learner.journal import Journal, read_log
from curate.learner.policing import certified
from curate.learner.problem import wants_bf16
from curate.learner.reading_ahead import Ahead, SuperBatch
from curate.learner.running import Running
from curate.storage import readable_json, replace_file

BF16_SLOPES = 0.1  # deviation of a directional derivative over |g|: some hundredths are rounding, a lost layer is more


def opened(run: Running, ahead: Ahead) -> None:
    """The first record: what is to be done, and what it will cost."""
    engine, settings, module = run.engine, run.settings, run.start.module
    course, costs = engine.course, engine.stepper.costs
    batch = ahead.get(0, engine.wanted(course.plan))
    forward = costs.forward(len(batch), batch.token_BT) / len(batch)
    looks = engine.steps * engine.wanted(course.plan)  # the reference embeds a pair once, however often it is looked at
    expected = forecast(
        settings, course.plan, engine.drawer, forward=forward, reference=course.ledger.reference.flops / looks
    )
    if run.extras.say is not None:
        run.extras.say(f"cost: {expected.factor:.2f} x plain training of as many pairs ({expected.text})")
    if run.journal is None:
        return
    run.journal.write(
        "start", model=settings.model, reference=settings.reference, criterion=settings.criterion,
        settings=asdict(settings), samples=len(engine.candidates), steps=engine.steps,
        super_batch=course.plan.candidates(settings.batch), sub_batch=settings.batch, chunks=settings.chunks,
        parameters=sum(p.numel() for p in module.parameters()), flops_per_sample=forward,
        factor=expected.factor, factor_text=expected.text, held_out=[asdict(one) for one in run.extras.held_out],
        before=run.extras.before.as_json(),
    )  # fmt: skip
    if run.extras.policing is not None:
        policing = run.extras.policing
        members = policing.member_NG[engine.candidates.row_M].sum(axis=0)
        run.journal.write(
            "policy", policy=policing.policy.as_json(), columns=policing.columns, window=settings.window,
            members=dict(zip(course.tally.state.names, members.tolist(), strict=True)) if course.tally else {},
        )  # fmt: skip
    if settings.estimator not in ("backprop", "backprop-checkpoint"):
        probed(run, run.journal, batch)


def probed(run: Running, journal: Journal, batch: SuperBatch) -> None:
    """What the estimator is worth on the first batch; a hopeless one is announced, and trained with all the same."""
    stepper, size = run.engine.stepper, run.settings.batch
    given = (batch.image_BCHW[:size].to(stepper.device), stepper.compact(batch.token_BT[:size]).to(stepper.device))
    run.start.module.train()
    rounding = BF16_SLOPES if wants_bf16(run.settings.precision, stepper.device) else SLOPE_TOLERANCE
    report = probe(
        stepper.estimator, stepper.problem, given, seeds=4, repeats=1, seed=run.settings.seed, tolerance=rounding
    )
    journal.write("probe", **asdict(report), hopeless=report.hopeless)
    if report.hopeless:
        warnings.warn(
            f"estimator {report.estimator} is hopeless here: {report.progress:.2g} of backprop's progress per second "
            f"(its variance is {report.ratio:,.0f} times |g|^2; `curate probe` shows more)",
            CurateWarning,
            stacklevel=2,
        )


def written(run: Running, taken: Taken) -> None:
    """The journal's and the log's share of a step."""
    if run.journal is None or run.chosen is None:
        return
    course, chosen, clean_N = run.engine.course, taken.chosen, run.engine.candidates.clean_N
    run.chosen.add(taken.step, taken.row_b, chosen)
    run.journal.write(
        "step", step=taken.step, samples=course.trained, candidates=course.scored, loss=taken.loss, lr=taken.rate,
        phase=taken.plan.phase, gain=taken.plan.gain, keep=taken.plan.keep, chunk_scores=chosen.chunk_scores,
        effective=chosen.effective,
        clean=None if clean_N is None else float(clean_N[taken.row_b].mean()),
        clean_pool=None if clean_N is None else float(clean_N[taken.candidates].mean()),
        flops=course.ledger.flops(), seconds=course.seconds,
    )  # fmt: skip
    _short(run.journal, taken)
    if taken.lag is not None:
        run.journal.write("lag", step=taken.step, lag=run.settings.lag, **taken.lag)


def _short(journal: Journal, taken: Taken) -> None:
    """A line where members are owed after a draw: how many, and what conflicted (nothing: there were too few)."""
    kept = taken.chosen.kept
    if kept is None:
        return
    missing_G = np.floor(kept.quota.debt_G - kept.count_G + 1e-9)  # the debt is a fraction in floating point
    short = {name: int(n) for name, n in zip(kept.quota.names, missing_G, strict=True) if n >= 1}
    if kept.conflict or short:
        journal.write("short", step=taken.step, conflict=kept.conflict, short=short)


def tallied(run: Running) -> None:
    """Under a policy: per group how many candidates and members there were so far, and the price."""
    tally = run.engine.course.tally
    if run.journal is not None and tally is not None:
        state = tally.state
        groups = {name: counts for name, *counts in zip(state.names, state.pool_G, state.chosen_G, strict=True)}
        run.journal.write(
            "quota", step=run.engine.course.step, candidates=state.pool, chosen=state.chosen, groups=groups,
            bound=tally.bound, conflicts=tally.conflicts, substitutes=tally.substitutes,
            given_up={name: price.given_up for name, price in tally.prices.items()},
        )  # fmt: skip


def _certified(run: Running, journal: Journal) -> None:
    """Write what the policy asked of the whole run, and what it got, into the journal and beside the checkpoint."""
    files, policing, tally = run.extras.files, run.extras.policing, run.engine.course.tally
    if files is None or policing is None or tally is None:
        return
    journal.sync()
    conflicts = [str(line["conflict"]) for line in read_log(files.log) if line["kind"] == "short"]
    found = certified(policing, tally, conflicts, run.settings.criterion)
    replace_file(files.certificate, readable_json(found))
    journal.write("certificate", **found)


def measured(run: Running) -> None:
    measure, course = run.extras.measure, run.engine.course
    if measure is None:
        return
    began = time.perf_counter()
    with run.vocabulary.whole():
        found = measure()
    course.spend("evaluation", seconds=time.perf_counter() - began)
    if run.journal is not None:
        run.journal.write(
            "eval", step=course.step, samples=course.trained, flops=course.ledger.flops(), seconds=course.seconds,
            ledger=course.ledger.as_json(), **found,
        )  # fmt: skip


def watched(run: Running) -> None:
    """Look at learner and reference on the trusted set, and hand over if it is time."""
    engine, course = run.engine, run.engine.course
    if run.watch is None or not course.control.listens:
        return
    began = time.perf_counter()
    with run.vocabulary.whole():
        seen = run.watch.look(replace(engine.drawer.scorer, low=None, reuse=None, compact=_as_it_is), course.step)
    course.spend("scoring", flops=run.watch.flops(engine.stepper.costs), seconds=time.perf_counter() - began)
    course.seconds += time.perf_counter() - began
    course.control = course.control.observe(seen)
    if run.journal is not None:
        run.journal.write("watch", **seen.as_json(), phase=course.plan.phase)


def handed_over(run: Running, before: int) -> None:
    """Write the changes of phase beyond the first `before` ones into the journal, and say them."""
    for event in run.engine.course.control.events[before:]:
        if run.journal is not None:
            run.journal.write(**event.as_json())
        if run.extras.say is not None:
            run.extras.say(f"step {event.step}: {event.before} -> {event.after}: {event.why}")


def _as_it_is(token_BT: Tensor) -> Tensor:
    return token_BT


def closed(run: Running) -> None:
    """The last record: what it has cost, and how often samples were chosen."""
    course = run.engine.course
    factor = measured_factor(course.ledger, course.plain)
    if run.extras.say is not None:
        run.extras.say(f"cost: {factor:.2f} x plain training of as many pairs, as counted")
    if run.journal is None:
        return
    _certified(run, run.journal)
    times, samples = np.unique(course.times_N[course.times_N > 0], return_counts=True)
    run.journal.write(
        "end", steps=course.step, seconds=course.seconds, loss=tail(course.losses),
        repeats={int(t): int(n) for t, n in zip(times, samples, strict=True)},
        ledger=course.ledger.as_json(), factor=factor,
    )  # fmt: skip
    run.journal.sync()


def tail(losses: Sequence[float]) -> float:
    """The mean loss of the last tenth of the steps."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
