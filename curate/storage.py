"""Every durable byte is written here: attempt, fsync, rename, publish by put-if-absent.

All other modules write through `Disk`, a dozen primitive operations, so that one fake disk can replay every prefix of
a run's operations and lose every un-synced subset (`tests/fault/crash_disk.py`). Costs one fsync of each file and of
each directory that gains a name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from curate.errors import StorageError

T = TypeVar("T")
_STAGED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


class Disk(Protocol):
    """The primitive operations that durability rests on."""

    def create(self, path: Path) -> IO[bytes]: ...
    def sync(self, file: IO[bytes]) -> None: ...
    def sync_directory(self, path: Path) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def link(self, old: Path, new: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def make_directory(self, path: Path) -> None: ...


class LocalDisk:
    """The operating system's file system."""

    def create(self, path: Path) -> IO[bytes]:
        return open(path, "xb")  # the caller closes it

    def sync(self, file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


LOCAL = LocalDisk()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, it resumes",
            errno.EDQUOT: "the quota is used up; free some space and run the same command again, it resumes",
            errno.EFBIG: "the file-size limit is reached; raise it and run the same command again, it resumes",
            errno.EROFS: "the file system is read-only; choose another output directory",
            errno.EACCES: "permission denied; choose another output directory or change its owner",
            errno.EPERM: "not permitted; choose another output directory or change its owner",
            errno.ENOTDIR: "a part of the path is a file; choose another output directory",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise StorageError(f"cannot write {path}: {advice}") from error


class HashingWriter(io.RawIOBase):
    """A binary file that knows the sha256 and the size of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def make_directory(path: Path, disk: Disk = LOCAL) -> None:
    """Create `path` and its parents; the names that are new are durable."""
    with storage_errors(path):
        new = [step for step in (path, *path.parents) if not step.exists()]
        disk.make_directory(path)
        for step in reversed(new):
            disk.sync_directory(step.parent)


def replace_file(path: Path, data: bytes, disk: Disk = LOCAL) -> None:
    """Write `path` so that it is at any time absent, the old bytes or the new ones."""
    with storage_errors(path):
        _staged(path, lambda staged: _write_synced(staged, data, disk), lambda staged: disk.rename(staged, path), disk)
        disk.sync_directory(path.parent)


def put_if_absent(path: Path, data: bytes, disk: Disk = LOCAL) -> bool:
    """Create `path` with `data` unless it exists; True if this call created it. Atomic among all writers."""

    def place(staged: Path) -> bool:
        try:
            disk.link(staged, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(staged)
        return True

    with storage_errors(path):
        created = _staged(path, lambda staged: _write_synced(staged, data, disk), place, disk)
        disk.sync_directory(path.parent)
    return created


def write_file(path: Path, data: bytes, disk: Disk = LOCAL) -> None:
    """Create `path` with `data`, synced; it must not exist. Its name lasts once the directory is synced."""
    with storage_errors(path):
        _write_synced(path, data, disk)


def replace_directory(new: Path, path: Path, disk: Disk = LOCAL) -> None:
    """Give the complete directory `new` the name `path`; what has that name steps aside first, and back on failure."""
    with storage_errors(path):
        disk.sync_directory(new)
        aside = path.with_name(f".{path.name}.{os.urandom(6).hex()}.old")
        replaced = path.exists()
        if replaced:
            disk.rename(path, aside)
        try:
            disk.rename(new, path)
        except BaseException:
            if replaced:
                disk.rename(aside, path)
            raise
        disk.sync_directory(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def publish(blob: Path, name: Path, disk: Disk = LOCAL) -> None:
    """Give `blob` a second name, replacing what has that name now."""

    def place(staged: Path) -> None:
        disk.rename(staged, name)
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(staged)  # renaming onto another name of the same file does nothing (POSIX)

    with storage_errors(name):
        _staged(name, lambda staged: disk.link(blob, staged), place, disk)
        disk.sync_directory(name.parent)


def remove(path: Path, disk: Disk = LOCAL) -> None:
    """Remove a name if it is there."""
    with storage_errors(path), contextlib.suppress(FileNotFoundError):
        disk.unlink(path)


def sync_directory(path: Path, disk: Disk = LOCAL) -> None:
    """Make the names that were removed from a directory stay removed after a loss of power."""
    with storage_errors(path):
        disk.sync_directory(path)


def leftovers(directory: Path) -> list[Path]:
    """Temporary names in `directory` that a process which was killed never gave their final name."""
    return [path for path in sorted(directory.glob(".*.tmp")) if _STAGED.fullmatch(path.name)]


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN; what digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def readable_json(value: Any) -> bytes:
    """JSON for people: sorted, indented, ending in a newline."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staged(path: Path, fill: Callable[[Path], None], place: Callable[[Path], T], disk: Disk) -> T:
    """Fill a temporary name beside `path` and place it there.

    Once more if the temporary name is gone: another driver that finished this run took it for a leftover.
    """
    for last in (False, False, True):
        staged = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        try:
            fill(staged)
            return place(staged)
        except FileNotFoundError:
            if last:
                raise
        except OSError:
            with contextlib.suppress(OSError):
                disk.unlink(staged)
            raise
    raise AssertionError("the last round returns or raises")


def _write_synced(path: Path, data: bytes, disk: Disk) -> None:
    file = disk.create(path)
    try:
        file.write(data)
        disk.sync(file)
    finally:
        file.close()
