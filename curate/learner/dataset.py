"""Serve training batches from shards: images decoded once into uint8 where they fit in memory, else decoded per batch.

A bad sample is skipped and counted under its reason (`curate.reasons`), never raised. 10,000 images of 64 pixels take
123 MB; decoding them takes a few seconds once, and as much again in each epoch where they do not fit. Every pair keeps
the id and the place that the score tables know it by.
"""

# N pairs, B batch, C channels, H, W height and width, T tokens

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import UsageError
from curate.images.decode import ImageRejected, decode_rgb
from curate.models.preprocess import Preprocess
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import IMAGE_EXTENSIONS, SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar

Tokenize = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, slots=True)
class Places:
    """Who the pairs are: id [N, 16], number of the shard and ordinal in it [N], key, and what their json says of them.

    `label_N` holds the json field that was asked for: None where it is absent.
    """

    id_N16: NDArray[np.uint8]
    shard_N: NDArray[np.int32]
    row_N: NDArray[np.int32]
    key_N: tuple[str, ...]
    label_N: tuple[Any, ...]

    def name(self, row: int) -> str:
        """How messages call a pair."""
        return f"{self.key_N[row]!r} of input shard {self.shard_N[row]}"


class PairSource(Protocol):
    """Pairs by position. `read` and `batch` may return fewer rows than asked for, where an image is bad."""

    @property
    def token_NT(self) -> Tensor: ...  # noqa: N802 - shapes in names

    @property
    def places(self) -> Places: ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, Tensor]: ...

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class CachedPairs:
    """All pairs in memory: uint8 `image_NCHW` and int64 `token_NT`."""

    image_NCHW: Tensor
    token_NT: Tensor
    places: Places

    def __len__(self) -> int:
        return len(self.token_NT)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        """The rows that could be read, their uint8 images and token ids."""
        row_B = np.array(rows, dtype=np.int64)
        index_B = torch.from_numpy(row_B)
        return row_B, self.image_NCHW[index_B], self.token_NT[index_B]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and token ids alone."""
        return self.read(rows)[1:]


@dataclass(frozen=True, slots=True)
class _Pointer:
    """One readable-so-far sample: its shard's bytes and number, its entry and its caption."""

    data: memoryview
    shard: int
    entry: SampleEntry
    caption: str


@dataclass(frozen=True, slots=True)
class StreamedPairs:
    """Pairs decoded again for each batch. Bad images are dropped from their batch, and counted once."""

    pointers: tuple[_Pointer, ...]
    token_NT: Tensor
    places: Places
    rule: Preprocess
    pool: ThreadPoolExecutor
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.pointers)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and token ids alone."""
        return self.read(rows)[1:]

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        """The rows that could be read, their uint8 images and token ids."""
        asked = [int(row) for row in rows]
        good: list[int] = []
        images: list[NDArray[np.uint8]] = []
        for row, image in zip(asked, _decoded(self.pool, self.pointers, asked, self.rule), strict=True):
            if isinstance(image, str):
                self.bad[row] = image
            else:
                good.append(row)
                images.append(image)
        stacked = np.stack(images) if images else np.zeros((0, 3, self.rule.height, self.rule.width), np.uint8)
        return np.asarray(good, np.int64), torch.from_numpy(stacked), self.token_NT[good]


@dataclass(frozen=True, slots=True)
class Contents:
    """What pairs are made of, undecoded: their shards, number of the shard, offset and size of the image in it [N, 3],
    and captions."""

    shards: tuple[memoryview, ...]
    image_N3: NDArray[np.int64]
    caption_N: tuple[str, ...]

    def image(self, row: int) -> memoryview:
        """The encoded image of a pair."""
        shard, offset, size = map(int, self.image_N3[row])
        return self.shards[shard][offset : offset + size]


@dataclass(frozen=True, slots=True)
class Opened:
    """What `open_pairs` found; `digests` are those of the shards. `skipped` grows while a streamed source is read."""

    pairs: CachedPairs | StreamedPairs
    early: Counter[str]
    digests: tuple[str, ...]
    contents: Contents

    @property
    def skipped(self) -> dict[str, int]:
        late = self.pairs.bad.values() if isinstance(self.pairs, StreamedPairs) else ()
        return dict(sorted((self.early + Counter(late)).items()))


@contextmanager
def open_pairs(
    sources: Sequence[ShardSource],
    tokenize: Tokenize,
    rule: Preprocess,
    *,
    memory_gb: float = 2.0,
    label: str | None = None,
) -> Iterator[Opened]:
    """Index the shards and serve their pairs, in shard order, while the context lasts. `label` names a json field.

    Errors: ShardError for a shard that cannot be opened; UsageError where no sample is readable.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="curate-decode"))
        skipped: Counter[str] = Counter()
        shards = tuple(stack.enter_context(open_shard(source)) for source in sources)
        digests = tuple(map(shard_digest, shards))
        indexed = enumerate(zip(shards, digests, strict=True))
        pointers = [p for number, (data, digest) in indexed for p in _pointers(data, number, digest, skipped)]
        pairs: CachedPairs | StreamedPairs
        if len(pointers) * 3 * rule.height * rule.width <= memory_gb * 1e9:
            pairs, pointers = _cached(pool, pointers, tokenize, rule, skipped, label)
        else:
            token_NT = tokenize([p.caption for p in pointers])
            pairs = StreamedPairs(tuple(pointers), token_NT, _places(pointers, label), rule, pool, {})
        opened = Opened(pairs, skipped, digests, _contents(shards, pointers))
        if not len(pairs):
            what = ", ".join(f"{n} x {reason}" for reason, n in opened.skipped.items()) or "the shards are empty"
            raise UsageError(f"no readable pair in {len(sources)} shards ({what}); `curate inspect` shows each sample")
        yield opened


