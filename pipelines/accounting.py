"""The ledger of one input shard: its score rows joined with what was drawn of them, and with where that was written."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import scores
from curate.formats.img2dataset import SAMPLES_PER_SHARD, output_key, shard_stem
from curate.ledger import LEDGER_SCHEMA, status_of
from curate.receipts import Attempt, Receipt, Store, Unit

_SCORED = (
    "sample_id", "ordinal", "key", "uid", "reason", "detail", "reference_similarity", "learner_similarity",
    "reference_loss", "learner_loss", "sharpness", "width", "height", "caption_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawing:
    """One super-batch as drawn: its selection file, and the place of its first sample in the whole output."""

    sub_batch: int
    path: Path
    sha256: str
    first: int


@dataclass(frozen=True, slots=True)
class LedgerSpec:
    """One input shard, and the super-batches that drew from it."""

    output: Path
    shard: int
    url: str
    table: tuple[Path, str]
    drawings: tuple[Drawing, ...]
    samples_per_shard: int = SAMPLES_PER_SHARD

    @property
    def unit(self) -> Unit:
        drawings = [[drawing.sub_batch, drawing.sha256, drawing.first] for drawing in self.drawings]
        inputs = {"shard": self.shard, "url": self.url, "table": self.table[1], "drawings": drawings}
        return Unit("ledger", inputs | {"samples_per_shard": self.samples_per_shard})


def write_ledger(spec: LedgerSpec) -> Receipt:
    """The receipt of one shard's ledger; its facts count statuses and reasons."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_write, spec))


def _write(spec: LedgerSpec, attempt: Attempt) -> dict[str, Any]:
    drawn = {row["row"]: row for drawing in spec.drawings for row in _drawn_rows(spec, drawing)}
    scored = scores.read_table(spec.table[0], _SCORED).to_pylist()
    rows = [_ledger_row(spec, row, drawn.get(number)) for number, row in enumerate(scored)]
    table = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)
    with attempt.open(".parquet", published=f"_curate/ledger/{spec.shard:05d}.parquet") as file:
        pq.write_table(table, file, compression="zstd")
    return {name: _counts(table[name]) for name in ("status", "reason")} | {"shard": spec.shard, "rows": len(rows)}


def _drawn_rows(spec: LedgerSpec, drawing: Drawing) -> list[dict[str, Any]]:
    table = scores.read_table(drawing.path)
    rows = table.filter(pc.equal(table["shard"], spec.shard)).to_pylist()
    return [row | {"sub_batch": drawing.sub_batch, "first": drawing.first} for row in rows]


def _ledger_row(spec: LedgerSpec, scored: dict[str, Any], drawn: dict[str, Any] | None) -> dict[str, Any]:
    row = scored | {"shard": spec.url, "times_selected": 0}
    if drawn is None:
        return row | {"status": status_of(row["reason"])}
    row |= {name: drawn[name] for name in ("reason", "detail", "score", "chunk", "rank", "sub_batch")}
    row["status"] = status_of(row["reason"])
    if drawn["rank"] is not None:
        number, index = divmod(drawn["first"] + drawn["rank"], spec.samples_per_shard)
        row |= {
            "times_selected": 1,
            "out_shard": f"{shard_stem(number)}.tar",
            "out_key": output_key(number, index),
        }
    return row


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = sorted(column.value_counts().to_pylist(), key=lambda item: item["values"])
    return {item["values"]: item["counts"] for item in counted}
