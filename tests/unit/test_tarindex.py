"""The tar index: where members lie, and what stops the reading."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from struct import pack_into

import pytest

from curate.shards.tarindex import Member, TarIndex, index_tar, is_unsafe
from tests.making import special, tar_bytes

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
GOOD = [("a.jpg", b"x" * 700), ("a.txt", b"caption"), ("b.jpg", b""), ("b.txt", b"y" * 512)]


def index(data: bytes) -> TarIndex:
    return index_tar(memoryview(data))


def contents(data: bytes) -> list[tuple[str, bytes]]:
    return [(one.name, data[one.offset : one.offset + one.size]) for one in index(data).members]


def signed_header(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def raw_member(name: bytes, payload: bytes, **fields: bytes) -> bytes:
    """A header built by hand: fields are `size`, `kind`, `magic`, `prefix`."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    size = fields.get("size", b"%011o\0" % len(payload))
    block[124 : 124 + len(size)] = size
    block[156:157] = fields.get("kind", b"0")
    magic, prefix = fields.get("magic", b"ustar\x0000"), fields.get("prefix", b"")
    block[257 : 257 + len(magic)] = magic
    block[345 : 345 + len(prefix)] = prefix
    return signed_header(block) + payload + bytes(-len(payload) % 512)


@pytest.mark.parametrize("form", FORMATS)
def test_members_lie_where_tarfile_wrote_them(form: int) -> None:
    """Names and bytes of regular files come back in order, in each of tar's three formats."""
    data = tar_bytes(GOOD, form=form)
    assert contents(data) == GOOD
    assert index(data).flaw is None


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(form: int) -> None:
    """GNU and PAX long names and names outside ASCII come back exactly."""
    members = [("d" * 90 + "/" + "é" * 120 + ".jpg", b"1"), ("日本.txt", b"2"), ("short.txt", b"3")]
    assert contents(tar_bytes(members, form=form)) == members


def test_ustar_prefix_only_where_the_header_is_ustar() -> None:
    """The prefix field extends a ustar name and is ignored in an old GNU header, where it holds times."""
    data = raw_member(b"a.jpg", b"", prefix=b"dir") + raw_member(b"b.jpg", b"", magic=b"ustar  \0", prefix=b"12345")
    assert [one.name for one in index(data).members] == ["dir/a.jpg", "b.jpg"]


def test_old_v7_headers() -> None:
    """A header without magic and with a NUL type is a file, or a directory where its name ends in a slash."""
    data = raw_member(b"a.jpg", b"12", kind=b"\0", magic=b"") + raw_member(b"d/", b"", kind=b"\0", magic=b"")
    assert contents(data) == [("a.jpg", b"12")]
    assert index(data).skipped == (("d", "directory"),)


def test_base_256_size() -> None:
    """A size in GNU's base-256 notation is read."""
    data = raw_member(b"a.jpg", b"12345", size=b"\x80" + (5).to_bytes(11, "big"))
    assert contents(data) == [("a.jpg", b"12345")]


def test_pax_size_record() -> None:
    """A PAX size record replaces the size of the header."""
    record = b"9 size=5\n"
    data = raw_member(b"x", record, kind=b"x") + raw_member(b"a.jpg", b"12345", size=b"00000000000\0")
    assert contents(data) == [("a.jpg", b"12345")]


def test_global_pax_header_is_not_a_member() -> None:
    """A global header, as `git archive` writes, is passed over."""
    data = raw_member(b"g", b"18 comment=0123456\n"[:19], kind=b"g")
    assert index(data).flaw is not None  # the record's length is wrong on purpose: 19 bytes said to be 18
    data = raw_member(b"g", b"19 comment=0123456\n", kind=b"g") + raw_member(b"a.jpg", b"1")
    assert contents(data) == [("a.jpg", b"1")]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "device"),
        (tarfile.DIRTYPE, "directory"),
        (b"Z", "unknown-type"),
    ],
)
def test_what_is_no_regular_file_is_skipped(kind: bytes, why: str) -> None:
    """Links, devices, FIFOs, directories and unknown types are named as skipped; what follows is still read."""
    data = tar_bytes([(special("odd", kind, "/etc/passwd"), b""), ("a.jpg", b"1")])
    found = index(data)
    assert found.skipped == (("odd", why),)
    assert contents(data) == [("a.jpg", b"1")]


