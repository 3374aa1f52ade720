"""Which held-out pairs are trained on, too: told by the bytes of their images, wherever their shards lie.

No image is decoded. The tar headers of the held-out shards are read, and images of one length on both sides are hashed:
at most the bytes of both once more, at 1.5 GB/s, and hardly any where the two have nothing in common. An image that was
encoded anew, cropped or resized is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from curate.learner.dataset import Contents
from curate.learner.settings import TrainSettings
from curate.shards.captions import read_caption
from curate.shards.samples import group_samples
from curate.shards.sources import ShardSource, expand_shards, open_shard
from curate.shards.tarindex import index_tar

OPTIONS: Final = {"trusted": "--trusted", "eval_shards": "--eval", "zeroshot": "--zeroshot"}  # a setting -> its flag


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The `pairs` that one option holds out; of `trained` the image is in the pool that is trained on, of `captions`
    with the same caption beside it. Labelled images may have none."""

    option: str
    pairs: int
    trained: int
    captions: int

    @property
    def text(self) -> str:
        """A sentence without its full stop. Example: `HeldOut("--eval", 100, 40, 32).text` is "--eval: 40 of 100
        held-out pairs are trained on, too: their images are in the pool, byte for byte, 32 with the same caption"."""
        if not self.trained:
            return f"{self.option}: none of {self.pairs:,} held-out pairs has its image in the pool, byte for byte"
        are, images = ("are", "their images are") if self.trained > 1 else ("is", "its image is")
        text = f"{self.option}: {self.trained:,} of {self.pairs:,} held-out pairs {are} trained on, too"
        beside = f", {self.captions:,} with the same caption" if self.captions else ""
        return f"{text}: {images} in the pool, byte for byte{beside}"


def held_out_pairs(settings: TrainSettings, pool: Contents) -> tuple[HeldOut, ...]:
    """What `settings` hold out, and how much of it is in the pool. Errors: UsageError, ShardError for their shards."""
    return tuple(
        _compared(flag, expand_shards(getattr(settings, name)), pool, captioned=name != "zeroshot")
        for name, flag in OPTIONS.items()
        if getattr(settings, name)
    )


def _compared(option: str, sources: Sequence[ShardSource], pool: Contents, *, captioned: bool) -> HeldOut:
    with ExitStack() as stack:
        shards = (stack.enter_context(open_shard(source)) for source in sources)
        pairs = [pair for data in shards for pair in _pairs(data, captioned=captioned)]
        both = np.intersect1d([len(image) for image, _ in pairs], pool.image_N3[:, 2])
        captions, lengths = _captions(pool, both), set(both.tolist())
        alike = [(_digest(image), caption) for image, caption in pairs if len(image) in lengths]
    found = [caption in captions[digest] for digest, caption in alike if digest in captions]
    return HeldOut(option, len(pairs), len(found), sum(found))


def _pairs(data: memoryview, *, captioned: bool) -> Iterator[tuple[memoryview, str | None]]:
    """Encoded image and caption of each sample that would be measured, as far as its headers tell."""
    for entry in group_samples(index_tar(data), "00"):  # the digest only makes sample ids, which nobody reads here
        image = entry.image()
        if entry.reason is not None or image is None or not image.size:
            continue
        caption = read_caption(data, entry)[0]
        if caption is not None or not captioned:
            yield data[image.offset : image.offset + image.size], caption


def _captions(pool: Contents, lengths: NDArray[np.int64]) -> dict[bytes, set[str]]:
    """Digest of an image -> the captions that the pool has for it, for images of these lengths."""
    found: dict[bytes, set[str]] = {}
    for row in np.flatnonzero(np.isin(pool.image_N3[:, 2], lengths)).tolist():
        found.setdefault(_digest(pool.image(row)), set()).add(pool.caption_N[row])
    return found


def _digest(image: memoryview) -> bytes:
    return hashlib.sha256(image).digest()
