"""Durable writing on a sound disk; crashes are in tests/fault."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from pathlib import Path

import pytest

from curate.errors import StorageError
from curate.storage import (
    HashingWriter,
    canonical_json,
    file_digest,
    leftovers,
    make_directory,
    publish,
    put_if_absent,
    readable_json,
    remove,
    replace_file,
    storage_errors,
)


def test_the_first_put_wins(tmp_path: Path) -> None:
    """`put_if_absent` is True once, and the bytes of the first stay."""
    assert put_if_absent(tmp_path / "f", b"first")
    assert not put_if_absent(tmp_path / "f", b"second")
    assert (tmp_path / "f").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_of_many_simultaneous_puts_one_wins(tmp_path: Path) -> None:
    """Sixteen threads put at once: one is told that it created the file, and its bytes are there."""
    barrier, won = threading.Barrier(16), []

    def put(number: int) -> None:
        barrier.wait()
        if put_if_absent(tmp_path / "f", f"{number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f"{number}" for number in won] == [(tmp_path / "f").read_text()]
    assert len(list(tmp_path.iterdir())) == 1


def test_replacing_leaves_one_file(tmp_path: Path) -> None:
    """`replace_file` creates and replaces, and leaves no temporary name."""
    for data in (b"old", b"new"):
        replace_file(tmp_path / "f", data)
        assert (tmp_path / "f").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_publishing_gives_a_second_name_to_the_same_bytes(tmp_path: Path) -> None:
    """A published file shares its bytes on disk with the blob, and replaces what had the name."""
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "name").write_bytes(b"old")
    publish(tmp_path / "blob", tmp_path / "name")
    assert (tmp_path / "name").samefile(tmp_path / "blob")
    assert len(list(tmp_path.iterdir())) == 2
    publish(tmp_path / "blob", tmp_path / "name")
    assert not leftovers(tmp_path)  # POSIX: renaming onto another name of the same file does nothing


def test_a_missing_blob_is_not_published(tmp_path: Path) -> None:
    """Publishing what is not there fails and leaves the name as it was."""
    (tmp_path / "name").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "blob", tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == b"old"


def test_removing_what_is_absent_is_fine(tmp_path: Path) -> None:
    """`remove` of a missing name does nothing."""
    (tmp_path / "f").touch()
    remove(tmp_path / "f")
    remove(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_directories_are_made_with_their_parents(tmp_path: Path) -> None:
    """`make_directory` makes parents, and is content with what is there."""
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    """A path that leads through a file is a StorageError with advice."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of the path is a file; choose another output directory"):
        make_directory(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again, it resumes"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "file-size limit"),
        (errno.EROFS, "read-only; choose another output directory"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_what_stops_writing_is_said_with_advice(tmp_path: Path, number: int, advice: str) -> None:
    """Every common failure to write names the path, the cause and what to do."""
    with pytest.raises(StorageError, match=advice) as caught, storage_errors(tmp_path / "f"):
        raise OSError(number, "system text")
    assert str(tmp_path / "f") in str(caught.value)
    assert caught.value.exit_code == 1


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    """An OSError without advice is not dressed up."""
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_the_writer_hashes_what_it_writes(tmp_path: Path) -> None:
    """`HashingWriter` knows the digest, the size and the position of what went through it, in any buffer type."""
    with open(tmp_path / "f", "wb") as file:
        writer = HashingWriter(file)
        assert [writer.write(part) for part in (b"ab", memoryview(b"cde"), bytearray(b""))] == [2, 3, 0]
        assert (writer.tell(), writer.size) == (5, 5)
    assert writer.sha256 == hashlib.sha256(b"abcde").hexdigest() == file_digest(tmp_path / "f")


def test_json_has_one_spelling() -> None:
    """Canonical JSON does not depend on the order of insertion; NaN is refused in both spellings."""
    assert canonical_json({"b": 1, "a": [True, None]}) == b'{"a":[true,null],"b":1}'
    assert json.loads(readable_json({"ä": 1})) == {"ä": 1}
    assert readable_json({"ä": 1}).endswith(b"\n")
    for spelling in (canonical_json, readable_json):
        with pytest.raises(ValueError):
            spelling(float("nan"))


def test_only_our_temporary_names_are_leftovers(tmp_path: Path) -> None:
    """A user's hidden files are never taken for leftovers."""
    ours = tmp_path / ".sizes.json.0123456789ab.tmp"
    for path in (ours, tmp_path / ".notes.tmp", tmp_path / "x.tmp", tmp_path / ".sizes.json"):
        path.touch()
    assert leftovers(tmp_path) == [ours]
