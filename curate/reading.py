"""Read one sample of a shard: caption, image, quality signals, digests; or the reason why it cannot be used.

One pass over the sample's bytes, nothing kept but what the score table needs; read in numbers, a picture is gone before
the next is decoded. A bad sample is a value with a reason, never an exception.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from json.encoder import encode_basestring_ascii as json_string
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curate.formats.datacomp import uid_of
from curate.images.decode import ImageHeader, ImageRejected, decode_rgb
from curate.images.signals import GreyCopies, Signals, grey_copies, rate, signals
from curate.scores import safe_text
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry
from curate.shards.tarindex import Member


@dataclass(frozen=True, slots=True)
class Sample:
    """One input sample as read. `rgb_HWC` is None where `reason` is set or the sample was one of many."""

    entry: SampleEntry
    reason: str | None
    detail: str
    caption: str | None = None
    uid: str | None = None
    header: ImageHeader | None = None
    rgb_HWC: NDArray[np.uint8] | None = None
    signals: Signals | None = None
    payload_digest: bytes = bytes(16)
    image_digest: bytes = bytes(32)
    caption_digest: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What a sample may cost, and how large its image is needed."""

    max_pixels: int = 64_000_000
    max_caption_bytes: int = 65_536
    min_side: int | None = None


def read_sample(data: memoryview, entry: SampleEntry, limits: ReadLimits) -> Sample:
    """Read `entry` from its shard's bytes.

    The image is decoded at a reduced scale whose shorter side is still at least `limits.min_side`.
    """
    found = _read(data, entry, limits)
    if isinstance(found, Sample):
        return found
    return found.sample(rgb_HWC=found.rgb_HWC, signals=signals(found.rgb_HWC))


def read_samples(
    data: memoryview, entries: Sequence[SampleEntry], limits: ReadLimits, see: Callable[[NDArray[np.uint8]], None]
) -> list[Sample]:
    """The same for many entries; no pixels are kept. `see` is called with those of each readable one [H, W, 3], in
    order, and one picture lives at a time."""
    found: list[Sample | Callable[..., Sample]] = []
    copies: list[GreyCopies] = []
    for entry in entries:
        one = _read(data, entry, limits)
        if isinstance(one, Sample):
            found.append(one)
            continue
        copies.append(grey_copies(Image.fromarray(one.rgb_HWC)))
        see(one.rgb_HWC)
        found.append(one.sample)
    rated = iter(rate(copies))
    return [one if isinstance(one, Sample) else one(signals=next(rated)) for one in found]


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Pixels, and what makes the sample once its signals are known."""

    rgb_HWC: NDArray[np.uint8]
    sample: Callable[..., Sample]


def _read(data: memoryview, entry: SampleEntry, limits: ReadLimits) -> Sample | _Decoded:
    if entry.reason is not None:
        return Sample(entry, entry.reason, entry.detail)
    caption, reason = read_caption(data, entry, max_bytes=limits.max_caption_bytes)
    if caption is None:
        return Sample(entry, reason or "caption-missing", "")
    image = entry.image()
    if image is None:
        return Sample(entry, "image-missing", "")
    payload = data[image.offset : image.offset + image.size]
    try:
        rgb_HWC, header = decode_rgb(payload, min_side=limits.min_side, max_pixels=limits.max_pixels)
    except ImageRejected as rejected:
        return Sample(entry, rejected.reason, rejected.detail, caption)
    image_digest = hashlib.sha256(payload).digest()
    sample = partial(
        Sample,
        entry,
        None,
        "",
        caption,
        _uid(data, entry),
        header,
        payload_digest=payload_digest(data, entry.members, {image.name: image_digest}),
        image_digest=image_digest,
        caption_digest=hashlib.blake2b(caption.encode(), digest_size=16).digest(),
    )
    return _Decoded(rgb_HWC, sample)


def payload_digest(
    data: memoryview, members: tuple[Member, ...], known: Mapping[str, bytes] = MappingProxyType({})
) -> bytes:
    """16 bytes over every member's name, size and sha256: what must still be true when the sample is copied. `known`
    holds digests that have been made, by the member's name."""
    digest = hashlib.blake2b(digest_size=16)
    for member in members:
        # what json.dumps makes of the pair, whose encoder takes longer than the digest itself
        digest.update(f"[{json_string(safe_text(member.name))}, {member.size}]".encode())
        content = data[member.offset : member.offset + member.size]
        digest.update(known.get(member.name) or hashlib.sha256(content).digest())
    return digest.digest()


def _uid(data: memoryview, entry: SampleEntry) -> str | None:
    member = entry.member("json")
    return None if member is None else uid_of(bytes(data[member.offset : member.offset + member.size]))
