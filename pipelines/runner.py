"""`score`: the main job. Shards in, a filtered dataset on disk, a `RunResult` out; the same call again resumes."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from curate.errors import UsageError
from curate.formats.openclip import train_command
from curate.machine import cores
from curate.models.spec import parse_spec
from curate.pipelines import finishing, passes
from curate.pipelines.aligning import make_direction, trusted_settings
from curate.pipelines.certifying import certify
from curate.pipelines.costing import Plan, plan_costs
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.finishing import Receipts
from curate.pipelines.modelling import ModelChoice, choose_models
from curate.pipelines.overwriting import earlier_kept, scoring_place, take_place, unscored
from curate.pipelines.passes import Job
from curate.pipelines.policing import asked_policy, check_before_scores, rule_of
from curate.pipelines.ruling import Rule
from curate.policy.given import File
from curate.receipts import Receipt
from curate.results import RunResult, check_tolerance, lost_shards, refuse_loss
from curate.run_record import RunRecord, refuse_foreign
from curate.selection.criteria import AnyCriterion
from curate.settings import (
    Deduplicate,
    Precision,
    RunSettings,
    ScoreSettings,
    SelectSettings,
    WriteSettings,
    checked,
)
from curate.shards.sources import ShardSource, expand_shards

Shards = Sequence[str | PathLike[str]] | str | PathLike[str]


def score(
    shards: Shards,
    output: str | PathLike[str],
    *,
    reference: str,
    learner: str | None = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int = 20_480,
    chunks: int = 16,
    criterion: AnyCriterion | None = None,
    gain: float | None = None,
    loss: str = "auto",
    seed: int = 0,
    deduplicate: Deduplicate = "exact",
    trusted: Shards = (),
    trusted_size: int = 256,
    policy: File | None = None,
    labels: File | None = None,
    on: str | None = None,
    precision: Precision = "auto",
    batch_size: int = 64,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    reference_cache: str | PathLike[str] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    scores_only: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> RunResult:
    """Score `shards`, select sub-batches, write them to new shards in `output`.

    Arguments are those of `curate score`. Raises `UsageError` for arguments that cannot be met, `RunMismatch` if
    `output` belongs to another run, `CacheMismatch` if `reference_cache` was made by another model, and
    `LossAboveTolerance` after everything is written if a shard lost more than `tolerance`.
    """
    started = time.monotonic()
    path = local_output(output)
    check_tolerance(tolerance)
    given = asked_policy(policy, labels, on)
    if given is not None and scores_only:
        raise UsageError("--scores-only draws nothing that --policy could steer; give it to `curate select`")
    clean = list_shards(trusted) if trusted else ()
    record, choice = plan_run(
        list_shards(shards),
        {"reference": reference, "learner": learner, "precision": precision, "batch_size": batch_size}
        | trusted_settings(clean, trusted_size),
        None
        if scores_only
        else drawn(keep, sub_batch, super_batch)
        | {"chunks": chunks, "gain": gain, "seed": seed, "deduplicate": deduplicate}
        | {"policy": None if given is None else given.settings},
        {"samples_per_shard": samples_per_shard},
        criterion,
        loss,
    )
    cache = None if reference_cache is None else choice.check_cache(local_output(reference_cache))
    with open_engine(workers=workers, scheduler=scheduler, mode=engine, allow_remote=allow_remote_scheduler) as running:
        refuse_foreign(path)  # after the engine stands: a refusal leaves no trace
        place = scoring_place(path, record, overwrite=overwrite)
        job = Job(place, record, running, cache, quiet, given=given)
        announce(job, path)
        with unscored(place, path):
            check_before_scores(job)
        with earlier_kept(place, path):
            if clean:
                gradient = make_direction(place, choice.settings, clean, choice.identities["learner"])
                job = replace(job, direction=gradient)
            scored = passes.score_pass(job)
            rule = None if scores_only else rule_of(job, scored)
        take_place(place, path, record)  # only now: what is refused up to here must not have cost the earlier run
        job = replace(job, output=path)
        if scores_only:
            return _scores_result(job, scored, tolerance, started)
        return write_drawn(job, scored, None if rule is None else rule.within(path), tolerance, started)


def plan(
    shards: Shards,
    output: str | PathLike[str],
    *,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int = 20_480,
    criterion: AnyCriterion | None = None,
    loss: str = "auto",
    trusted: Shards = (),
    trusted_size: int = 256,
    policy: File | None = None,
    labels: File | None = None,
    on: str | None = None,
    samples_per_shard: int | None = None,
    reference_cache: str | PathLike[str] | None = None,
    **values: Any,
) -> Plan:
    """What `score` with the same arguments would do and cost; writes nothing.

    `values` are the other arguments of `score` that `RUN.json` pins: reference, learner, chunks, gain, ...
    """
    local_output(output)
    score_names = ("reference", "learner", "precision", "batch_size")
    of_score: dict[str, Any] = {name: values.pop(name) for name in score_names if name in values}
    given = asked_policy(policy, labels, on)
    of_select = drawn(keep, sub_batch, super_batch) | values | {"policy": None if given is None else given.settings}
    of_write = {"samples_per_shard": samples_per_shard}
    of_score |= trusted_settings(list_shards(trusted) if trusted else (), trusted_size)
    record, choice = plan_run(list_shards(shards), of_score, of_select, of_write, criterion, loss)
    if reference_cache is not None:
        choice.check_cache(local_output(reference_cache))
    return plan_costs(record, choice, cached=reference_cache is not None, cores=cores().usable)


def list_shards(shards: Shards) -> tuple[ShardSource, ...]:
    """The shards that an argument names."""
    return tuple(expand_shards([shards] if isinstance(shards, str | PathLike) else list(shards)))


def plan_run(
    sources: tuple[ShardSource, ...],
    score_values: dict[str, Any],
    select_values: dict[str, Any] | None,
    write_values: dict[str, Any],
    criterion: str | None,
    loss: str,
) -> tuple[RunRecord, ModelChoice]:
    """Check the settings, load the models, and put together what `RUN.json` pins."""
    choice = choose_models(checked(ScoreSettings, score_values), criterion, loss)
    if select_values is not None:
        select_values = select_values | {"criterion": choice.criterion, "loss": choice.loss}
    settings = RunSettings(
        score=choice.settings,
        select=None if select_values is None else checked(SelectSettings, select_values),
        write=checked(WriteSettings, write_values),
    )
    return RunRecord(settings, sources, choice.identities), choice


def drawn(keep: float | None, sub_batch: int | None, super_batch: int) -> dict[str, Any]:
    """How much is drawn, as settings; --keep and --sub-batch exclude each other."""
    if keep is not None and sub_batch is not None:
        raise UsageError("--keep and --sub-batch both say how much is drawn; give one")
    given = {"keep": keep, "sub_batch": sub_batch, "super_batch": super_batch}
    return {name: value for name, value in given.items() if value is not None}


def local_output(output: str | PathLike[str]) -> Path:
    """The output directory as an absolute path."""
    text = str(output)
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # a Path has already made one slash of two
        raise UsageError(f"{text}: outputs are written to a file system mounted here; sync the result afterwards")
    return Path(text).expanduser().absolute()


def announce(job: Job, output: Path) -> None:
    """Say on standard error what runs where, and what was chosen for the user."""
    if job.quiet:
        return
    settings, models = job.record.settings, job.record.models
    megabytes = sum(source.size for source in job.record.inputs) / 1e6
    lines = [f"{len(job.record.inputs)} shards, {megabytes:,.0f} MB -> {output}"]
    lines += [f"{role}: {identity['name']}, {identity['precision']}" for role, identity in models.items()]
    if settings.select is not None:
        choice = settings.select
        share = f"{choice.sub_batch} of each super-batch" if choice.sub_batch else f"{choice.keep:.0%}"
        lines.append(f"criterion: {choice.criterion}, {choice.loss} loss, gain {choice.gain:g}, keeping {share}")
        if job.given is not None:
            asked = f"{len(job.given.policy.bounds)} groups of {len(job.given.policy.columns)} columns"
            lines.append(f"policy of {job.given.policy.author} ({job.given.policy.date}): {asked}")
    lines.append(f"engine: {job.engine.description}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def select_and_write(job: Job, scored: list[Receipt], tolerance: float, started: float) -> RunResult:
    """Draw, under the run's policy where it has one, and write what was drawn. Errors: as `rule_of`."""
    return write_drawn(job, scored, rule_of(job, scored), tolerance, started)


