"""No crash, at any operation and with any loss of what was not synced, leaves a receipt without its bytes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.errors import StorageError
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.storage import publish, put_if_absent, replace_file
from tests.fault.crash_disk import LOSSES, CrashDisk, PowerCut

UNIT = Unit("shards", {"number": 0})
PARTS = (b"first half, ", b"second half")


def produce(attempt: Attempt) -> dict[str, Any]:
    """Two files, the first in two writes and with a published name."""
    with attempt.open(".tar", published="00000.tar") as file:
        for part in PARTS:
            file.write(part)
    with attempt.open(".parquet") as file:
        file.write(b"a table")
    return {"samples": 2}


def commit(output: Path, disk: Any) -> Receipt:
    """What a driver and a unit do, from an empty directory to a published name."""
    store = Store.of(output, disk)
    store.prepare()
    receipt = store.commit(UNIT, produce)
    store.publish_outputs(receipt)
    return receipt


def check_receipts(output: Path) -> None:
    """Every receipt that is visible names files that are complete."""
    store = Store.of(output)
    for path in (store.root / "commits").glob("*.json"):
        receipt = Receipt.from_json(json.loads(path.read_bytes()))
        for made in receipt.outputs:
            assert hashlib.sha256((store.root / made.path).read_bytes()).hexdigest() == made.sha256
    for path in output.glob("0*.tar"):
        assert path.read_bytes() == b"".join(PARTS)


def nothing(_: Path) -> None:
    """A run that begins in an empty directory."""


def crashes(tmp_path: Path, work: Callable[[Path, Any], object], begin: Callable[[Path], None]) -> Iterator[Path]:
    """Every directory that a crash during `work` can leave: each prefix of its operations, each loss."""
    for stop in itertools.count():
        root = tmp_path / f"{stop}"
        root.mkdir()
        begin(root)
        disk = CrashDisk(root, stop)
        try:
            work(root, disk)
            return
        except PowerCut:
            for number, loss in enumerate(LOSSES):
                yield disk.surviving(tmp_path / f"{stop}-{number}", **loss)


def test_a_commit_survives_every_crash(tmp_path: Path) -> None:
    """After a crash before any operation no receipt lacks its bytes, and the same unit gives the same result."""
    (tmp_path / "sound").mkdir()
    expected = commit(tmp_path / "sound" / "out", CrashDisk(tmp_path / "sound"))
    count = 0
    for root in crashes(tmp_path, lambda root, disk: commit(root / "out", disk), nothing):
        check_receipts(root / "out")
        assert commit(root / "out", CrashDisk(root)) == expected
        check_receipts(root / "out")
        assert (root / "out" / "00000.tar").read_bytes() == b"".join(PARTS)
        count += 1
    assert count > 30 * len(LOSSES)


def test_what_was_returned_is_never_lost(tmp_path: Path) -> None:
    """Once a unit has returned, its receipt, its files and its published name outlive a loss of power."""
    root = tmp_path / "root"
    root.mkdir()
    disk = CrashDisk(root)
    receipt = commit(root / "out", disk)
    for number, loss in enumerate(LOSSES):
        after = disk.surviving(tmp_path / str(number), **loss) / "out"
        assert Store.of(after).read(UNIT) == receipt
        check_receipts(after)
        assert (after / "00000.tar").exists()


def test_a_file_is_put_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whatever is lost, `put_if_absent` leaves nothing or all of it under the final name."""
    seen = set()
    for root in crashes(tmp_path, lambda root, disk: put_if_absent(root / "f", b"content", disk), nothing):
        seen.add((root / "f").read_bytes() if (root / "f").exists() else None)
    assert seen == {None, b"content"}


def test_a_replaced_file_is_old_or_new(tmp_path: Path) -> None:
    """Whatever is lost, `replace_file` leaves the old bytes or the new ones."""

    def begin(root: Path) -> None:
        (root / "f").write_bytes(b"old")

    seen = set()
    for root in crashes(
        tmp_path,
        lambda root, disk: replace_file(root / "f", b"new", disk),
        begin,
    ):
        seen.add((root / "f").read_bytes())
    assert seen == {b"old", b"new"}


def test_a_published_name_is_old_or_new(tmp_path: Path) -> None:
    """Whatever is lost, `publish` leaves the old file or the new one under the name, and the blob under its own."""

    def begin(root: Path) -> None:
        (root / "name").write_bytes(b"old")
        (root / "blob").write_bytes(b"new")

    seen = set()
    for root in crashes(tmp_path, lambda root, disk: publish(root / "blob", root / "name", disk), begin):
        assert (root / "blob").read_bytes() == b"new"
        seen.add((root / "name").read_bytes())
    assert seen == {b"old", b"new"}


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_the_checker_would_notice_a_missing_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """A protocol that forgets to sync files, or directories, leaves a receipt without its bytes."""
    monkeypatch.setattr(CrashDisk, forgotten, lambda *_: None)
    root = tmp_path / "root"
    root.mkdir()
    disk = CrashDisk(root)
    commit(root / "out", disk)
    found = 0
    for seed in range(0, 200, 2):
        after = disk.surviving(tmp_path / f"after-{seed}", names="some", content="some", seed=seed)
        try:
            check_receipts(after / "out")
        except (AssertionError, FileNotFoundError, ValueError):
            found += 1
    assert found


def store_in(path: Path) -> Store:
    store = Store.of(path)
    store.prepare()
    return store


