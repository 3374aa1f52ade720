"""The tar index against the standard library's tarfile, on archives that hypothesis makes, cuts and corrupts."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.shards.samples import group_samples
from curate.shards.tarindex import TarIndex, index_tar, is_unsafe
from curate.shards.tarwriter import tar_end, tar_member
from tests.making import special, tar_bytes

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

short_names = st.text("ab.é日/-_ =0", min_size=1, max_size=30)
long_names = st.builds(
    lambda part, times: (part + "/") * times + "x.jpg", st.text("abé.", min_size=1, max_size=9), st.integers(8, 40)
)
names = st.one_of(short_names, long_names, st.sampled_from(["../up.jpg", "/abs.jpg", "a/../b", "./a.jpg", "a..jpg"]))
payloads = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda n, b: b * n, st.sampled_from([511, 512, 513, 1500]), st.binary(min_size=1, max_size=1)),
)
kinds = st.sampled_from(
    [None, None, None, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
members = st.lists(st.tuples(names, payloads, kinds), max_size=8)


def build(drawn: list[tuple[str, bytes, bytes | None]], form: int) -> bytes:
    """An archive of what was drawn, less what the format cannot hold."""
    kept: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for name, payload, kind in drawn:
        one: tuple[str | tarfile.TarInfo, bytes] = (
            (name, payload) if kind is None else (special(name, kind, "target"), b"")
        )
        try:
            tar_bytes([one], form=form)
        except ValueError:  # a name that ustar cannot split
            continue
        kept.append(one)
    return tar_bytes(kept, form=form)


def index(data: bytes) -> TarIndex:
    return index_tar(memoryview(data))


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        return [(one.name, one.offset_data, one.size) for one in archive if one.isreg() and not is_unsafe(one.name)]


def found_in(data: bytes) -> list[tuple[str, int, int]]:
    return [(one.name, one.offset, one.size) for one in index(data).members]


@pytest.mark.parametrize("form", FORMATS)
@quick
@given(drawn=members)
def test_same_members_as_tarfile(form: int, drawn: list[tuple[str, bytes, bytes | None]]) -> None:
    """Names, offsets and sizes of regular files are tarfile's, and every other member is accounted for as skipped."""
    data = build(drawn, form)
    assert found_in(data) == by_tarfile(data)
    assert index(data).flaw is None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        assert len(index(data).members) + len(index(data).skipped) == len(archive.getmembers())


@pytest.mark.parametrize("form", FORMATS)
@quick
@given(drawn=members, part=st.floats(0, 1), edge=st.integers(-2, 2))
def test_a_cut_archive_keeps_a_prefix(
    form: int, drawn: list[tuple[str, bytes, bytes | None]], part: float, edge: int
) -> None:
    """Cut at any offset, the members found are a prefix of the whole archive's and lie within what is left."""
    data = build(drawn, form)
    at = int(part * len(data))
    for cut in {at, max(0, min(len(data), at // 512 * 512 + edge))}:
        found = index(data[:cut])
        whole = index(data).members
        assert found.members == whole[: len(found.members)]
        assert all(one.offset + one.size <= cut for one in found.members)
        lost = [one for one in whole[len(found.members) :] if one.offset - 512 < cut < one.offset + one.size]
        assert found.flaw is not None or not lost


@quick
@given(
    drawn=members,
    form=st.sampled_from(FORMATS),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
)
def test_corruption_never_raises(
    drawn: list[tuple[str, bytes, bytes | None]], form: int, hits: list[tuple[float, int]]
) -> None:
    """Whatever bytes change, indexing and grouping end without an exception, inside the data, a row for every flaw."""
    data = bytearray(build(drawn, form))
    for part, value in hits:
        data[min(len(data) - 1, int(part * len(data)))] = value
    check_sane(bytes(data))


@quick
@given(
    drawn=members,
    form=st.sampled_from(FORMATS),
    block=st.integers(0, 40),
    at=st.integers(0, 499),
    value=st.binary(min_size=1, max_size=12),
)
def test_hostile_headers_with_a_right_checksum_never_raise(
    drawn: list[tuple[str, bytes, bytes | None]], form: int, block: int, at: int, value: bytes
) -> None:
    """Fields overwritten in a header whose checksum is then mended reach the parser and cause no exception."""
    data = bytearray(build(drawn, form))
    start = block * 512 % len(data)
    header = data[start : start + 512]
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    data[start : start + 512] = header[:512]
    check_sane(bytes(data))


@quick
@given(data=st.binary(max_size=3000))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    """Bytes that are no archive give at most a flaw."""
    check_sane(data)


def check_sane(data: bytes) -> None:
    found = index(data)
    assert all(one.offset >= 0 and one.size >= 0 and one.offset + one.size <= len(data) for one in found.members)
    assert not any(is_unsafe(one.name) for one in found.members)
    entries = group_samples(found, "00" * 32)
    assert [one.ordinal for one in entries] == list(range(len(entries)))
    assert len({one.sample_id for one in entries}) == len(entries)
    if found.flaw is not None:
        assert 0 <= found.flaw.offset <= len(data)
        assert any(one.reason == found.flaw.reason for one in entries)


safe_names = names.filter(lambda name: not is_unsafe(name) and not name.endswith("/"))


@quick
@given(drawn=st.lists(st.tuples(safe_names, payloads), max_size=8))
def test_written_archives_come_back(drawn: list[tuple[str, bytes]]) -> None:
    """What tarwriter writes, tarfile and the index read back, and writing twice gives the same bytes."""

    def write() -> bytes:
        data = b"".join(bytes(part) for name, payload in drawn for part in tar_member(name, payload))
        return data + tar_end(len(data))

    data = write()
    assert data == write()
    assert len(data) % 10240 == 0
    assert found_in(data) == by_tarfile(data)
    assert [(name, data[at : at + size]) for name, at, size in found_in(data)] == drawn
