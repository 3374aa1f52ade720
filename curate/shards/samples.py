"""Group the members of a shard into samples by webdataset's rule, shard-wide: their order in the tar does not matter.

One pass over the index, O(members). The key of `dir.v1/a.b.jpg` is `dir.v1/a` and its extension is `b.jpg`: the split
is at the first dot of the base name. Keys are compared as decoded, so names that differ only in Unicode normalisation
are two samples. Names without a dot belong to no sample; nor do base names that start with one, which webdataset drops
at the top and lumps together, under the directory's name, below it.

No pair is ever mixed: once a key has repeated an extension, every later member of that key belongs to the newest repeat
and never to the sample that came first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from curate.shards.tarindex import Flaw, Member, TarIndex

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "gif")


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """All that a shard holds of one sample.

    `ordinal` counts samples in the order of their first members; `sample_id` is blake2b(shard sha256 || ordinal as 8
    bytes, little endian), 16 bytes; `reason` is None while the sample is readable, else a reason of
    `curate.reasons.QUARANTINED`.
    """

    ordinal: int
    sample_id: bytes
    key: str
    members: tuple[Member, ...]
    reason: str | None
    detail: str

    def member(self, *extensions: str) -> Member | None:
        """The member with the first of `extensions` that the sample has, whatever the letter case; else None."""
        for wanted in extensions:
            for member in self.members:
                if extension(member.name) == wanted:
                    return member
        return None

    def image(self) -> Member | None:
        """The member that is the sample's image."""
        return self.member(*IMAGE_EXTENSIONS)


@dataclass(slots=True)
class _Growing:
    key: str
    repeat: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension), or None for a name that belongs to no sample.

    >>> split_name("dir.v1/a.b.JPG"), split_name("dir/README")
    (('dir.v1/a', 'b.jpg'), None)
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    return name[:dot], name[dot + 1 :].lower()


def extension(name: str) -> str:
    """What follows the first dot of the base name, in lower case; "" where there is none."""
    parts = split_name(name)
    return parts[1] if parts else ""


def group_samples(index: TarIndex, digest: str) -> list[SampleEntry]:
    """The samples of a shard with sha256 `digest` (hex), in the order of their first members.

    Repeats of a key are entries of their own with reason "key-duplicate". After the readable members come samples of
    which only refused members exist ("member-refused"), then the sample that the flaw cut; where its name is unknown an
    entry with key "" stands for whatever was lost, so that no shard loses its tail in silence.

    Example: members a.jpg, b.jpg, a.txt, b.txt, a.jpg give entries a (2 members), b (2 members), a ("key-duplicate").
    """
    refused = _refused(index.skipped)
    growing = _grow(index.members)
    seen = {one.key for one in growing}
    growing += [_Growing(key) for key in refused if key not in seen]
    for one in growing:
        _judge(one, refused)
    if index.flaw is not None:
        _mark_cut(growing, index.flaw)
    return [_entry(ordinal, one, bytes.fromhex(digest)) for ordinal, one in enumerate(growing)]


def _grow(members: Iterable[Member]) -> list[_Growing]:
    ordered: list[_Growing] = []
    newest: dict[str, _Growing] = {}
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, suffix = parts
        one = newest.get(key)
        if one is None or suffix in one.members:
            one = newest[key] = _Growing(key, repeat=one is not None)
            ordered.append(one)
        one.members[suffix] = member
    return ordered


def _refused(skipped: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key -> the first refused member of that key, as a sentence."""
    found: dict[str, str] = {}
    for name, why in skipped:
        parts = split_name(name) if why != "directory" else None
        if parts is not None:
            found.setdefault(parts[0], f"member {name!r} was skipped: {why}")
    return found


def _judge(one: _Growing, refused: dict[str, str]) -> None:
    if one.repeat:
        one.reason, one.detail = "key-duplicate", f"key {one.key!r} came earlier in the shard"
    elif not any(suffix in one.members for suffix in IMAGE_EXTENSIONS):
        one.reason = "member-refused" if one.key in refused else "image-missing"
        one.detail = refused.get(one.key) or "members: " + ", ".join(list(one.members)[:8])


def _mark_cut(growing: list[_Growing], flaw: Flaw) -> None:
    parts = split_name(flaw.name)
    key = parts[0] if parts else ""
    cut = next((one for one in reversed(growing) if one.key == key), None) if parts else None
    if cut is None or (parts and parts[1] in cut.members):
        cut = _Growing(key)
        growing.append(cut)
    cut.reason, cut.detail = flaw.reason, f"byte offset {flaw.offset}: {flaw.detail}"


def _entry(ordinal: int, one: _Growing, digest: bytes) -> SampleEntry:
    sample_id = blake2b(digest + ordinal.to_bytes(8, "little"), digest_size=16).digest()
    return SampleEntry(ordinal, sample_id, one.key, tuple(one.members.values()), one.reason, one.detail)
