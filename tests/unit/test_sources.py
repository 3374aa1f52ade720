"""From patterns to shards, and from a shard to its bytes."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import fsspec
import pytest

from curate.errors import ShardError, UsageError
from curate.shards.sources import ShardSource, expand_shards, open_shard, shard_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "sub/00003.tar", "notes.txt"):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    return tmp_path / "a"


def names(patterns: list[str | os.PathLike[str]], **options: int) -> list[str]:
    return [one.name for one in expand_shards(patterns, **options)]


def test_files_keep_the_order_given(folder: Path) -> None:
    """Files come in argument order with absolute path, size and no etag."""
    found = expand_shards([folder / "00002.tar", str(folder / "00000.tar")])
    assert found[0] == ShardSource(str(folder / "00002.tar"), 900, "")
    assert [one.name for one in found] == ["00002.tar", "00000.tar"]


def test_directories_braces_globs_and_joined_patterns(folder: Path) -> None:
    """A directory gives its tars at any depth, braces and globs expand, `::` joins; each part is sorted."""
    assert names([folder]) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert names([f"{folder}/{{00000..00002}}.tar"]) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names([f"{folder}/*.tar"]) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names([f"{folder}/sub/*.tar::{folder}/{{00001,00000}}.tar"]) == ["00003.tar", "00001.tar", "00000.tar"]
    assert names([f"file://{folder}/00001.tar"]) == ["00001.tar"]


def test_an_existing_name_is_taken_literally(tmp_path: Path) -> None:
    """A file whose name holds braces, brackets or a colon is that file."""
    for name in ("a{0..1}.tar", "b[x].tar", "pipe:c.tar"):
        (tmp_path / name).write_bytes(b"")
        assert names([tmp_path / name]) == [name]


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is resolved when the run is planned, so that a worker elsewhere finds it."""
    monkeypatch.chdir(folder)
    assert expand_shards(["00000.tar"])[0].url == str(folder / "00000.tar")


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:cat /etc/passwd",
        "exec:ls",
        "ftp://host/a.tar",
        "ssh://host/a.tar",
        "reference://x",
        "simplecache:x",
        "s3:a.tar",
        "python://os",
        "FILE:a.tar",
    ],
)
def test_schemes_outside_the_list_are_refused(pattern: str) -> None:
    """Pipes, shells and unlisted schemes are a usage error that names the allowed ones."""
    with pytest.raises(UsageError, match="is not opened; allowed are file, memory, s3"):
        expand_shards([pattern])


def test_no_shell_and_no_rewriting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset's GOPEN_REWRITE is not heeded and nothing is run."""
    monkeypatch.setenv("GOPEN_REWRITE", f"{folder}=pipe:touch {folder}/ran")
    monkeypatch.setattr(os, "system", None)
    with open_shard(expand_shards([folder / "00000.tar"])[0]) as view:
        assert len(view) == 900
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "pattern",
    ["{0..999999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar", "{0.." + "9" * 5000 + "}", "{" * 20_000 + "}"],
)
def test_huge_brace_patterns_are_refused_at_once(pattern: str) -> None:
    """A pattern that would expand to billions is refused without expanding it."""
    with pytest.raises(UsageError):
        expand_shards([pattern])


def test_limit(folder: Path) -> None:
    """More shards than the limit are refused."""
    assert len(names([folder], limit=4)) == 4
    with pytest.raises(UsageError, match="more than 3"):
        names([folder], limit=3)


def test_one_pattern_need_not_be_a_list(folder: Path) -> None:
    """A single path or string is one pattern, not a sequence of letters."""
    assert expand_shards(folder) == expand_shards(str(folder)) == expand_shards([folder])


def test_missing_files_are_named(folder: Path) -> None:
    """A missing file, in a brace pattern too, is a UsageError with its path."""
    with pytest.raises(UsageError, match=r"00007\.tar"):
        names([f"{folder}/{{00000,00007}}.tar"])


