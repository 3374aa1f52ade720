"""The certificate of a selection under a policy: from the receipts of its draws, so that a resumed run writes the same.

`certificate.json` says what each group was owed and got, which draws could not keep every bound, what the policy cost,
and under which digest the memberships are kept that all of it was counted by.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from curate.certified import CERTIFICATE, certificate_of
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.run_record import Record, RunRecord, TeeRecord
from curate.storage import readable_json


class Place(Protocol):
    """A pinned run and where it lives."""

    @property
    def record(self) -> Record: ...
    @property
    def store(self) -> Store: ...


def certify(job: Place, selected: Sequence[Receipt]) -> dict[str, Any] | None:
    """The certificate of these draws; None without a policy, or of a training."""
    record = job.record
    return certificate_of(job.store.root.parent, record, selected) if isinstance(record, RunRecord) else None


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
