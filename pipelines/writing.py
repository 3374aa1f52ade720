"""Write one output shard: the selected members copied by offset, byte for byte, in the order they were drawn.

Headers are rebuilt (mtime 0, nine-digit keys), bytes are not: each sample's digest is compared with what was scored, so
an image and a caption never come from different versions of a shard. Memory: one sample, and the sidecar's rows.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import scores
from curate.errors import ShardError, VerificationError
from curate.formats.dali import dali_index
from curate.formats.img2dataset import SIDECAR_SCHEMA, output_key, shard_stem, stats
from curate.reading import payload_digest
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import SampleEntry, extension
from curate.shards.sources import ShardSource, open_shard
from curate.shards.tarindex import Member
from curate.shards.tarwriter import tar_end, tar_member
from curate.storage import HashingWriter, readable_json

_SCORE_COLUMNS = (
    "sample_id", "key", "uid", "reason", "members", "payload_digest", "image_digest", "width", "height",
    "reference_similarity", "learner_similarity",
)  # fmt: skip

Tables = Mapping[int, tuple[Path, str]]  # input shard -> (path of its score table, its sha256)
MOST_OPEN = 256  # two file descriptors each, and a process has 1,024 as a rule

EXECUTABLE = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})  # readers of tars unpickle these, which runs them


@dataclass(frozen=True, slots=True)
class Drawn:
    """Ranks `start..stop` of one super-batch, and the file that has its selection."""

    sub_batch: int
    path: Path
    sha256: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WriteSpec:
    """One output shard: which drawn samples it holds, and where their bytes and scores are."""

    output: Path
    number: int
    drawn: tuple[Drawn, ...]
    sources: dict[int, ShardSource]
    tables: dict[int, tuple[Path, str]]  # input shard -> (path of its score table, its sha256)

    @property
    def unit(self) -> Unit:
        drawn = [[piece.sub_batch, piece.sha256, piece.start, piece.stop] for piece in self.drawn]
        tables = sorted([shard, sha256] for shard, (_, sha256) in self.tables.items())
        return Unit("shards", {"number": self.number, "drawn": drawn, "tables": tables})


def write_shard(spec: WriteSpec) -> Receipt:
    """The receipt of one written shard: tar, sidecar and stats, with the names they are published under."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_write, spec))


def _write(spec: WriteSpec, attempt: Attempt) -> dict[str, Any]:
    picks = pa.concat_tables([_picks(drawn) for drawn in spec.drawn])
    return write_files(attempt, spec.number, list(scored_rows(picks, spec.tables)), spec.sources)


def write_files(
    attempt: Attempt, number: int, rows: Iterable[dict[str, Any]], sources: Mapping[int, ShardSource]
) -> dict[str, Any]:
    """Tar, sidecar, stats and index of output shard `number` from rows of `scored_rows`; its facts."""
    stem = shard_stem(number)
    with OpenShards(sources) as shards, attempt.open(".tar", published=f"{stem}.tar") as file:
        tar = TarFile(file)
        sidecar = [_copy(tar, shards, output_key(number, index), row) for index, row in enumerate(rows)]
        tar.finish()
    with attempt.open(".parquet", published=f"{stem}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(sidecar, schema=SIDECAR_SCHEMA), file, compression="zstd")
    with attempt.open(".json", published=f"{stem}_stats.json") as file:
        file.write(readable_json(stats(len(sidecar))))
    with attempt.open(".idx", published=f"{stem}.idx") as file:
        file.write(dali_index(tar.members).encode())
    return {"number": number, "samples": len(sidecar), "md5": tar.md5}


class OpenShards:
    """Input shards opened as they are asked for; of the local ones, whose opening is cheap, a bounded number."""

    def __init__(self, sources: Mapping[int, ShardSource], most: int = MOST_OPEN) -> None:
        self.sources, self._most = sources, most
        self._local: OrderedDict[int, tuple[memoryview, ExitStack]] = OrderedDict()
        self._remote: dict[int, memoryview] = {}
        self._stack = ExitStack()

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *_: object) -> None:
        while self._local:
            self._local.popitem()[1][1].close()
        self._remote.clear()
        self._stack.close()

    def __getitem__(self, shard: int) -> memoryview:
        if "://" in self.sources[shard].url:
            if shard not in self._remote:
                self._remote[shard] = self._stack.enter_context(open_shard(self.sources[shard]))
            return self._remote[shard]
        if shard not in self._local:
            while len(self._local) >= self._most:
                self._local.popitem(last=False)[1][1].close()
            stack = ExitStack()
            self._local[shard] = stack.enter_context(open_shard(self.sources[shard])), stack
        self._local.move_to_end(shard)
        return self._local[shard][0]


