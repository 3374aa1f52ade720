"""`audit`: who and what a selection left out, how sure that is, and what could explain it; checked against a policy.

    pool read back -> captions read once per shard -> columns assembled -> statistics -> verdict, report, tables

Nothing of the selection enters the columns: clusters are fitted on the whole pool, labels are joined to it. Cost: one
pass over the shards' captions (no image is decoded but those of the galleries), kept for the next audit; then seconds
for a hundred thousand samples. Memory: about half a kilobyte a sample, and 2 bytes per embedding number.
"""

# N rows of the pool

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from curate.audit.assembling import Assembled, along, assemble
from curate.audit.auditing import audit_columns
from curate.audit.columns import Column, LabelError, shown
from curate.audit.concepts import concepts_of
from curate.audit.files import assignments_table, groups_table
from curate.audit.foreign import read_foreign
from curate.audit.foreign_ids import IDS
from curate.audit.lexicons import SETS
from curate.audit.outcome import Audit
from curate.audit.own_columns import COPIES
from curate.audit.report import drawn, fetch, medoids, render_report
from curate.audit.report.figures import figures_of
from curate.audit.request import CAPTION_LENGTH, AuditRequest
from curate.audit.sentences import findings
from curate.errors import UsageError
from curate.pipelines.audited_pool import AuditedPool, Running, read_selection
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.runner import local_output
from curate.pipelines.traits import read_traits, traits_pass
from curate.policy.certificate import certificate
from curate.policy.checking import Verdict, check_selection
from curate.policy.columns import groups_of
from curate.policy.memberships import members_of
from curate.policy.quotas import State
from curate.policy.schema import Policy, read_policy
from curate.receipts import Store
from curate.scores import ids_to_array
from curate.storage import make_directory, readable_json, replace_file

if TYPE_CHECKING:
    from rich.console import Console

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
class _Question:
    """What is asked of a pool: the columns, which of them are shown, and the policy."""

    request: AuditRequest
    columns: tuple[str, ...]
    policy: Policy | None
    seed: int

    @property
    def wanted(self) -> set[str] | None:
        """The columns to make; None: all that the pool allows."""
        if not self.columns:
            return None
        crossed = (name for names in self.request.intersect for name in names)
        return {shown(name) for name in (*self.columns, *crossed, *self.request.confounders, *self.bounded, COPIES)}

    @property
    def bounded(self) -> tuple[str, ...]:
        return () if self.policy is None else tuple(column.name for column in self.policy.columns)

    def shows(self, column: Column) -> bool:
        crossed = (name for names in self.request.intersect for name in names)
        return not self.columns or column.name in {shown(name) for name in (*self.columns, *crossed, *self.bounded)}


