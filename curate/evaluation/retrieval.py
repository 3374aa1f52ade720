"""Image-text retrieval on held-out shards: does an image find its caption among all, and a caption its image?

One forward pass of both towers per sample, then the ranking of `curate.evaluation.recall`; memory O((N + M) D).
"""

# N images, M captions, D width

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from curate.errors import UsageError
from curate.evaluation.interval import Share, wilson
from curate.evaluation.recall import Recall, recall
from curate.evaluation.streaming import Rejected, embedded
from curate.models.embed import DualEncoder
from curate.progress import Progress
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry
from curate.shards.sources import ShardSource

MAX_CAPTION_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class At:
    """Recall at k: the share of queries whose match is among the first k, and that of a random order."""

    recall: Share
    chance: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Recall by k in both directions. `pool`: images that are ranked together; `left_over` filled no pool."""

    images: int
    captions: int
    pool: int
    pools: int
    left_over: int
    image_to_text: dict[int, At]
    text_to_image: dict[int, At]
    skipped: dict[str, int]


def retrieve(
    encoder: DualEncoder,
    sources: Sequence[ShardSource],
    workers: ThreadPoolExecutor,
    *,
    pool: int | None = None,
    batch_size: int,
    bar: Progress,
) -> Retrieval:
    """Embed the pairs of the shards and rank them, over the whole set or consecutive pools of `pool` images.

    Errors: UsageError where no sample is readable; ShardError for a shard that cannot be opened.
    """
    images: list[Tensor] = []
    texts: list[Future[Tensor]] = []
    counts: list[int] = []
    skipped: Counter[str] = Counter()
    for batch in embedded(encoder, sources, read_captions, workers, batch_size=batch_size, bar=bar):
        skipped += batch.skipped
        images.append(batch.image_bD)
        counts += map(len, batch.values)
        texts.append(workers.submit(_embed_captions, encoder, [one for own in batch.values for one in own]))
    if not counts:
        what = ", ".join(f"{n} x {reason}" for reason, n in sorted(skipped.items())) or "the shards are empty"
        raise UsageError(f"no readable pair in {len(sources)} shards ({what}); `curate inspect` shows each sample")
    owner_M = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    on = encoder.device
    text_MD = torch.cat([future.result() for future in texts])
    found = recall(torch.cat(images).to(on), text_MD.to(on), owner_M.to(on), pool=pool)
    return with_intervals(found, dict(sorted(skipped.items())))


def read_captions(data: memoryview, entry: SampleEntry) -> tuple[str, ...] | Rejected:
    """The captions of a sample: the lines of its txt member that have something in them, else the one in its json."""
    text, reason = read_caption(data, entry, max_bytes=MAX_CAPTION_BYTES)
    if text is None:
        return Rejected(reason or "caption-missing")
    if entry.member("txt") is None:
        return (text,)
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _embed_captions(encoder: DualEncoder, captions: list[str]) -> Tensor:
    return encoder.embed_texts(encoder.tokenize(captions))


def with_intervals(found: Recall, skipped: dict[str, int]) -> Retrieval:
    """Counts of hits as shares with their intervals."""
    return Retrieval(
        images=found.images,
        captions=found.captions,
        pool=found.pool,
        pools=found.pools,
        left_over=found.left_over,
        image_to_text={
            k: At(wilson(hits, found.images), found.image_to_text_chance[k]) for k, hits in found.image_to_text.items()
        },
        text_to_image={
            k: At(wilson(hits, found.captions), found.text_to_image_chance[k])
            for k, hits in found.text_to_image.items()
        },
        skipped=skipped,
    )