@pytest.mark.parametrize(
    "name", ["/etc/passwd.jpg", "../a.jpg", "a/../../b.jpg", "a\nb.jpg", "a\tb.jpg", "..", "", "a\x7f.jpg"]
)
def test_unsafe_names(name: str) -> None:
    """Absolute, climbing, empty names and names with control characters are unsafe."""
    assert is_unsafe(name)


def test_unsafe_member_is_skipped_and_the_next_is_read() -> None:
    """A member with an unsafe name is skipped with that reason."""
    data = tar_bytes([("../../evil.jpg", b"boom"), ("a..b/c.jpg", b"1")])
    assert index(data).skipped == (("../../evil.jpg", "unsafe-name"),)
    assert contents(data) == [("a..b/c.jpg", b"1")]


def test_nul_in_a_pax_name_is_unsafe() -> None:
    """A name with NUL, which only PAX can carry, is skipped."""
    body = b"path=a\0b.jpg\n"
    record = b"%d %s" % (len(body) + 3, body)
    data = raw_member(b"x", record, kind=b"x") + raw_member(b"a.jpg", b"1")
    assert [why for _, why in index(data).skipped] == ["unsafe-name"]


def test_pax_sparse_is_skipped_without_allocating() -> None:
    """A PAX-sparse member that claims a petabyte is skipped and the next member is read."""
    records = b"".join(
        b"%d %s" % (len(body) + 3, body)
        for body in (b"GNU.sparse.major=1\n", b"GNU.sparse.name=s.jpg\n", b"GNU.sparse.realsize=1125899906842624\n")
    )
    data = (
        raw_member(b"x", records, kind=b"x") + raw_member(b"GNUSparseFile.0/s.jpg", b"0\n") + raw_member(b"a.jpg", b"1")
    )
    found = index(data)
    assert found.skipped == (("s.jpg", "sparse"),)
    assert [one.name for one in found.members] == ["a.jpg"]


def test_old_gnu_sparse_with_continued_map_is_skipped() -> None:
    """An old GNU sparse member with a continued map is skipped to the right place."""
    block = bytearray(raw_member(b"s.jpg", b"", kind=b"S", magic=b"ustar  \0", size=b"%011o\0" % 512)[:512])
    block[482] = 1
    data = signed_header(block) + bytes(512) + b"d" * 512 + raw_member(b"a.jpg", b"1")
    found = index(data)
    assert found.skipped == (("s.jpg", "sparse"),)
    assert contents(data) == [("a.jpg", b"1")]


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11])
def test_a_size_beyond_the_file_is_truncation(size: bytes) -> None:
    """A declared size beyond the end of the shard is a flaw at the header's offset that names the member."""
    data = raw_member(b"a.jpg", b"1") + raw_member(b"b.jpg", b"only this", size=size)
    found = index(data)
    assert [one.name for one in found.members] == ["a.jpg"]
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset, found.flaw.name) == ("tar-truncated", 1024, "b.jpg")


def test_cut_inside_a_member_keeps_the_ones_before() -> None:
    """A shard cut inside a member keeps the members before it and names the one that was cut."""
    data = tar_bytes(GOOD)[: 512 + 1024 + 512 + 3]
    found = index(data)
    assert contents(data) == GOOD[:1]
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset, found.flaw.name) == ("tar-truncated", 1536, "a.txt")


def test_cut_inside_a_header() -> None:
    """A shard cut inside a header is truncated at that header's offset."""
    found = index(tar_bytes(GOOD)[: 1536 + 100])
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset) == ("tar-truncated", 1536)


def test_cut_inside_padding() -> None:
    """A shard cut inside the last padding keeps that member and is flagged, since what followed is unknown."""
    data = tar_bytes(GOOD[:1])[: 512 + 700 + 10]
    assert contents(data) == GOOD[:1]
    assert index(data).flaw is not None


def test_missing_end_blocks_after_a_whole_member_is_fine() -> None:
    """An archive without the two closing zero blocks is accepted."""
    data = tar_bytes(GOOD)[: 512 + 1024 + 1024]
    assert contents(data) == GOOD[:2]
    assert index(data).flaw is None


def test_bad_checksum() -> None:
    """A header whose checksum does not match stops the reading at its offset."""
    data = bytearray(tar_bytes(GOOD))
    data[1536 + 5] ^= 1
    found = index(bytes(data))
    assert contents(bytes(data)) == GOOD[:1]
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset) == ("tar-damaged", 1536)


