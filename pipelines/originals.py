"""Where the samples of a training's input shards lie: score tables that a reference left, or the same without a model.

Without a reference's tables each shard is read and decoded once, as the trainer does: some 1,500 images of 256 pixels a
second and core. Embeddings, similarities and losses are then left out.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate import scores
from curate.chosen import Training
from curate.errors import ShardError, UsageError
from curate.reading import ReadLimits, Sample, read_samples
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.run_record import run_path
from curate.score_rows import score_rows
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar

_BATCH = 64
_LIMITS = ReadLimits(min_side=64)  # decoded small: the quality signals are made at 64 pixels of height


@dataclass(frozen=True, slots=True)
class OriginalSpec:
    """One input shard, and the sha256 that it had when the training began."""

    output: Path
    source: ShardSource
    digest: str
    threads: int

    @property
    def unit(self) -> Unit:
        source = {"url": self.source.url, "size": self.source.size, "etag": self.source.etag}
        return Unit("score", {"source": source, "digest": self.digest, "models": {}})


def describe_shard(spec: OriginalSpec) -> Receipt:
    """The receipt of one described shard, with the facts of a scored one. Errors: ShardError where it changed."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_describe, spec))


def _describe(spec: OriginalSpec, attempt: Attempt) -> dict[str, Any]:
    with open_shard(spec.source) as data:
        if (digest := shard_digest(data)) != spec.digest:
            raise changed(spec.source, spec.digest, digest)
        index = index_tar(data)
        samples = list(_read(data, group_samples(index, digest), spec.threads))
        facts: dict[str, Any] = {
            "shard": spec.source.url,
            "digest": digest,
            "rows": len(samples),
            "unread_bytes": 0 if index.flaw is None else max(0, spec.source.size - index.flaw.offset),
            "flaw": None if index.flaw is None else f"{index.flaw.reason} at byte {index.flaw.offset}",
            "models": {},
        }
    reasons = Counter(sample.reason for sample in samples if sample.reason is not None)
    facts |= {"candidates": len(samples) - reasons.total(), "reasons": dict(sorted(reasons.items()))}
    with attempt.open(".parquet") as file:
        scores.write_table(file, _table(samples), {"identity": {}, **facts})
    return facts


def changed(source: ShardSource, then: str, now: str) -> ShardError:
    """A shard whose bytes are not those that were trained on."""
    return ShardError(
        f"shard {source.url} changed since the training began: sha256 {then[:12]}... then, {now[:12]}... now; restore "
        "it, or train anew"
    )


def _table(samples: list[Sample]) -> pa.Table:
    return score_rows(samples, {}, {})


def _read(data: memoryview, entries: list[SampleEntry], threads: int) -> Iterator[Sample]:
    batches = [entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH)]
    read = functools.partial(_read_batch, data)
    with ThreadPoolExecutor(threads) as pool:
        for samples in pool.map(read, batches):
            yield from samples


def _read_batch(data: memoryview, entries: list[SampleEntry]) -> list[Sample]:
    return read_samples(data, entries, _LIMITS, lambda _: None)


def stored_scores(training: Training, scores: str | os.PathLike[str] | None) -> Path | None:
    """A directory that has a score table of every input shard as it was trained on, or None."""
    path = training.run / "_curate" / "reference" if scores is None else Path(scores).expanduser().absolute()
    if not run_path(path).is_file():
        if scores is not None:
            raise UsageError(f"{path}: no run of `curate score` there, so it has no scores of these shards")
        return None
    stored = by_digest(path)
    missing = [
        source.url for source, digest in zip(training.inputs, training.digests, strict=True) if digest not in stored
    ]
    if missing and scores is not None:
        raise UsageError(f"{path} has no scores of {missing[0]} as it was trained on; leave the option out")
    return None if missing else path


def by_digest(scores: Path) -> dict[str, Receipt]:
    """sha256 of a shard -> receipt of its score table; of several by other settings, the first by unit id."""
    store = Store.of(scores)
    found = [receipt for receipt in store.receipts("score") if store.locate(receipt.outputs[0]) is not None]
    return {receipt.facts["digest"]: receipt for receipt in reversed(found)}
