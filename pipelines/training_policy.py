"""A training's policy between its shards and its first draw: who is in which group, and can it be met at all.

The captions of the shards are read once for it, in the pass that audits use; memberships are kept under RUN/_curate, so
that a run that is taken up again reads neither captions nor labels. Memory: some 300 bytes per pair while they are
made, one byte per pair and group after.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate import scores
from curate.auditing.renamed import with_originals
from curate.errors import UsageError, VerificationError
from curate.learner.dataset import Opened
from curate.learner.files import RunFiles, forget
from curate.learner.policing import Policing, refuse_impossible
from curate.learner.settings import TrainSettings
from curate.pipelines.engine import open_engine
from curate.pipelines.overwriting import link_stages
from curate.pipelines.passes import Passing
from curate.pipelines.reference_pass import Where
from curate.pipelines.ruling import as_members, membership_schema
from curate.pipelines.traits import read_traits, traits_pass
from curate.policy.columns import coverage_notes, policy_columns, request_of
from curate.policy.given import GivenPolicy
from curate.receipts import Attempt, Store, Unit
from curate.shards.sources import ShardSource
from curate.storage import make_directory

# N pairs of the source, G groups of the policy

_DIRECTORIES: Final = ("policy", "traits", "commits", "attempts", "logs")
_ROWS: Final = ("sample_id", "shard", "ordinal", "key", "uid", "width", "height")


def pinned(given: GivenPolicy) -> dict[str, Any]:
    """What TRAIN.json says of a policy: its text, the digest of its labels, and the word lists that groups come from.

    Errors: UsageError for labels that are none.
    """
    return {"policy": given.settings.model_dump() | {"traits": request_of(given).traits.as_json()}}


def policed(
    given: GivenPolicy | None,
    settings: TrainSettings,
    opened: Opened,
    sources: Sequence[ShardSource],
    files: RunFiles,
    where: Where,
) -> Policing | None:
    """The policy with the members of its groups, made now or found in the run; None without one.

    Errors: UsageError for columns or groups that are not there, labels that do not match, and bounds that no run of
    this size could keep to; the run is then as if it had not begun.
    """
    if given is None:
        shutil.rmtree(files.next, ignore_errors=True)  # of a call with a policy that was killed
        return None
    making = _making(given, opened, sources, files.own, where)
    if files.next.is_dir():  # made before an earlier run was removed
        link_stages(Store(files.next), making.store, ("traits", "policy"))
        shutil.rmtree(files.next)
    try:
        found = _remembered(making)
        _refuse_impossible(found, settings, len(opened.pairs))
    except UsageError:
        forget(files)
        raise
    for note in coverage_notes(given.policy, found.columns):
        where.say(note)
    return found


def check_policed(
    given: GivenPolicy | None,
    settings: TrainSettings,
    opened: Opened,
    sources: Sequence[ShardSource],
    files: RunFiles,
    where: Where,
) -> None:
    """`policed`, before the run that is there makes room: what is read for it is kept beside it for the new run.

    Errors: as `policed`; nothing of it stays then.
    """
    if given is None or not (files.record.is_file() or files.finished):
        return
    try:
        _refuse_impossible(_remembered(_making(given, opened, sources, files.next, where)), settings, len(opened.pairs))
    except UsageError:
        shutil.rmtree(files.next)
        with contextlib.suppress(OSError):
            files.own.rmdir()  # a checkpoint that no run of ours made had none
        raise


def _refuse_impossible(policing: Policing, settings: TrainSettings, pairs: int) -> None:
    steps, window = settings.total_steps(pairs), min(settings.window, pairs)
    refuse_impossible(policing, np.arange(pairs), batch=min(settings.batch, window), window=window, steps=steps)


@dataclass(frozen=True, slots=True)
class _Making:
    given: GivenPolicy
    opened: Opened
    sources: tuple[ShardSource, ...]
    store: Store
    where: Where

    @property
    def unit(self) -> Unit:
        inputs = {"pinned": pinned(self.given), "inputs": list(self.opened.digests), "pairs": len(self.opened.pairs)}
        return Unit("policy", inputs)


def _making(given: GivenPolicy, opened: Opened, sources: Sequence[ShardSource], root: Path, where: Where) -> _Making:
    for name in _DIRECTORIES:
        make_directory(root / name)
    return _Making(given, opened, tuple(sources), Store(root), where)


def _remembered(making: _Making) -> Policing:
    """The policy with the members of its groups, as the store of `making` has them; made now where it has not."""
    output = making.store.commit(making.unit, functools.partial(_make, making)).outputs[0]
    path, policy = making.store.root / output.path, making.given.policy
    member_NG = as_members(pq.read_table(path), len(policy.bounds))
    kept = {"file": f"_curate/{output.path}", "sha256": output.sha256}
    return Policing(policy, member_NG, tuple(scores.read_facts(path)["columns"]), kept)


def _make(making: _Making, attempt: Attempt) -> dict[str, Any]:
    """Write the memberships: a row for each pair of the source, in its order."""
    where, given = making.where, making.given
    with open_engine(
        workers=where.workers, scheduler=where.scheduler, mode=where.engine, allow_remote=where.allow_remote
    ) as engine:
        request = request_of(given)
        receipts = traits_pass(Passing(engine, where.quiet), making.store, making.sources, request.traits)
    traits = read_traits(making.store, receipts)
    rows = _of_pairs(traits, making.opened)
    if given.labels is not None:
        rows = with_originals(rows, [source.url for source in making.sources])
    found = policy_columns(given, rows, traits)
    fixed = [rows["sample_id"], rows["shard"], rows["ordinal"]]
    layout = membership_schema(found.member_NG.shape[1])
    table = pa.table([*fixed, *(pa.array(member_N) for member_N in found.member_NG.T)], schema=layout)
    facts = {
        "groups": [bound.name for bound in given.policy.bounds],
        "columns": [dict(column) for column in found.facts],
    }
    with attempt.open(".parquet") as file:
        pq.write_table(table.replace_schema_metadata(scores.facts_metadata(facts)), file, compression="zstd")
    return {"rows": len(table)}


def _of_pairs(traits: pa.Table, opened: Opened) -> pa.Table:
    """The rows of the pairs, in their order. Errors: VerificationError where the shards changed in between."""
    places = opened.pairs.places
    place_M = _places(traits["shard"].to_numpy(), traits["ordinal"].to_numpy())  # ascending: shards and rows in order
    at_N = np.searchsorted(place_M, _places(places.shard_N, places.row_N)).clip(max=len(place_M) - 1)
    rows = traits.select(_ROWS).take(at_N)
    if not np.array_equal(scores.ids_to_array(rows["sample_id"]), places.id_N16):
        raise VerificationError("the shards changed while their captions were read; run the same command again")
    return rows.replace_schema_metadata(None)


def _places(shard_N: Any, row_N: Any) -> Any:
    return (shard_N.astype(np.int64) << 32) + row_N.astype(np.int64)
