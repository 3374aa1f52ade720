"""Serve training batches from shards: images decoded once into uint8 where they fit in memory, else decoded per batch.

A bad sample is skipped and counted under its reason (`curate.reasons`), never raised. 10,000 images of 64 pixels take
123 MB; decoding them takes a few seconds once, and as much again in each epoch where they do not fit.
"""

# N pairs, B batch, C channels, H, W height and width, T tokens

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import UsageError
from curate.images.decode import ImageRejected, decode_rgb
from curate.models.preprocess import Preprocess
from curate.shards.captions import read_caption
from curate.shards.samples import IMAGE_EXTENSIONS, SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar

Tokenize = Callable[[Sequence[str]], Tensor]


class PairSource(Protocol):
    """Pairs by position. `batch` may return fewer rows than asked for, where an image turns out to be bad."""

    @property
    def token_NT(self) -> Tensor: ...  # noqa: N802 - shapes in names

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class CachedPairs:
    """All pairs in memory: uint8 `image_NCHW` and int64 `token_NT`."""

    image_NCHW: Tensor
    token_NT: Tensor

    def __len__(self) -> int:
        return len(self.token_NT)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        index_B = torch.as_tensor(rows)
        return self.image_NCHW[index_B], self.token_NT[index_B]


@dataclass(frozen=True, slots=True)
class _Pointer:
    """One readable-so-far sample: its shard's bytes, its entry and its caption."""

    data: memoryview
    entry: SampleEntry
    caption: str


@dataclass(frozen=True, slots=True)
class StreamedPairs:
    """Pairs decoded again for each batch. Bad images are dropped from their batch, and counted once."""

    pointers: tuple[_Pointer, ...]
    token_NT: Tensor
    rule: Preprocess
    pool: ThreadPoolExecutor
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.pointers)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
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
        return torch.from_numpy(stacked), self.token_NT[good]


@dataclass(frozen=True, slots=True)
class Opened:
    """What `open_pairs` found. `skipped` grows while a streamed source is read."""

    pairs: CachedPairs | StreamedPairs
    early: Counter[str]

    @property
    def skipped(self) -> dict[str, int]:
        late = self.pairs.bad.values() if isinstance(self.pairs, StreamedPairs) else ()
        return dict(sorted((self.early + Counter(late)).items()))


@contextmanager
def open_pairs(
    sources: Sequence[ShardSource], tokenize: Tokenize, rule: Preprocess, *, memory_gb: float = 2.0
) -> Iterator[Opened]:
    """Index the shards and serve their pairs, in shard order, while the context lasts.

    Errors: ShardError for a shard that cannot be opened; UsageError where no sample is readable.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="curate-decode"))
        skipped: Counter[str] = Counter()
        pointers = tuple(p for source in sources for p in _pointers(stack.enter_context(open_shard(source)), skipped))
        opened: Opened
        if len(pointers) * 3 * rule.height * rule.width <= memory_gb * 1e9:
            opened = Opened(_cached(pool, pointers, tokenize, rule, skipped), skipped)
        else:
            token_NT = tokenize([p.caption for p in pointers])
            opened = Opened(StreamedPairs(pointers, token_NT, rule, pool, {}), skipped)
        if not len(opened.pairs):
            what = ", ".join(f"{n} x {reason}" for reason, n in opened.skipped.items()) or "the shards are empty"
            raise UsageError(f"no readable pair in {len(sources)} shards ({what}); `curate inspect` shows each sample")
        yield opened


def _pointers(data: memoryview, skipped: Counter[str]) -> Iterator[_Pointer]:
    for entry in group_samples(index_tar(data), shard_digest(data)):
        caption, reason = (None, entry.reason) if entry.reason else read_caption(data, entry)
        if caption is None:
            skipped[str(reason)] += 1
        else:
            yield _Pointer(data, entry, caption)


def _cached(
    pool: ThreadPoolExecutor, pointers: Sequence[_Pointer], tokenize: Tokenize, rule: Preprocess, skipped: Counter[str]
) -> CachedPairs:
    """Decode every image once. A bad one leaves no hole: the good ones move up."""
    image_NCHW = np.empty((len(pointers), 3, rule.height, rule.width), np.uint8)
    captions: list[str] = []
    for pointer, image in zip(pointers, _decoded(pool, pointers, range(len(pointers)), rule), strict=True):
        if isinstance(image, str):
            skipped[image] += 1
        else:
            image_NCHW[len(captions)] = image
            captions.append(pointer.caption)
    return CachedPairs(torch.from_numpy(image_NCHW[: len(captions)]), tokenize(captions))


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
