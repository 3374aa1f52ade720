"""`audit`: who and what a selection left out, how sure that is, and what could explain it; checked against a policy.

    pool read back -> captions read once per shard -> columns assembled -> statistics -> verdict, report, tables

Nothing of the selection enters the columns: clusters are fitted on the whole pool, labels are joined to it. Cost: one
pass over the shards' captions (no image is decoded but those of the galleries, unless a model is asked about them),
kept for the next audit; then seconds for a hundred thousand samples. Memory: about half a kilobyte a sample, and 2
bytes per embedding number.
"""

# N rows of the pool

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from curate.auditing.assembling import along, assemble, joined_labels
from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, LabelError, crossed_names, shown
from curate.auditing.concepts import concepts_of
from curate.auditing.foreign import read_foreign
from curate.auditing.labels import Labels, check_labels, label_names
from curate.auditing.lexicons import SETS
from curate.auditing.own_columns import COPIES
from curate.auditing.renamed import with_originals
from curate.auditing.request import CAPTION_LENGTH, AuditRequest
from curate.auditing.sentences import findings
from curate.errors import UsageError
from curate.pipelines.audit_files import REPORT, Audited, AuditResult, write_audit
from curate.pipelines.audited_pool import AuditedPool, read_selection
from curate.pipelines.engine import Mode, open_engine
from curate.pipelines.passes import Passing
from curate.pipelines.predicting import predict
from curate.pipelines.runner import local_output
from curate.pipelines.traits import read_traits, traits_pass
from curate.policy.checking import check_selection
from curate.policy.columns import groups_of
from curate.policy.schema import Column as Bounded
from curate.policy.schema import Policy, read_policy
from curate.provenance import Findings, add_findings
from curate.receipts import Store
from curate.run_record import run_path

if TYPE_CHECKING:
    from rich.console import Console


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
        return {*self.told, *map(shown, self.request.confounders), COPIES}

    @property
    def told(self) -> set[str]:
        """The columns that are asked for by name: to be shown, crossed, or held to the policy."""
        crossed = (name for names in self.request.intersect for name in names)
        bounded = () if self.policy is None else (name for column in self.policy.columns for name in column.parts)
        return {shown(name) for name in (*self.columns, *crossed, *bounded)}

    def shows(self, column: Column) -> bool:
        return not self.columns or column.name in self.told


