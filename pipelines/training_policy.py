"""A training's policy between its shards and its first draw: who is in which group, and can it be met at all.

The captions of the shards are read once for it, in the pass that audits use; memberships are kept under RUN/_curate, so
that a run that is taken up again reads neither captions nor labels. Near-duplicates and embedding clusters are those of
all the pairs, as the reference's pass leaves them; it then comes first, and what needs no scores is refused before it.
Memory: some 300 bytes per pair while they are made (with clusters 6 D more, D the reference's width), one byte per pair
and group after.
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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import scores
from curate.auditing.own_columns import CLUSTERS, EMBEDDING
from curate.auditing.renamed import with_originals
from curate.errors import UsageError, VerificationError
from curate.learner.dataset import Opened
from curate.learner.files import RunFiles, clear_but_scores, forget
from curate.learner.policing import Policing, refuse_impossible
from curate.learner.settings import TrainSettings
from curate.pipelines.engine import open_engine
from curate.pipelines.overwriting import link_stages
from curate.pipelines.passes import Passing
from curate.pipelines.reference_pass import Referred, Referring, Where
from curate.pipelines.ruling import as_members, membership_schema
from curate.pipelines.traits import read_traits, traits_pass
from curate.policy.ahead import check_clusters, check_pool, refuse_without_reference, scored_names
from curate.policy.columns import coverage_notes, policy_columns, request_of
from curate.policy.given import GivenPolicy
from curate.receipts import Attempt, Store, Unit
from curate.shards.sources import ShardSource
from curate.storage import make_directory

# N pairs of the source, G groups of the policy

_DIRECTORIES: Final = ("policy", "traits", "commits", "attempts", "logs")
_ROWS: Final = ("sample_id", "shard", "ordinal", "key", "uid", "width", "height")
_HASHES: Final = ("image_digest", "dhash")


def pinned(given: GivenPolicy) -> dict[str, Any]:
    """What TRAIN.json says of a policy: its text, the digest of its labels, and the word lists that groups come from.

    Errors: UsageError for labels that are none.
    """
    return {"policy": given.settings.model_dump() | {"traits": request_of(given).traits.as_json()}}


def policed(
    given: GivenPolicy | None, referring: Referring, files: RunFiles, ahead: Referred | None = None
) -> tuple[Policing | None, Referred | None]:
    """The policy with the members of its groups, made now or found in the run, None without one; and what the reference
    had to make for it, if anything, in its place in the run. `ahead` is what `check_policed` had it make.

    Errors: UsageError for columns or groups that are not there, labels that do not match, and bounds that no run of
    this size could keep to; the run is then as if it had not begun, but for the reference's scores.
    """
    if given is None:
        shutil.rmtree(files.next, ignore_errors=True)  # of a call with a policy that was killed
        return None, None
    making = _making(given, referring, files.own)
    if files.next.is_dir():  # made before an earlier run was removed
        link_stages(Store(files.next), making.store, ("traits", "policy"))
        if making.scored and files.next_reference.is_dir() and not files.reference.exists():
            files.next_reference.rename(files.reference)
        shutil.rmtree(files.next)
    try:
        found, scored = _possible(making)
    except UsageError as error:
        forget(files)
        raise _with_scores(error, files.reference) from error
    for note in coverage_notes(given.policy, found.columns):
        referring.where.say(note)
    moved = None if ahead is None else ahead.moved(files.next_reference, files.reference)
    return found, scored or moved


def check_policed(given: GivenPolicy | None, referring: Referring, files: RunFiles) -> Referred | None:
    """`policed`, before the run that is there makes room: what is read and scored for it is kept beside it for the new
    run, and what was scored is returned.

    Errors: as `policed`; nothing but scores stays then.
    """
    if given is None or not (files.record.is_file() or files.finished):
        return None
    try:
        return _possible(_making(given, referring, files.next))[1]
    except UsageError as error:
        clear_but_scores(files.next)
        with contextlib.suppress(OSError):
            files.own.rmdir()  # a checkpoint that no run of ours made had none
        raise _with_scores(error, files.next_reference) from error


def check_bounds(
    given: GivenPolicy,
    settings: TrainSettings,
    opened: Opened,
    sources: Sequence[ShardSource],
    place: Path,
    where: Where,
) -> None:
    """Refuse what `policed` would refuse and no score is needed for; what is read for it is kept in `place`.

    Errors: as `policed`.
    """
    if settings.reference is None:
        refuse_without_reference(given)
    making = _making(given, Referring(settings, opened, tuple(sources), None, where), place)
    if making.scored:
        _check_unscored(making, _traits(making))
    else:
        _possible(making)


def _with_scores(error: UsageError, scores: Path) -> UsageError:
    """The refusal, with what stays of the run."""
    if not scores.is_dir():
        return error
    return UsageError(f"{error}. The reference's scores are kept in {scores} for the next call, and may be removed")


@dataclass(frozen=True, slots=True)
class _Making:
    given: GivenPolicy
    referring: Referring
    store: Store

    @property
    def scored(self) -> tuple[str, ...]:
        """The columns that the reference's pass has to come before."""
        return scored_names(self.given)

    @property
    def unit(self) -> Unit:
        opened, model = self.referring.opened, self.referring.model
        inputs = {"pinned": pinned(self.given), "inputs": list(opened.digests), "pairs": len(opened.pairs)}
        made_by = {"reference": model.identity.to_json()} if self.scored and model is not None else {}
        return Unit("policy", inputs | made_by)


