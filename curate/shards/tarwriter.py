"""Write tar members whose bytes depend only on name and payload: ustar, mtime 0, owner 0, mode 0644, regular files.

About two microseconds a header. A name that ustar's 100 bytes cannot hold, or that is not ASCII, and a payload of 8
GiB or more get `tarfile`'s PAX header, with the same fixed fields.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Final

from curate.shards.tarindex import BLOCK, is_unsafe

RECORD: Final = 10240
TAR_END: Final = bytes(2 * BLOCK)
_USTAR_SIZE: Final = 8**11
_AFTER_SIZE: Final = b"00000000000\0"  # mtime
# Type flag "0", an empty link name, magic and version; owners, device numbers and prefix stay empty.
_TAIL: Final = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)


def tar_member(name: str, payload: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Header, payload as given, padding to 512 bytes. Raises ValueError for a name that a careful reader would refuse.

    Example: `b"".join(tar_member("000000000.txt", b"a cube"))` has 1024 bytes.
    """
    if is_unsafe(name) or name.endswith("/"):
        raise ValueError(f"not a name for a tar member: {name!r}")
    size = len(payload)
    yield _header(name, size)
    if size:
        yield payload
    if size % BLOCK:
        yield bytes(-size % BLOCK)


def tar_end(written: int) -> bytes:
    """The zero bytes that end an archive of `written` bytes so far: two blocks, then up to a multiple of 10240.

    >>> len(tar_end(1024)), (10240 + len(tar_end(10240))) % 10240
    (9216, 0)
    """
    return TAR_END + bytes(-(written + len(TAR_END)) % RECORD)


def _header(name: str, size: int) -> bytes:
    if len(name) > 100 or not name.isascii() or size >= _USTAR_SIZE:
        return _pax_header(name, size)
    head = b"%s0000644\x000000000\x000000000\x00%011o\x00%s" % (name.encode().ljust(100, b"\0"), size, _AFTER_SIZE)
    total = sum(head) + 8 * 32 + _TAIL_SUM
    return b"%s%06o\0 %s" % (head, total, _TAIL)


_TAIL_SUM: Final = sum(_TAIL)


def _pax_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
