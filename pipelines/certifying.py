"""The certificate of a selection under a policy: from the receipts of its draws, so that a resumed run writes the same.

`certificate.json` says what each group was owed and got, which draws could not keep every bound, what the policy cost,
and under which digest the memberships are kept that all of it was counted by.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow.parquet as pq

from curate import scores
from curate.policy.certificate import MOST_CONFLICTS, certificate
from curate.policy.given import pinned_policy
from curate.policy.price import Price
from curate.policy.quotas import State
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.run_record import Record, RunRecord, TeeRecord, run_path
from curate.storage import readable_json

CERTIFICATE: Final = "certificate.json"


class Place(Protocol):
    """A pinned run and where it lives."""

    @property
    def record(self) -> Record: ...
    @property
    def store(self) -> Store: ...


def certify(job: Place, selected: Sequence[Receipt]) -> dict[str, Any] | None:
    """The certificate of these draws; None without a policy, or of a training."""
    settings = job.record.settings.select if isinstance(job.record, RunRecord) else None
    if settings is None or settings.policy is None:
        return None
    policy = pinned_policy(settings.policy, run_path(job.store.root.parent)).policy
    drawn = [(receipt.facts["super_batch"], receipt.facts["policy"]) for receipt in selected]
    state = State.from_json(drawn[-1][1]["state"]) if drawn else State.empty(policy.bounds)
    prices = [Price(*facts["price"]) for _, facts in drawn if facts["price"] is not None]
    in_conflict = [(number, facts["conflict"]) for number, facts in drawn if facts["conflict"]]
    found = certificate(policy, state, conflicts=[text for _, text in in_conflict], price=_sum(prices))
    found["sub_batches_with_conflict"] = [
        {"sub_batch": number, "conflict": text} for number, text in in_conflict[:MOST_CONFLICTS]
    ]
    return found | {"price_unit": settings.criterion} | _made_of(job.store, drawn)


def certificate_files(job: Place, selected: Sequence[Receipt]) -> dict[str, bytes]:
    """The certificate as a file of the output, where there is one: of what a training chose, the training's own."""
    if isinstance(job.record, TeeRecord):
        path = job.record.run / CERTIFICATE
        return {CERTIFICATE: path.read_bytes()} if path.is_file() else {}
    found = certify(job, selected)
    return {} if found is None else {CERTIFICATE: readable_json(found)}


def take_memberships(store: Store, run: Path) -> None:
    """Keep the memberships that a training's certificate was counted by with the shards of what it chose."""
    path = run / CERTIFICATE
    kept = json.loads(path.read_bytes())["memberships"] if path.is_file() else None
    if kept is not None:
        unit = Unit("policy", {"memberships": kept["sha256"]})
        store.commit(unit, functools.partial(_copy, run / kept["file"]))


def _copy(path: Path, attempt: Attempt) -> dict[str, Any]:
    with attempt.open(".parquet") as file:
        file.write(path.read_bytes())
    return {"rows": pq.read_metadata(path).num_rows}


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