def write_drawn(job: Job, scored: list[Receipt], rule: Rule | None, tolerance: float, started: float) -> RunResult:
    """Draw, under a rule where there is one, and write what was drawn."""
    selected = passes.select_pass(job, scored, rule)
    ledger = passes.ledger_pass(job, scored, selected)
    written = passes.write_pass(job, scored, selected)
    receipts = Receipts(scored, selected, ledger, written)
    lost = lost_shards(scored, tolerance)
    manifest = finishing.finish(job, receipts, success=not lost)
    refuse_loss(lost, tolerance, job.output)
    return RunResult(
        job.output,
        manifest["counts"],
        manifest["reasons"],
        tuple(shard["name"] for shard in manifest["shards"]),
        time.monotonic() - started,
        _train_command(job, manifest),
        certify(job, selected),
    )


def _scores_result(job: Job, scored: list[Receipt], tolerance: float, started: float) -> RunResult:
    reasons: Counter[str] = Counter()
    for receipt in scored:
        reasons.update(receipt.facts["reasons"])
    rows = sum(receipt.facts["rows"] for receipt in scored)
    lost = reasons.total()
    refuse_loss(lost_shards(scored, tolerance), tolerance, job.output)
    counts = {"in": rows, "candidates": rows - lost, "quarantined": lost}
    return RunResult(job.output, counts, dict(sorted(reasons.items())), seconds=time.monotonic() - started)


def _train_command(job: Job, manifest: dict[str, Any]) -> str | None:
    shards = [shard["name"] for shard in manifest["shards"]]
    if not shards:
        return None
    settings = job.record.settings
    model = settings.score.learner or settings.score.reference
    sigmoid = settings.select is not None and settings.select.loss == "sigmoid"
    return train_command(job.output, shards, manifest["counts"]["kept"], _architecture(model), sigmoid=sigmoid)


def _architecture(spec: str) -> str:
    """The model of a new training run in open_clip's words: the architecture, without the weights it had."""
    parsed = parse_spec(spec)
    return parsed.architecture or parsed.open_clip_name
