"""Turn what a user types into a list of shards, and open each as one read-only view of memory.

Expanding costs one stat per shard; opening a local shard maps it (no copy), a remote one is streamed once to a
temporary file that is already unlinked. Only the listed schemes are opened and nothing is ever given to a shell:
`pipe:` and whatever else webdataset or fsspec would run are refused. A view must not outlive its `with` block.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from curate.errors import ShardError, UsageError

SCHEMES: Final = ("file", "memory", "s3", "gs", "gcs", "http", "https", "hf", "az", "abfs")
_LONGEST_PATTERN: Final = 16 * 1024
_COPY: Final = 8 * 1024 * 1024
Patterns = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_RANGE: Final = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_GLOB: Final = re.compile(r"[*?\[]")
_MARKS: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
_PACKED_NAME: Final = re.compile(r"\.(tgz|tbz2|txz|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)
_PACKED_MAGIC: Final = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh91AY&SY", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)


@dataclass(frozen=True, slots=True)
class ShardSource:
    """An input shard as it was when the run was planned: absolute path or URL, bytes, a remote file's etag or date."""

    url: str
    size: int
    etag: str = ""

    @property
    def name(self) -> str:
        """The base name, "00000.tar", without a URL's query."""
        path = urlsplit(self.url).path if "://" in self.url else self.url
        return path.rstrip("/").rsplit("/", 1)[-1]


def expand_shards(patterns: Patterns, *, limit: int = 1_000_000) -> list[ShardSource]:
    """The shards that `patterns` (or one pattern) name, in the order given; what a directory or a glob holds is sorted.

    A pattern is a file, a directory (every *.tar below it), a glob, a brace pattern as webdataset and open_clip take
    them (`a/{00000..00099}.tar`), several of these joined by `::`, or a URL with a scheme of `SCHEMES`. An existing
    path is taken literally. Raises UsageError for nothing found, a file that is missing, the same shard twice, a scheme
    that is not allowed or more than `limit` shards; ShardError for what is not a regular file or is compressed.

    Example: `expand_shards(["data/{00000..00002}.tar"])` gives three sources.
    """
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    urls = list(islice(_urls(patterns, limit), limit + 1))
    if len(urls) > limit:
        raise UsageError(f"the patterns name more than {limit} shards; give fewer at a time")
    if not urls:
        named = ", ".join(str(pattern) for pattern in patterns) or "no pattern given"
        raise UsageError(f"no shard found: {named}; shards end in .tar")
    twice = next((url for url, count in _counted(urls) if count > 1), None)
    if twice is not None:
        raise UsageError(f"shard {twice} is named twice; list each shard once")
    return [_stat(url) for url in urls]


@contextmanager
def open_shard(source: ShardSource, *, spool_dir: Path | None = None) -> Iterator[memoryview]:
    """The bytes of a shard as a read-only view, valid inside the `with` block; an empty file gives an empty view.

    Raises ShardError where the shard cannot be read, is compressed, or has another size or etag than when it was
    planned. A local shard that another process shortens while it is open ends this process with SIGBUS: that is how
    mappings work.
    """
    opened = _remote(source, spool_dir) if "://" in source.url else _local(source)
    with opened as file, _mapped(file, source) as view:
        _refuse_packed(source.url, bytes(view[:16]))
        yield view


def shard_digest(data: memoryview) -> str:
    """sha256 of the whole shard in hex; about 1.5 GB/s on a core with SHA extensions, and the lock is released."""
    return hashlib.sha256(data).hexdigest()


def _counted(urls: Iterable[str]) -> Iterable[tuple[str, int]]:
    counts: dict[str, int] = {}
    for url in urls:
        counts[url] = counts.get(url, 0) + 1
    return counts.items()


def _urls(patterns: Sequence[str | os.PathLike[str]], limit: int) -> Iterator[str]:
    for given in patterns:
        pattern = os.fspath(given)
        if pattern and os.path.exists(pattern):
            yield from _local_urls(pattern)
            continue
        for part in pattern.split("::"):
            for one in _braces(part, limit):
                yield from _remote_urls(one) if _is_remote(one) else _local_urls(one.removeprefix("file://"))


def _is_remote(pattern: str) -> bool:
    match = _SCHEME.match(pattern)
    if match is None:
        return False
    scheme = match[1].lower()
    if scheme not in SCHEMES or not pattern[match.end() :].startswith("//"):
        allowed = ", ".join(SCHEMES)
        raise UsageError(f"{pattern!r}: the scheme {scheme!r} is not opened; allowed are {allowed} and local paths")
    return scheme != "file"


def _braces(pattern: str, limit: int) -> Iterable[str]:
    """Expand braces, but first bound what they can expand to: braceexpand would hold a whole range in memory."""
    if "{" not in pattern:
        return (pattern,)
    total = 1
    for low, high in _RANGE.findall(pattern):
        total *= _length(low, high)
        if total > limit:
            raise UsageError(f"{pattern[:200]!r} names more than {limit} shards")
    if len(pattern) > _LONGEST_PATTERN:
        raise UsageError(f"a brace pattern of {len(pattern)} characters; the limit is {_LONGEST_PATTERN}")
    from braceexpand import braceexpand

    try:
        return list(islice(braceexpand(pattern), limit + 1))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{pattern[:200]!r}: the braces cannot be expanded: {error}") from None


