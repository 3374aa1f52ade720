"""Units of work commit here: a receipt is the only truth, published once, whoever finishes first.

A unit's id is the digest of its stage, inputs and configuration. Its task returns the receipt that exists, or writes to
`attempts/`, renames to content-addressed names and publishes the receipt by put-if-absent. Two live writers of one unit
are a real case (a Dask task runs again when the worker that held its result dies): the loser compares digests and
adopts the winner's files; a difference is recorded in `logs/`, since it means that the unit is not deterministic.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.errors import StorageError
from curate.storage import (
    LOCAL,
    Disk,
    HashingWriter,
    canonical_json,
    make_directory,
    publish,
    put_if_absent,
    remove,
    storage_errors,
)

DIRECTORIES = ("score", "traits", "policy", "direction", "selection", "shards", "ledger", "commits", "attempts", "logs")


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of work: `stage` names its directory of files, `inputs` is everything its outputs depend on."""

    stage: str
    inputs: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.stage}-{hashlib.sha256(canonical_json([self.stage, self.inputs])).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class Output:
    """A file of a receipt: its content-addressed path under `_curate/`, and the name in OUT that it is published as."""

    path: str
    sha256: str
    size: int
    published: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a unit made (`outputs`) and what it counted (`facts`). Equal units give equal receipts."""

    unit: str
    stage: str
    outputs: tuple[Output, ...]
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        outputs = [{"path": o.path, "sha256": o.sha256, "size": o.size, "published": o.published} for o in self.outputs]
        return {"schema": 1, "unit": self.unit, "stage": self.stage, "outputs": outputs, "facts": self.facts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Receipt:
        outputs = tuple(Output(**output) for output in value["outputs"])
        return cls(value["unit"], value["stage"], outputs, value["facts"])


@dataclass(slots=True)
class Attempt:
    """The files one running unit is writing; none has its final name yet."""

    store: Store
    unit: Unit
    token: str = field(default_factory=lambda: os.urandom(8).hex())
    outputs: list[Output] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self, suffix: str, *, published: str | None = None) -> Iterator[HashingWriter]:
        """Write one file; on leaving the block it is synced and carries its content-addressed name."""
        temporary = self.store.root / "attempts" / f"{self.unit.id}.{self.token}.{len(self.outputs)}.tmp"
        disk = self.store.disk
        with storage_errors(temporary):
            file = disk.create(temporary)
            try:
                writer = HashingWriter(file)
                yield writer
                disk.sync(file)
            finally:
                file.close()
            path = f"{self.unit.stage}/{writer.sha256[:32]}{suffix}"
            disk.rename(temporary, self.store.root / path)
            disk.sync_directory(self.store.root / self.unit.stage)
        self.outputs.append(Output(path, writer.sha256, writer.size, published))


@dataclass(frozen=True, slots=True)
class Store:
    """The `_curate/` directory of one output directory: receipts and the files they name."""

    root: Path
    disk: Disk = LOCAL

    @classmethod
    def of(cls, output: Path, disk: Disk = LOCAL) -> Store:
        return cls(Path(output) / "_curate", disk)

    def prepare(self) -> None:
        """Create the directories."""
        for name in DIRECTORIES:
            make_directory(self.root / name, self.disk)

    def receipt_path(self, unit_id: str) -> Path:
        return self.root / "commits" / f"{unit_id}.json"

    def read(self, unit: Unit) -> Receipt | None:
        """The valid receipt of `unit`, or None if it has none or one of its files is gone or cut."""
        try:
            receipt = Receipt.from_json(json.loads(self.receipt_path(unit.id).read_bytes()))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return receipt if all(self.locate(output) for output in receipt.outputs) else None

    def locate(self, output: Output) -> Path | None:
        """Where the bytes of `output` are now: its own name, else the published one; None if neither has its size."""
        names = [self.root / output.path]
        if output.published is not None:
            names.append(self.root.parent / output.published)
        for name in names:
            with contextlib.suppress(OSError):
                if name.stat().st_size == output.size:
                    return name
        return None

    def commit(self, unit: Unit, produce: Callable[[Attempt], dict[str, Any]]) -> Receipt:
        """Return the receipt of `unit`, running `produce` only if there is no valid one."""
        receipt = self.read(unit)
        if receipt is not None:
            return receipt
        attempt = Attempt(self, unit)
        try:
            facts = produce(attempt)
        except FileNotFoundError:
            # another driver finished this run and collected the attempt: its receipt is as good as ours
            if (receipt := self.read(unit)) is not None:
                return receipt
            raise
        except BaseException:
            self._discard(attempt)
            raise
        return self._publish(Receipt(unit.id, unit.stage, tuple(attempt.outputs), facts))

    def publish_outputs(self, receipt: Receipt) -> None:
        """Give every output of `receipt` that has a published name that name in OUT."""
        for output in receipt.outputs:
            if output.published is None:
                continue
            blob, name = self.root / output.path, self.root.parent / output.published
            try:
                if self.locate(output) == blob:
                    publish(blob, name, self.disk)
            except FileNotFoundError:
                pass  # collected by another driver, which has finished this run and published the same bytes
            if self.locate(output) is None:
                raise StorageError(f"{blob} is gone; run the same command again, it is made anew")

    def receipts(self, stage: str) -> Iterator[Receipt]:
        """All receipts of a stage that can be read, in the order of their unit ids."""
        for path in sorted((self.root / "commits").glob(f"{stage}-*.json")):
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                yield Receipt.from_json(json.loads(path.read_bytes()))

    def note(self, line: str) -> None:
        """Append a line to the run's log; not durable, nothing depends on it."""
        with open(self.root / "logs" / "notes.log", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _publish(self, receipt: Receipt) -> Receipt:
        path = self.receipt_path(receipt.unit)
        data = canonical_json(receipt.as_json())
        for _ in range(2):
            if put_if_absent(path, data, self.disk):
                return receipt
            with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
                winner = Receipt.from_json(json.loads(path.read_bytes()))
                if all(self.locate(output) for output in winner.outputs):
                    self._compare(winner, receipt)
                    return winner
            remove(path, self.disk)  # a receipt whose files are gone proves nothing: this attempt takes its place
        return receipt

    def _compare(self, winner: Receipt, loser: Receipt) -> None:
        ours, theirs = [o.sha256 for o in loser.outputs], [o.sha256 for o in winner.outputs]
        if ours != theirs:
            self.note(f"non-determinism: unit {winner.unit} gave {theirs} first and {ours} later; the first is kept")

    def _discard(self, attempt: Attempt) -> None:
        with contextlib.suppress(OSError):
            for path in (self.root / "attempts").glob(f"{attempt.unit.id}.{attempt.token}.*"):
                self.disk.unlink(path)
