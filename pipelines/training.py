"""`train`: shards in, an open_clip checkpoint out; the same call again resumes.

The reference's part is scored ahead, shard by shard, by the pipeline (or taken from an earlier run's scores); then the
learner trains in this process, reading ahead; what it trained on can be written as new shards on the way.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from curate.costs.energy import Joules, co2_grams
from curate.costs.ledger import CostLedger
from curate.errors import CurateWarning, UsageError
from curate.estimators.problem import Problem
from curate.learner.candidates import Candidates
from curate.learner.checkpoint import TRAINING_FILE, add_checkpoint
from curate.learner.dataset import Opened, open_pairs
from curate.learner.engine import Course
from curate.learner.files import RunFiles, alone, begin_run, check_run
from curate.learner.fitting import fit
from curate.learner.forecast import measured_factor
from curate.learner.held_out import HeldOut, held_out_pairs
from curate.learner.measuring import opened_measure
from curate.learner.problem import wants_bf16
from curate.learner.report import write_report
from curate.learner.report.history import read_history
from curate.learner.running import Extras, Report, Team
from curate.learner.settings import FREE, TrainResult, TrainSettings, parse_settings
from curate.learner.start import Start, prepare
from curate.learner.stepping import MAX_SCALE
from curate.learner.telling import tail
from curate.models.embed import DualEncoder
from curate.models.precision import choose_device
from curate.models.spec import parse_spec
from curate.pipelines.data_parallel import ForwardTeam
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.policing import asked_policy
from curate.pipelines.reference_pass import (
    Referring,
    Where,
    check_trusted,
    reference_model,
    referred_candidates,
    trusted_pairs,
)
from curate.pipelines.replicas import ClippedStep
from curate.pipelines.runner import local_output
from curate.pipelines.teeing import pin_tee, tee
from curate.pipelines.training_policy import check_policed, pinned, policed
from curate.policy.ahead import refuse_without_reference, scored_names
from curate.run_record import refuse_foreign
from curate.shards.sources import Patterns, ShardSource, expand_shards


def train(
    shards: Patterns,
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
    reference_cache: str | PathLike[str] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    write_shards: str | PathLike[str] | None = None,
    baselines: Sequence[str | PathLike[str]] = (),
    grams_per_kwh: float | None = None,
    policy: str | PathLike[str] | None = None,
    labels: str | PathLike[str] | None = None,
    on: str | None = None,
    before: CostLedger | None = None,
    progress: Report | None = None,
    quiet: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train on `shards` and leave a checkpoint in `output` that open_clip loads as `local-dir:OUTPUT`.

    `settings` are the fields of `curate.learner.settings.TrainSettings`. `reference_cache` is an OUT of `curate score`
    with the same reference. What is trained on is written to new shards in `write_shards`; `baselines` are finished
    runs that the report compares with (charging this one with what was spent `before` it, too), `grams_per_kwh` is the
    intensity by which it turns joules into CO2. `policy` is a file of bounds that every draw keeps to, on groups of
    captions or of `labels`, joined `on` key, uid or sample_id; `output`/certificate.json says what came of it. Where
    the run was interrupted, the same call takes it up again; `overwrite` removes it first, and nothing else in
    `output`.

    Errors: UsageError for settings, an output in use (also by another process), shards without a readable pair, models
    that do not fit; RunMismatch where the run there was begun with other settings; CacheMismatch; ShardError;
    StorageError; CurateError where something is not finite.
    Example: `train(["shards/{0..3}.tar"], "run", reference="small", criterion="learnability", steps=500).loss`.
    """
    chosen = _absolute(parse_settings(settings))
    files = RunFiles(local_output(output))
    check_run(files, overwrite=overwrite)
    began = time.perf_counter()
    cache = None if reference_cache is None else local_output(reference_cache)
    given = asked_policy(policy, labels, on)
    pinned_too = {} if given is None else pinned(given)
    if given is not None and chosen.reference is None:
        refuse_without_reference(given)
    teed = None if write_shards is None else local_output(write_shards)
    against = [local_output(run) for run in baselines]
    reported = partial(write_report, output=files.report, baselines=against, grams_per_kwh=grams_per_kwh)
    check_report(against, grams_per_kwh)
    _check_places(files, chosen, [path for path in (cache, *against) if path is not None], teed, overwrite=overwrite)
    where = Where(cache, workers, scheduler, engine, allow_remote_scheduler, quiet)
    start, sources = prepare(chosen), tuple(expand_shards(shards))
    with ExitStack() as stack:
        opened = stack.enter_context(
            open_pairs(sources, start.tokenizer, start.rule, memory_gb=chosen.memory_gb, label=chosen.label)
        )
        model = reference_model(chosen, start, groups=bool(scored_names(given)))
        of_size(chosen, len(opened.pairs))  # refused before an earlier run is removed
        check_sources(chosen, sources, opened)
        held_out = held_out_pairs(chosen, opened.contents)
        _warn_of_overlap(held_out)
        measure = None if files.finished and not overwrite else stack.enter_context(opened_measure(start, chosen))
        stack.enter_context(alone(files))
        referring, ahead = Referring(chosen, opened, sources, model, where), None
        if overwrite:  # what else is refused before an earlier run is removed
            check_trusted(chosen, start)
            ahead = check_policed(given, referring, files)
        begin_run(files, _record(chosen, sources, opened, model) | pinned_too, overwrite=overwrite)
        if files.finished:
            return _found(files, opened, teed, where, reported)
        policing, ahead = policed(given, referring, files, ahead)
        referred = ahead or referring.into(files.reference)
        candidates, reference = referred_candidates(chosen, opened, referred), model if chosen.uses_reference else None
        trusted, candidates, more = trusted_pairs(chosen, start, reference, candidates, files, where)
        chosen = of_size(chosen, len(candidates))
        extras = Extras(
            files, trusted=trusted, ledger=referred.ledger + more, progress=progress, say=where.say, policing=policing,
            held_out=held_out, before=before or CostLedger(), measure=measure,
        )  # fmt: skip
        try:
            course = _fitted(start, candidates, chosen, extras, teed, where, overwrite=overwrite)
        except KeyboardInterrupt:
            reported(files.root)  # of what there is so far
            raise
        samples, skipped = len(opened.pairs), opened.skipped
        record = _history(chosen, sources, course, samples, skipped)
        path = add_checkpoint(
            start.module, files.root, architecture=start.architecture, training=record, feedforward=start.feedforward
        )
    report = reported(path)
    factor, seconds = measured_factor(course.ledger, course.plain), time.perf_counter() - began
    return TrainResult(
        path, course.step, seconds, tail(course.losses), samples, skipped, report, factor, _certificate(files)
    )