def test_the_slower_of_two_writers_adopts_the_receipt(tmp_path: Path) -> None:
    """A second live writer with the same bytes returns the winner's receipt, and nothing is noted."""
    store = store_in(tmp_path / "out")
    inner: list[Receipt] = []

    def slow(attempt: Attempt) -> dict[str, Any]:
        facts = produce(attempt)
        inner.append(store.commit(UNIT, produce))
        return facts

    assert store.commit(UNIT, slow) == inner[0] == store.read(UNIT)
    assert not (store.root / "logs" / "notes.log").exists()
    check_receipts(tmp_path / "out")


def test_differing_writers_are_noted_and_the_first_is_kept(tmp_path: Path) -> None:
    """A unit that gives other bytes the second time is reported in logs/, and the first bytes stay."""
    store = store_in(tmp_path / "out")

    def other(attempt: Attempt) -> dict[str, Any]:
        with attempt.open(".tar", published="00000.tar") as file:
            file.write(b"other bytes, " + PARTS[1])
        winners.append(store.commit(UNIT, produce))
        return {"samples": 2}

    winners: list[Receipt] = []
    assert store.commit(UNIT, other) == winners[0]
    note = (store.root / "logs" / "notes.log").read_text()
    assert "non-determinism" in note
    assert UNIT.id in note
    store.publish_outputs(winners[0])
    check_receipts(tmp_path / "out")


def test_many_live_writers_make_one_receipt(tmp_path: Path) -> None:
    """Eight threads that commit one unit at once all return the same receipt."""
    store = store_in(tmp_path / "out")
    barrier = threading.Barrier(8)
    receipts: list[Receipt] = []

    def late(attempt: Attempt) -> dict[str, Any]:
        facts = produce(attempt)
        barrier.wait(10)
        return facts

    threads = [threading.Thread(target=lambda: receipts.append(store.commit(UNIT, late))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts == [store.read(UNIT)] * 8
    assert not list((store.root / "attempts").iterdir())
    assert len(list((store.root / "commits").iterdir())) == 1


@pytest.mark.parametrize("damage", ["delete", "cut", "receipt"])
def test_a_receipt_without_its_files_is_redone(tmp_path: Path, damage: str) -> None:
    """A receipt whose file is deleted or cut, or that is itself cut, is made anew with the same bytes."""
    store = store_in(tmp_path / "out")
    receipt = store.commit(UNIT, produce)
    blob = store.root / receipt.outputs[0].path
    if damage == "delete":
        blob.unlink()
    elif damage == "cut":
        blob.write_bytes(blob.read_bytes()[:-1])
    else:
        store.receipt_path(UNIT.id).write_bytes(b'{"schema": 1, "un')
    assert store.read(UNIT) is None
    assert store.commit(UNIT, produce) == receipt
    check_receipts(tmp_path / "out")


def test_a_cut_file_never_replaces_a_published_one(tmp_path: Path) -> None:
    """Publishing again after the file under its own name was cut keeps the whole one that is published."""
    store = store_in(tmp_path / "out")
    receipt = commit(tmp_path / "out", store.disk)
    blob = store.root / receipt.outputs[0].path
    blob.unlink()
    blob.write_bytes(b"cut")
    store.publish_outputs(receipt)
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"".join(PARTS)


def test_a_driver_that_is_overtaken_adopts_what_the_other_published(tmp_path: Path) -> None:
    """A driver whose attempt, blob or temporary name the finishing driver collected goes on with its receipt."""
    store = store_in(tmp_path / "out")

    def overtaken(attempt: Attempt) -> dict[str, Any]:
        with attempt.open(".tar", published="00000.tar") as file:
            file.write(b"".join(PARTS))
            winner = commit(tmp_path / "out", store.disk)
            for path in (store.root / "attempts").iterdir():
                path.unlink()
            (store.root / winner.outputs[0].path).unlink()
        return {}

    receipt = store.commit(UNIT, overtaken)
    assert receipt == store.read(UNIT)
    store.publish_outputs(receipt)
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"".join(PARTS)


def test_a_temporary_name_that_was_collected_is_made_again(tmp_path: Path) -> None:
    """Another driver's collection of a temporary name costs a repetition, not the run."""
    collected = []

    class Collecting(CrashDisk):
        def link(self, old: Path, new: Path) -> None:
            if not collected:
                collected.append(old)
                old.unlink()
            super().link(old, new)

    assert put_if_absent(tmp_path / "f", b"content", Collecting(tmp_path))
    assert (tmp_path / "f").read_bytes() == b"content"
    assert collected


@pytest.mark.parametrize("operation", ["write", "sync", "create", "link", "rename", "mkdir"])
def test_a_full_disk_commits_nothing(tmp_path: Path, operation: str) -> None:
    """ENOSPC at any operation is a StorageError that says what to do; no receipt is half there; a retry is complete."""
    for number in itertools.count():
        root = tmp_path / f"{number}"
        root.mkdir()
        seen = itertools.count()

        def full(_: int, name: str, number: int = number, seen: Iterator[int] = seen) -> None:
            if name.split()[0] == operation and next(seen) == number:
                raise OSError(errno.ENOSPC, "No space left on device")

        disk = CrashDisk(root, fail=full)
        if not _fails(root, disk):
            break
        check_receipts(root / "out")
        assert not list((root / "out").rglob(".*.tmp"))
        commit(root / "out", CrashDisk(root))
        check_receipts(root / "out")
    assert number > 1


def _fails(root: Path, disk: CrashDisk) -> bool:
    """Whether the disk was full during a commit."""
    try:
        commit(root / "out", disk)
    except StorageError as error:
        return "the disk is full; free some space and run the same command again" in str(error)
    return False
