"""Embed the images of shards batch by batch, each with what its sample says about it; pixels live as long as a batch.

A batch is fixed by the shard and the batch size, and one thread with torch's own threads off computes it, so results do
not depend on the number of threads. A bad sample is counted under its reason and never raised.
"""

# b images of a batch, D width

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.images.decode import ImageRejected, decode_rgb
from curate.machine import cores
from curate.models.embed import DualEncoder
from curate.progress import Progress
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard
from curate.shards.tarindex import index_tar

T = TypeVar("T")
WINDOW = 64  # batches that may be finished and not yet taken; they hold embeddings, no pixels


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a sample cannot be used."""

    reason: str


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Unit vectors [b, D] of the images that could be used, what was read beside each, and who was left out."""

    image_bD: Tensor
    values: list[T]
    skipped: Counter[str]


Read = Callable[[memoryview, SampleEntry], T | Rejected]


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """A thread per core, each with one torch thread."""
    with ThreadPoolExecutor(cores().usable, "curate-evaluate", torch.set_num_threads, (1,)) as pool:
        yield pool


def embedded(
    encoder: DualEncoder,
    sources: Sequence[ShardSource],
    read: Read[T],
    pool: ThreadPoolExecutor,
    *,
    batch_size: int,
    bar: Progress,
) -> Iterator[Batch[T]]:
    """The samples of the shards in order. `read` gives a sample's label or captions, or says why it has none.

    `bar` counts bytes of shards in megabytes. Errors: ShardError for a shard that cannot be opened.
    """
    for source in sources:
        with open_shard(source) as data:
            entries = group_samples(index_tar(data), "")
            batches = [entries[start : start + batch_size] for start in range(0, len(entries), batch_size)]
            for start in range(0, len(batches), WINDOW):
                for batch in pool.map(partial(_batch, encoder, data, read), batches[start : start + WINDOW]):
                    bar.advance(source.size / 1e6 / len(batches))
                    yield batch


def _batch(encoder: DualEncoder, data: memoryview, read: Read[T], entries: Sequence[SampleEntry]) -> Batch[T]:
    values: list[T] = []
    pixels: list[NDArray[np.uint8]] = []
    skipped: Counter[str] = Counter()
    for entry in entries:
        found = _sample(data, entry, read, encoder.min_side)
        if isinstance(found, Rejected):
            skipped[found.reason] += 1
        else:
            values.append(found[0])
            pixels.append(found[1])
    if not pixels:
        return Batch(torch.zeros(0, encoder.width), values, skipped)
    return Batch(encoder.embed_images(encoder.preprocess_batch(pixels)), values, skipped)


def _sample(
    data: memoryview, entry: SampleEntry, read: Read[T], min_side: int
) -> tuple[T, NDArray[np.uint8]] | Rejected:
    if entry.reason is not None:
        return Rejected(entry.reason)
    value = read(data, entry)
    member = entry.image()
    if isinstance(value, Rejected) or member is None:
        return value if isinstance(value, Rejected) else Rejected("image-missing")
    try:
        return value, decode_rgb(data[member.offset : member.offset + member.size], min_side=min_side)[0]
    except ImageRejected as rejected:
        return Rejected(rejected.reason)
