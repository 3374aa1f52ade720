"""Packing a log of chosen sub-batches into shards, and counting choices, against slow and obvious versions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.chosen import LOG_SCHEMA, log_digest, log_rows, read_log
from curate.errors import VerificationError
from curate.pipelines import packing
from curate.pipelines.packing import Packed, count_choices, pack


def make_log(run: Path, sizes: Sequence[int], cuts: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """A log whose step k has `sizes[k - 1]` rows, cut into segments after the steps `cuts`; its rows."""
    dice = np.random.default_rng(seed)
    rows = [
        {
            "step": step, "rank": rank, "chunk": rank % 3 if step % 2 else None,
            "score": float(np.float32(dice.normal())) if step % 2 else None, "sample_id": dice.bytes(16),
            "shard": int(dice.integers(3)), "row": int(dice.integers(5)), "key": "k",
        }
        for step, size in enumerate(sizes, 1) for rank in range(size)
    ]  # fmt: skip
    (run / "_curate" / "chosen").mkdir(parents=True)
    for first, last in zip([0, *cuts], [*cuts, len(sizes)], strict=True):
        table = pa.Table.from_pylist([row for row in rows if first < row["step"] <= last], schema=LOG_SCHEMA)
        pq.write_table(table, run / "_curate" / "chosen" / f"{first + 1:08d}-{last:08d}.parquet")
    return rows


def packed_rows(one: Packed) -> list[tuple[int, int]]:
    tables = [pq.read_table(piece.path).slice(piece.start, piece.stop - piece.start) for piece in one.pieces]
    return [(row["step"], row["rank"]) for table in tables for row in table.to_pylist()]


def obvious(sizes: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """Shards as lists of (step, rank), filled one sub-batch after the other."""
    shards: list[list[tuple[int, int]]] = [[]]
    for step, count in enumerate(sizes, 1):
        if shards[-1] and len(shards[-1]) + count > size:
            shards.append([])
        for rank in range(count):
            if len(shards[-1]) == size:
                shards.append([])
            shards[-1].append((step, rank))
    return [shard for shard in shards if shard]


@pytest.mark.parametrize("seed", range(12))
def test_shards_are_filled_one_sub_batch_after_the_other(tmp_path: Path, seed: int) -> None:
    """Any log in any segments packs as the obvious version does, with the digest of exactly those rows."""
    dice = np.random.default_rng(seed)
    sizes, size = dice.integers(1, 14, 20).tolist(), int(dice.integers(1, 24))
    make_log(tmp_path, sizes, sorted(dice.choice(np.arange(1, 20), 3, replace=False).tolist()))
    shards = list(pack(read_log(tmp_path), size))
    assert [packed_rows(one) for one in shards] == obvious(sizes, size)
    assert [one.complete for one in shards[:-1]] == [True] * (len(shards) - 1)
    row_n = np.concatenate([log_rows(segment.table) for segment in read_log(tmp_path)])
    bounds = np.cumsum([0, *(one.samples for one in shards)])
    for one, start, stop in zip(shards, bounds, bounds[1:], strict=False):
        assert one.digest == hashlib.sha256(row_n[start:stop].tobytes()).hexdigest()
        last = int(row_n["step"][stop - 1])
        assert (one.steps, one.whole) == (
            (int(row_n["step"][start]), last),
            bool(stop == len(row_n) or row_n["step"][stop] != last),
        )
    assert log_digest(read_log(tmp_path)) == hashlib.sha256(row_n.tobytes()).hexdigest()


def test_what_a_shard_holds_does_not_depend_on_later_steps(tmp_path: Path) -> None:
    """The complete shards of a log are the first shards of every longer one."""
    sizes = [3, 9, 4, 4, 30, 2, 5, 5, 1, 8]
    make_log(tmp_path, sizes, range(1, 10))
    whole = list(pack(read_log(tmp_path), 10))
    for steps in range(1, 11):
        segments = list(read_log(tmp_path))[:steps]
        complete = [one for one in pack(segments, 10) if one.complete]
        assert complete == whole[: len(complete)]


@pytest.mark.parametrize("merge", [1, 10, 10_000])
def test_choices_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: int) -> None:
    """Times and first places are those of a dictionary, however often the counts were merged on the way."""
    monkeypatch.setattr(packing, "_MERGE", merge)
    rows = make_log(tmp_path, [5, 1, 7, 4, 9], [1, 2, 4])
    first: dict[tuple[int, int], dict[str, Any]] = {}
    for position, row in enumerate(rows):
        known = first.setdefault((row["shard"], row["row"]), {"times": 0, "position": position, **row})
        known["times"] += 1
    found = count_choices(read_log(tmp_path))
    assert len(found) == len(first)
    for one, (place, known) in zip(found, sorted(first.items()), strict=True):
        assert (one["shard"], one["row"]) == place
        assert all(one[name] == known[name] for name in ("times", "position", "step", "rank"))
        assert one["chunk"] == (-1 if known["chunk"] is None else known["chunk"])
        assert one["score"] == known["score"] or (known["score"] is None and np.isnan(one["score"]))


def test_an_empty_log_has_no_shards(tmp_path: Path) -> None:
    """Nothing chosen gives no shard and no choice."""
    assert list(pack(read_log(tmp_path), 10)) == []
    assert len(count_choices(read_log(tmp_path))) == 0


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two segments that both have a step are an error that names the second."""
    make_log(tmp_path, [2, 2, 2], [2])
    folder = tmp_path / "_curate" / "chosen"
    (folder / "00000003-00000003.parquet").rename(folder / "00000002-00000003.parquet")
    with pytest.raises(VerificationError, match=r"00000002-00000003\.parquet: the log should go on with step 3"):
        list(read_log(tmp_path))