def _making(given: GivenPolicy, referring: Referring, root: Path) -> _Making:
    for name in _DIRECTORIES:
        make_directory(root / name)
    return _Making(given, referring, Store(root))


def _possible(making: _Making) -> tuple[Policing, Referred | None]:
    """The policy, and what the reference made for it just now. Errors: UsageError where no run could keep to it."""
    settings, pairs = making.referring.settings, len(making.referring.opened.pairs)
    found, scored = _remembered(making)
    steps, window = settings.total_steps(pairs), min(settings.window, pairs)
    refuse_impossible(found, np.arange(pairs), batch=min(settings.batch, window), window=window, steps=steps)
    return found, scored


def _remembered(making: _Making) -> tuple[Policing, Referred | None]:
    """The policy with the members of its groups, as the store of `making` has them; made now where it has not."""
    scored: list[Referred] = []
    output = making.store.commit(making.unit, functools.partial(_make, making, scored)).outputs[0]
    path, policy = making.store.root / output.path, making.given.policy
    member_NG = as_members(pq.read_table(path), len(policy.bounds))
    kept = {"file": f"_curate/{output.path}", "sha256": output.sha256}
    found = Policing(policy, member_NG, tuple(scores.read_facts(path)["columns"]), kept)
    return found, scored[0] if scored else None


def _make(making: _Making, scored: list[Referred], attempt: Attempt) -> dict[str, Any]:
    """Write the memberships, a row for each pair in the source's order; what had to be scored goes to `scored`."""
    given, referring = making.given, making.referring
    traits = _traits(making)
    rows = _of_pairs(traits, referring.opened)
    if given.labels is not None:
        rows = with_originals(rows, [source.url for source in referring.sources])
    if making.scored:
        _check_unscored(making, traits)
        scored.append(referring.into(making.store.root / "reference"))
        rows = _with_images(rows, scored[0].tables, clustered=CLUSTERS in making.scored)
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


def _check_unscored(making: _Making, traits: pa.Table) -> None:
    """Errors: UsageError for what can be told before the reference's pass."""
    check_pool(making.given, traits, (*_ROWS, *_HASHES))
    check_clusters(making.given, len(making.referring.opened.pairs))


def _traits(making: _Making) -> pa.Table:
    where = making.referring.where
    with open_engine(
        workers=where.workers, scheduler=where.scheduler, mode=where.engine, allow_remote=where.allow_remote
    ) as engine:
        request = request_of(making.given)
        sources = making.referring.sources
        receipts = traits_pass(Passing(engine, where.quiet), making.store, sources, request.traits)
    return read_traits(making.store, receipts)


def _with_images(rows: pa.Table, tables: Sequence[Path], *, clustered: bool) -> pa.Table:
    """The rows with hashes and embeddings of their images, null for pairs that the reference could not read."""
    names = [*_HASHES, *([EMBEDDING] if clustered else [])]
    table = pa.concat_tables(scores.read_table(path, ["sample_id", "reason", *names]) for path in tables)
    table = table.filter(table["reason"].is_null())
    ids = table["sample_id"].cast(pa.binary()).combine_chunks()
    at_N = pc.index_in(rows["sample_id"].cast(pa.binary()).combine_chunks(), value_set=ids)
    for name in names:
        rows = rows.append_column(name, table[name].take(at_N))
    return rows


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
