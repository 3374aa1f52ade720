"""The files that an audit leaves: the report, its tables, the verdict's certificate; and what the verb returns.

`report.html` is written last, so that it is not there before what it speaks of. Every file but for its pictures is a
function of the audit alone: the same audit gives the same bytes.
"""

# N rows of the pool

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from curate.auditing.assembling import Assembled
from curate.auditing.columns import Column, shown
from curate.auditing.files import assignments_table, groups_table
from curate.auditing.outcome import Audit
from curate.auditing.report import drawn, fetch, medoids, render_report
from curate.auditing.report.figures import figures_of
from curate.pipelines.audited_pool import AuditedPool
from curate.policy.certificate import certificate
from curate.policy.checking import Verdict
from curate.policy.columns import groups_of
from curate.policy.memberships import members_of
from curate.policy.quotas import State
from curate.policy.schema import Policy
from curate.scores import ids_to_array
from curate.storage import make_directory, readable_json, replace_file

REPORT: Final = "report.html"


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit found and where it lies. `exit_code` is the verdict's, 0 without a policy."""

    directory: Path
    audit: Audit
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict | None
    seconds: float

    @property
    def report(self) -> Path:
        return self.directory / REPORT

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict is None else self.verdict.exit_code

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; without the paths and the time it is also `audit.json`."""
        places = {"directory": str(self.directory), "report": str(self.report), "seconds": round(self.seconds, 3)}
        return self.content() | places | {"exit_code": self.exit_code}

    def content(self) -> dict[str, Any]:
        """What does not depend on where and when it was made."""
        return {
            "schema": 1,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "verdict": None if self.verdict is None else self.verdict.as_json(),
            "audit": self.audit.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Audited:
    """A pool, its columns (those shown, and all that were made), its captions [N], and the policy it is held to."""

    pool: AuditedPool
    columns: tuple[Column, ...]
    made: Assembled
    captions: Sequence[str | None]
    intersections: tuple[tuple[str, ...], ...]
    policy: Policy | None


def write_audit(result: AuditResult, of: Audited) -> None:
    """Write all files into the result's directory."""
    make_directory(result.directory)
    files = {
        "audit.json": readable_json(result.content()),
        "groups.parquet": _parquet(groups_table(result.audit)),
        "assignments.parquet": _parquet(assignments_table(of.pool.rows, of.columns, of.pool.times_N)),
    }
    if of.policy is not None:
        files["certificate.json"] = readable_json(_certificate(of.policy, of.made, of.pool))
    for name, content in (files | {REPORT: _report(result, of).encode()}).items():
        replace_file(result.directory / name, content)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _certificate(policy: Policy, found: Assembled, pool: AuditedPool) -> dict[str, Any]:
    """What the policy asks of the selection as a whole, and what it got: as if it had been drawn at once."""
    member_NG = members_of(policy, groups_of(found, policy))
    taken_N = pool.times_N > 0
    names = tuple(bound.name for bound in policy.bounds)
    counts = (tuple(member_NG.sum(0).tolist()), tuple(member_NG[taken_N].sum(0).tolist()))
    return certificate(policy, State(names, *counts, len(taken_N), int(taken_N.sum()), draws=1))


def _report(result: AuditResult, of: Audited) -> str:
    audited, pool, seed = result.audit, of.pool, result.audit.seed
    galleries = drawn(
        audited, of.columns, pool.times_N > 0, ids_to_array(pool.rows["sample_id"]).tobytes(),
        intersections=of.intersections, seed=seed,
    )  # fmt: skip
    clusters = of.made.clusters
    if clusters is not None and any(column.name == clusters.column.name for column in of.columns):
        galleries = (*galleries, medoids(audited, clusters))
    named = {column.name: column for column in of.columns}
    return render_report(
        audited,
        title=f"Audit of {shown(Path(pool.name).name)}",
        pool_facts={"Pool": pool.name} | ({"Shards": f"{len(pool.sources):,}"} if pool.sources else {}),
        galleries=fetch(galleries, pool.place, lambda row: of.captions[row] or ""),
        verdict=result.verdict,
        policy=of.policy,
        figures=figures_of(audited, score_N=pool.numbers("score"), members=named),
        notes=result.notes,
    )
