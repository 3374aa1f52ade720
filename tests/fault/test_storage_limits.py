"""A full disk, a file-size limit, an output that cannot be written: a clear end, and a run that can be resumed."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.errors import StorageError, UsageError
from curate.storage import LOCAL
from tests.e2e.pools import check_run, make_pool, published
from tests.fault.crash_disk import CrashDisk, installed
from tests.fault.forking import ForkServer

OPTIONS: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "keep": 0.5}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), shards=2)


@pytest.fixture(scope="module")
def finished(pool: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "out"
    curate.score(pool, output, reference=str(tiny_checkpoint), **OPTIONS)
    return output


@pytest.mark.parametrize(("limit", "stage"), [(4096, "score"), (30_000, "shards")])
def test_a_file_size_limit_ends_the_run_resumably(
    forks: ForkServer, pool: Path, tiny_checkpoint: Path, finished: Path, tmp_path: Path, limit: int, stage: str
) -> None:
    """With RLIMIT_FSIZE the run ends with code 1 and one line of advice; without it the same command finishes."""
    output = tmp_path / "out"
    arguments = ["score", str(pool), "-o", str(output), "--reference", str(tiny_checkpoint), "--engine", "inline"]
    arguments += ["--super-batch", "50", "--chunks", "4", "--keep", "0.5"]
    code, log = forks.run(arguments, limit=limit)
    assert code == 1, log
    assert "the file-size limit is reached; raise it and run the same command again, it resumes" in log
    assert f"{stage}-" in log
    assert "Traceback" not in log
    assert not list((output / "_curate" / "commits").glob(f"{stage}-*"))
    assert not list((output / "_curate" / "attempts").iterdir())
    code, log = forks.run(arguments)
    assert code == 0, log
    check_run(output)
    assert published(output) == published(finished)


@pytest.mark.parametrize("operation", ["create", "write", "sync", "link", "rename", "mkdir"])
def test_a_full_disk_ends_the_run_resumably(
    pool: Path, tiny_checkpoint: Path, finished: Path, tmp_path: Path, operation: str
) -> None:
    """ENOSPC at any kind of operation, at a few places of a run, is a StorageError; the same call then finishes."""
    failures = 0
    for place in (0, 3, 11):
        output = tmp_path / str(place) / "out"
        output.parent.mkdir()
        with installed(CrashDisk(output.parent, fail=full(operation, place))):
            try:
                curate.score(pool, output, reference=str(tiny_checkpoint), **OPTIONS)
            except StorageError as error:
                failures += "the disk is full; free some space" in str(error)
        curate.score(pool, output, reference=str(tiny_checkpoint), **OPTIONS)
        check_run(output)
        assert published(output) == published(finished)
    assert failures >= 2
    assert LOCAL.create.__self__ is LOCAL


def full(operation: str, place: int) -> Callable[[int, str], None]:
    """A disk that has no space for the operation of this kind that comes after `place` others."""
    seen = itertools.count()

    def fail(_: int, name: str) -> None:
        if name.split()[0] == operation and next(seen) == place:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fail


def test_an_output_below_a_file_is_refused(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An output path that leads through a file is a StorageError with advice; one that is a file is a UsageError."""
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StorageError, match="a part of the path is a file; choose another output directory"):
        curate.score(pool, tmp_path / "file" / "out", reference=str(tiny_checkpoint), **OPTIONS)
    with pytest.raises(UsageError, match="is a file; -o names a directory"):
        curate.score(pool, tmp_path / "file", reference=str(tiny_checkpoint), **OPTIONS)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_without_permission_is_refused(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A directory that may not be written is a StorageError with advice, and stays as it was."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission denied; choose another output directory"):
        curate.score(pool, tmp_path / "locked" / "out", reference=str(tiny_checkpoint), **OPTIONS)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_an_output_that_turns_read_only_ends_the_run_resumably(finished: Path, tmp_path: Path, number: int) -> None:
    """A file system that is remounted read-only while shards are written ends with advice; writing again finishes."""
    output = shutil.copytree(finished, tmp_path / "root" / "out")

    def fail(_: int, name: str) -> None:
        if name.startswith("create shards-"):
            raise OSError(number, "refused")

    with installed(CrashDisk(output.parent, fail=fail)), pytest.raises(StorageError, match="choose another output"):
        curate.write(output, samples_per_shard=8, engine="inline")
    assert not list(output.glob("*.tar"))
    assert not (output / "_curate" / "SUCCESS.json").exists()
    curate.write(output, samples_per_shard=8, engine="inline")
    check_run(output)