def audit(
    output: str | PathLike[str],
    *,
    selected: str | PathLike[str] | None = None,
    labels: str | PathLike[str] | None = None,
    on: str = "key",
    least_match: float = 0.5,
    label_error: Sequence[str] = (),
    lexicon: Sequence[str] = (),
    attributes: str | PathLike[str] | None = None,
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

    Arguments are those of `curate audit`; the report and its tables go `to` a directory. Unless one is given that is
    OUTPUT/_curate/audit, and the findings enter OUTPUT's data card and Croissant file.

    Errors: UsageError for columns, labels or a policy that do not fit, naming what and where; ShardError for a shard
    that is gone or changed.
    Example: `audit("filtered", columns=["gender"]).findings[0]` is "Captions that mention female were kept 0.62 times
    as often as the rest (0.55-0.70); ...".
    """
    started = time.monotonic()
    path = local_output(output)
    asked = _question(
        labels=labels, on=on, least_match=least_match, label_error=label_error, lexicon=lexicon,
        attributes=attributes, columns=columns, intersect=intersect, confounder=confounder, clusters=clusters,
        policy=policy, seed=seed,
    )  # fmt: skip
    _check_labels(asked)  # before a pass over shards, which may take hours
    if selected is not None:
        return _audited(*_of_other_tools(path, Path(selected).expanduser(), asked), asked, _required(to), started)
    target = path / "_curate" / "audit" if to is None else _place(to)
    with open_engine(workers=workers, scheduler=scheduler, mode=engine, allow_remote=allow_remote_scheduler) as running:
        pool = read_selection(path, running, place=path if to is None else target, quiet=quiet)
        rows = pool.rows if labels is None else with_originals(pool.rows, [one.url for one in pool.sources])
        joined = joined_labels(rows, asked.request, asked.wanted)
        store = Store.of(path if to is None else target)
        units = Passing(running, quiet)
        made = traits_pass(units, store, pool.sources, asked.request.traits)
        guessed = None
        if asked.request.zero_shot is not None:
            guessed = predict(units, store.root, path, pool.sources, asked.request.zero_shot, asked.wanted)
    result = _audited(pool, read_traits(store, made), asked, target, started, guessed, joined)
    if to is None:
        verdict = None if result.verdict is None else result.verdict.as_json()
        report = result.report.relative_to(path / "_curate").as_posix()
        add_findings(path, Findings.of(result.audit, notes=result.notes, verdict=verdict, report=report))
    return result


def _check_labels(asked: _Question) -> None:
    """Refuse a label file that could be joined to no pool. Errors: UsageError."""
    there, wanted = asked.request.label_columns, asked.wanted
    names = [name for name in there if wanted is None or shown(name) in wanted]
    if asked.request.labels is not None and (names or not there):
        check_labels(asked.request.labels, on=asked.request.on, columns=names)


def _of_other_tools(pool: Path, selected: Path, asked: _Question) -> tuple[AuditedPool, pa.Table]:
    if asked.request.attributes is not None:
        raise UsageError("--attributes asks a model about images, and a pool of other tools has none; leave it out")
    lists = {*asked.request.named, *asked.request.confounders} - {*asked.request.label_columns}
    found = read_foreign(pool, selected, asked.request.traits, lists=lists)
    return AuditedPool(str(pool), found.rows, found.times_N, (), steps=False, notes=found.notes), found.traits


def _required(to: str | PathLike[str] | None) -> Path:
    if to is None:
        raise UsageError("name a directory for the report: -o DIR")
    return _place(to)


def _place(to: str | PathLike[str]) -> Path:
    """Where the report goes. Errors: UsageError for a directory whose own files it would replace."""
    target = local_output(to)
    if run_path(target).is_file() or (target / "_curate" / "TRAIN.json").is_file():
        raise UsageError(f"-o {target}: an output of curate; leave -o out, or name a directory for the report alone")
    if (target / REPORT).is_file() and not (target / "audit.json").is_file():
        raise UsageError(f"-o {target}: its {REPORT} is no audit's and would be replaced; name another directory")
    return target


def _question(
    *,
    labels: str | PathLike[str] | None,
    on: str,
    least_match: float,
    label_error: Sequence[str],
    lexicon: Sequence[str],
    attributes: str | PathLike[str] | None,
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
    alone = [one for one in bounded if not one.crossed]
    held = dict.fromkeys((*(confounder or (CAPTION_LENGTH,)), *(name for one in bounded for name in one.confounders)))
    file = None if labels is None else Path(labels).expanduser().absolute()
    labelled = () if file is None or columns else label_names(file)  # naming none of them asks for all
    request = AuditRequest(
        labels=file,
        on=on,
        least_match=least_match,
        lexicons=tuple(lexicon) or SETS,
        columns=tuple(dict.fromkeys((*columns, *(one.name for one in alone if one.name not in labelled)))),
        intersect=_crossed(intersect, bounded),
        confounders=tuple(held),
        clusters=clusters,
        label_errors=dict(_label_error(text) for text in label_error),
        seed=seed,
        attributes=None if attributes is None else Path(attributes).expanduser(),
    )
    return _Question(request, tuple(columns), checked, seed)


def _crossed(given: Sequence[str], bounded: Sequence[Bounded]) -> tuple[tuple[str, ...], ...]:
    """The columns to cross: as given, then those of the policy that are not crossed already."""
    try:
        found = [crossed_names(names) for names in given]
    except UsageError as error:
        raise UsageError(f"--intersect {error}") from None
    for column in bounded:
        if column.crossed and {*column.crossed} not in map(set, found):
            found.append(column.crossed)
    return tuple(found)


def _label_error(text: str) -> tuple[str, LabelError]:
    name, _, numbers = text.rpartition("=")
    try:
        sensitivity, specificity = (float(number) for number in numbers.split(","))
    except ValueError:
        raise UsageError(f"--label-error {text}: give COLUMN=SENSITIVITY,SPECIFICITY, such as tone=0.9,0.98") from None
    return name, LabelError(sensitivity, specificity)


def _audited(
    pool: AuditedPool,
    traits: pa.Table,
    asked: _Question,
    target: Path,
    started: float,
    predictions: pa.Table | None = None,
    joined: Labels | None = None,
) -> AuditResult:
    """The statistics of a pool, and the files that hold them."""
    found = assemble(pool.rows, traits, asked.request, wanted=asked.wanted, predictions=predictions, joined=joined)
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
        verdict = check_selection(asked.policy, groups_of(found, asked.policy), pool.times_N, cluster_N=unit_N)
    result = AuditResult(
        target, audited, findings(audited), (*pool.notes, *found.notes), verdict, seconds=time.monotonic() - started
    )  # fmt: skip
    write_audit(result, Audited(pool, tuple(columns), found, caption_N, asked.request.intersect, asked.policy))
    return result


def render_audit(result: AuditResult, console: Console) -> None:
    """Print what was found, what was not, and the verdict."""
    from rich.text import Text

    lines = [*result.findings, *(f"Note: {note}." for note in result.notes)]
    if result.verdict is not None:
        lines.append(f"Policy: {result.verdict.result}.")
        lines += [f"  {row.column}={row.group}: {row.result}, {row.reason}" for row in result.verdict.groups]
        lines += [f"  Conflict: {result.verdict.conflict}."] if result.verdict.conflict else []
    console.print(Text("\n".join(lines)), soft_wrap=True)
