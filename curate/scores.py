"""The score table: one row per input sample, rejects included, in the shard's own order.

Embeddings are fixed-size binary fp16 (1.6 M rows/s written uncompressed, 35 times a list of halffloats): what a later
run with another learner, another criterion or another seed needs is all here, so no model is asked twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.shards.tarindex import Member

# N rows, D width

TOWERS: Final = ("ref_image", "ref_text", "learner_image", "learner_text")

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

COLUMNS: Final = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("ordinal", pa.int32()),
        ("key", pa.string()),
        ("uid", pa.string()),
        ("reason", pa.string()),  # null: a candidate; else a reason of curate.reasons.QUARANTINED
        ("detail", pa.string()),
        ("members", pa.list_(_MEMBER)),
        ("payload_digest", pa.binary(16)),  # of every member's name and bytes, checked again when they are copied
        ("image_digest", pa.binary(32)),
        ("caption_digest", pa.binary(16)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_bytes", pa.int32()),
        ("sharpness", pa.float32()),
        ("dhash", pa.binary(32)),
        ("reference_similarity", pa.float32()),
        ("learner_similarity", pa.float32()),
        ("reference_loss", pa.float32()),
        ("learner_loss", pa.float32()),
        ("alignment", pa.float32()),  # of the learner's gradients with a trusted one; null where not asked for
    ]
)


def schema(widths: dict[str, int | None]) -> pa.Schema:
    """`COLUMNS` plus one fixed-size binary column per tower; `widths[tower]` is D, or None where it has no model."""
    fields = [pa.field(name, pa.binary(2 * D) if (D := widths.get(name)) else pa.null()) for name in TOWERS]
    return pa.schema([*COLUMNS, *fields])


def pack(embedding_ND: NDArray[np.floating[Any]]) -> pa.Array:
    """Embeddings [N, D] as fixed-size binary fp16."""
    half_ND = np.ascontiguousarray(embedding_ND, dtype="<f2")
    N, D = half_ND.shape
    return pa.Array.from_buffers(pa.binary(2 * D), N, [None, pa.py_buffer(half_ND)])


def unpack(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float16]:
    """The embeddings [N, D] of a column without nulls, fp16."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    D = array.type.byte_width // 2
    flat = np.frombuffer(array.buffers()[1], dtype="<f2", offset=array.offset * 2 * D, count=len(array) * D)
    return flat.reshape(len(array), D)


def write_table(file: IO[bytes] | RawIOBase, table: pa.Table, facts: dict[str, Any]) -> None:
    """Write `table` with `facts` in its metadata. Uncompressed: half floats do not shrink, and reading stays a copy."""
    pq.write_table(table.replace_schema_metadata(facts_metadata(facts)), file, compression="none", use_dictionary=False)


def facts_metadata(facts: dict[str, Any]) -> dict[bytes, bytes]:
    """Facts as the metadata of a file, for `read_facts`."""
    return {b"curate": json.dumps(facts, sort_keys=True).encode()}


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `write_table` put into the file."""
    facts: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[b"curate"])
    return facts


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file of ours."""
    return pq.read_table(path, columns=None if columns is None else list(columns))


def ids_to_array(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A fixed-size binary column without nulls as bytes [N, width]."""
    array = column.combine_chunks()
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8, offset=array.offset * width, count=len(array) * width)
    return data.reshape(len(array), width)


def members_of(row: Any) -> tuple[Member, ...]:
    """The members of one row of the table, as the tar index gave them."""
    return tuple(Member(m["name"], m["offset"], m["size"]) for m in row)


def safe_text(name: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 are spelled out, so that every table can hold it."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
