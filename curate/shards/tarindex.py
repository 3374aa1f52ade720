"""Index a tar that nobody vouches for: where the bytes of every regular file lie, and where it stops making sense.

Some 7 us a member: two Adler-32 halves give the header checksum, and only the fields that place the data are
parsed. Nothing is extracted, no declared size is ever allocated, no link is followed. Where the archive is cut or
damaged the members before that point stay valid and one `Flaw` says where the reading stopped and why.

Rules, each the same as `tarfile`'s and GNU tar's unless said otherwise:
- the first zero block ends the archive; any non-zero byte after it is a flaw (a second archive appended with `cat`, a
  hole in the middle), since every reader built on `tarfile` would miss what follows;
- an archive that ends cleanly after its last member, without the two zero blocks, is accepted;
- GNU `L`/`K` and PAX `x`/`g` headers are read; GNU and PAX sparse members are skipped;
- unlike `tarfile`, a damaged header is a flaw and not a silent end, and the prefix field counts only where the header
  says `ustar`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NoReturn
from zlib import adler32

BLOCK: Final = 512
_ZERO: Final = bytes(BLOCK)
_LONGEST_NAME: Final = 64 * 1024
_LONGEST_PAX: Final = 1024 * 1024
_SCAN: Final = 1024 * 1024

_DATA: Final = frozenset((b"0", b"\0", b"7"))
_NO_DATA: Final = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "directory", b"6": "device"}
_PAX_RECORD: Final = re.compile(rb"(\d{1,20}) ([^=\n]+)=")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of the archive: its name and where its bytes lie in the shard."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Flaw:
    """Where reading had to stop; `reason` is "tar-truncated" or "tar-damaged", `name` the member that was cut or ""."""

    reason: str
    offset: int
    detail: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class TarIndex:
    """Every regular file before the flaw, in shard order, and what was skipped: (name, "link" | "device" |
    "directory" |
    "sparse" | "unknown-type" | "unsafe-name")."""

    members: tuple[Member, ...]
    skipped: tuple[tuple[str, str], ...]
    flaw: Flaw | None


class _Broken(Exception):  # control flow, not a failure
    """Carries the flaw out of the parser; never leaves this module."""

    def __init__(self, flaw: Flaw) -> None:
        self.flaw = flaw


@dataclass(slots=True)
class _Overrides:
    """What `L` and `x` headers say of the next member. The first header to name a field wins, as in tarfile."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


@dataclass(slots=True)
class _State:
    members: list[Member] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pending: _Overrides = field(default_factory=_Overrides)
    shared: _Overrides = field(default_factory=_Overrides)  # from `g`: holds for every later member


def index_tar(data: memoryview) -> TarIndex:
    """Index the archive in `data` (C-contiguous bytes). Never raises on what the bytes say.

    Example: two files of 5 and 700 bytes written by any tar give members at offsets 512 and 1536.

        >>> index_tar(memoryview(b"<html>not found</html>")).flaw.reason
        'tar-damaged'

    Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
    """
    state = _State()
    try:
        _walk(data.cast("B") if data.format != "B" or data.ndim != 1 else data, state)
    except _Broken as broken:
        return TarIndex(tuple(state.members), tuple(state.skipped), broken.flaw)
    return TarIndex(tuple(state.members), tuple(state.skipped), None)


def _walk(data: memoryview, state: _State) -> None:
    end, at = len(data), 0
    while at < end:
        block = bytes(data[at : at + BLOCK])
        if len(block) < BLOCK:
            _partial_header(block, at)
            break
        if not block[0] and block == _ZERO:
            _require_zeros(data, at + BLOCK)
            break
        if not _checksum_holds(block):
            _damaged(at, _what_instead(block) if at == 0 else "the header checksum does not match")
        at = _take(data, block, at, state)
    if at > end:
        _truncated(end, f"the shard ends at byte {end} inside the padding of its last member")
    if state.pending != _Overrides():
        _truncated(at, f"the archive ends at byte {at} after a long-name or PAX header", _pending_name(state))


def _take(data: memoryview, block: bytes, at: int, state: _State) -> int:
    """Handle the header at `at`; return the offset of the next one."""
    kind = block[156:157]
    size = _number(block[124:136], at, "size")
    start = at + BLOCK
    if kind in _DATA or kind not in _SPECIAL:
        return _take_member(data, block, kind, size, at, state)
    if kind in (b"L", b"K"):
        payload = _small_payload(data, start, size, _LONGEST_NAME, at, state)
        if kind == b"L" and state.pending.name is None:
            state.pending.name = payload.partition(b"\0")[0]
    else:
        payload = _small_payload(data, start, size, _LONGEST_PAX, at, state)
        _read_pax(payload, state.shared if kind == b"g" else state.pending, at, shared=kind == b"g")
    return start + _padded(size)


_SPECIAL: Final = frozenset((b"L", b"K", b"x", b"g", b"X"))