def _pointers(data: memoryview, shard: int, digest: str, skipped: Counter[str]) -> Iterator[_Pointer]:
    for entry in group_samples(index_tar(data), digest):
        caption, reason = (None, entry.reason) if entry.reason else read_caption(data, entry)
        if caption is None:
            skipped[str(reason)] += 1
        else:
            yield _Pointer(data, shard, entry, caption)


def _cached(
    pool: ThreadPoolExecutor,
    pointers: Sequence[_Pointer],
    tokenize: Tokenize,
    rule: Preprocess,
    skipped: Counter[str],
    label: str | None,
) -> tuple[CachedPairs, list[_Pointer]]:
    """Decode every image once. A bad one leaves no hole: the good ones move up, and are returned as well."""
    image_NCHW = np.empty((len(pointers), 3, rule.height, rule.width), np.uint8)
    good: list[_Pointer] = []
    for pointer, image in zip(pointers, _decoded(pool, pointers, range(len(pointers)), rule), strict=True):
        if isinstance(image, str):
            skipped[image] += 1
        else:
            image_NCHW[len(good)] = image
            good.append(pointer)
    token_NT = tokenize([p.caption for p in good])
    return CachedPairs(torch.from_numpy(image_NCHW[: len(good)]), token_NT, _places(good, label)), good


def _places(pointers: Sequence[_Pointer], label: str | None) -> Places:
    ids = b"".join(p.entry.sample_id for p in pointers)
    return Places(
        np.frombuffer(ids, np.uint8).reshape(len(pointers), 16),
        np.array([p.shard for p in pointers], np.int32),
        np.array([p.entry.ordinal for p in pointers], np.int32),
        tuple(p.entry.key for p in pointers),
        tuple(None if label is None else (read_json(p.data, p.entry) or {}).get(label) for p in pointers),
    )


def _contents(shards: tuple[memoryview, ...], pointers: Sequence[_Pointer]) -> Contents:
    images = ((p.shard, p.entry.image()) for p in pointers)
    spans = [(shard, 0, 0) if image is None else (shard, image.offset, image.size) for shard, image in images]
    return Contents(shards, np.array(spans, np.int64).reshape(-1, 3), tuple(p.caption for p in pointers))


def _decoded(
    pool: ThreadPoolExecutor, pointers: Sequence[_Pointer], rows: Sequence[int], rule: Preprocess
) -> Iterator[NDArray[np.uint8] | str]:
    """The resized image of each row, or the reason why there is none; in order, a window of rows at a time."""
    for start in range(0, len(rows), 256):
        yield from pool.map(lambda row: _image(pointers[row], rule), rows[start : start + 256])


def _image(pointer: _Pointer, rule: Preprocess) -> NDArray[np.uint8] | str:
    member = pointer.entry.member(*IMAGE_EXTENSIONS)
    if member is None:
        return "image-missing"
    try:
        rgb_HWC, _ = decode_rgb(pointer.data[member.offset : member.offset + member.size], min_side=rule.min_side)
    except ImageRejected as rejected:
        return rejected.reason
    return rule(rgb_HWC)
