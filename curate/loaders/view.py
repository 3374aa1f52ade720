"""The selected subset of the ORIGINAL shards, read in place: nothing is rewritten, nothing is copied.

Opening costs one pass over the ledger's kept rows; the first sample of a shard costs its sha256 and its index. Every
later one is a copy out of a memory map.
"""

# n kept samples

from __future__ import annotations

import os
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from torch.utils.data import Dataset

from curate.errors import ShardError, UsageError
from curate.loaders.output import finished_output, read_rows
from curate.loaders.subbatches import decode_pil
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import IMAGE_EXTENSIONS, SampleEntry, group_samples
from curate.shards.sources import ShardSource, expand_shards, open_shard, shard_digest
from curate.shards.tarindex import index_tar

_COLUMNS = ["sample_id", "shard", "ordinal", "key", "status", "sub_batch", "rank", "score"]


@dataclass(frozen=True, slots=True)
class _Open:
    data: memoryview
    entries: Mapping[bytes, SampleEntry]  # by sample id
    stack: ExitStack


class SelectionView(Dataset[dict[str, Any]]):
    """Map-style dataset over the samples that the run in `out_dir` kept, in selection order.

    shards: the run's input shards, wherever they lie now (files, folders, braces, URLs). They are matched by base name,
    and by content where several share one; a shard whose bytes differ from those scored is refused by name with
    `ShardError` when its first sample is read (`check()` does it for all at once, at the price of reading them all).

    An item is {"key", "image", "caption", "json", "sample_id", "shard", "sub_batch", "rank", "score"}: image as encoded
    bytes, or with `decode=True` an RGB PIL image, passed through `transform`; json the parsed object, or {} where the
    sample has none. `open_shards` bounds the memory maps held at once.

    >>> view = curate.SelectionView("data/{00000..00099}.tar", "out")                        # doctest: +SKIP
    >>> len(view), view[0]["caption"]                                                        # doctest: +SKIP
    (200000, 'a red bicycle against a wall')
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        out_dir: str | os.PathLike[str],
        *,
        decode: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        open_shards: int = 64,
        allow_unfinished: bool = False,
    ) -> None:
        if transform is not None and not decode:
            raise UsageError("transform needs decode=True")
        if open_shards < 1:
            raise UsageError(f"open_shards={open_shards}: at least one shard must be open to read from it")
        self._out = finished_output(out_dir, allow_unfinished=allow_unfinished)
        self._decode, self._transform, self._open_shards = decode, transform, open_shards
        self._kept = _kept_rows(self._out)
        patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
        self._sources = _match(_first_ids(self._kept), expand_shards(patterns), self._out)
        self._start_closed()

    def __len__(self) -> int:
        return int(self._kept.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a view of {len(self)}")
        row = self._kept.slice(index % len(self), 1).to_pylist()[0]
        opened = self._shard(row["shard"])
        entry = opened.entries.get(row["sample_id"])
        if entry is None:
            raise _changed(self._sources[row["shard"]], row["shard"], self._out)
        return {**row, **self._content(opened.data, entry, self._sources[row["shard"]].url)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All samples in selection order."""
        return (self[index] for index in range(len(self)))

    def check(self) -> None:
        """Hash every shard now; `ShardError` names the first whose content changed."""
        for shard, sample_id in _first_ids(self._kept).items():
            if sample_id not in self._shard(shard).entries:
                raise _changed(self._sources[shard], shard, self._out)

    def close(self) -> None:
        """Release the memory maps; a later access opens them again."""
        _close_all(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        # memory maps do not travel to a spawned worker; it opens its own
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_finalizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_closed()

    def _start_closed(self) -> None:
        self._opened: OrderedDict[str, _Open] = OrderedDict()
        self._finalizer = weakref.finalize(self, _close_all, self._opened)  # also when the interpreter ends

    def _content(self, data: memoryview, entry: SampleEntry, url: str) -> dict[str, Any]:
        member = entry.member(*IMAGE_EXTENSIONS)
        assert member is not None, "a kept sample has an image: its id, made of the shard's digest, was found"
        image: Any = bytes(data[member.offset : member.offset + member.size])
        if self._decode:
            image = decode_pil(image, f"{url}, sample {entry.key!r}")
            image = self._transform(image) if self._transform else image
        caption, _ = read_caption(data, entry, max_bytes=sys.maxsize)  # the run had its own limit
        return {"image": image, "caption": caption, "json": read_json(data, entry) or {}}

    def _shard(self, shard: str) -> _Open:
        if shard not in self._opened:
            while len(self._opened) >= self._open_shards:
                self._opened.popitem(last=False)[1].stack.close()
            self._opened[shard] = _open(self._sources[shard])
        self._opened.move_to_end(shard)
        return self._opened[shard]


def _close_all(opened: OrderedDict[str, _Open]) -> None:
    while opened:
        opened.popitem()[1].stack.close()


def _open(source: ShardSource) -> _Open:
    stack = ExitStack()
    data = stack.enter_context(open_shard(source))
    entries = group_samples(index_tar(data), shard_digest(data))
    return _Open(data, {entry.sample_id: entry for entry in entries}, stack)


def _kept_rows(out: Path) -> pa.Table:
    """Kept rows of the whole ledger in selection order."""
    paths = sorted((out / "_curate" / "ledger").glob("*.parquet"))
    if not paths:
        raise UsageError(f"{out}: no ledger in _curate/ledger, so nothing tells which samples were kept")
    tables = [read_rows(path, _COLUMNS) for path in paths]
    kept = [table.filter(pc.equal(table["status"], "kept")) for table in tables]
    return pa.concat_tables(kept).drop_columns("status").sort_by([("sub_batch", "ascending"), ("rank", "ascending")])


def _first_ids(kept: pa.Table) -> dict[str, bytes]:
    """One kept sample id per input shard: enough to recognise the shard's content."""
    firsts = kept.group_by("shard", use_threads=False).aggregate([("sample_id", "first")])
    return dict(zip(firsts["shard"].to_pylist(), firsts["sample_id_first"].to_pylist(), strict=True))


def _match(wanted: Mapping[str, bytes], sources: Sequence[ShardSource], out: Path) -> dict[str, ShardSource]:
    """Where each shard of the ledger lies now."""
    named: defaultdict[str, list[ShardSource]] = defaultdict(list)
    for source in sources:
        named[source.name].append(source)
    near = {shard: named[shard.rsplit("/", 1)[-1]] for shard in wanted}
    return {shard: _choose(shard, sample_id, near[shard], out) for shard, sample_id in wanted.items()}


def _choose(shard: str, sample_id: bytes, candidates: Sequence[ShardSource], out: Path) -> ShardSource:
    if not candidates:
        raise UsageError(f"{shard}: {out} kept samples of this shard, but it is not among those given; add its path")
    if len(candidates) == 1:
        return candidates[0]
    same = [source for source in candidates if source.url == shard]
    if same:
        return same[0]
    found = [source for source in candidates if _holds(source, sample_id)]
    if not found:
        raise _changed(candidates[0], shard, out)
    return found[0]


def _holds(source: ShardSource, sample_id: bytes) -> bool:
    opened = _open(source)
    with opened.stack:
        return sample_id in opened.entries


def _changed(source: ShardSource, shard: str, out: Path) -> ShardError:
    return ShardError(
        f"{source.url}: its content is not that of {shard}, which {out} was selected from; restore the shard, or score "
        "the new one (curate score)"
    )
