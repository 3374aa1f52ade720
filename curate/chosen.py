"""Read the log of chosen sub-batches that a training keeps: which samples each step trained on, in the order drawn.

`RUN/_curate/chosen/FIRST-LAST.parquet` has the rows of steps FIRST to LAST; the segments tile the steps from 1. One
segment is in memory at a time. The digest of a stretch of the log does not depend on where its segments were cut: it
is taken over (step, rank, score, sample id), 32 bytes a row, which is also what the sidecars of teed shards hold.
"""

# n rows of a segment

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import UsageError, VerificationError
from curate.shards.sources import ShardSource

LOG_SCHEMA: Final = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int32()),
        ("chunk", pa.int16()),
        ("score", pa.float32()),
        ("sample_id", pa.binary(16)),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
    ]
)
_ROW: Final = np.dtype([("step", "<i8"), ("rank", "<i4"), ("score", "<f4"), ("sample_id", "V16")])
_SEGMENT: Final = re.compile(r"(\d{8,})-(\d{8,})\.parquet")


@dataclass(frozen=True, slots=True)
class Training:
    """What a training pinned in `TRAIN.json`: its settings, its input shards and their sha256.

    `models`: role -> identity as JSON, of those that it only read.
    """

    run: Path
    settings: dict[str, Any]
    inputs: tuple[ShardSource, ...]
    digests: tuple[str, ...]
    models: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the log: its rows in order of step and rank, and where each sub-batch begins."""

    path: Path
    table: pa.Table
    starts: tuple[int, ...]

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows of each sub-batch."""
        return pairwise((*self.starts, len(self.table)))


def read_training(run: Path) -> Training:
    """The pinned settings and inputs of a training run. Errors: UsageError where there is none."""
    path = run / "_curate" / "TRAIN.json"
    try:
        value = json.loads(path.read_bytes())
        inputs = tuple(ShardSource(one["url"], one["size"], one["etag"]) for one in value["inputs"])
        digests = tuple(one["digest"] for one in value["inputs"])
        return Training(run, value["settings"], inputs, digests, value.get("models", {}))
    except FileNotFoundError:
        raise UsageError(f"{run}: no training there ({path} is missing); `curate train` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not readable ({error!r}); it was not written by curate") from error


def read_log(run: Path) -> Iterator[Segment]:
    """The segments of a run's log in order. Errors: VerificationError where they do not hold steps 1, 2, ... in order.

    Example: with `00000001-00000050.parquet` and `00000051-00000060.parquet` it yields two segments.
    """
    expected = 1
    for first, last, path in segments(run / "_curate" / "chosen"):
        if first != expected or last < first:
            raise VerificationError(f"{path}: the log should go on with step {expected}; segments overlap or are gone")
        yield read_segment(path, first, last)
        expected = last + 1


def segments(directory: Path) -> list[tuple[int, int, Path]]:
    """First step, last step and path of each segment, in order; none where there is no directory."""
    return sorted(
        (int(m[1]), int(m[2]), path) for path in directory.glob("*.parquet") if (m := _SEGMENT.fullmatch(path.name))
    )


def read_segment(path: Path, first: int, last: int) -> Segment:
    """One file of the log, checked: steps `first` to `last`, each with ranks 0, 1, ..., every row naming a sample."""
    try:
        table = pq.read_table(path, columns=LOG_SCHEMA.names).cast(LOG_SCHEMA)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        raise VerificationError(f"{path}: not readable as a log of chosen sub-batches ({error})") from error
    if any(table[name].null_count for name in LOG_SCHEMA.names if name not in ("score", "chunk")):
        raise VerificationError(f"{path}: a row without a step, a rank or a sample")
    step_n, rank_n = table["step"].to_numpy(), table["rank"].to_numpy()
    change_n = np.diff(step_n)
    start_n = np.concatenate([[0], np.flatnonzero(change_n) + 1])[: len(step_n)]
    tiled = len(step_n) and step_n[0] == first and step_n[-1] == last and bool(np.isin(change_n, (0, 1)).all())
    if not tiled or not np.array_equal(rank_n, _count_up(start_n, len(step_n))):
        raise VerificationError(f"{path}: it does not hold steps {first} to {last} in order, ranks counting up from 0")
    return Segment(path, table, tuple(start_n.tolist()))


def log_rows(table: pa.Table) -> NDArray[Any]:
    """The rows as the digest takes them: structured [n], 32 bytes each; a score that is null counts as NaN."""
    row_n = np.empty(len(table), _ROW)
    row_n["step"] = table["step"].to_numpy()
    row_n["rank"] = table["rank"].to_numpy()
    score_n = table["score"].to_numpy().astype(np.float32)
    row_n["score"] = np.where(np.isnan(score_n), np.float32(np.nan), score_n)
    row_n["sample_id"] = np.frombuffer(b"".join(table["sample_id"].to_pylist()), "V16")
    return row_n


def log_digest(segments: Iterable[Segment]) -> str:
    """sha256 over the rows of a whole log, hex."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(log_rows(segment.table).tobytes())
    return digest.hexdigest()


def _count_up(start_n: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """0, 1, ... from each start on."""
    lengths = np.diff(np.append(start_n, rows))
    return np.arange(rows) - np.repeat(start_n, lengths)
