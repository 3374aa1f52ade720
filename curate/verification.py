"""Prove a finished output from its files alone: accounting, digests, pairs, sub-batches, and that readers load it.

Each check is independent of the code that wrote the files where it can be: shards are indexed and hashed anew, and the
original shards too if they are still there. Reads every published byte once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import __version__
from curate.chosen import log_digest, log_rows, read_log
from curate.errors import ShardError, UsageError, VerificationError
from curate.ledger import ledger_files, read_ledger
from curate.provenance.keeping import is_ours, make_cards, read_certificate
from curate.provenance.lineage import CARDS
from curate.run_record import Record, RunRecord, TeeRecord, read_record
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import open_shard, shard_digest
from curate.shards.tarindex import index_tar
from curate.storage import file_digest

STATUSES = ("kept", "dropped", "quarantined")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was proved, or was not: `ok` is None where it could not be tried, with the reason in `detail`."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one output; `ok` if none failed."""

    output: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in self.checks]
        return {"output": str(self.output), "ok": self.ok, "checks": checks}


class _Mismatch(Exception):
    """A check failed; the message says where."""


class _Untried(Exception):
    """A check could not be made here; the message says why."""


def verify(output: str | PathLike[str], *, load: bool = True) -> Verification:
    """Check the output directory of a finished run; `load` also reads a sample with webdataset and open_clip."""
    output = Path(output).expanduser().absolute()
    record, manifest = read_record(output), _manifest(output)
    steps: list[tuple[str, Callable[[], str]]] = [
        ("finished", lambda: _finished(output, manifest)),
        ("accounting", lambda: _accounting(output, record, manifest)),
        ("inputs", lambda: _inputs(record, manifest)),
        ("digests", lambda: _digests(output, manifest)),
        ("data card", lambda: _data_card(output, record, manifest)),
    ]
    if isinstance(record, TeeRecord):
        steps.append(("pairs", lambda: _teed_pairs(output, manifest)))
        steps.append(("sub-batches", lambda: _teed_sub_batches(output, record, manifest)))
        if "certificate.json" in manifest["digests"]:
            from curate.certified import check_teed_certificate

            shards = [shard["name"] for shard in manifest["shards"]]
            steps.append(("certificate", lambda: check_teed_certificate(output, shards)))
    else:
        steps.append(("pairs", lambda: _pairs(output, manifest)))
        steps.append(("sub-batches", lambda: _sub_batches(output, record)))
        if record.settings.select is not None and record.settings.select.policy is not None:
            from curate.certified import check_certificate

            steps.append(("certificate", lambda: check_certificate(output, record, manifest["receipts"])))
    if load:
        from curate.loaders.readers import read_with_open_clip, read_with_webdataset

        steps.append(("webdataset loads it", lambda: _loaded(read_with_webdataset, output, manifest)))
        steps.append(("open_clip loads it", lambda: _loaded(read_with_open_clip, output, manifest)))
    return Verification(output, tuple(_checked(name, step) for name, step in steps))