def _take_member(data: memoryview, block: bytes, kind: bytes, size: int, at: int, state: _State) -> int:
    pending, shared = state.pending, state.shared
    start = at + BLOCK
    raw_name = pending.name if pending.name is not None else shared.name
    if raw_name is None:
        raw_name = _header_name(block)
    name = raw_name.decode("utf-8", "surrogateescape")
    if kind == b"\0" and raw_name.endswith(b"/"):
        kind = b"5"  # before ustar a directory was a file whose name ends in a slash
    sparse = pending.sparse or shared.sparse or kind == b"S"
    if kind == b"S":
        start = _after_sparse_maps(data, block, start, at, name)
    if kind in _NO_DATA:
        size = 0
    elif pending.size is not None:
        size = pending.size
    if sparse or pending.name is not None or pending.size is not None:
        state.pending = _Overrides()
    if start + size > len(data):
        held = max(0, len(data) - start)
        detail = f"the member at byte {at} declares {size} bytes, the shard holds {held} of them"
        _truncated(at, detail, name)
    why = "sparse" if sparse else _NO_DATA.get(kind) or ("" if kind in _DATA else "unknown-type")
    if not why and is_unsafe(name):
        why = "unsafe-name"
    if why:
        state.skipped.append((name.rstrip("/") if why == "directory" else name, why))
    else:
        state.members.append(Member(name, start, size))
    return start + _padded(size)


def is_unsafe(name: str) -> bool:
    """True for an empty or absolute name, a ".." component, NUL or any other control character.

    >>> is_unsafe("a/../../b.jpg"), is_unsafe("a..b/c.jpg")
    (True, False)
    """
    if name.isprintable() and name[:1] not in ("", ".", "/") and "/." not in name:
        return False  # the common case, decided without a split
    return not name or name[0] == "/" or _CONTROL.search(name) is not None or (".." in name and ".." in name.split("/"))


def _header_name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        return block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _checksum_holds(block: bytes) -> bool:
    # adler32's low half is 1 + sum(bytes) mod 65521; 256 bytes sum to at most 65280: exact, and much faster than sum().
    stored = block[148:156]
    unsigned = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2 - sum(stored) + 8 * 32
    try:
        declared = _octal(stored)
    except ValueError:
        return False
    if declared == unsigned:
        return True
    # Some old tars summed signed bytes; each byte above 127 then counts 256 less.
    return declared == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _octal(text: bytes) -> int:
    digits = text.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError("not an octal number")
    return int(digits, 8)


def _number(text: bytes, at: int, what: str) -> int:
    """A numeric field: octal text, or GNU's base-256 when the first byte is 0x80."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    try:
        return _octal(text)
    except ValueError:
        _damaged(at, f"the {what} field is not a number")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) & ~(BLOCK - 1)


def _small_payload(data: memoryview, start: int, size: int, limit: int, at: int, state: _State) -> bytes:
    if size > limit:
        _damaged(at, f"a long-name or PAX header declares {size} bytes, the limit is {limit}")
    if start + size > len(data):
        _truncated(at, f"the shard ends inside the long-name or PAX header at byte {at}", _pending_name(state))
    return bytes(data[start : start + size])


def _pending_name(state: _State) -> str:
    return (state.pending.name or b"").decode("utf-8", "surrogateescape")


def _read_pax(payload: bytes, into: _Overrides, at: int, *, shared: bool) -> None:
    for key, value in _pax_records(payload, at):
        if key == b"path" or key == b"GNU.sparse.name":
            into.name = value.rstrip(b"/") if into.name is None else into.name
        elif key == b"size":
            if shared or not value.isdigit() or len(value) > 20:
                _damaged(at, "a PAX size record that is not one member's size")
            into.size = int(value) if into.size is None else into.size
        if key.startswith(b"GNU.sparse."):
            into.sparse = True


def _pax_records(payload: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of `<length> <key>=<value>\\n` records."""
    here, end = 0, len(payload)
    while here < end and payload[here]:
        match = _PAX_RECORD.match(payload, here)
        stop = here + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= end or payload[stop - 1] != 0x0A:
            _damaged(at, "a PAX header record that is malformed")
        yield match[2], payload[match.end() : stop - 1]
        here = stop


def _after_sparse_maps(data: memoryview, block: bytes, start: int, at: int, name: str) -> int:
    """GNU's old sparse format may continue its map in further blocks; the data starts after the last of them."""
    more = block[482]
    while more:
        if start + BLOCK > len(data):
            _truncated(at, f"the shard ends inside the sparse map at byte {at}", name)
        more = data[start + 504]
        start += BLOCK
    return start


def _partial_header(block: bytes, at: int) -> None:
    if not block.strip(b"\0"):
        return
    if at == 0:
        _damaged(at, _what_instead(block))
    _truncated(at, f"the shard ends inside the header at byte {at}")


def _require_zeros(data: memoryview, at: int) -> None:
    while at < len(data):
        chunk = bytes(data[at : at + _SCAN])
        rest = chunk.lstrip(b"\0")
        if rest:
            _damaged(at + len(chunk) - len(rest), "data after the end-of-archive block")
        at += len(chunk)


def _what_instead(block: bytes) -> str:
    start = block.lstrip()[:15].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not a tar archive but a web page, perhaps an error that a download saved"
    return "not a tar archive"


def _truncated(at: int, detail: str, name: str = "") -> NoReturn:
    raise _Broken(Flaw("tar-truncated", at, detail, name))


def _damaged(at: int, detail: str) -> NoReturn:
    raise _Broken(Flaw("tar-damaged", at, f"{detail} (byte {at})"))
