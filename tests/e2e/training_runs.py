"""What a training leaves behind, made without one: pinned inputs and a log of chosen sub-batches over small shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import curate
from curate.chosen import LOG_SCHEMA
from curate.pipelines.engine import Inline
from curate.pipelines.teeing import TeeResult, tee
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import expand_shards
from curate.shards.tarindex import index_tar

SIZES = [7, 7, 7, 12, 3, 7, 7, 25, 7, 1, 7, 6]  # of a shard of 20: one sub-batch is larger
INLINE = Inline(1)
Batch = list[dict[str, Any]]  # rows of one step


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run directory, and what its steps chose, in order."""

    run: Path
    steps: list[Batch]

    @property
    def keys(self) -> list[list[str]]:
        return [[row["key"] for row in step] for step in self.steps]

    def write_log(self, *lengths: int) -> None:
        """Replace the log by segments of so many steps each."""
        folder = self.run / "_curate" / "chosen"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        first = 0
        for length in lengths:
            rows = [row for step in self.steps[first : first + length] for row in step]
            name = f"{first + 1:08d}-{first + length:08d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=LOG_SCHEMA), folder / name)
            first += length


def make_training(
    run: Path, pool: Path, sizes: Sequence[int], *, seed: int = 0, settings: dict[str, Any] | None = None
) -> TrainingRun:
    """A run over the shards of `pool` whose step k chose `sizes[k - 1]` of the readable samples; steps repeat them."""
    sources = expand_shards([pool])
    digests = [hashlib.sha256(Path(source.url).read_bytes()).hexdigest() for source in sources]
    inputs = [
        {"url": source.url, "size": source.size, "etag": source.etag, "digest": digest}
        for source, digest in zip(sources, digests, strict=True)
    ]
    (run / "_curate").mkdir(parents=True)
    pinned = {"schema": 1, "settings": settings or {"model": "ViT-B-32", "loss": "sigmoid", "seed": seed}}
    (run / "_curate" / "TRAIN.json").write_text(json.dumps(pinned | {"inputs": inputs}))
    candidates = [
        (shard, entry)
        for shard, (source, digest) in enumerate(zip(sources, digests, strict=True))
        for entry in _readable(Path(source.url), digest)
    ]
    return TrainingRun(run, list(_steps(candidates, sizes, seed)))


def _readable(path: Path, digest: str) -> list[SampleEntry]:
    entries = group_samples(index_tar(memoryview(path.read_bytes())), digest)
    image_and_text = (e for e in entries if e.reason is None and e.member("txt") is not None)
    return [entry for entry in image_and_text if (image := entry.image()) is not None and image.size > 200]


def _steps(candidates: list[tuple[int, SampleEntry]], sizes: Sequence[int], seed: int) -> Iterator[Batch]:
    dice = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        drawn = dice.choice(len(candidates), size, replace=False).tolist()
        yield [
            {
                "step": number + 1,
                "rank": rank,
                "chunk": rank // 2,
                "score": float(np.float32(dice.normal())),
                "sample_id": candidates[at][1].sample_id,
                "shard": candidates[at][0],
                "row": candidates[at][1].ordinal,
                "key": candidates[at][1].key,
            }
            for rank, at in enumerate(drawn)
        ]


def finish(training: TrainingRun, output: Path, **options: Any) -> TeeResult:
    return tee(training.run, output, INLINE, final=True, **{"samples_per_shard": 20} | options)


def failed(output: Path, *, load: bool = False) -> list[str]:
    return [check.name for check in curate.verify(output, load=load).checks if check.ok is not True]


def explained(output: Path, key: str) -> Any:
    """The sample of that original key; other samples' copies may have it as their new one."""
    return next(found for found in curate.explain(output, key) if found.row["key"] == key)
