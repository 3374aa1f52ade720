"""`train`: shards in, an open_clip checkpoint out; the same call again resumes.

The reference's part is scored ahead, shard by shard, by the pipeline (or taken from an earlier run's scores); then the
learner trains in this process, reading ahead; what it trained on can be written as new shards on the way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from curate.costs.ledger import CostLedger
from curate.errors import CacheMismatch, UsageError
from curate.estimators.problem import Problem
from curate.learner.candidates import Candidates, all_of, read_reference
from curate.learner.checkpoint import TRAINING_FILE, add_checkpoint
from curate.learner.dataset import Opened, open_pairs
from curate.learner.engine import Course
from curate.learner.files import RunFiles, begin_run, check_run
from curate.learner.fitting import fit
from curate.learner.forecast import measured_factor
from curate.learner.measuring import opened_measure
from curate.learner.report import write_report
from curate.learner.running import Extras, Report, Team
from curate.learner.settings import TrainResult, TrainSettings, parse_settings
from curate.learner.start import Start, prepare
from curate.learner.stepping import MAX_SCALE
from curate.learner.telling import tail
from curate.learner.trust import MOST, Trusted, held_out
from curate.models.embed import DualEncoder
from curate.models.identity import ModelIdentity
from curate.models.load import load_model
from curate.models.spec import parse_spec
from curate.pipelines.data_parallel import ForwardTeam
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.replicas import ClippedStep
from curate.pipelines.runner import local_output, score
from curate.pipelines.teeing import pin_tee, tee
from curate.receipts import Store
from curate.run_record import read_run
from curate.shards.sources import Patterns, ShardSource, expand_shards

PROBES = ("a red circle", "two dogs on a beach at sunset, one of them asleep", "ein rotes Haus")


@dataclass(frozen=True, slots=True)
class Where:
    """On what the reference's pass runs, and an earlier run's scores; none of it changes what comes out."""

    cache: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    engine: Mode | None = None
    allow_remote: bool = False
    quiet: bool = True


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
    progress: Report | None = None,
    quiet: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train on `shards` and leave a checkpoint in `output` that open_clip loads as `local-dir:OUTPUT`.

    `settings` are the fields of `curate.learner.settings.TrainSettings`. `reference_cache` is an OUT of `curate score`
    with the same reference. What is trained on is written to new shards in `write_shards`; `baselines` are finished
    runs that the report compares with. Where the run was interrupted, the same call takes it up again.

    Errors: UsageError for settings, an output in use, shards without a readable pair, models that do not fit;
    RunMismatch where the run there was begun with other settings; CacheMismatch; ShardError; StorageError; CurateError
    where something is not finite.
    Example: `train(["shards/{0..3}.tar"], "run", reference="small", criterion="learnability", steps=500).loss`.
    """
    chosen = _absolute(parse_settings(settings))
    files = RunFiles(local_output(output))
    check_run(files, overwrite=overwrite)
    began = time.perf_counter()
    cache = None if reference_cache is None else local_output(reference_cache)
    where = Where(cache, workers, scheduler, engine, allow_remote_scheduler, quiet)
    start, sources = prepare(chosen), tuple(expand_shards(shards))
    with ExitStack() as stack:
        opened = stack.enter_context(
            open_pairs(sources, start.tokenizer, start.rule, memory_gb=chosen.memory_gb, label=chosen.label)
        )
        reference = _reference_model(chosen, start)
        begin_run(files, _record(chosen, sources, opened, reference), overwrite=overwrite)
        if files.finished:
            return _found(files, opened, baselines)
        candidates, ledger = _candidates(chosen, opened, reference, sources, files, where)
        trusted, candidates = _trusted(chosen, start, reference, candidates, files, where)
        chosen = _of_size(chosen, candidates)
        pairs = chosen.total_steps(len(candidates)) * chosen.batch
        teeing = stack.enter_context(_teeing(files, pairs, write_shards, where, overwrite=overwrite))
        extras = Extras(
            files,
            stack.enter_context(opened_measure(start, chosen)),
            trusted,
            ledger,
            progress,
            None if quiet else _say,
            stack.enter_context(_team(chosen, where)),
            teeing,
        )
        course = fit(start, candidates, chosen, extras)
        samples, skipped = len(opened.pairs), opened.skipped
        teeing(final=True)
    record = _history(chosen, sources, course, samples, skipped)
    path = add_checkpoint(
        start.module, files.root, architecture=start.architecture, training=record, feedforward=start.feedforward
    )
    report = write_report(path, files.report, baselines=[Path(run) for run in baselines])
    factor = measured_factor(course.ledger, course.plain)
    seconds = time.perf_counter() - began
    return TrainResult(path, course.step, seconds, tail(course.losses), samples, skipped, report, factor)


