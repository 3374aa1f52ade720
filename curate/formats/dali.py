"""The index that NVIDIA DALI's webdataset reader wants beside a shard (what its `wds2idx` writes, format v1.2).

Line 1 is `v1.2 <samples>`; then one line per sample, `extension offset size name` for each of its members, where offset
is the first byte of the member's data in the tar. Without the index DALI scans every shard before the first batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Protocol

from curate.errors import UsageError


class Located(Protocol):
    """A member of a tar: `curate.shards.tarindex.Member` is one."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


def dali_index(members: Iterable[Located]) -> str:
    """Text of `00000.idx` for the members of a shard in tar order; members of a sample are adjacent.

    >>> from types import SimpleNamespace as M
    >>> print(dali_index([M(name="7.jpg", offset=512, size=9), M(name="7.txt", offset=1536, size=3)]), end="")
    v1.2 1
    jpg 512 9 7.jpg txt 1536 3 7.txt
    """
    lines = [" ".join(map(_field, sample)) for _, sample in groupby(members, key=lambda member: _split(member.name)[0])]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def _field(member: Located) -> str:
    if any(character.isspace() for character in member.name):
        raise UsageError(f"member {member.name!r}: blanks part the fields of a DALI index, so no name may hold one")
    return f"{_split(member.name)[1]} {member.offset} {member.size} {member.name}"


def _split(name: str) -> tuple[str, str]:
    """Key and extension, parted at the first dot of the base name, as webdataset and DALI do."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])