def _length(low: str, high: str) -> int:
    if max(len(low), len(high)) > 18:
        return 10**18
    return abs(int(high) - int(low)) + 1


def _local_urls(pattern: str) -> Iterator[str]:
    if os.path.isdir(pattern):
        yield from sorted(os.path.abspath(path) for path in Path(pattern).rglob("*.tar") if path.is_file())
    elif _GLOB.search(pattern) and not os.path.exists(pattern):
        found = sorted(glob.glob(pattern, recursive=True))
        yield from (os.path.abspath(path) for path in found if os.path.isfile(path))
    elif pattern:
        yield os.path.abspath(pattern)


def _remote_urls(pattern: str) -> Iterator[str]:
    if pattern.lower().startswith("http"):
        yield pattern  # listing a web page is guessing, and "?" starts a query there
        return
    system, path = _file_system(pattern)
    try:
        if _GLOB.search(path):
            found = sorted(map(str, system.glob(path)))
        elif not path.endswith(".tar") and system.isdir(path):
            found = sorted(str(one) for one in system.find(path) if str(one).endswith(".tar"))
        else:
            found = [path]
    except Exception as error:
        raise _unreadable(pattern, error) from error
    yield from (str(system.unstrip_protocol(one)) for one in found)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url}: {error}") from error
    except Exception as error:
        raise _unreadable(url, error) from error
    return system, str(path)


def _unreadable(url: str, error: BaseException) -> ShardError:
    why = f"{type(error).__name__}: {error}"
    return ShardError(f"shard {url} cannot be read: {why}; check the path and the access rights")


def _stat(url: str) -> ShardSource:
    if _PACKED_NAME.search(urlsplit(url).path if "://" in url else url):
        raise ShardError(f"shard {url} is compressed; decompress it first, members are read by their offset")
    try:
        return _remote_stat(url, *_file_system(url)) if "://" in url else ShardSource(url, _local_size(url))
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(f"shard {url}: there is no such file; check the path and the pattern") from error
        raise


def _local_size(path: str) -> int:
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise ShardError(f"shard {path} is not a regular file; name a .tar file or a directory of them")
    return found.st_size


def _remote_stat(url: str, system: Any, path: str) -> ShardSource:
    try:
        info = system.info(path)
    except Exception as error:
        raise _unreadable(url, error) from error
    if info.get("size") is None:
        raise ShardError(f"shard {url}: the server does not tell its size; copy it to a disk first")
    mark = next((info[key] for key in _MARKS if info.get(key)), "")
    return ShardSource(url, int(info["size"]), str(mark).strip('"'))


@contextmanager
def _local(source: ShardSource) -> Iterator[Any]:
    size = _local_size(source.url)
    if size != source.size:
        raise _changed(source, f"{size} bytes")
    try:
        file = open(source.url, "rb")  # noqa: SIM115 - closed below; only the opening belongs in the try
    except OSError as error:
        raise _unreadable(source.url, error) from error
    with file:
        yield file


@contextmanager
def _remote(source: ShardSource, spool_dir: Path | None) -> Iterator[Any]:
    system, path = _file_system(source.url)
    now = _remote_stat(source.url, system, path)
    if now != source:
        raise _changed(source, f"{now.size} bytes, etag {now.etag!r}")
    with tempfile.TemporaryFile(dir=spool_dir, prefix="curate-shard-") as spool:
        try:
            with system.open(path, "rb") as remote:
                _copy(remote, spool, source)
        except ShardError:
            raise
        except Exception as error:
            raise _unreadable(source.url, error) from error
        yield spool


def _copy(remote: Any, spool: Any, source: ShardSource) -> None:
    held = 0
    while chunk := remote.read(_COPY):
        held += len(chunk)
        if held > source.size:
            break
        spool.write(chunk)
    spool.flush()
    if held != source.size:
        raise _changed(source, f"{held} bytes read")


def _changed(source: ShardSource, found: str) -> ShardError:
    planned = f"{source.size} bytes" + (f", etag {source.etag!r}" if source.etag else "")
    return ShardError(f"shard {source.url} changed since it was planned: {planned} then, {found} now; start a new run")


@contextmanager
def _mapped(file: Any, source: ShardSource) -> Iterator[memoryview]:
    size = os.fstat(file.fileno()).st_size
    if size != source.size:
        raise _changed(source, f"{size} bytes")
    if not size:
        yield memoryview(b"")
        return
    try:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _unreadable(source.url, error) from error
    view = memoryview(mapping)
    try:
        yield view
    finally:
        with suppress(BufferError):  # a slice is still held somewhere; the mapping then goes when that slice goes
            view.release()
            mapping.close()


def _refuse_packed(url: str, head: bytes) -> None:
    kind = next((kind for magic, kind in _PACKED_MAGIC if head.startswith(magic)), None)
    if kind is not None:
        raise ShardError(f"shard {url} is compressed ({kind}); decompress it first, members are read by their offset")
