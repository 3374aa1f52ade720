"""`select` and `write`: the later passes of a run repeated from its stored scores, without a model."""

from __future__ import annotations

import time
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from curate.errors import RunMismatch, UsageError
from curate.pipelines import finishing, passes
from curate.pipelines.certifying import certificate_files, certify
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.finishing import Receipts
from curate.pipelines.modelling import default_criterion
from curate.pipelines.overwriting import link_stages
from curate.pipelines.passes import Job
from curate.pipelines.policing import asked_policy, rule_of
from curate.pipelines.runner import drawn, local_output, select_and_write
from curate.policy.given import File
from curate.receipts import Receipt, Store
from curate.results import RunResult, check_tolerance
from curate.run_record import RunRecord, read_run, refuse_foreign, repin_run, run_path
from curate.selection.criteria import AnyCriterion, check_available, default_gain
from curate.selection.criteria import LossName as Loss
from curate.settings import (
    Deduplicate,
    RunSettings,
    SelectSettings,
    WriteSettings,
    checked,
)
from curate.storage import replace_file

_REPEATED = ("score", "traits", "policy", "selection")  # stages whose files a copy of a run takes along


def select(
    output: str | PathLike[str],
    *,
    to: str | PathLike[str] | None = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int | None = None,
    chunks: int | None = None,
    criterion: AnyCriterion | None = None,
    gain: float | None = None,
    loss: Loss | None = None,
    seed: int | None = None,
    deduplicate: Deduplicate | None = None,
    policy: File | None = None,
    labels: File | None = None,
    on: str | None = None,
    no_policy: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    quiet: bool = True,
) -> RunResult:
    """Draw anew from the scores stored in `output`, without a model; what is not given stays as it was.

    The selection and the ledger are replaced, and the shards written from the earlier selection are taken back;
    `write` writes the new ones. `no_policy` drops a stored policy. With `to`, the scores are linked into that directory
    and `output` stays as it is.
    """
    started = time.monotonic()
    source, target = local_output(output), local_output(to or output)
    record = read_run(source)
    if no_policy and policy is not None:
        raise UsageError("--policy and --no-policy contradict each other; give one")
    asked = asked_policy(policy, labels, on)
    given = {
        "policy": None if asked is None else asked.settings,
        "chunks": chunks, "criterion": criterion, "gain": gain, "loss": loss, "seed": seed,
        "deduplicate": deduplicate, "super_batch": super_batch,
    }  # fmt: skip
    record = replace(record, settings=_reselected(source, record, given, keep, sub_batch, no_policy))
    with open_engine(workers=workers, scheduler=scheduler, mode=engine, allow_remote=allow_remote_scheduler) as running:
        _prepare_target(Job(source, record, running), target)
        job = Job(target, record, running, None, quiet, given=asked)
        scored = stored_scores(job)
        rule = rule_of(job, scored)
        # only now: what is refused up to here must not have cost the shards of the earlier selection
        finishing.reopen(target)
        repin_run(target, record)
        selected = passes.select_pass(job, scored, rule)
        ledger = passes.ledger_pass(job, scored, selected)
    receipts = Receipts(scored, selected, ledger, ())
    counts = finishing.check_accounting(receipts)
    for receipt in ledger:
        job.store.publish_outputs(receipt)
    for name, content in certificate_files(job, selected).items():
        replace_file(target / name, content)
    seconds, certificate = time.monotonic() - started, certify(job, selected)
    return RunResult(target, counts, finishing.reason_counts(receipts), seconds=seconds, certificate=certificate)


def write(
    output: str | PathLike[str],
    *,
    to: str | PathLike[str] | None = None,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    quiet: bool = True,
) -> RunResult:
    """Write the shards of the selection stored in `output`, into it or into `to`, without a model."""
    started = time.monotonic()
    source, target = local_output(output), local_output(to or output)
    check_tolerance(tolerance)
    record = read_run(source)
    if samples_per_shard is not None:
        write_settings = checked(WriteSettings, {"samples_per_shard": samples_per_shard})
        record = replace(record, settings=record.settings.model_copy(update={"write": write_settings}))
    with open_engine(workers=workers, scheduler=scheduler, mode=engine, allow_remote=allow_remote_scheduler) as running:
        _prepare_target(Job(source, record, running), target)
        finishing.reopen(target, keep=("score", "selection", "traits", "policy"))
        repin_run(target, record)
        job = Job(target, record, running, None, quiet)
        return select_and_write(job, stored_scores(job), tolerance, started)


def stored_scores(job: Job) -> list[Receipt]:
    """The score receipts of every input shard, or a UsageError if some are missing."""
    by_url = {receipt.facts["shard"]: receipt for receipt in job.store.receipts("score")}
    missing = [source.url for source in job.record.inputs if source.url not in by_url]
    if missing:
        raise UsageError(
            f"{job.output}: {len(missing)} of {len(job.record.inputs)} shards are not scored yet "
            f"(first: {missing[0]}); run the same `curate score` command again, it resumes"
        )
    return [by_url[source.url] for source in job.record.inputs]


def _reselected(
    output: Path, record: RunRecord, given: dict[str, Any], keep: float | None, sub_batch: int | None, no_policy: bool
) -> RunSettings:
    """The stored settings with what was given in their place."""
    stored = record.settings.select
    values = stored.model_dump() if stored is not None else _default_selection(output, record)
    if default_gain(given["criterion"] or values["criterion"]) != default_gain(values["criterion"]):
        values["gain"] = None  # the stored one is in units of another criterion
    values |= {name: value for name, value in given.items() if value is not None}
    if no_policy:
        values["policy"] = None
    if keep is not None:
        values["sub_batch"] = None
    values |= drawn(keep, sub_batch, values["super_batch"])
    scored = record.settings.score
    check_available(
        values["criterion"], reference=True, learner=scored.learner is not None, trusted=scored.trusted is not None
    )
    return record.settings.model_copy(update={"select": checked(SelectSettings, values)})


def _default_selection(output: Path, record: RunRecord) -> dict[str, Any]:
    """What `curate score` would have taken, for an output that holds scores only."""
    scored = next(iter(Store.of(output).receipts("score")), None)
    if scored is None:
        raise UsageError(f"{output}: no shard is scored yet; run the same `curate score` command again, it resumes")
    settings = record.settings.score
    criterion = default_criterion(learner=settings.learner is not None, trusted=settings.trusted is not None)
    role = "learner" if criterion == "alignment" else "reference"
    return SelectSettings(criterion=criterion, loss=scored.facts["models"][role]["loss"]).model_dump()


def _prepare_target(job: Job, target: Path) -> None:
    """Check that the scores are complete, and link them into `target` if that is another directory."""
    stored_scores(job)
    if target == job.output:
        return
    refuse_foreign(target)
    if run_path(target).exists() and _scored(read_run(target)) != _scored(job.record):
        raise RunMismatch(f"{target} belongs to a run over other shards or models; choose another directory")
    old, new = Store.of(job.output), Store.of(target)
    new.prepare()
    link_stages(old, new, _REPEATED)


def _scored(record: RunRecord) -> tuple[Any, ...]:
    """What the scores of a run depend on."""
    return record.inputs, record.models, record.settings.score