def _certificate(files: RunFiles) -> dict[str, Any] | None:
    """How the draws kept to a policy; None without one."""
    return json.loads(files.certificate.read_bytes()) if files.certificate.is_file() else None


def _fitted(
    start: Start,
    candidates: Candidates,
    settings: TrainSettings,
    extras: Extras,
    teed: Path | None,
    where: Where,
    *,
    overwrite: bool,
) -> Course:
    """Fit, with what is open only meanwhile: workers that share gradients, shards that are written."""
    assert extras.files is not None
    pairs = settings.total_steps(len(candidates)) * settings.batch
    with (
        _team(settings, where) as team,
        _teeing(extras.files, pairs, teed, where, overwrite=overwrite) as teeing,
    ):
        course = fit(start, candidates, settings, replace(extras, team=team, kept=teeing))
        teeing(final=True)
    return course


def _check_places(
    files: RunFiles, settings: TrainSettings, others: Sequence[Path], teed: Path | None, *, overwrite: bool
) -> None:
    """Refuse to remove what the run is made of, and a bad place for the new shards, before the work."""
    if overwrite:
        _check_overwriting(files.root, settings, others)
    if teed is not None:
        _check_tee(files, teed)


def _nothing(final: bool = False) -> None:
    """There is nothing to write."""


def check_report(baselines: Sequence[Path], grams_per_kwh: float | None) -> None:
    """Refuse before the work what the report would be refused for after it. Errors: UsageError."""
    for run in baselines:
        read_history(run)
    if grams_per_kwh is not None:
        co2_grams(Joules(), grams_per_kwh)


def _check_overwriting(root: Path, settings: TrainSettings, others: Sequence[Path]) -> None:
    """Refuse to remove what the run is to be made of. Errors: UsageError."""
    specs = [parse_spec(name) for name in (settings.model, settings.reference) if name is not None]
    needed = [Path(spec.location) for spec in specs if spec.kind in ("directory", "file")] + list(others)
    for path in needed:
        if path.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"--overwrite would remove {path}, which this run needs; choose another output directory")


def _check_tee(files: RunFiles, teed: Path) -> None:
    """Refuse a place for the new shards before the work. Errors: UsageError."""
    if teed.resolve() == files.root.resolve():
        raise UsageError(f"--write-shards {teed} is the run's own directory; choose another one, such as {teed}/chosen")
    refuse_foreign(teed)


def check_sources(settings: TrainSettings, sources: Sequence[ShardSource], opened: Opened) -> None:
    """Refuse joint draws from a shard that is there twice. Errors: UsageError."""
    first = dict(zip(reversed(opened.digests), reversed(sources), strict=True))
    if settings.criterion != "uniform" and len(first) < len(sources):
        twice = Counter(opened.digests).most_common(1)[0][0]
        raise UsageError(
            f"{first[twice].url} is there twice, the second time under another name; joint draws need each pair once: "
            "leave one out"
        )


