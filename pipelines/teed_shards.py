"""Write one shard of what a training chose: rows of its log, joined with the tables of the shards that they name.

The unit trusts nothing that it reads: the log's rows have to give the digest that was planned, each has to name the
sample that stands at its place, and that sample's bytes have to be those that were read when the table was made.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.chosen import LOG_SCHEMA, log_rows
from curate.errors import VerificationError
from curate.pipelines.packing import Packed, Piece
from curate.pipelines.writing import scored_rows, write_files
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.shards.sources import ShardSource


@dataclass(frozen=True, slots=True)
class TeeSpec:
    """One output shard: which rows of the log it holds, and where their bytes and scores are."""

    output: Path
    packed: Packed
    sources: dict[int, ShardSource]
    tables: dict[int, tuple[Path, str]]

    @property
    def unit(self) -> Unit:
        tables = sorted([shard, sha256] for shard, (_, sha256) in self.tables.items())
        return Unit("shards", {"number": self.packed.number, "chosen": self.packed.digest, "tables": tables})


def write_teed(spec: TeeSpec) -> Receipt:
    """The receipt of one output shard: tar, sidecar, stats and index, with the names they are published under."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_write_shard, spec))


def _write_shard(spec: TeeSpec, attempt: Attempt) -> dict[str, Any]:
    log = pa.concat_tables([_read_piece(piece) for piece in spec.packed.pieces])
    if hashlib.sha256(log_rows(log).tobytes()).hexdigest() != spec.packed.digest:
        raise VerificationError(f"{spec.packed.pieces[0].path}: the log changed while it was read; run it again")
    picks = log.select(["shard", "row", "rank", "score"])
    picks = picks.append_column("chosen_id", log["sample_id"]).append_column("chosen_key", log["key"])
    picks = picks.append_column("sub_batch", pc.subtract(log["step"], 1).cast(pa.int32()))
    rows = list(map(_checked_row, scored_rows(picks, spec.tables)))
    facts = write_files(attempt, spec.packed.number, rows, spec.sources)
    return facts | {"chosen": spec.packed.digest, "steps": list(spec.packed.steps)}


def _read_piece(piece: Piece) -> pa.Table:
    table = pq.read_table(piece.path, columns=LOG_SCHEMA.names).cast(LOG_SCHEMA)
    return table.slice(piece.start, piece.stop - piece.start)


def _checked_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if the log and the score table speak of the same readable sample."""
    if row["sample_id"] != row["chosen_id"] or row["reason"] is not None:
        what = f"is unreadable ({row['reason']})" if row["reason"] else f"is another one, {row['key']!r}"
        raise VerificationError(
            f"step {row['sub_batch'] + 1} of the log chose sample {row['chosen_key']!r}, but row {row['row']} of input "
            f"shard {row['shard']} {what}; the log is not of this training's shards"
        )
    return row