def _nothing(final: bool = False) -> None:
    """There is nothing to write."""


def _found(files: RunFiles, opened: Opened, baselines: Sequence[str | PathLike[str]]) -> TrainResult:
    """The result of a run that has ended; its report is written again, since the baselines may be others."""
    history = json.loads((files.root / TRAINING_FILE).read_bytes())
    report = write_report(files.root, files.report, baselines=[Path(run) for run in baselines])
    losses, skipped = history["losses"], opened.skipped
    return TrainResult(
        files.root, history["steps"], history["seconds"], tail(losses), history["samples"], skipped, report,
        history["factor"],
    )  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _teeing(
    files: RunFiles, pairs: int, output: str | PathLike[str] | None, where: Where, *, overwrite: bool
) -> Iterator[Callable[..., None]]:
    """What writes the chosen batches to shards, after each state and at the end; does nothing without `output`."""
    if output is None:
        yield _nothing
        return
    scores = None if (files.reference / "_curate").is_dir() else where.cache
    pin_tee(files.root, local_output(output), samples=pairs, scores=scores, overwrite=overwrite)
    with open_engine(
        workers=where.workers, scheduler=where.scheduler, mode=where.engine, allow_remote=where.allow_remote
    ) as running:

        def write(final: bool = False) -> None:
            tee(files.root, local_output(output), running, samples=pairs, scores=scores, final=final)

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


def _reference_model(settings: TrainSettings, start: Start) -> DualEncoder | None:
    """The reference, if it is weighed. Errors: UsageError where its loss or tokens differ from the learner's."""
    if not settings.uses_reference or settings.reference is None:
        return None
    reference = load_model(settings.reference, precision=settings.precision, device=settings.device)
    if reference.loss != settings.loss:
        raise UsageError(
            f"the reference {settings.reference} was trained with the {reference.loss} loss, the learner is to be with "
            f"{settings.loss}: their losses do not compare; give --loss {reference.loss}, or another reference"
        )
    ours, theirs = (tokenize(list(PROBES)) for tokenize in (start.tokenizer, reference.tokenizer))
    both = min(ours.shape[1], theirs.shape[1])
    if not torch.equal(ours[:, : both - 1], theirs[:, : both - 1]):
        raise UsageError(
            f"the reference {settings.reference} reads captions with another tokenizer than {settings.model}: their "
            "losses would be of different texts; choose a reference with the learner's tokenizer"
        )
    return reference


def _record(
    settings: TrainSettings, sources: Sequence[ShardSource], opened: Opened, reference: DualEncoder | None
) -> dict[str, Any]:
    """What TRAIN.json pins."""
    free = ("memory_gb", "device")
    inputs = [asdict(s) | {"digest": digest} for s, digest in zip(sources, opened.digests, strict=True)]
    return {
        "schema": 1,
        "settings": {name: value for name, value in asdict(settings).items() if name not in free},
        "inputs": inputs,
        "models": {} if reference is None else {"reference": reference.identity.to_json()},
    }


def _candidates(
    settings: TrainSettings,
    opened: Opened,
    reference: DualEncoder | None,
    sources: Sequence[ShardSource],
    files: RunFiles,
    where: Where,
) -> tuple[Candidates, CostLedger]:
    """The pairs to draw from, and what scoring them with the reference has cost."""
    clean = settings.clean if settings.label is not None else ()
    if reference is None or settings.reference is None:
        return all_of(opened.pairs, clean=clean), CostLedger()
    began = time.perf_counter()
    tables, fresh = _reference_tables(settings, reference, opened, sources, files, where)
    found = all_of(opened.pairs, read_reference(tables, opened.pairs.places.id_N16), clean)
    flops = reference.flops_per_sample(_mean_tokens(opened)) * len(opened.pairs) if fresh else 0.0
    ledger = CostLedger().add(
        "reference", samples=len(opened.pairs) if fresh else 0, flops=flops, seconds=time.perf_counter() - began
    )
    return found, ledger