def _warn_of_overlap(held_out: Sequence[HeldOut]) -> None:
    """Say which held-out pairs are trained on: what is measured on them is then memory as well."""
    for one in held_out:
        if one.trained:
            warnings.warn(one.text, CurateWarning, stacklevel=3)


def _found(
    files: RunFiles, opened: Opened, teed: Path | None, where: Where, reported: Callable[[Path], Path]
) -> TrainResult:
    """The result of a run that has ended. Its report is written again, since the baselines may be others; and so are
    shards that were not asked for before."""
    history = json.loads((files.root / TRAINING_FILE).read_bytes())
    with _teeing(files, history["steps"] * history["settings"]["batch"], teed, where, overwrite=False) as teeing:
        teeing(final=True)
    report = reported(files.root)
    losses, skipped = history["losses"], opened.skipped
    return TrainResult(
        files.root, history["steps"], history["seconds"], tail(losses), history["samples"], skipped, report,
        history["factor"], _certificate(files),
    )  # fmt: skip


@contextmanager
def _teeing(
    files: RunFiles, pairs: int, output: Path | None, where: Where, *, overwrite: bool
) -> Iterator[Callable[..., None]]:
    """What writes the chosen batches to shards, after each state and at the end; does nothing without `output`."""
    if output is None:
        yield _nothing
        return
    scores = None if (files.reference / "_curate").is_dir() else where.cache
    pin_tee(files.root, output, samples=pairs, scores=scores, overwrite=overwrite)
    with open_engine(
        workers=where.workers, scheduler=where.scheduler, mode=where.engine, allow_remote=where.allow_remote
    ) as running:

        def write(final: bool = False) -> None:
            tee(files.root, output, running, samples=pairs, scores=scores, final=final)

        yield write


@contextmanager
def _team(settings: TrainSettings, where: Where) -> Iterator[Team | None]:
    """What shares a forward gradient among workers: processes here, or those of the scheduler."""
    if settings.estimator_workers == 1:
        yield None
        return
    count = settings.estimator_workers
    mode = where.engine or (None if where.scheduler else "processes")
    with open_engine(
        workers=None if where.scheduler else count,
        scheduler=where.scheduler,
        mode=mode,
        allow_remote=where.allow_remote,
    ) as running:

        def shared(problem: Problem, optimiser: torch.optim.Optimizer, estimator: Any) -> ForwardTeam:
            finish = ClippedStep(settings.clip_gradient, MAX_SCALE)
            return ForwardTeam(running, problem, optimiser, estimator, workers=count, finish=finish)

        yield shared


def _absolute(settings: TrainSettings) -> TrainSettings:
    """Paths as they are found from anywhere."""
    reference = None if settings.reference is None else parse_spec(settings.reference).absolute
    return replace(settings, model=parse_spec(settings.model).absolute, reference=reference)


def _record(
    settings: TrainSettings, sources: Sequence[ShardSource], opened: Opened, reference: DualEncoder | None
) -> dict[str, Any]:
    """What TRAIN.json pins."""
    inputs = [asdict(s) | {"digest": digest} for s, digest in zip(sources, opened.digests, strict=True)]
    arithmetic = "bf16" if wants_bf16(settings.precision, choose_device(settings.device)) else "fp32"
    pinned = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return {
        "schema": 1,
        "settings": pinned | {"precision": arithmetic},  # "auto" is another one on another machine
        "inputs": inputs,
        "models": {} if reference is None else {"reference": reference.identity.to_json()},
    }


def of_size(settings: TrainSettings, candidates: int) -> TrainSettings:
    """Uniform draws make do with what there is; a super-batch has to be there. Errors: UsageError."""
    if settings.criterion == "uniform" and 2 <= candidates < settings.batch:
        return replace(settings, batch=candidates)
    if candidates < settings.super_batch:
        raise UsageError(
            f"{candidates} candidates are fewer than a super-batch of {settings.super_batch} (batch "
            f"{settings.batch} at filter ratio {settings.filter_ratio:g}); lower --batch or --filter-ratio"
        )
    return settings


def _history(
    settings: TrainSettings, sources: Sequence[ShardSource], course: Course, samples: int, skipped: dict[str, int]
) -> dict[str, Any]:
    """training.json: how the checkpoint came about."""
    return {
        "settings": asdict(settings),
        "inputs": [asdict(s) for s in sources],
        "samples": samples,
        "skipped": skipped,
        "steps": course.step,
        "seconds": round(course.seconds, 3),
        "losses": [round(x, 5) for x in course.losses],
        "ledger": course.ledger.as_json(),
        "factor": measured_factor(course.ledger, course.plain),
    }