def audit(
    output: str | PathLike[str],
    *,
    selected: str | PathLike[str] | None = None,
    labels: str | PathLike[str] | None = None,
    on: str = "key",
    least_match: float = 0.5,
    label_error: Sequence[str] = (),
    lexicon: Sequence[str] = (),
    columns: Sequence[str] = (),
    intersect: Sequence[str] = (),
    confounder: Sequence[str] = (),
    clusters: int | None = None,
    policy: str | PathLike[str] | None = None,
    to: str | PathLike[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    quiet: bool = True,
) -> AuditResult:
    """Audit a selection: an output of curate, or with `selected` the parquet of a pool that another tool chose from.

    Arguments are those of `curate audit`; the report and its tables go `to` a directory, OUTPUT/_curate/audit unless
    given. Errors: UsageError for columns, labels or a policy that do not fit, naming what and where; ShardError for a
    shard that is gone or changed.
    Example: `audit("filtered", columns=["gender"]).findings[0]` is "Captions that mention female were kept 0.62 times
    as often as the rest (0.55-0.70); ...".
    """
    started = time.monotonic()
    path = local_output(output)
    asked = _question(
        labels=labels, on=on, least_match=least_match, label_error=label_error, lexicon=lexicon, columns=columns,
        intersect=intersect, confounder=confounder, clusters=clusters, policy=policy, seed=seed,
    )  # fmt: skip
    if selected is not None:
        return _audited(*_of_other_tools(path, Path(selected).expanduser(), asked), _required(to), started)
    target = path / "_curate" / "audit" if to is None else local_output(to)
    with open_engine(workers=workers, scheduler=scheduler, mode=engine, allow_remote=allow_remote_scheduler) as running:
        pool = read_selection(path, running, quiet=quiet)
        store = Store.of(path if to is None else target)
        made = traits_pass(Running(running, quiet), store, pool.sources, asked.request.traits)
    return _audited(pool, read_traits(store, made), (), asked, target, started)


def _of_other_tools(pool: Path, selected: Path, asked: _Question) -> tuple[AuditedPool, pa.Table, tuple[str, ...], Any]:
    on = asked.request.on if asked.request.on in IDS and asked.request.labels is None else None
    found = read_foreign(pool, selected, asked.request.traits, on=on)
    return AuditedPool(str(pool), found.rows, found.times_N, (), steps=False), found.traits, found.notes, asked


def _required(to: str | PathLike[str] | None) -> Path:
    if to is None:
        raise UsageError("name a directory for the report: -o DIR")
    return local_output(to)


def _question(
    *,
    labels: str | PathLike[str] | None,
    on: str,
    least_match: float,
    label_error: Sequence[str],
    lexicon: Sequence[str],
    columns: Sequence[str],
    intersect: Sequence[str],
    confounder: Sequence[str],
    clusters: int | None,
    policy: str | PathLike[str] | None,
    seed: int,
) -> _Question:
    """The options of the verb, read and checked."""
    checked = None if policy is None else read_policy(Path(policy).expanduser())
    bounded = () if checked is None else checked.columns
    held = dict.fromkeys((*(confounder or (CAPTION_LENGTH,)), *(name for one in bounded for name in one.confounders)))
    request = AuditRequest(
        labels=None if labels is None else Path(labels).expanduser().absolute(),
        on=on,
        least_match=least_match,
        lexicons=tuple(lexicon) or SETS,
        columns=tuple(dict.fromkeys((*columns, *(one.name for one in bounded)))),
        intersect=tuple(tuple(part.strip() for part in names.split(",")) for names in intersect),
        confounders=tuple(held),
        clusters=clusters,
        label_errors=dict(_label_error(text) for text in label_error),
        seed=seed,
    )
    return _Question(request, tuple(columns), checked, seed)


def _label_error(text: str) -> tuple[str, LabelError]:
    name, _, numbers = text.rpartition("=")
    try:
        sensitivity, specificity = (float(number) for number in numbers.split(","))
    except ValueError:
        raise UsageError(f"--label-error {text}: give COLUMN=SENSITIVITY,SPECIFICITY, such as tone=0.9,0.98") from None
    return name, LabelError(sensitivity, specificity)


def _audited(
    pool: AuditedPool, traits: pa.Table, notes: tuple[str, ...], asked: _Question, target: Path, started: float
) -> AuditResult:
    """The statistics of a pool, and the files that hold them."""
    found = assemble(pool.rows, traits, asked.request, wanted=asked.wanted)
    caption_N = along(pool.rows, traits)["caption"].to_pylist()
    selected_N = pool.times_N > 0
    columns = [column for column in found.columns if asked.shows(column)]
    unit_N = None if found.copies is None else found.copies.units_N
    audited = audit_columns(
        columns,
        selected_N,
        pool.times_N if pool.repeats else None,
        unit_N,
        found.strata,
        intersections=asked.request.intersect,
        learner_loss_N=pool.numbers("learner_loss"),
        reference_loss_N=pool.numbers("reference_loss"),
        score_N=pool.numbers("score"),
        sub_batch_N=pool.numbers("sub_batch") if pool.steps else None,
        concepts=concepts_of(caption_N, asked.request.traits),
        seed=asked.seed,
    )
    verdict = None
    if asked.policy is not None:
        verdict = check_selection(asked.policy, groups_of(found), pool.times_N, cluster_N=unit_N)
    result = AuditResult(
        target, audited, findings(audited), (*notes, *found.notes), verdict, seconds=time.monotonic() - started
    )  # fmt: skip
    _write(result, pool, found, columns, asked, caption_N)
    return result


def _write(
    result: AuditResult,
    pool: AuditedPool,
    found: Assembled,
    columns: Sequence[Column],
    asked: _Question,
    caption_N: Sequence[str | None],
) -> None:
    """The files of an audit; the report last, so that it is not there before what it speaks of."""
    make_directory(result.directory)
    files = {
        "audit.json": readable_json(result.content()),
        "groups.parquet": _parquet(groups_table(result.audit)),
        "assignments.parquet": _parquet(assignments_table(pool.rows, columns, pool.times_N)),
    }
    if asked.policy is not None:
        files["certificate.json"] = readable_json(_certificate(asked.policy, found, pool))
    for name, content in (files | {REPORT: _report(result, pool, found, columns, asked, caption_N).encode()}).items():
        replace_file(result.directory / name, content)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _certificate(policy: Policy, found: Assembled, pool: AuditedPool) -> dict[str, Any]:
    """What the policy asks of the selection as a whole, and what it got: as if it had been drawn at once."""
    member_NG = members_of(policy, groups_of(found))
    taken_N = pool.times_N > 0
    names = tuple(bound.name for bound in policy.bounds)
    counts = (tuple(member_NG.sum(0).tolist()), tuple(member_NG[taken_N].sum(0).tolist()))
    return certificate(policy, State(names, *counts, len(taken_N), int(taken_N.sum()), draws=1))


def _report(
    result: AuditResult,
    pool: AuditedPool,
    found: Assembled,
    columns: Sequence[Column],
    asked: _Question,
    caption_N: Sequence[str | None],
) -> str:
    audited, selected_N = result.audit, pool.times_N > 0
    galleries = drawn(
        audited, columns, selected_N, ids_to_array(pool.rows["sample_id"]).tobytes(),
        intersections=asked.request.intersect, seed=asked.seed,
    )  # fmt: skip
    if found.clusters is not None and any(column.name == found.clusters.column.name for column in columns):
        galleries = (*galleries, medoids(audited, found.clusters))
    named = {column.name: column for column in columns}
    return render_report(
        audited,
        title=f"Audit of {shown(Path(pool.name).name)}",
        pool_facts={"Pool": pool.name} | ({"Shards": f"{len(pool.sources):,}"} if pool.sources else {}),
        galleries=fetch(galleries, pool.place, lambda row: caption_N[row] or ""),
        verdict=result.verdict,
        policy=asked.policy,
        figures=figures_of(audited, score_N=pool.numbers("score"), members=named),
        notes=result.notes,
    )


def render_audit(result: AuditResult, console: Console) -> None:
    """Print what was found, what was not, and the verdict."""
    from rich.text import Text

    lines = [*result.findings, *(f"Note: {note}." for note in result.notes)]
    if result.verdict is not None:
        lines.append(f"Policy: {result.verdict.result}.")
        lines += [f"  {row.column}={row.group}: {row.result}, {row.reason}" for row in result.verdict.groups]
        lines += [f"  Conflict: {result.verdict.conflict}."] if result.verdict.conflict else []
    console.print(Text("\n".join(lines)), soft_wrap=True)
