"""A run's policy between its scores and its selection: who is in which group, can it be met, then draw under it.

Memberships are a unit of their own, made of the traits of the input shards, the score tables and the labels, and kept
under `_curate/policy`: a later `select` or `write` needs neither the label file nor the shards again. What can be kept
is asked of the candidates that may be drawn, so duplicates are looked for before the first draw, and again in each.
Memory: some 300 bytes per candidate while they are made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import scores
from curate.auditing.renamed import with_originals
from curate.errors import UsageError
from curate.pipelines import passes
from curate.pipelines.passes import Job
from curate.pipelines.ruling import Memberships, Rule, membership_schema, read_members
from curate.pipelines.selecting import drawable
from curate.pipelines.traits import read_traits, traits_pass
from curate.policy.ahead import check_pool, reads_pool
from curate.policy.columns import check_names, coverage_notes, policy_columns, request_of
from curate.policy.feasibility import refuse_conflict
from curate.policy.given import File, GivenPolicy, given_policy, pinned_policy
from curate.receipts import Attempt, Receipt, Unit
from curate.run_record import run_path

_PLAIN: Final = (
    "sample_id", "key", "uid", "width", "height", "caption_bytes", "sharpness", "image_digest", "dhash", "reason",
)  # fmt: skip


def asked_policy(policy: File | None, labels: File | None, on: str | None) -> GivenPolicy | None:
    """What --policy, --labels and --on say, looked over before any work. Errors: as `given_policy`, `check_names`."""
    given = given_policy(policy, labels, on)
    if given is not None:
        check_names(given)
    return given


def rule_of(job: Job, scored: Sequence[Receipt]) -> Rule | None:
    """What the run's policy asks of every draw; None where it has none.

    Errors: UsageError where no selection of this size could keep to it, and for columns or groups that are not there,
    naming line and field.
    """
    settings = job.record.settings.select
    if settings is None or settings.policy is None:
        return None
    given = job.given or pinned_policy(settings.policy, run_path(job.output))
    specs = passes.select_specs(job, scored)
    if not specs:
        return None
    memberships, bounds = remember_members(job, scored, given), given.policy.bounds
    drawable_T = [drawable(spec) for spec in specs]
    member_T = [read_members(memberships.path, rows, len(bounds)) for rows in drawable_T]
    sizes = [min(spec.batch.size, len(rows)) for spec, rows in zip(specs, drawable_T, strict=True)]
    if any(sizes):
        refuse_conflict(given.policy, np.concatenate(member_T), sum(sizes))
    facts = scores.read_facts(memberships.path)["columns"]
    for note in () if job.quiet else coverage_notes(given.policy, facts):
        print(f"policy: {note}", file=sys.stderr, flush=True)
    present_TG = np.array([member_UG.sum(axis=0) for member_UG in member_T], dtype=np.int64)
    return Rule.over(bounds, memberships, present_TG, sizes)


def check_before_scores(job: Job) -> None:
    """Refuse a policy that speaks of what no sample has, before any model runs; its shards are read once in all.

    Errors: UsageError naming line and field, and the fields that there are.
    """
    if job.given is None or not reads_pool(job.given):
        return
    receipts = traits_pass(job, job.store, job.record.inputs, request_of(job.given).traits)
    check_pool(job.given, read_traits(job.store, receipts), (*_PLAIN, "ref_image"))


def remember_members(job: Job, scored: Sequence[Receipt], given: GivenPolicy) -> Memberships:
    """The stored memberships of the pool in the policy's groups, made now where they are not there yet."""
    job.store.prepare()  # a run of an earlier version lacks some directories
    making = _Making(job, tuple(scored), given)
    receipt = job.store.commit(making.unit, functools.partial(_make, making))
    output = receipt.outputs[0]
    return Memberships(job.store.root / output.path, output.sha256)


@dataclass(frozen=True, slots=True)
class _Making:
    job: Job
    scored: tuple[Receipt, ...]
    given: GivenPolicy

    @property
    def unit(self) -> Unit:
        policy = self.given.policy
        groups = [
            [column.name, [group.name for group in column.groups], column.overlapping, column.unknowns]
            + ([list(column.crossed)] if column.crossed else [])
            for column in policy.columns
        ]
        held = sorted({name for column in policy.columns for name in column.confounders})
        settings = self.given.settings
        inputs = {"groups": groups, "held": held, "labels": settings.labels, "on": settings.on}
        return Unit("policy", inputs | {"tables": [receipt.outputs[0].sha256 for receipt in self.scored]})


def _make(making: _Making, attempt: Attempt) -> dict[str, Any]:
    job, given = making.job, making.given
    if given.settings.labels is not None and given.labels is None:
        raise UsageError(
            f"{job.output}: the labels of its policy (sha256 {given.settings.labels[:12]}...) are needed again; give "
            "--policy and --labels"
        )
    request = request_of(given)
    with_image = "embedding cluster" in {name for column in given.policy.columns for name in column.parts}
    rows = _pool(job, making.scored, (*_PLAIN, *(["ref_image"] if with_image else [])))
    receipts = traits_pass(job, job.store, job.record.inputs, request.traits)
    named = rows if given.labels is None else with_originals(rows, [one.facts["shard"] for one in making.scored])
    found = policy_columns(given, named.drop_columns(["shard", "row"]), read_traits(job.store, receipts))
    layout = membership_schema(found.member_NG.shape[1])
    columns = [rows[name] for name in ("sample_id", "shard", "row")]
    table = pa.table([*columns, *(pa.array(member_N) for member_N in found.member_NG.T)], schema=layout)
    facts = {
        "groups": [bound.name for bound in given.policy.bounds],
        "columns": [dict(column) for column in found.facts],
    }
    with attempt.open(".parquet") as file:
        pq.write_table(table.replace_schema_metadata(scores.facts_metadata(facts)), file, compression="zstd")
    return {"rows": len(table)}


def _pool(job: Job, scored: Sequence[Receipt], names: Sequence[str]) -> pa.Table:
    """The readable rows of all score tables, with their shard and their row in its table."""
    parts = []
    for shard, receipt in enumerate(scored):
        path = passes.path_of(job, receipt)
        there = set(pq.read_schema(path).names)
        table = scores.read_table(path, [name for name in names if name in there])
        table = table.append_column("row", pa.array(np.arange(len(table), dtype=np.int32)))
        table = table.append_column("shard", pa.array(np.full(len(table), shard, np.int32)))
        parts.append(table.filter(pc.is_null(table["reason"])).drop_columns(["reason"]))
    return pa.concat_tables(parts)
