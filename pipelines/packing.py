"""Pack a log of chosen sub-batches into output shards, and count how often each sample was chosen.

Whole sub-batches in order of step: one goes where there is room, else the next shard begins; only one that is larger
than a shard is parted. What a shard holds depends on nothing that comes after it, so shards can be written while the
training goes on. Each function reads the log once, a segment at a time; counting holds 38 bytes for each sample.
"""

# n rows of a segment, N distinct samples so far

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curate.chosen import Segment, log_rows

SELECTION: Final = np.dtype(
    [
        ("shard", "<i4"), ("row", "<i4"), ("times", "<i4"), ("position", "<i8"),
        ("step", "<i8"), ("rank", "<i4"), ("chunk", "<i2"), ("score", "<f4"),
    ]
)  # fmt: skip
_MERGE: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` of one file of the log."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Packed:
    """What one output shard holds: pieces of the log, the digest of their rows, the input shards they name.

    `steps` are its first and last, `whole` whether that last sub-batch ends in it; `complete` whether no later step can
    be added.
    """

    number: int
    pieces: tuple[Piece, ...]
    samples: int
    steps: tuple[int, int]
    digest: str
    shards: tuple[int, ...]
    whole: bool
    complete: bool


@dataclass(slots=True)
class _Filling:
    number: int
    pieces: list[Piece] = field(default_factory=list)
    samples: int = 0
    steps: list[int] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    shards: set[int] = field(default_factory=set)

    def add(self, segment: Segment, row_n: NDArray[Any], shard_n: NDArray[np.int32], start: int, stop: int) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.path == segment.path and last.stop == start:
            self.pieces[-1] = Piece(last.path, last.start, stop)
        else:
            self.pieces.append(Piece(segment.path, start, stop))
        self.samples += stop - start
        self.steps.append(int(row_n["step"][start]))
        self.digest.update(row_n[start:stop].tobytes())
        self.shards.update(np.unique(shard_n[start:stop]).tolist())

    def packed(self, *, whole: bool = True, complete: bool = True) -> Packed:
        return Packed(
            self.number,
            tuple(self.pieces),
            self.samples,
            (self.steps[0], self.steps[-1]),
            self.digest.hexdigest(),
            tuple(sorted(self.shards)),
            whole,
            complete,
        )


def pack(segments: Iterable[Segment], size: int) -> Iterator[Packed]:
    """The output shards of at most `size` samples that a log makes; the last one may be incomplete.

    Example: sub-batches of 40 in shards of 100 give shards of 80.
    """
    filling = _Filling(0)
    for segment in segments:
        row_n, shard_n = log_rows(segment.table), segment.table["shard"].to_numpy()
        for start, stop in segment.spans:
            if filling.samples and filling.samples + stop - start > size:
                yield filling.packed()
                filling = _Filling(filling.number + 1)
            while start < stop:
                end = min(stop, start + size - filling.samples)
                filling.add(segment, row_n, shard_n, start, end)
                start = end
                if filling.samples == size:
                    yield filling.packed(whole=start == stop)
                    filling = _Filling(filling.number + 1)
    if filling.samples:
        yield filling.packed(complete=False)


def count_choices(segments: Iterable[Segment]) -> NDArray[Any]:
    """One row per sample ever chosen, sorted by (shard, row): how often, and where it stood when it was chosen first.

    `position` is that first place in the whole log, counted from 0.
    """
    found_N, waiting, held, position = np.empty(0, SELECTION), [], 0, 0
    for segment in segments:
        waiting.append(_selections(segment, position))
        position += len(segment.table)
        held += len(segment.table)
        if held > max(_MERGE, len(found_N)):  # so that each row is sorted a bounded number of times
            found_N, waiting, held = _merged([found_N, *waiting]), [], 0
    return _merged([found_N, *waiting])


def _selections(segment: Segment, position: int) -> NDArray[Any]:
    table = segment.table
    row_n = np.zeros(len(table), SELECTION)
    for name in ("shard", "row", "step", "rank"):
        row_n[name] = table[name].to_numpy()
    row_n["chunk"] = table["chunk"].fill_null(-1).to_numpy()
    row_n["score"] = log_rows(table)["score"]
    row_n["times"] = 1
    row_n["position"] = np.arange(position, position + len(table))
    return row_n


def _merged(parts: list[NDArray[Any]]) -> NDArray[Any]:
    row_n = np.concatenate(parts)
    row_n = row_n[np.lexsort((row_n["position"], row_n["row"], row_n["shard"]))]
    place_n = row_n["shard"].astype(np.int64) << 32 | row_n["row"].astype(np.int64)
    first_N = np.flatnonzero(np.diff(place_n, prepend=-1))
    merged_N: NDArray[Any] = row_n[first_N]
    if len(merged_N):
        merged_N["times"] = np.add.reduceat(row_n["times"], first_N)
    return merged_N
