"""End a run: prove the accounting, publish names, write the side files, the manifest, and SUCCESS last.

Everything before SUCCESS.json can be repeated; nothing is collected before it exists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from curate.certified import CERTIFICATE
from curate.errors import VerificationError
from curate.formats.datacomp import to_npy, uid_array
from curate.formats.openclip import sizes
from curate.formats.wids import WidsShard, wids_index
from curate.pipelines.certifying import certificate_files
from curate.provenance.keeping import carried_findings, is_ours, make_cards, read_certificate
from curate.provenance.lineage import CARDS
from curate.receipts import Receipt, Store
from curate.run_record import Record
from curate.storage import leftovers, readable_json, remove, replace_file, sync_directory

STATUSES = ("kept", "dropped", "quarantined")


class Place(Protocol):
    """A pinned run and where it lives: what every kind of job has."""

    @property
    def output(self) -> Path: ...
    @property
    def record(self) -> Record: ...
    @property
    def store(self) -> Store: ...


@dataclass(frozen=True, slots=True)
class Receipts:
    """All receipts of a run, in the order of their passes."""

    scored: Sequence[Receipt]
    selected: Sequence[Receipt]
    ledger: Sequence[Receipt]
    written: Sequence[Receipt]

    def __iter__(self) -> Any:
        yield from (*self.scored, *self.selected, *self.ledger, *self.written)


_PUBLISHED = re.compile(r"\d{5,}(\.tar|\.parquet|\.idx|_stats\.json)")
_SIDE = ("sizes.json", "shardindex.json", "meta.json", "sample_ids.npy", CERTIFICATE)


def reopen(output: Path, *, keep: tuple[str, ...] = ("score", "direction", "traits", "policy")) -> None:
    """Take back what an earlier run published, SUCCESS first, and its receipts but for the stages in `keep`."""
    root = output / "_curate"
    if (root / "SUCCESS.json").exists():
        remove(root / "SUCCESS.json")
        sync_directory(root)  # else a loss of power could leave SUCCESS over shards that are gone
    remove(root / "manifest.json")
    for path in output.iterdir():
        if _PUBLISHED.fullmatch(path.name) or path.name in _SIDE or (path.name in CARDS and is_ours(path)):
            remove(path)
    for path in (root / "ledger").glob("*.parquet"):
        if len(path.stem) < 32:
            remove(path)
    for path in leftovers(output):
        remove(path)
    sync_directory(output)  # else the next run, of fewer shards, could find the last ones of this one beside its own
    for path in (root / "commits").glob("*.json"):
        if path.stem.partition("-")[0] not in keep:
            remove(path)


def withdraw(job: Place, units: Set[str]) -> bool:
    """Take SUCCESS back if what is finished is not that of these units, and more was not finished with them.

    True if nothing is finished now. Receipts of other shards and ledgers go first: their files are about to be replaced
    under their names, and a receipt knows a file by its size alone.
    """
    success, manifest = job.store.root / "SUCCESS.json", job.store.root / "manifest.json"
    if not success.exists():
        return True
    if units <= set(json.loads(manifest.read_bytes())["receipts"]):
        return False
    for path in (job.store.root / "commits").glob("*.json"):
        if path.stem.startswith(("shards-", "ledger-")) and path.stem not in units:
            remove(path)
    sync_directory(job.store.root / "commits")
    remove(success)
    sync_directory(job.store.root)  # else a loss of power could leave SUCCESS over shards that are gone
    cards = (path for path in (job.output / name for name in CARDS) if is_ours(path))
    for path in (manifest, *(job.output / name for name in _SIDE), *cards):
        remove(path)
    return True


def remove_stale(job: Place, receipts: Receipts) -> None:
    """Remove shards that have the name of a shard but are not among these: a log was taken back and grew otherwise."""
    names = {output.published for receipt in receipts for output in receipt.outputs}
    for path in job.output.iterdir():
        if _PUBLISHED.fullmatch(path.name) and path.name not in names:
            remove(path)
    sync_directory(job.output)


def check_accounting(receipts: Receipts) -> dict[str, int]:
    """in = kept + dropped + quarantined for every shard, and chosen = written; the counts, or VerificationError.

    Every kept sample was chosen once, unless its ledger's receipt counts how often (`times`).
    """
    totals: Counter[str] = Counter()
    chosen = 0
    for scored, ledger in zip(receipts.scored, receipts.ledger, strict=True):
        statuses = ledger.facts["status"]
        if scored.facts["rows"] != sum(statuses.values()) or set(statuses) - set(STATUSES):
            came = f"{scored.facts['shard']}: {scored.facts['rows']} samples came in"
            raise VerificationError(f"{came}, the ledger has {statuses}")
        totals.update(statuses)
        chosen += ledger.facts.get("times", statuses.get("kept", 0))
    counts = {"in": sum(totals.values())} | {status: totals[status] for status in STATUSES}
    written = sum(receipt.facts["samples"] for receipt in receipts.written)
    if receipts.written and written != chosen:
        raise VerificationError(f"{chosen} samples are kept in the ledger, {written} were written")
    return counts


def reason_counts(receipts: Receipts) -> dict[str, int]:
    """How many samples have each reason."""
    reasons: Counter[str] = Counter()
    for receipt in receipts.ledger:
        reasons.update(receipt.facts["reason"])
    return dict(sorted(reasons.items()))


def finish(job: Place, receipts: Receipts, *, success: bool, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Publish the run and write its manifest, `more` added; SUCCESS.json only if `success`. Returns the manifest."""
    counts = check_accounting(receipts)
    for receipt in receipts:
        job.store.publish_outputs(receipt)
    side = _side_files(job, receipts)
    for name, content in side.items():
        replace_file(job.output / name, content)
    manifest = _with_cards(job, _manifest(job, receipts, counts, side) | dict(more or {}))
    content = readable_json(manifest)
    replace_file(job.store.root / "manifest.json", content)
    if not success:
        remove(job.store.root / "SUCCESS.json")  # of an earlier call with a larger tolerance
    else:
        replace_file(job.store.root / "SUCCESS.json", readable_json({"schema": 1, "counts": counts}))
        collect(job.store, receipts)
    return manifest


