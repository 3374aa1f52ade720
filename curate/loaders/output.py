"""A finished output directory, as the loaders see it: its shards, their sidecars, and the spans of its sub-batches.

Opening one reads two small columns of each sidecar (8 bytes per sample), never a tar.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import UsageError, VerificationError


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start:stop` of shard `shard`: all of a sub-batch, or its part in that shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One sub-batch of the run and where its samples lie, in the order drawn."""

    sub_batch: int
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


def finished_output(out_dir: str | os.PathLike[str], *, allow_unfinished: bool = False) -> Path:
    """`out_dir` as a path, refused with `UsageError` unless a run has finished there."""
    out = Path(out_dir)
    if not (out / "_curate").is_dir():
        raise UsageError(f"{out}: not an output of curate (no _curate folder); name the directory given to `-o`")
    if not allow_unfinished and not (out / "_curate" / "SUCCESS.json").is_file():
        raise UsageError(
            f"{out}: the run that writes here has not finished (no _curate/SUCCESS.json); run the same command again "
            "to resume it, or pass allow_unfinished=True to read what is complete so far"
        )
    return out


def shard_stems(out: Path) -> list[str]:
    """Stems of the shards that are complete (tar and sidecar both present), in numerical order."""
    sidecars = (path for path in out.glob("*.parquet") if path.stem.isdecimal())
    return sorted((path.stem for path in sidecars if path.with_suffix(".tar").is_file()), key=int)


def read_rows(path: Path, columns: Sequence[str]) -> pa.Table:
    """`columns` of a parquet file that a run wrote; `VerificationError` names the file if they are not there."""
    try:
        return pq.read_table(path, columns=list(columns))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        raise VerificationError(f"{path}: not readable as a file of this run ({error}); see `curate verify`") from error


def plan_sub_batches(out: Path, stems: Sequence[str]) -> list[Planned]:
    """The sub-batches of `out` in selection order.

    Raises `VerificationError` if one is not contiguous or its ranks do not count up from 0: the shards would then not
    hold what the sampler drew.
    """
    spans = [span for shard, stem in enumerate(stems) for span in _shard_spans(out / f"{stem}.parquet", shard)]
    planned: dict[int, list[Span]] = {}
    latest: int | None = None
    filled = 0
    for sub_batch, first_rank, span in spans:
        continued = sub_batch == latest
        if (not continued and sub_batch in planned) or first_rank != (filled if continued else 0):
            raise VerificationError(
                f"{out}/{stems[span.shard]}.parquet, row {span.start}: sub-batch {sub_batch} is not in the order "
                "drawn; the shards were changed after the run (curate verify OUT)"
            )
        planned.setdefault(sub_batch, []).append(span)
        filled = (filled if continued else 0) + span.stop - span.start
        latest = sub_batch
    return [Planned(sub_batch, tuple(parts)) for sub_batch, parts in planned.items()]


def _shard_spans(sidecar: Path, shard: int) -> Iterator[tuple[int, int, Span]]:
    """(sub-batch, first rank, span) for each run of rows with consecutive ranks of one sub-batch."""
    table = read_rows(sidecar, ["sub_batch", "rank"])
    batch_n = _whole(table, "sub_batch", sidecar)
    rank_n = _whole(table, "rank", sidecar)
    breaks = np.flatnonzero((np.diff(batch_n) != 0) | (np.diff(rank_n) != 1)) + 1
    bounds = [0, *breaks.tolist(), len(batch_n)]
    for start, stop in pairwise(bounds):
        if stop > start:
            yield int(batch_n[start]), int(rank_n[start]), Span(shard, start, stop)


def _whole(table: pa.Table, column: str, sidecar: Path) -> NDArray[np.int64]:
    if table[column].null_count:
        raise VerificationError(f"{sidecar}: {column} is empty in some rows; the shards hold no sub-batches")
    values: NDArray[np.int64] = table[column].to_numpy().astype(np.int64)
    return values
