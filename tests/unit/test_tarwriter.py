"""Written members: the same bytes every time, readable by everyone."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from curate.shards.tarindex import index_tar
from curate.shards.tarwriter import TAR_END, tar_end, tar_member

MEMBERS = [("000000000.jpg", b"\xff\xd8" + b"x" * 700), ("000000000.txt", b"a cube"), ("000000001.txt", b"")]


def archive(members: list[tuple[str, bytes]]) -> bytes:
    data = b"".join(bytes(part) for name, payload in members for part in tar_member(name, payload))
    return data + tar_end(len(data))


def test_tarfile_reads_it_and_finds_only_fixed_fields() -> None:
    """The standard library reads names and payloads back; time, owner and mode are constants."""
    with tarfile.open(fileobj=io.BytesIO(archive(MEMBERS))) as opened:
        found = opened.getmembers()
        assert [(one.name, opened.extractfile(one).read()) for one in found] == MEMBERS  # type: ignore[union-attr]
    assert {(one.mtime, one.uid, one.gid, one.mode, one.uname, one.gname, one.type) for one in found} == {
        (0, 0, 0, 0o644, "", "", tarfile.REGTYPE)
    }


def test_bytes_are_those_of_the_standard_library() -> None:
    """The archive is the one that tarfile writes in ustar with the same fixed fields."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for name, payload in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            opened.addfile(info, io.BytesIO(payload))
    assert archive(MEMBERS) == out.getvalue()


def test_bytes_are_pinned() -> None:
    """The digest of a small archive does not change from release to release."""
    assert hashlib.sha256(archive(MEMBERS)).hexdigest() == PINNED


PINNED = "fbf83ebcc3869e7db9643121d7690b37105e9bff3ac727eb5cbe2d92d1be0836"


def test_our_own_index_reads_it() -> None:
    """The hardened index finds every member without a flaw."""
    data = archive(MEMBERS)
    found = index_tar(memoryview(data))
    assert [(one.name, data[one.offset : one.offset + one.size]) for one in found.members] == MEMBERS
    assert found.flaw is None


def test_webdataset_reads_it(tmp_path: Path) -> None:
    """webdataset groups the members into samples."""
    shard = tmp_path / "00000.tar"
    shard.write_bytes(archive(MEMBERS[:2]))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(one["__key__"], one["txt"]) for one in samples] == [("000000000", b"a cube")]


@pytest.mark.parametrize("name", ["n" * 200 + ".jpg", "é.jpg", "d" * 99 + "/" + "f" * 99 + ".jpg"])
def test_odd_names_come_back(name: str) -> None:
    """A long name or one outside ASCII gets a PAX header and is read back by tarfile and by the index."""
    data = archive([(name, b"1")])
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        assert opened.getnames() == [name]
    assert [one.name for one in index_tar(memoryview(data)).members] == [name]


@pytest.mark.parametrize("name", ["", "/a.jpg", "../a.jpg", "a\nb", "a\0b", "d/"])
def test_unsafe_names_are_not_written(name: str) -> None:
    """A name that a careful reader would refuse is refused here."""
    with pytest.raises(ValueError, match="tar member"):
        list(tar_member(name, b""))


def test_payload_is_passed_on_uncopied() -> None:
    """A memoryview payload is yielded as it is."""
    payload = memoryview(b"abc")
    assert any(part is payload for part in tar_member("a.txt", payload))


@pytest.mark.parametrize("written", [0, 512, 9216, 9728, 10240, 10752])
def test_the_end_fills_a_record(written: int) -> None:
    """The end is at least two zero blocks and fills a record of 10240 bytes."""
    end = tar_end(written)
    assert end.startswith(TAR_END)
    assert (written + len(end)) % 10240 == 0
    assert len(end) < 10240 + 1024