def _checked(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except _Mismatch as mismatch:
        return Check(name, False, str(mismatch))
    except _Untried as untried:
        return Check(name, None, str(untried))
    except (OSError, ValueError, LookupError, TypeError, UsageError, ShardError, VerificationError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _manifest(output: Path) -> dict[str, Any]:
    path = output / "_curate" / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{output}: the run has not finished ({path} is missing); run the same command again"
        ) from None
    return manifest


def _finished(output: Path, manifest: dict[str, Any]) -> str:
    if not (output / "_curate" / "SUCCESS.json").is_file():
        raise _Mismatch("no SUCCESS.json: the run lost more than its tolerance, or did not finish")
    return f"{manifest['counts']['in']} samples in {len(manifest['inputs'])} shards came in"


def _accounting(output: Path, record: Record, manifest: dict[str, Any]) -> str:
    """in = kept + dropped + quarantined for every input shard, each row with a reason; the manifest says the same."""
    files = ledger_files(output)
    if len(files) != len(record.inputs):
        raise _Mismatch(f"{len(record.inputs)} input shards, {len(files)} ledger files")
    totals: Counter[str] = Counter()
    for file, known in zip(files, manifest["inputs"], strict=True):
        table = pq.read_table(file, columns=["status", "reason", "ordinal"])
        statuses = Counter(table["status"].to_pylist())
        if len(table) != known["rows"] or any(statuses[name] != known[name] for name in STATUSES):
            raise _Mismatch(f"{file.name}: {dict(statuses)} of {len(table)} rows, the manifest says {known}")
        if table["reason"].null_count or table["ordinal"].to_pylist() != list(range(len(table))):
            raise _Mismatch(f"{file.name}: a row without a reason, or rows missing")
        totals.update(statuses)
    if any(totals[name] != manifest["counts"][name] for name in STATUSES):
        raise _Mismatch(f"the ledger counts {dict(totals)}, the manifest {manifest['counts']}")
    return " + ".join(f"{totals[name]} {name}" for name in STATUSES) + f" = {totals.total()}"


def _inputs(record: Record, manifest: dict[str, Any]) -> str:
    """The original shards, if they are still there, hold the samples that the ledger accounts for."""
    seen = 0
    for source, known in zip(record.inputs, manifest["inputs"], strict=True):
        try:
            with open_shard(source) as data:
                digest = shard_digest(data)
                rows = len(group_samples(index_tar(data), digest))
        except (OSError, ShardError):
            continue
        if digest != known["sha256"] or rows != known["rows"]:
            raise _Mismatch(f"{source.url} has changed: {rows} samples now, {known['rows']} when it was scored")
        seen += 1
    if not seen:
        raise _Untried("the original shards are not reachable from here")
    return f"{seen} of {len(record.inputs)} original shards read again, unchanged"


def _digests(output: Path, manifest: dict[str, Any]) -> str:
    replaced = manifest.get("replaced", {})  # of an audit that was cut short while it wrote
    read = {name: sha256 for name, sha256 in manifest["digests"].items() if name not in _released(output)}
    for name, sha256 in read.items():
        path = output / name
        if not path.is_file():
            raise _Mismatch(f"{name} is missing")
        if file_digest(path) not in (sha256, *replaced.get(name, [])):
            raise _Mismatch(f"{name}: its bytes are not those that were written")
    return f"sha256 of {len(read)} files"


def _released(output: Path) -> set[str]:
    """The data card or the Croissant file, where somebody took it over by removing the mark of curate."""
    return {name for name in CARDS if not is_ours(output / name)}


def _data_card(output: Path, record: Record, manifest: dict[str, Any]) -> str:
    """README.md and croissant.json are what record, manifest and certificate say, made anew here."""
    names = [name for name in CARDS if name in manifest["digests"] and name not in _released(output)]
    if not names or record.tool != __version__:
        raise _Untried(
            "there is none that curate wrote"
            if not names
            else f"written by curate {record.tool}, whose words may differ from those of {__version__}"
        )
    if "replaced" in manifest:
        raise _Untried("an audit was interrupted while it wrote them; run `curate audit` again")
    made = make_cards(record, manifest, read_certificate(output, manifest))
    for name in names:
        if (output / name).read_bytes() != made[name]:
            raise _Mismatch(f"{name} does not say what record and manifest say")
    findings = "with the findings of an audit" if "audit" in manifest else "no audit yet"
    return f"{' and '.join(names)} made anew from the manifest, {findings}"


def _pairs(output: Path, manifest: dict[str, Any]) -> str:
    """Every sample written has the image and the caption of its sidecar, and is the one that the ledger sent there."""
    table = read_ledger(output, ["sample_id", "out_shard", "out_key", "status"])
    expected = {row["out_key"]: row for row in table.filter(pc.equal(table["status"], "kept")).to_pylist()}
    for shard in manifest["shards"]:
        for key, sidecar, image, caption in _written(output / shard["name"]):
            row = expected.pop(key, None)
            if row is None or row["out_shard"] != shard["name"] or row["sample_id"] != sidecar["sample_id"]:
                raise _Mismatch(f"{shard['name']}, sample {key}: the ledger sent another sample there")
            _compare_pair(f"{shard['name']}, sample {key}", sidecar, image, caption)
    if expected:
        raise _Mismatch(f"{len(expected)} kept samples are in no shard, first {next(iter(expected))}")
    return f"image and caption of {manifest['counts']['kept']} written samples"


def _compare_pair(where: str, sidecar: dict[str, Any], image: memoryview, caption: str | None) -> None:
    if hashlib.sha256(image).hexdigest() != sidecar["sha256"] or caption != sidecar["caption"]:
        raise _Mismatch(f"{where}: image or caption is not that of its sidecar")


def _teed_pairs(output: Path, manifest: dict[str, Any]) -> str:
    """Every pair written is that of its sidecar, and each sample is there as often as the ledger says it was chosen."""
    found: Counter[tuple[str, bytes]] = Counter()
    for shard in manifest["shards"]:
        for key, sidecar, image, caption in _written(output / shard["name"]):
            _compare_pair(f"{shard['name']}, sample {key}", sidecar, image, caption)
            found[sidecar["original_shard"], sidecar["sample_id"]] += 1
    for row in read_ledger(output, ["shard", "key", "sample_id", "status", "times_selected"]).to_pylist():
        times = found.pop((row["shard"], row["sample_id"]), 0)
        if times != row["times_selected"] or (times > 0) != (row["status"] == "kept"):
            where = f"{row['shard']}, sample {row['key']!r}"
            raise _Mismatch(f"{where}: {row['status']}, chosen {row['times_selected']} times, written {times} times")
    if found:
        raise _Mismatch(f"{len(found)} samples were written that the ledger does not have, first {next(iter(found))}")
    return f"image and caption of {manifest['chosen']['samples']} written samples, repeats as in the ledger"


def _written(tar: Path) -> Iterator[tuple[str, dict[str, Any], memoryview, str | None]]:
    """(key, sidecar row, image bytes, caption) of every sample of a written shard."""
    from curate.shards.sources import expand_shards

    sidecar = {row["key"]: row for row in pq.read_table(tar.with_suffix(".parquet")).to_pylist()}
    with open_shard(expand_shards([tar])[0]) as data:
        entries: list[SampleEntry] = group_samples(index_tar(data), shard_digest(data))
        if len(entries) != len(sidecar):
            raise _Mismatch(f"{tar.name} has {len(entries)} samples, its sidecar {len(sidecar)}")
        for entry in entries:
            member = entry.image()
            if entry.reason is not None or member is None or entry.key not in sidecar:
                raise _Mismatch(f"{tar.name}, sample {entry.key}: {entry.reason or 'not in the sidecar'}")
            caption, _ = read_caption(data, entry, max_bytes=len(data))
            yield entry.key, sidecar[entry.key], data[member.offset : member.offset + member.size], caption


def _sub_batches(output: Path, record: RunRecord) -> str:
    """Ranks of every sub-batch count up from 0 without a gap, and an explicit --sub-batch has that size."""
    table = read_ledger(output, ["sub_batch", "rank"]).drop_null()
    ranks: dict[int, list[int]] = {}
    for row in table.to_pylist():
        ranks.setdefault(row["sub_batch"], []).append(row["rank"])
    for number, found in ranks.items():
        if sorted(found) != list(range(len(found))):
            raise _Mismatch(f"sub-batch {number}: ranks are not 0..{len(found) - 1}")
    sizes = sorted({len(found) for found in ranks.values()})
    wanted = record.settings.select.sub_batch if record.settings.select else None
    if wanted is not None and any(size != wanted for size in sizes):
        raise _Mismatch(f"--sub-batch {wanted} was asked for, sub-batches have {sizes}")
    return f"{len(ranks)} of {sizes[0] if sizes else 0} to {sizes[-1] if sizes else 0} samples"


def _teed_sub_batches(output: Path, record: TeeRecord, manifest: dict[str, Any]) -> str:
    """The sidecars hold exactly the log that the shards were made of; the training's own too, if it is still there."""
    digest, steps = hashlib.sha256(), 0
    names = ["sub_batch", "rank", "score", "sample_id"]
    for shard in manifest["shards"]:
        table = pq.read_table((output / shard["name"]).with_suffix(".parquet"), columns=names)
        step = pc.add(table["sub_batch"].cast(pa.int64()), 1)
        digest.update(log_rows(table.append_column("step", step)).tobytes())
        steps = pc.max(step).as_py()
    known = manifest["chosen"]
    if digest.hexdigest() != known["log"] or steps != known["steps"]:
        raise _Mismatch(f"the sidecars do not hold the {known['steps']} sub-batches that were chosen, in their order")
    if not record.run.is_dir():
        return f"{steps}, as chosen (the training's own log, {record.run}, is not reachable from here)"
    ours = (segment for segment in read_log(record.run) if segment.table["step"][0].as_py() <= steps)
    if log_digest(ours) != known["log"]:
        raise _Mismatch(f"{record.run} has another log of chosen sub-batches now; the training went on or was changed")
    return f"{steps}, as in the log of {record.run}"


def _loaded(read: Callable[[Path, list[str]], tuple[int, str]], output: Path, manifest: dict[str, Any]) -> str:
    names = [shard["name"] for shard in manifest["shards"]]
    if not names:
        raise _Untried("nothing was selected, so there is nothing to load")
    try:
        samples, described = read(output, names)
    except ImportError as error:
        raise _Untried(f"not installed here: {error.name}") from error
    if not samples:
        raise _Mismatch("it yielded no sample")
    return f"{samples} samples with {described}"
