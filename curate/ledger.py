"""The ledger: one row per input sample with its status, its reason and where it went; the truth that users look up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.errors import UsageError
from curate.reasons import DROPPED, KEPT

LEDGER_SCHEMA: Final = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("shard", pa.string()),
        ("ordinal", pa.int32()),
        ("key", pa.string()),
        ("uid", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("reference_similarity", pa.float32()),
        ("learner_similarity", pa.float32()),
        ("reference_loss", pa.float32()),
        ("learner_loss", pa.float32()),
        ("alignment", pa.float32()),
        ("score", pa.float32()),
        ("sub_batch", pa.int32()),
        ("rank", pa.int32()),
        ("chunk", pa.int16()),
        ("times_selected", pa.int32()),
        ("out_shard", pa.string()),
        ("out_key", pa.string()),
        ("sharpness", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_bytes", pa.int32()),
    ]
)


def status_of(reason: str) -> str:
    """The status that a reason belongs to."""
    if reason in KEPT:
        return "kept"
    return "dropped" if reason in DROPPED else "quarantined"


def ledger_files(output: Path) -> list[Path]:
    """The ledger's files of an output directory, one per input shard in the order the shards were named."""
    found = (Path(output) / "_curate" / "ledger").glob("*.parquet")
    published = (file for file in found if len(file.stem) < 32)  # 32: named by its digest, not published yet
    files = sorted(published, key=lambda file: int(file.stem))
    if not files:
        raise UsageError(f"{output}: no ledger there yet; `curate score` or `curate write` makes it")
    return files


def read_ledger(output: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole ledger as one table (about 150 bytes a row)."""
    names = None if columns is None else list(columns)
    return pa.concat_tables([pq.read_table(file, columns=names) for file in ledger_files(output)])


def find_rows(output: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows whose original key, output key, uid or sample id (hex) is `key`; reads one file at a time."""
    identifier = bytes.fromhex(key) if len(key) == 32 and set(key) <= set("0123456789abcdef") else None
    for file in ledger_files(output):
        table = pq.read_table(file)
        hit = pc.or_(pc.equal(table["key"], key), pc.fill_null(pc.equal(table["out_key"], key), False))
        hit = pc.or_(hit, pc.fill_null(pc.equal(table["uid"], key), False))
        if identifier is not None:
            hit = pc.or_(hit, pc.equal(table["sample_id"], pa.scalar(identifier, pa.binary(16))))
        yield from table.filter(hit).to_pylist()
