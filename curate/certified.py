"""The certificate of a run's draws, and its proof.

Made it is from the receipts of the draws, so that a resumed run writes the same. Proved it is twice: every count is
made anew from the ledger and the stored memberships, and the whole from the receipts; prices are reckoned again from
the stored scores (`repriced.py`), and the conflicts of single draws are not drawn again. Reads the ledger and the
memberships once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate import scores
from curate.errors import VerificationError
from curate.ledger import ledger_files
from curate.policy.certificate import MOST_CONFLICTS, certificate, rows_of_run
from curate.policy.given import pinned_policy
from curate.policy.price import Price
from curate.policy.quotas import State
from curate.policy.schema import Bounds
from curate.receipts import Receipt, Store
from curate.repriced import check_prices
from curate.run_record import RunRecord, run_path
from curate.storage import file_digest, readable_json

# N candidates of a shard, G groups of the policy

CERTIFICATE: Final = "certificate.json"
_FRACTIONS: Final = ("min_ratio", "max_ratio", "min_share")
_DRAWABLE: Final = ("selected", "not-selected")


def certificate_of(output: Path, record: RunRecord, selected: Sequence[Receipt]) -> dict[str, Any] | None:
    """The certificate of these draws, as they are counted in their receipts; None without a policy."""
    settings = record.settings.select
    if settings is None or settings.policy is None:
        return None
    policy = pinned_policy(settings.policy, run_path(output)).policy
    drawn = [(receipt.facts["super_batch"], receipt.facts["policy"]) for receipt in selected]
    state = State.from_json(drawn[-1][1]["state"]) if drawn else State.empty(policy.bounds)
    prices = [Price(*facts["price"]) for _, facts in drawn if facts["price"] is not None]
    in_conflict = [(number, facts["conflict"]) for number, facts in drawn if facts["conflict"]]
    found = certificate(policy, state, conflicts=[text for _, text in in_conflict], price=_sum(prices))
    found["sub_batches_with_conflict"] = [
        {"sub_batch": number, "conflict": text} for number, text in in_conflict[:MOST_CONFLICTS]
    ]
    return found | {"price_unit": settings.criterion} | _made_of(Store.of(output), drawn)


def _sum(prices: Sequence[Price]) -> Price | None:
    if not prices:
        return None
    total = prices[0]
    for price in prices[1:]:
        total += price
    return total


def _made_of(store: Store, drawn: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Which file the groups were counted by, and what it says of their columns."""
    if not drawn:
        return {"memberships": None, "columns": []}
    sha256 = drawn[0][1]["memberships"]
    name = f"policy/{sha256[:32]}.parquet"
    return {
        "memberships": {"file": f"_curate/{name}", "sha256": sha256},
        "columns": scores.read_facts(store.root / name)["columns"],
    }


def check_certificate(output: Path, record: RunRecord, units: Sequence[str]) -> str:
    """What was proved, in words; `units` are the finished run's, in order.

    Errors: VerificationError saying what differs; OSError or ValueError for no file.
    """
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
    price = check_prices(output, record, _as_drawn(output, record, units, said))
    return f"{len(found['groups'])} groups counted again: {state.chosen:,} chosen of {state.pool:,}; {price}"


def _as_drawn(output: Path, record: RunRecord, units: Sequence[str], said: Mapping[str, Any]) -> list[Receipt]:
    """Compare with the receipts what no count tells: memberships, conflicts, prices. Returns those of the draws."""
    there = {receipt.unit: receipt for receipt in Store.of(output).receipts("selection")}
    wanted = [unit for unit in units if unit.startswith("selection-")]
    gone = [unit for unit in wanted if unit not in there]
    if gone:
        raise VerificationError(f"{CERTIFICATE}: the receipts of {len(gone)} of its {len(wanted)} draws are gone")
    drawn = [there[unit] for unit in wanted]
    made = certificate_of(output, record, drawn)
    found: dict[str, Any] = json.loads(readable_json(made))
    for name in sorted({*said, *found}):
        if said.get(name) != found.get(name):
            raise VerificationError(f"{CERTIFICATE}, {name}: the receipts of its draws say {found.get(name)}")
    return drawn


def check_teed_certificate(output: Path, shards: Sequence[str]) -> str:
    """As `check_certificate`, of the shards that a training wrote: members are counted again, pair by pair.

    Whom the training looked at and did not choose is not written, so candidates are taken on trust, and so are prices
    and conflicts; bounds are reckoned again from them.
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
    bounds, pool_G, chosen_G = _bounds_of(said["policy"]), *(tuple(row[name] for row in groups) for name in "nC")
    names = tuple(bound.name for bound in bounds)
    state = State(names, pool_G, chosen_G, said["candidates"], len(chosen), said["draws"])
    rows = [asdict(row) for row in rows_of_run(bounds, state)]
    if rows != groups:
        raise VerificationError(f"{CERTIFICATE}, groups: it says {_first(groups, rows)}")
    pairs = f"{len(chosen):,} pairs that were trained on"
    return f"{len(groups)} groups counted again among {pairs}; candidates and price not checked: the training's word"


def _bounds_of(policy: Mapping[str, Any]) -> list[Bounds]:
    """The bounds of a policy as `Policy.as_json` writes it."""
    found = []
    for column in policy["columns"]:
        for group in column["groups"]:
            low, high, share = (Fraction(str(group[name])) if name in group else None for name in _FRACTIONS)
            found.append(Bounds(f"{column['column']}={group['name']}", low, high, share, group.get("min_count")))
    return found


def _counted(output: Path, said: dict[str, Any], names: tuple[str, ...]) -> State:
    """Candidates, chosen and sub-batches per group, from ledger and memberships."""
    members = None if said["memberships"] is None else _memberships(output, said)
    pool_G, chosen_G = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    pool = chosen = 0
    batches: set[int] = set()
    for file in ledger_files(output):
        rows = pq.read_table(file, columns=["sample_id", "ordinal", "reason", "status", "sub_batch"])
        rows = rows.filter(pc.is_in(rows["reason"], value_set=pa.array(_DRAWABLE)))
        if not len(rows):
            continue
        if members is None:
            raise VerificationError(f"{CERTIFICATE}: it names no memberships, but {len(rows)} samples could be drawn")
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