def test_signed_checksum_of_old_tars() -> None:
    """A checksum that summed signed bytes is accepted, as in tarfile."""
    block = bytearray(raw_member("é.jpg".encode(), b"")[:512])
    block[148:156] = b" " * 8
    total = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    assert [one.name for one in index(bytes(block)).members] == ["é.jpg"]


@pytest.mark.parametrize("zeros", [1, 2, 30])
def test_members_after_zero_blocks_are_a_flaw(zeros: int) -> None:
    """Zero blocks end the archive; what follows them is reported at its offset and not read."""
    head = tar_bytes(GOOD[:1])[:1536]
    found = index(head + bytes(512 * zeros) + tar_bytes(GOOD[1:2]))
    assert [one.name for one in found.members] == ["a.jpg"]
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset) == ("tar-damaged", 1536 + 512 * zeros)


def test_trailing_data() -> None:
    """A non-zero byte after the end of the archive is a flaw at that byte."""
    data = tar_bytes(GOOD)
    found = index(data + bytes(7) + b"!")
    assert contents(data) == GOOD
    assert found.flaw is not None
    assert found.flaw.offset == len(data) + 7


@pytest.mark.parametrize("data", [b"<html>404</html>", b"<!DOCTYPE html>" + b"x" * 5000, b"\x89PNG" * 500, b"short"])
def test_not_a_tar(data: bytes) -> None:
    """A web page or any other file is one flaw at offset 0 and no exception."""
    found = index(data)
    assert not found.members
    assert found.flaw is not None
    assert (found.flaw.reason, found.flaw.offset) == ("tar-damaged", 0)
    assert "not a tar" in found.flaw.detail


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(10240), bytes(100)])
def test_empty_archives(data: bytes) -> None:
    """No bytes, or only zeros, is an empty archive."""
    assert index(data) == TarIndex((), (), None)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_header_extensions_are_bounded(kind: bytes) -> None:
    """A long-name or PAX header that declares gigabytes is damage, whatever the file holds."""
    data = raw_member(b"x", b"", kind=kind, size=b"70000000000\0") + bytes(4096)
    found = index(data)
    assert found.flaw is not None
    assert found.flaw.reason == "tar-damaged"


@pytest.mark.parametrize(
    "record", [b"5 a=b", b"0 a=b\n", b"99999999999999999999 a=b\n", b"abc", b"12 size=-5\n", b"9 size=x\n", b"6 =\n=\n"]
)
def test_malformed_pax_records(record: bytes) -> None:
    """A PAX header that contradicts itself is damage."""
    found = index(raw_member(b"x", record, kind=b"x") + raw_member(b"a.jpg", b"1"))
    assert found.flaw is not None
    assert found.flaw.reason == "tar-damaged"


def test_archive_that_ends_after_a_long_name() -> None:
    """A long-name header without its member is truncation that names the member."""
    found = index(raw_member(b"././@LongLink", b"d/lost.jpg\0", kind=b"L"))
    assert found.flaw is not None
    assert found.flaw.name == "d/lost.jpg"


def test_names_that_are_not_utf8_survive() -> None:
    """A name that is no UTF-8 comes back with surrogate escapes, byte for byte."""
    name = index(raw_member(b"\xff\xfe.jpg", b"")).members[0].name
    assert name.encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"


def test_many_header_extensions_stay_linear() -> None:
    """Twenty thousand chained long names are read without recursion in well under two seconds."""
    data = raw_member(b"x", b"n.jpg\0", kind=b"L") * 20_000 + raw_member(b"a.jpg", b"")
    started = time.perf_counter()
    assert [one.name for one in index(data).members] == ["n.jpg"]
    assert time.perf_counter() - started < 2


def test_the_file_system_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing an archive full of links and climbing names creates nothing."""
    monkeypatch.chdir(tmp_path)
    index(tar_bytes([("../x.jpg", b"1"), (special("l", tarfile.SYMTYPE, "/"), b""), (special("d", b"5"), b"")]))
    assert list(tmp_path.iterdir()) == []


def test_read_only_views_of_any_buffer() -> None:
    """A view over a bytearray and one over bytes give the same index."""
    data = tar_bytes(GOOD)
    assert index_tar(memoryview(bytearray(data))) == index(data)


def test_zero_sized_member_at_the_end() -> None:
    """An empty last member needs no data blocks."""
    block = bytearray(io.BytesIO(raw_member(b"e.jpg", b"")).read())
    pack_into("12s", block, 124, b"0".rjust(11, b" ") + b"\0")
    assert index(signed_header(block)).members == (Member("e.jpg", 512, 0),)
