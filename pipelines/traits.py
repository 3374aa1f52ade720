"""The traits of a pool: one unit per input shard, which opens it once and decodes no image.

Audits, and policies before a draw, ask of every sample what its caption is like; a shard is read for that once, its
table kept beside the scores under the digest of the word lists and the names of the fields. About 8,000 samples/s and
core with three sets and a json of twelve fields, plus the sha256 of the shard (1.5 GB/s); all of it is Python, so
processes make it faster and threads do not.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from curate.auditing.columns import shown
from curate.auditing.traits import FIELD, TEXT, TraitSettings, caption_reader, facts_of, field_value, with_facts
from curate.errors import VerificationError
from curate.formats.datacomp import checked_uid
from curate.images.decode import ImageRejected
from curate.images.header import MAX_PIXELS, read_layout
from curate.pipelines.passes import Running, run_units
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.scores import safe_text
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar
from curate.storage import make_directory

MAX_CAPTION_BYTES: Final = 65_536
MOST_NAMES: Final = 50  # of json fields, told to whoever asks for one that is not there
_DIRECTORIES: Final = ("traits", "commits", "attempts", "logs")
_SAMPLE: Final = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("ordinal", pa.int32()),
        ("key", pa.string()),
        ("uid", pa.string()),
        ("width", pa.int32()),  # as the image's header says, before any EXIF rotation; null where it says nothing
        ("height", pa.int32()),
        ("caption", TEXT),
        ("url", TEXT),
    ]
)


@dataclass(frozen=True, slots=True)
class TraitSpec:
    """One shard to read."""

    store: Store
    source: ShardSource
    settings: TraitSettings

    @property
    def unit(self) -> Unit:
        source = {"url": self.source.url, "size": self.source.size, "etag": self.source.etag}
        return Unit("traits", {"source": source, "settings": self.settings.as_json()})


def traits_pass(
    running: Running, store: Store | Path, sources: Sequence[ShardSource], settings: TraitSettings
) -> list[Receipt]:
    """Read every shard, or find what an earlier call made of it; receipts in the order of the sources.

    `store`, or an output directory: where the tables are kept. A receipt's facts have the shard's sha256 (`digest`) and
    `rows`. Errors: ShardError for a shard that is gone or changed, UsageError for a word list that is.
    """
    store = store if isinstance(store, Store) else Store.of(store)
    for name in _DIRECTORIES:
        make_directory(store.root / name, store.disk)
    specs = [TraitSpec(store, source, settings) for source in sources]
    return run_units(running, "captions", read_shard, specs, [source.size / 1e6 for source in sources], "MB")


def read_traits(store: Store | Path, receipts: Sequence[Receipt], columns: Sequence[str] | None = None) -> pa.Table:
    """The tables of these receipts as one, in their order, with `shard` (int32) the number of the receipt.

    Rows are in ordinal order within a shard; `columns` leaves others out. Some 100 bytes a row, captions included.
    """
    store = store if isinstance(store, Store) else Store.of(store)
    tables = [_numbered(pq.read_table(_path(store, receipt), columns=columns), n) for n, receipt in enumerate(receipts)]
    facts = [facts_of(table) for table in tables]
    names = list(dict.fromkeys(name for one in facts for name in one["json_fields"]))
    joined = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    return with_facts(joined, facts[0] | {"json_fields": names[:MOST_NAMES]})


def read_shard(spec: TraitSpec) -> Receipt:
    """The receipt of one shard's traits."""
    return spec.store.commit(spec.unit, functools.partial(_read, spec))


def _read(spec: TraitSpec, attempt: Attempt) -> dict[str, Any]:
    with open_shard(spec.source) as data:
        digest = shard_digest(data)
        entries = group_samples(index_tar(data), digest)
        fields: Counter[str] = Counter()
        rows = [_row(data, entry, spec.settings.fields, fields) for entry in entries]
    reader = caption_reader(spec.settings)
    layout = pa.schema([*_SAMPLE, *((FIELD + name, pa.string()) for name in spec.settings.fields)])
    table = pa.Table.from_pylist(rows, schema=layout)
    read = reader.read(row["caption"] for row in rows)
    table = pa.table([*table.columns, *read.columns], names=[*table.column_names, *read.column_names])
    names = [shown(name) for name in sorted(fields, key=lambda name: (-fields[name], name))[:MOST_NAMES]]
    with attempt.open(".parquet") as file:
        pq.write_table(with_facts(table, reader.facts | {"json_fields": names}), file, compression="zstd")
    return {"shard": spec.source.url, "digest": digest, "rows": len(entries)}


def _row(data: memoryview, entry: SampleEntry, wanted: Sequence[str], seen: Counter[str]) -> dict[str, Any]:
    caption, _ = read_caption(data, entry, max_bytes=MAX_CAPTION_BYTES)
    record = read_json(data, entry) or {}
    fields = {name: value for name, given in record.items() if (value := field_value(given)) is not None}
    seen.update(fields.keys())
    width, height = _size(data, entry)
    url = record.get("url")
    return {
        "sample_id": entry.sample_id,
        "ordinal": entry.ordinal,
        "key": safe_text(entry.key),
        "uid": checked_uid(record.get("uid")),
        "width": width,
        "height": height,
        "caption": caption,
        "url": url if isinstance(url, str) and _is_text(url) else None,
        **{FIELD + name: json.dumps(fields[name]) for name in wanted if name in fields},
    }


def _size(data: memoryview, entry: SampleEntry) -> tuple[int | None, int | None]:
    image = entry.image()
    if image is None:
        return None, None
    try:
        header = read_layout(data[image.offset : image.offset + image.size], MAX_PIXELS).header
    except ImageRejected:
        return None, None
    return header.width, header.height


def _is_text(value: str) -> bool:
    """Not a lone surrogate, which JSON can spell and no table can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbered(table: pa.Table, shard: int) -> pa.Table:
    return table.append_column("shard", pa.array([shard] * len(table), pa.int32()))


def _path(store: Store, receipt: Receipt) -> Path:
    path = store.locate(receipt.outputs[0])
    if path is None:
        raise VerificationError(f"{store.root / receipt.outputs[0].path} is gone; run the same command again")
    return path
