"""Group shards into super-batches: a seeded permutation of shards, their candidates laid end to end and cut evenly.

Cutting shards rather than shuffling samples keeps every super-batch to about B / shard-size files; the permutation
depends on the seed and on what the shards contain, not on the order they were named in. Cost: one pass over receipts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from curate.errors import UsageError
from curate.settings import SelectSettings


@dataclass(frozen=True, slots=True)
class Piece:
    """Candidates `start..stop` (readable rows only, in the shard's order) of input shard number `shard`."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SuperBatch:
    """Candidates that are drawn from together, and how many are drawn."""

    number: int
    pieces: tuple[Piece, ...]
    size: int

    @property
    def candidates(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


def plan_super_batches(
    digests: Sequence[str], candidates: Sequence[int], settings: SelectSettings
) -> tuple[SuperBatch, ...]:
    """Super-batches of at most B candidates whose sizes differ by at most one.

    `digests` and `candidates` belong to the input shards in the order given. With `sub_batch` every super-batch gives
    exactly that many, else the sub-batches together hold `round(keep * candidates)`. With 250 candidates in three
    shards, B = 100 and keep = 0.2 there are three super-batches of 83, 83 and 84 that give 17, 16 and 17.
    """
    total = sum(candidates)
    if total == 0:
        return ()
    order = sorted(range(len(digests)), key=lambda shard: _rank(settings.seed, digests[shard], shard))
    count = math.ceil(total / settings.super_batch)
    edges = [number * total // count for number in range(count + 1)]
    batches = []
    for number, (start, stop) in enumerate(pairwise(edges)):
        size = settings.sub_batch or _rounded(settings.keep * stop) - _rounded(settings.keep * start)
        if size > stop - start:
            raise UsageError(
                f"--sub-batch {size} is more than the {stop - start} candidates of a super-batch; "
                f"{total} candidates make {count} of them: lower --sub-batch or raise --super-batch"
            )
        batches.append(SuperBatch(number, _pieces(order, candidates, start, stop), size))
    return tuple(batches)


def _rank(seed: int, digest: str, shard: int) -> tuple[bytes, int]:
    return hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest(), shard


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _pieces(order: Sequence[int], candidates: Sequence[int], start: int, stop: int) -> tuple[Piece, ...]:
    pieces, position = [], 0
    for shard in order:
        first, last = max(start - position, 0), min(stop - position, candidates[shard])
        if first < last:
            pieces.append(Piece(shard, first, last))
        position += candidates[shard]
    return tuple(pieces)
