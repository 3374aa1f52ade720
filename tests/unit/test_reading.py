"""One sample read: everything a row needs, or the reason why it cannot be used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from curate.reading import ReadLimits, Sample, payload_digest, read_sample, read_samples
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.tarindex import Member, index_tar
from tests.making import make_image, make_png_bomb, tar_bytes, write_tar

LIMITS = ReadLimits()
UID = "0123456789abcdef0123456789abcdef"


def entries_of(parts: dict[str, bytes]) -> tuple[memoryview, list[SampleEntry]]:
    data = memoryview(tar_bytes([(f"key.{extension}", payload) for extension, payload in parts.items()]))
    return data, group_samples(index_tar(data), "0" * 64)


def read(parts: dict[str, bytes], limits: ReadLimits = LIMITS) -> Sample:
    data, entries = entries_of(parts)
    return read_sample(data, entries[0], limits)


def test_a_good_sample_has_everything_a_row_needs() -> None:
    """Caption, uid, size, pixels, signals and the digests of what was read."""
    image = make_image("jpeg", 64, 48)
    found = read({"jpg": image, "txt": b"a cat", "json": json.dumps({"uid": UID}).encode()})
    assert (found.reason, found.caption, found.uid) == (None, "a cat", UID)
    assert found.header is not None
    assert (found.header.width, found.header.height) == (64, 48)
    assert found.rgb_HWC is not None
    assert found.rgb_HWC.shape == (48, 64, 3)
    assert found.signals is not None
    assert found.image_digest == hashlib.sha256(image).digest()
    assert found.caption_digest == hashlib.blake2b(b"a cat", digest_size=16).digest()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"jpg": make_image()}, "caption-missing"),
        ({"jpg": make_image(), "txt": b" \n"}, "caption-empty"),
        ({"jpg": make_image(), "txt": b"\xff\xfe"}, "caption-encoding"),
        ({"jpg": make_image(), "txt": b"x" * 65_537}, "caption-too-long"),
        ({"txt": b"words"}, "image-missing"),
        ({"jpg": b"", "txt": b"words"}, "image-empty"),
        ({"jpg": b"%PDF-1.7 not an image", "txt": b"words"}, "image-format"),
        ({"jpg": make_image()[:200], "txt": b"words"}, "image-undecodable"),
        ({"png": make_png_bomb(), "txt": b"words"}, "image-too-large"),
    ],
)
def test_a_bad_sample_is_a_value_with_a_reason(parts: dict[str, bytes], reason: str) -> None:
    """Nothing is raised for a bad sample; it has one of the listed reasons and no pixels."""
    found = read(parts)
    assert (found.reason, found.rgb_HWC) == (reason, None)


def test_limits_are_arguments() -> None:
    """The pixel and caption limits of the run decide, not those of the module."""
    parts = {"jpg": make_image("jpeg", 64, 48), "txt": b"a longer caption"}
    assert read(parts, ReadLimits(max_pixels=64 * 48)).reason is None
    assert read(parts, ReadLimits(max_pixels=64 * 48 - 1)).reason == "image-too-large"
    assert read(parts, ReadLimits(max_caption_bytes=5)).reason == "caption-too-long"


def test_a_large_image_is_decoded_no_larger_than_needed() -> None:
    """With `min_side` a JPEG is decoded at a reduced scale, and the size that is told is the full one."""
    found = read({"jpg": make_image("jpeg", 640, 480), "txt": b"words"}, ReadLimits(min_side=60))
    assert found.rgb_HWC is not None
    assert 60 <= min(found.rgb_HWC.shape[:2]) < 480
    assert found.header is not None
    assert (found.header.width, found.header.height) == (640, 480)


def test_the_reason_of_the_index_is_kept() -> None:
    """A sample that the tar index already refused is not read again."""
    data, entries = entries_of({"jpg": make_image(), "txt": b"words"})
    found = read_sample(data, replace(entries[0], reason="tar-truncated", detail="byte offset 7"), LIMITS)
    assert (found.reason, found.detail, found.caption) == ("tar-truncated", "byte offset 7", None)


def test_the_payload_digest_sees_every_byte_and_name(tmp_path: Path) -> None:
    """Another byte, another name, another size or another order of members is another payload."""
    data = memoryview(write_tar(tmp_path / "t.tar", [("a.jpg", b"12"), ("a.txt", b"3")]).read_bytes())
    members = index_tar(data).members
    digests = {
        payload_digest(data, members),
        payload_digest(data, members[::-1]),
        payload_digest(data, members[:1]),
        payload_digest(data, (replace(members[0], name="b.jpg"), members[1])),
        payload_digest(data, (replace(members[0], size=1), members[1])),
        payload_digest(data, (Member("a.jpg", members[1].offset, 2), members[1])),
    }
    assert len(digests) == 6
    assert payload_digest(data, members, {"a.jpg": hashlib.sha256(b"12").digest()}) == payload_digest(data, members)
    assert payload_digest(data, members, {"a.jpg": hashlib.sha256(b"x").digest()}) not in digests
    assert all(len(digest) == 16 for digest in digests)


def test_a_damaged_json_does_not_reject_the_pair() -> None:
    """The json beside a caption of its own is opaque: if it cannot be parsed the sample has no uid, no more."""
    found = read({"jpg": make_image(), "txt": b"words", "json": b'{"uid": NaN'})
    assert (found.reason, found.uid) == (None, None)
    assert isinstance(found.rgb_HWC, np.ndarray)


def test_many_samples_read_as_each_alone() -> None:
    """Good and bad samples in one go: the same samples but for their pixels, which were seen once each, in order."""
    parts = {"a.jpg": make_image("jpeg", 64, 48), "a.txt": b"one", "b.jpg": b"no image", "b.txt": b"two"}
    parts |= {"c.png": make_image("png", 30, 90), "c.txt": b"three", "d.jpg": make_image(), "e.txt": b"five"}
    data = memoryview(tar_bytes(list(parts.items())))
    entries = group_samples(index_tar(data), "0" * 64)
    alone = [read_sample(data, entry, LIMITS) for entry in entries]
    seen: list[NDArray[np.uint8]] = []
    assert read_samples(data, entries, LIMITS, seen.append) == [replace(one, rgb_HWC=None) for one in alone]
    pixels = [one.rgb_HWC for one in alone if one.rgb_HWC is not None]
    assert [one.shape[:2] for one in pixels] == [(48, 64), (90, 30)]
    assert all(np.array_equal(one, rgb_HWC) for one, rgb_HWC in zip(seen, pixels, strict=True))
