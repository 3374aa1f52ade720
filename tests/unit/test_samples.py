"""Members become samples by webdataset's rule, and no pair is ever mixed."""

from __future__ import annotations

import tarfile
from hashlib import blake2b

import pytest
from webdataset.tariterators import base_plus_ext

from curate.reasons import QUARANTINED
from curate.shards.samples import SampleEntry, group_samples, split_name
from curate.shards.tarindex import index_tar
from tests.making import special, tar_bytes

DIGEST = "ab" * 32


def group(*names: str | tarfile.TarInfo) -> list[SampleEntry]:
    return group_samples(index_tar(memoryview(tar_bytes([(name, b"1") for name in names]))), DIGEST)


def brief(entries: list[SampleEntry]) -> list[tuple[str, int, str | None]]:
    return [(one.key, len(one.members), one.reason) for one in entries]


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a.b.jpg", "d.e/a.jpg", "./a.JPG", "README", "d.e/plain", "a.", "a..jpg", ".jpg", "x/y/z.tar.gz"],
)
def test_names_split_as_in_webdataset(name: str) -> None:
    """Key and extension are webdataset's own for odd names, the extension in lower case."""
    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


def test_members_of_a_key_need_not_be_adjacent() -> None:
    """Interleaved members and members sorted by extension are grouped by key over the whole shard."""
    assert brief(group("a.jpg", "b.jpg", "a.txt", "b.txt")) == [("a", 2, None), ("b", 2, None)]


def test_directories_and_normal_forms_tell_keys_apart() -> None:
    """The same base name in two directories, and NFC against NFD, are different samples."""
    assert len(group("x/a.jpg", "y/a.jpg", "\u00e9.jpg", "e\u0301.jpg")) == 4


@pytest.mark.parametrize("between", [(), ("b.jpg", "b.txt")])
def test_a_repeated_key_is_rejected_and_the_first_is_kept(between: tuple[str, ...]) -> None:
    """An adjacent or distant repeat of a key is an entry of its own with its own id; the first stays readable."""
    entries = [one for one in group("a.jpg", "a.txt", *between, "a.jpg", "a.txt") if one.key == "a"]
    assert brief(entries) == [("a", 2, None), ("a", 2, "key-duplicate")]
    assert entries[0].sample_id != entries[1].sample_id


def test_a_repeat_never_lends_its_caption() -> None:
    """A first sample without a caption does not take the caption of its repeat: pairs are not mixed."""
    entries = group("a.jpg", "a.jpg", "a.txt")
    assert brief(entries) == [("a", 1, None), ("a", 2, "key-duplicate")]
    assert entries[0].member("txt") is None


def test_letter_case_does_not_hide_a_repeat() -> None:
    """a.JPG and a.jpg are the same extension, so the second starts a repeat."""
    assert brief(group("a.JPG", "a.jpg")) == [("a", 1, None), ("a", 1, "key-duplicate")]


def test_first_image_extension_wins() -> None:
    """Of several images the one that comes first in IMAGE_EXTENSIONS is the sample's."""
    image = group("a.png", "a.jpg", "a.txt")[0].image()
    assert image is not None
    assert image.name == "a.jpg"


def test_no_image() -> None:
    """A sample without an image is image-missing and says what it has."""
    entry = group("a.txt", "a.seg.png")[0]
    assert entry.reason == "image-missing"
    assert "seg.png" in entry.detail


def test_a_linked_image_is_refused_by_name() -> None:
    """A sample whose image is a link is member-refused, even if the link is all that it has."""
    entries = group(special("a.jpg", tarfile.SYMTYPE, "/x"), "a.txt", special("b.jpg", tarfile.SYMTYPE, "/x"))
    assert brief(entries) == [("a", 1, "member-refused"), ("b", 0, "member-refused")]


def test_an_unsafe_name_leaves_a_row() -> None:
    """A sample with a climbing name is not silently lost."""
    assert brief(group("../a.jpg", "../a.txt")) == [("../a", 0, "member-refused")]


def test_pickles_are_carried_and_never_opened() -> None:
    """Members with executable formats are plain members of their sample."""
    assert brief(group("a.jpg", "a.pkl", "a.pth", "a.txt")) == [("a", 4, None)]


def test_files_of_no_sample_are_left_out() -> None:
    """Names without a dot, or that start with one, make no sample."""
    assert brief(group("README", ".DS_Store", "a.jpg", "d/._a.jpg")) == [("a", 1, None)]


def test_the_cut_sample_has_the_flaws_reason() -> None:
    """The sample whose member was cut is tar-truncated with the byte offset; those before it stay readable."""
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("b.jpg", b"1"), ("b.txt", b"1" * 600)])
    entries = group_samples(index_tar(memoryview(data)[: 3072 + 512 + 10]), DIGEST)
    assert brief(entries) == [("a", 2, None), ("b", 1, "tar-truncated")]
    assert "byte offset 3072" in entries[1].detail


def test_an_unknown_tail_leaves_a_row() -> None:
    """Damage without a name is an entry with the key "", so that the tail is counted."""
    data = tar_bytes([("a.jpg", b"1")])[:1024] + b"garbage" * 100
    assert brief(group_samples(index_tar(memoryview(data)), DIGEST)) == [("a", 1, None), ("", 0, "tar-damaged")]


def test_a_cut_repeat_does_not_taint_the_first() -> None:
    """A repeat that was cut is quarantined by itself."""
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("a.jpg", b"1" * 600)])
    entries = group_samples(index_tar(memoryview(data)[: 2048 + 512 + 10]), DIGEST)
    assert brief(entries) == [("a", 2, None), ("a", 0, "tar-truncated")]


def test_sample_ids_come_from_digest_and_ordinal() -> None:
    """The id is blake2b over the shard's digest and the ordinal, 16 bytes, and ordinals count up from 0."""
    entries = group("a.jpg", "b.jpg", "c.jpg")
    assert [one.ordinal for one in entries] == [0, 1, 2]
    expected = blake2b(bytes.fromhex(DIGEST) + (2).to_bytes(8, "little"), digest_size=16).digest()
    assert entries[2].sample_id == expected


def test_every_reason_is_listed() -> None:
    """Reasons given here are in the closed list."""
    entries = group("a.txt", "b.jpg", "b.jpg", special("c.jpg", tarfile.SYMTYPE, "/x"))
    assert {one.reason for one in entries if one.reason} <= QUARANTINED.keys()
    assert len({one.reason for one in entries}) == 4