def _with_cards(job: Place, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the data card and the Croissant file; the manifest with their digests, and an audit's findings if any."""
    manifest = manifest | carried_findings(job.store.root / "manifest.json", manifest)
    made = make_cards(job.record, manifest, read_certificate(job.output, manifest))
    cards = {name: content for name, content in made.items() if is_ours(job.output / name)}
    for name, content in cards.items():
        replace_file(job.output / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in cards.items()}
    return manifest | {"digests": manifest["digests"] | digests}


def collect(store: Store, receipts: Receipts) -> None:
    """Remove attempts, and files and receipts of earlier selections, that nothing refers to any more."""
    current = {receipt.unit for receipt in receipts}
    for path in sorted((store.root / "commits").glob("*.json")):
        if not path.stem.startswith(("score-", "direction-", "traits-", "policy-")) and path.stem not in current:
            remove(path)
    needed = {o.path for receipt in receipts for o in receipt.outputs if o.published is None}
    kept = ("score", "traits", "policy")
    needed |= {o.path for stage in kept for receipt in store.receipts(stage) for o in receipt.outputs}
    for stage in (*kept, "selection", "shards", "ledger"):
        for path in sorted((store.root / stage).glob("*")):
            if len(path.stem) == 32 and f"{stage}/{path.name}" not in needed:
                remove(path)
    for path in sorted((store.root / "attempts").iterdir()):
        remove(path)
    for directory in (store.root.parent, store.root, store.root / "commits", store.root / "ledger"):
        for path in leftovers(directory):
            remove(path)


def _side_files(job: Place, receipts: Receipts) -> dict[str, bytes]:
    """The files that open_clip, DataComp and wids look for beside the shards."""
    shards = [(receipt.outputs[0], receipt.facts) for receipt in receipts.written]
    names = [(str(output.published), facts["samples"]) for output, facts in shards]
    wids = [WidsShard(str(o.published), facts["md5"], facts["samples"], o.size) for o, facts in shards]
    files = {
        "sizes.json": readable_json(sizes(names)),
        "shardindex.json": readable_json(wids_index(wids, name="curate")),
        "meta.json": readable_json(_meta(job, names)),
    } | certificate_files(job, receipts.selected)
    uids = [uid for receipt in receipts.written for uid in _uids(job, receipt) if uid is not None]
    return files | ({"sample_ids.npy": to_npy(uid_array(uids))} if uids else {})


def _uids(job: Place, receipt: Receipt) -> list[str | None]:
    sidecar = job.output / str(receipt.outputs[1].published)  # another driver may be collecting the other name
    column: list[str | None] = pq.read_table(sidecar, columns=["uid"])["uid"].to_pylist()
    return column


def _meta(job: Place, names: list[tuple[str, int]]) -> dict[str, Any]:
    record = job.record.as_json()
    return {
        "tool": f"curate {job.record.tool}",
        "samples": sum(samples for _, samples in names),
        "shards": len(names),
        "settings": record["settings"],
        "models": record["models"],
    }


def _manifest(job: Place, receipts: Receipts, counts: dict[str, int], side: dict[str, bytes]) -> dict[str, Any]:
    shards = [
        {"name": o.published, "sha256": o.sha256, "size": o.size, "samples": receipt.facts["samples"]}
        for receipt in receipts.written
        for o in receipt.outputs[:1]
    ]
    digests = {str(o.published): o.sha256 for receipt in receipts for o in receipt.outputs if o.published is not None}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in side.items()}
    return {
        "schema": 1,
        "tool": job.record.tool,
        "counts": counts,
        "reasons": reason_counts(receipts),
        "shards": shards,
        "inputs": [_input(scored, ledger) for scored, ledger in zip(receipts.scored, receipts.ledger, strict=True)],
        "digests": digests,
        "receipts": [receipt.unit for receipt in receipts],
    }


def _input(scored: Receipt, ledger: Receipt) -> dict[str, Any]:
    facts = scored.facts
    counted = {status: ledger.facts["status"].get(status, 0) for status in STATUSES}
    return {"url": facts["shard"], "sha256": facts["digest"], "rows": facts["rows"], "flaw": facts["flaw"], **counted}
