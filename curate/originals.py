"""What the original shards hold of a handful of samples: picture, caption and fields, for those who look at a run.

Each shard that a wanted sample names is opened once, and only the wanted members are decoded. A shard that is gone and
a picture that cannot be decoded are answers too. Memory: one shard's index and one picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curate.errors import CurateError, ShardError
from curate.images.decode import ImageRejected, decode_rgb
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import expand_shards, open_shard
from curate.shards.tarindex import index_tar

# N samples

Place = tuple[str, int]  # the shard as it was named, and the sample's ordinal in it
GONE = "(the shard is not there any more)"


@dataclass(frozen=True, slots=True)
class Original:
    """A sample as its shard has it. `image` is None where there is none or it cannot be decoded; `fields` its json."""

    image: Image.Image | None
    caption: str
    fields: dict[str, Any] = field(default_factory=dict)


def read_originals(places: Iterable[Place], *, min_side: int) -> Iterator[tuple[Place, Original]]:
    """Each of `places` once with what is there; pictures upright and, for a JPEG, no larger than `min_side` needs.

    In the order of the shards' first mention. A shard that cannot be opened gives samples without a picture whose
    caption is `GONE`, and never an error.
    """
    by_shard: dict[str, dict[int, None]] = {}
    for url, ordinal in places:
        by_shard.setdefault(url, {})[ordinal] = None
    for url, ordinals in by_shard.items():
        told: set[int] = set()
        try:
            for ordinal, found in _of_shard(url, list(ordinals), min_side):
                told.add(ordinal)
                yield (url, ordinal), found
        except (CurateError, OSError):
            for ordinal in ordinals:
                if ordinal not in told:
                    yield (url, ordinal), Original(None, GONE)


def by_chance(ids: bytes, seed: int) -> NDArray[np.uint64]:
    """A number per sample [N] that sorts them by chance: a hash of the 16-byte id and the seed, of nothing else.

    `ids` are the ids one after another. The same samples come first whatever others there are.
    """
    id_N2 = np.frombuffer(ids, dtype="<u8").reshape(-1, 2)
    return _mixed(id_N2[:, 0] ^ _mixed(id_N2[:, 1] + np.uint64(seed % 2**64)))


def _of_shard(url: str, ordinals: list[int], min_side: int) -> Iterator[tuple[int, Original]]:
    found = expand_shards([url])
    literal = url if "://" in url else os.path.abspath(url)
    if [source.url for source in found] != [literal]:  # the name of a gone shard may read as a pattern for others
        raise ShardError(f"shard {url} is not there any more")
    with open_shard(found[0]) as data:
        entries = {entry.ordinal: entry for entry in group_samples(index_tar(data), "00" * 32)}
        for ordinal in ordinals:
            entry = entries.get(ordinal)
            yield ordinal, Original(None, "") if entry is None else _original(data, entry, min_side)


def _original(data: memoryview, entry: SampleEntry, min_side: int) -> Original:
    caption, _ = read_caption(data, entry)
    member = entry.image()
    image = None
    if member is not None:
        try:
            rgb_HWC, _ = decode_rgb(data[member.offset : member.offset + member.size], min_side=min_side)
            image = Image.fromarray(rgb_HWC)
        except ImageRejected:
            image = None
    return Original(image, caption or "", read_json(data, entry) or {})


def _mixed(bits_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014): equal inputs give equal bits, neighbours unrelated ones."""
    bits_N = bits_N + np.uint64(0x9E3779B97F4A7C15)
    bits_N = (bits_N ^ (bits_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits_N = (bits_N ^ (bits_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits_N ^ (bits_N >> np.uint64(31))