@pytest.mark.parametrize("pattern", ["*.nothing", ""])
def test_nothing_found(folder: Path, pattern: str) -> None:
    """Patterns that name nothing are a usage error."""
    with pytest.raises(UsageError, match="no shard found"):
        names([f"{folder}/{pattern}" if pattern else ""])
    with pytest.raises(UsageError, match="no pattern given"):
        names([])


def test_twice_the_same(folder: Path) -> None:
    """The same shard twice is a usage error that names it."""
    with pytest.raises(UsageError, match=r"00000\.tar is named twice"):
        names([folder, folder / "00000.tar"])


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar.bz2", "a.tar.xz"])
def test_compressed_names_are_refused(tmp_path: Path, name: str) -> None:
    """A compressed shard is refused with the advice to decompress it."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ShardError, match="decompress it first"):
        names([tmp_path / name])


def test_compressed_contents_are_refused(tmp_path: Path) -> None:
    """A gzip file that calls itself .tar is refused when it is opened."""
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(ShardError, match="gzip"), open_shard(expand_shards([tmp_path / "a.tar"])[0]):
        pass


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    """A named pipe is refused, not waited for."""
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ShardError, match="not a regular file"):
        names([tmp_path / "a.tar"])


def test_open_maps_the_bytes_read_only(folder: Path) -> None:
    """A local shard is a read-only view of its bytes; its digest is sha256."""
    source = expand_shards([folder / "00001.tar"])[0]
    with open_shard(source) as view:
        assert view.readonly
        assert bytes(view) == b"00001.tar" * 100
        assert shard_digest(view) == hashlib.sha256(b"00001.tar" * 100).hexdigest()


def test_a_slice_kept_too_long_does_not_hide_an_error(folder: Path) -> None:
    """An exception inside the block comes out as it is, even while slices of the view are held."""
    held = []
    source = expand_shards([folder / "00001.tar"])[0]

    def read() -> None:
        with open_shard(source) as view:
            held.append(view[:10])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read()


def test_an_empty_shard_is_an_empty_view(tmp_path: Path) -> None:
    """A file of 0 bytes opens as an empty view."""
    (tmp_path / "a.tar").write_bytes(b"")
    with open_shard(expand_shards([tmp_path / "a.tar"])[0]) as view:
        assert len(view) == 0


def test_a_shard_that_changed_is_refused(folder: Path) -> None:
    """A shard that has grown since it was planned is a ShardError with both sizes; one that vanished names its path."""
    source = expand_shards([folder / "00001.tar"])[0]
    (folder / "00001.tar").write_bytes(b"longer" * 900)
    with pytest.raises(ShardError, match="900 bytes then, 5400 bytes now"), open_shard(source):
        pass
    (folder / "00001.tar").unlink()
    with pytest.raises(ShardError, match=r"00001\.tar cannot be read"), open_shard(source):
        pass


def test_remote_shards_are_spooled_and_cleaned_up(tmp_path: Path) -> None:
    """A shard behind an fsspec URL is copied to the spool folder while open, and nothing stays there."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/remote/00000.tar": b"zero" * 300, "/remote/00001.tar": b"one" * 300, "/remote/x.txt": b""})
    assert names(["memory://remote/{00000..00001}.tar"]) == ["00000.tar", "00001.tar"]
    assert names(["memory://remote/*.tar"]) == ["00000.tar", "00001.tar"]
    found = expand_shards(["memory://remote"])
    assert [one.name for one in found] == ["00000.tar", "00001.tar"]
    assert found[0].etag
    with open_shard(found[0], spool_dir=tmp_path) as view:
        assert bytes(view) == b"zero" * 300
    assert list(tmp_path.iterdir()) == []
    memory.pipe({"/remote/00000.tar": b"zero" * 301})
    with pytest.raises(ShardError, match="changed"), open_shard(found[0], spool_dir=tmp_path):
        pass
    with pytest.raises(UsageError, match=r"00009\.tar"):
        names(["memory://remote/00009.tar"])


def test_name_without_query() -> None:
    """The name of a URL is its last part, without the query of a signed address."""
    assert ShardSource("https://host/a/00000.tar?sig=a/b", 1, "").name == "00000.tar"