class TarFile:
    """A tar being written: its members so far, and the md5 that wids wants."""

    def __init__(self, file: HashingWriter) -> None:
        self._file = file
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.members: list[Member] = []

    def add(self, name: str, payload: memoryview) -> None:
        for number, part in enumerate(tar_member(name, payload)):
            self._write(part)
            if number == 0:
                self.members.append(Member(name, self._file.size, len(payload)))

    def finish(self) -> None:
        self._write(tar_end(self._file.size))

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()

    def _write(self, part: bytes | memoryview) -> None:
        self._file.write(part)
        self._md5.update(part)


def scored_rows(picks: pa.Table, tables: Tables) -> Iterator[dict[str, Any]]:
    """The picks in order, each joined with what its score table says of (shard, row); columns of picks win."""
    joined: dict[tuple[int, int], dict[str, Any]] = {}
    for shard in sorted(set(picks["shard"].to_pylist())):
        rows = pc.unique(picks.filter(pc.equal(picks["shard"], shard))["row"])
        table = scores.read_table(tables[shard][0], _SCORE_COLUMNS)
        if (last := pc.max(rows).as_py()) >= len(table):
            raise VerificationError(f"{tables[shard][0]}: row {last} was drawn, but it has {len(table)} rows")
        for row, values in zip(rows.to_pylist(), table.take(rows).to_pylist(), strict=True):
            joined[shard, row] = values
    for pick in picks.to_pylist():
        yield joined[pick["shard"], pick["row"]] | pick


def _picks(drawn: Drawn) -> pa.Table:
    table = scores.read_table(drawn.path, ["shard", "row", "rank", "score"])
    table = table.filter(pc.is_valid(table["rank"])).sort_by("rank").slice(drawn.start, drawn.stop - drawn.start)
    return table.append_column("sub_batch", pa.array([drawn.sub_batch] * len(table), pa.int32()))


def _copy(tar: TarFile, shards: OpenShards, key: str, row: dict[str, Any]) -> dict[str, Any]:
    """Copy one sample's members into the tar under `key`; return its sidecar row."""
    source, data = shards.sources[row["shard"]], shards[row["shard"]]
    members = scores.members_of(row["members"])
    if payload_digest(data, members) != row["payload_digest"]:
        raise ShardError(
            f"{source.url}, sample {row['key']!r}: its bytes are not those that were scored; the shard changed during "
            "the run. Restore it, or score it anew into another directory"
        )
    for member in members:
        if extension(member.name).rpartition(".")[2] in EXECUTABLE:
            continue
        payload = data[member.offset : member.offset + member.size]
        tar.add(f"{key}.{_safe_extension(member.name)}", payload)
    return _sidecar_row(key, source, data, members, row)


def _safe_extension(name: str) -> str:
    """The extension in letters that every reader takes; the original name stands in the score table."""
    return re.sub(r"[^a-z0-9._-]", "_", extension(name))


def _sidecar_row(
    key: str, source: ShardSource, data: memoryview, members: tuple[Member, ...], row: dict[str, Any]
) -> dict[str, Any]:
    entry = SampleEntry(0, row["sample_id"], row["key"], members, None, "")
    caption, _ = read_caption(data, entry, max_bytes=len(data))
    record = read_json(data, entry) or {}
    kept = ("sample_id", "uid", "sub_batch", "rank", "score", "reference_similarity", "learner_similarity")
    return {name: row[name] for name in kept} | {
        "key": key,
        "url": record["url"] if isinstance(record.get("url"), str) else None,
        "caption": caption,
        "status": "success",
        "error_message": None,
        "width": row["width"],
        "height": row["height"],
        "original_width": _integer(record.get("original_width"), row["width"]),
        "original_height": _integer(record.get("original_height"), row["height"]),
        "exif": record["exif"] if isinstance(record.get("exif"), str) else None,
        "sha256": row["image_digest"].hex(),
        "original_key": row["key"],
        "original_shard": source.url,
    }


def _integer(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else default
