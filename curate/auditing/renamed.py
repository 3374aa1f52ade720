"""What samples were called before `curate score`, `select`, `write` or `train --write-shards` gave them new keys.

Shards that curate wrote have sidecars (00000.parquet beside 00000.tar) with each sample's original key and id, so that
labels of the pool can be joined to what was selected from it. Costs reading three columns of each sidecar; a shard
without one has the names that it was made with.
"""

# N samples, M rows of a sidecar

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ORIGINAL_KEY: Final = "original_key"
ORIGINAL_ID: Final = "original_id"
_SIDECAR: Final = ("key", ORIGINAL_KEY, "sample_id")


def with_originals(rows: pa.Table, urls: Sequence[str]) -> pa.Table:
    """`rows` with the columns original_key and original_id (16 bytes), null where there is none; as they are where no
    shard has a sidecar of curate's. `rows` has `shard`, a number into `urls`, and `key`."""
    if "key" not in rows.column_names:
        return rows
    parts = [part for shard, url in enumerate(urls) if (part := _originals(url, shard)) is not None]
    if not parts:
        return rows
    known = pa.concat_tables(parts)
    place_N = pc.index_in(_places(rows), value_set=_places(known))
    for name in (ORIGINAL_KEY, ORIGINAL_ID):
        rows = rows.append_column(name, known[name].combine_chunks().take(place_N))
    return rows


def _originals(url: str, shard: int) -> pa.Table | None:
    """The names that the samples of a shard had, from its sidecar; None where it has none of curate's."""
    if not url.endswith(".tar"):
        return None
    try:
        with _opened(url.removesuffix(".tar") + ".parquet") as file:
            if not {*_SIDECAR} <= {*pq.read_schema(file).names}:
                return None
            file.seek(0)
            table = pq.read_table(file, columns=list(_SIDECAR))
    except (OSError, pa.ArrowException):  # no sidecar, or somebody else's
        return None
    number_M = pa.array([shard] * len(table), pa.int32())
    columns = [table["key"], number_M, table[ORIGINAL_KEY], table["sample_id"].cast(pa.binary(16))]
    return pa.table(columns, names=["key", "shard", ORIGINAL_KEY, ORIGINAL_ID])


def _opened(url: str) -> Any:
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system.open(path, "rb")


def _places(rows: pa.Table) -> pa.Array:
    """Shard and key of each row, as one value that can be looked up; null where there is no key."""
    shard_N = rows["shard"].cast(pa.string()).combine_chunks()
    return pc.binary_join_element_wise(shard_N, rows["key"].cast(pa.string()).combine_chunks(), "/")
