"""Prove a certificate: every count of it made anew from the ledger and the stored memberships, none taken on trust.

Counted are the candidates that could be drawn and those that were, shard by shard. What a draw gave up (its price) and
the conflicts of single draws are not drawn again. Reads the ledger and the memberships once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import VerificationError
from curate.ledger import ledger_files
from curate.policy.certificate import rows_of_run
from curate.policy.given import pinned_policy
from curate.policy.quotas import State
from curate.run_record import RunRecord, run_path
from curate.storage import file_digest

# N candidates of a shard, G groups of the policy

CERTIFICATE: Final = "certificate.json"
_DRAWABLE: Final = ("selected", "not-selected")


def check_certificate(output: Path, record: RunRecord) -> str:
    """What was proved, in words. Errors: VerificationError saying what differs; OSError or ValueError for no file."""
    assert record.settings.select is not None
    assert record.settings.select.policy is not None
    said: dict[str, Any] = json.loads((output / CERTIFICATE).read_bytes())
    policy = pinned_policy(record.settings.select.policy, run_path(output)).policy
    if said["policy"] != policy.as_json():
        raise VerificationError(f"{CERTIFICATE} is of another policy than the one in {run_path(output)}")
    state = _counted(output, said, tuple(bound.name for bound in policy.bounds))
    found: dict[str, Any] = {"draws": state.draws, "candidates": state.pool, "chosen": state.chosen}
    found["groups"] = [asdict(row) for row in rows_of_run(policy.bounds, state)]
    for name, value in found.items():
        if said[name] != value:
            raise VerificationError(f"{CERTIFICATE}, {name}: it says {_first(said[name], value)}")
    return f"{len(found['groups'])} groups counted again: {state.chosen:,} chosen of {state.pool:,}"


def check_teed_certificate(output: Path, shards: Sequence[str]) -> str:
    """As `check_certificate`, of the shards that a training wrote: members are counted again, pair by pair.

    Whom the training looked at and did not choose is not written, so candidates are taken on trust.
    """
    said: dict[str, Any] = json.loads((output / CERTIFICATE).read_bytes())
    members = _memberships(output, said)
    named = [(output / name).with_suffix(".parquet") for name in shards]
    chosen = pa.concat_tables(pq.read_table(path, columns=["sample_id", "sub_batch"]) for path in named)
    place_N = pc.index_in(
        chosen["sample_id"].cast(pa.binary()), value_set=members["sample_id"].cast(pa.binary()).combine_chunks()
    )
    if place_N.null_count:
        raise VerificationError(f"{place_N.null_count} of the pairs are not among the memberships")
    taken, groups = members.take(place_N), said["groups"]
    found = {"draws": pc.count_distinct(chosen["sub_batch"]).as_py(), "chosen": len(chosen)}
    for name, value in found.items():
        if said[name] != value:
            raise VerificationError(f"{CERTIFICATE}, {name}: it says {said[name]}, counted again {value}")
    for group, row in enumerate(groups):
        count = pc.sum(taken[str(group)]).as_py() or 0
        if row["C"] != count:
            raise VerificationError(f"{CERTIFICATE}, {row['group']}: it says {row['C']}, counted again {count}")
    return f"{len(groups)} groups counted again among {len(chosen):,} pairs that were trained on"


def _counted(output: Path, said: dict[str, Any], names: tuple[str, ...]) -> State:
    """Candidates, chosen and sub-batches per group, from ledger and memberships."""
    if said["memberships"] is None:
        return State(names, (0,) * len(names), (0,) * len(names))
    members = _memberships(output, said)
    pool_G, chosen_G = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    pool = chosen = 0
    batches: set[int] = set()
    for file in ledger_files(output):
        rows = pq.read_table(file, columns=["sample_id", "ordinal", "reason", "status", "sub_batch"])
        rows = rows.filter(pc.is_in(rows["reason"], value_set=pa.array(_DRAWABLE)))
        member_NG = _of_shard(members, int(file.stem), rows, len(names))
        kept_N = pc.equal(rows["status"], "kept").to_numpy(zero_copy_only=False).astype(bool)
        pool_G, chosen_G = pool_G + member_NG.sum(0), chosen_G + member_NG[kept_N].sum(0)
        pool, chosen = pool + len(rows), chosen + int(kept_N.sum())
        batches |= set(rows["sub_batch"].filter(pa.array(kept_N)).to_pylist())
    return State(names, tuple(pool_G.tolist()), tuple(chosen_G.tolist()), pool, chosen, len(batches))


def _memberships(output: Path, said: dict[str, Any]) -> pa.Table:
    named = said["memberships"]
    path = output / named["file"]
    if file_digest(path) != named["sha256"]:
        raise VerificationError(f"{named['file']}: its bytes are not those that the certificate was made of")
    return pq.read_table(path)


def _of_shard(members: pa.Table, shard: int, rows: pa.Table, groups: int) -> NDArray[np.bool_]:
    """bool [N, G] of the ledger's rows of one shard."""
    own = members.filter(pc.equal(members["shard"], shard))
    place_N = pc.index_in(rows["ordinal"], value_set=own["row"].combine_chunks())
    if place_N.null_count or not own["sample_id"].take(place_N).equals(rows["sample_id"].cast(pa.binary(16))):
        raise VerificationError(f"shard {shard}: the memberships are of other samples than its ledger")
    taken = own.take(place_N)
    member_NG = np.zeros((len(rows), groups), dtype=np.bool_)
    for group in range(groups):
        member_NG[:, group] = taken[str(group)].to_numpy(zero_copy_only=False)
    return member_NG


def _first(said: Any, found: Any) -> str:
    if isinstance(said, list) and len(said) == len(found):
        return next(f"{one}, counted again {two}" for one, two in zip(said, found, strict=True) if one != two)
    return f"{said}, counted again {found}"