def _reference_tables(
    settings: TrainSettings,
    reference: DualEncoder,
    opened: Opened,
    sources: Sequence[ShardSource],
    files: RunFiles,
    where: Where,
) -> tuple[list[Path], bool]:
    """Score tables of the shards, in their order: from the cache if it has all of them, else scored now."""
    if where.cache is not None:
        _check_cache(where.cache, reference)
        stored = _tables(where.cache)
        if all(digest in stored for digest in opened.digests):
            return [stored[digest] for digest in opened.digests], False
    return _scored(settings, sources, opened, files.reference, where), True


def _scored(
    settings: TrainSettings, sources: Sequence[ShardSource], opened: Opened, output: Path, where: Where
) -> list[Path]:
    """Have the pipeline score shards with the reference; their tables, in the order of the shards."""
    score(
        [source.url for source in sources],
        output,
        reference=str(settings.reference),
        precision=settings.precision,
        reference_cache=where.cache,
        workers=where.workers,
        scheduler=where.scheduler,
        engine=where.engine,
        allow_remote_scheduler=where.allow_remote,
        tolerance=1.0,
        scores_only=True,
        quiet=where.quiet,
    )
    stored = _tables(output)
    return [stored[digest] for digest in opened.digests]


def _check_cache(cache: Path, reference: DualEncoder) -> None:
    stored = ModelIdentity.from_json(read_run(cache).models["reference"])
    if found := reference.identity.differences(stored):
        raise CacheMismatch(
            f"--reference-cache {cache} was made by {stored.name}, not by this reference: {'; '.join(found)}. Leave "
            "the option out to embed anew"
        )


def _tables(output: Path) -> dict[str, Path]:
    store = Store.of(output)
    found = ((receipt.facts["digest"], store.locate(receipt.outputs[0])) for receipt in store.receipts("score"))
    return {digest: path for digest, path in found if path is not None}


def _mean_tokens(opened: Opened) -> int:
    token_NT = opened.pairs.token_NT
    return max(1, round(float((token_NT != 0).sum(1).float().mean())))


def _trusted(
    settings: TrainSettings,
    start: Start,
    reference: DualEncoder | None,
    candidates: Candidates,
    files: RunFiles,
    where: Where,
) -> tuple[Trusted | None, Candidates]:
    """The trusted pairs, where the run has a use for them, and the candidates without those that were held out."""
    watched = settings.handover == "auto" and settings.uses_reference
    if settings.criterion != "alignment" and not watched:
        return None, candidates
    if not settings.trusted:
        if not where.quiet:
            _say("no --trusted pairs: some of the pool are held out to compare learner and reference by")
        return held_out(candidates, settings.seed)
    sources = tuple(expand_shards(settings.trusted))
    with open_pairs(sources, start.tokenizer, start.rule, memory_gb=settings.memory_gb) as opened:
        row_T, image_TCHW, token_TC = opened.pairs.read(range(min(MOST, len(opened.pairs))))
        if reference is None:
            return Trusted(image_TCHW, token_TC), candidates
        tables = _scored(settings, sources, opened, files.trusted, where)
        return Trusted(image_TCHW, token_TC, read_reference(tables, opened.pairs.places.id_N16[row_T])), candidates


def _of_size(settings: TrainSettings, candidates: Candidates) -> TrainSettings:
    """Uniform draws make do with what there is; a super-batch has to be there. Errors: UsageError."""
    if settings.criterion == "uniform" and 2 <= len(candidates) < settings.batch:
        return replace(settings, batch=len(candidates))
    if len(candidates) < settings.super_batch:
        raise UsageError(
            f"{len(candidates)} candidates are fewer than a super-batch of {settings.super_batch} (batch "
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
