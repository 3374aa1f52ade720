"""The ledger of one input shard: its score rows joined with what was drawn of them, and with where that was written.

A run of `curate score` draws a sample once at most; a training may choose it at many steps, and then the row tells of
the first.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate import scores
from curate.formats.img2dataset import SAMPLES_PER_SHARD, output_key, shard_stem
from curate.ledger import LEDGER_SCHEMA, status_of
from curate.receipts import Attempt, Receipt, Store, Unit

_SCORED = (
    "sample_id", "ordinal", "key", "uid", "reason", "detail", "reference_similarity", "learner_similarity",
    "reference_loss", "learner_loss", "alignment", "sharpness", "width", "height", "caption_bytes",
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
    rows = [_ledger_row(spec, row, drawn.get(number)) for number, row in enumerate(_scored_rows(spec.table[0]))]
    return _write_rows(attempt, spec.shard, rows)


def _scored_rows(path: Path) -> list[dict[str, Any]]:
    there = set(pq.read_schema(path).names)  # tables of earlier versions have fewer columns
    rows: list[dict[str, Any]] = scores.read_table(path, [name for name in _SCORED if name in there]).to_pylist()
    return rows


def _write_rows(attempt: Attempt, shard: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)
    with attempt.open(".parquet", published=f"_curate/ledger/{shard:05d}.parquet") as file:
        pq.write_table(table, file, compression="zstd")
    return {name: _counts(table[name]) for name in ("status", "reason")} | {"shard": shard, "rows": len(rows)}


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


@dataclass(frozen=True, slots=True)
class TeeLedgerSpec:
    """One input shard of a training, and what was chosen of it.

    `choices` is structured as `curate.pipelines.packing.SELECTION`, one row per sample chosen; `out` [n, 2] is the
    output shard and the place in it of each sample's first copy.
    """

    output: Path
    shard: int
    url: str
    table: tuple[Path, str]
    choices: NDArray[Any]
    out: NDArray[np.int64]

    @property
    def unit(self) -> Unit:
        chosen = hashlib.sha256(self.choices.tobytes() + self.out.astype("<i8").tobytes()).hexdigest()
        return Unit("ledger", {"shard": self.shard, "url": self.url, "table": self.table[1], "chosen": chosen})


def write_tee_ledger(spec: TeeLedgerSpec) -> Receipt:
    """The receipt of one shard's ledger; its facts also count `times`, the samples with repeats."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_write_tee, spec))


def _write_tee(spec: TeeLedgerSpec, attempt: Attempt) -> dict[str, Any]:
    chosen = {int(one["row"]): (one, place) for one, place in zip(spec.choices, spec.out.tolist(), strict=True)}
    rows = []
    for number, scored in enumerate(_scored_rows(spec.table[0])):
        row = scored | {"shard": spec.url, "times_selected": 0}
        if number in chosen:
            row |= _chosen_fields(*chosen[number])
        elif row["reason"] is None:
            row["reason"] = "never-chosen"
        rows.append(row | {"status": status_of(row["reason"])})
    return _write_rows(attempt, spec.shard, rows) | {"times": int(spec.choices["times"].sum())}


def _chosen_fields(choice: Any, place: list[int]) -> dict[str, Any]:
    """The ledger's columns of a sample that was chosen: how often, and where it stood the first time."""
    number, index = place
    return {
        "reason": "selected",
        "times_selected": int(choice["times"]),
        "sub_batch": int(choice["step"]) - 1,
        "rank": int(choice["rank"]),
        "chunk": int(choice["chunk"]) if choice["chunk"] >= 0 else None,
        "score": None if np.isnan(choice["score"]) else float(choice["score"]),
        "out_shard": f"{shard_stem(number)}.tar",
        "out_key": output_key(number, index),
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = sorted(column.value_counts().to_pylist(), key=lambda item: item["values"])
    return {item["values"]: item["counts"] for item in counted}
