"""A disk that loses power: it stops before its k-th operation and forgets what was not synced.

The operations happen in a real directory, so that the code under test can read what it wrote. Beside it a model keeps,
for every file, the bytes of its last sync, and for every directory, the changes of names since its last sync.
`surviving` builds the directory that a machine finds after the power is back: each change of names that was not synced
is there or is not, whatever came before or after it, and bytes that were not synced are gone, cut, or there.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from curate.storage import LOCAL


class PowerCut(BaseException):
    """The machine stopped; not an Exception, since no code gets to handle it."""


@dataclass(eq=False, slots=True)
class Inode:
    """A file (`live`, and `synced` as of its last sync) or a directory (durable `names`, `pending` changes)."""

    is_directory: bool = False
    live: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None
    names: dict[str, Inode] = field(default_factory=dict)
    pending: list[tuple[tuple[str, Inode | None], ...]] = field(default_factory=list)

    @property
    def visible(self) -> dict[str, Inode]:
        """The names of a directory as a running process sees them."""
        return _applied(self.names, self.pending)


def _applied(names: dict[str, Inode], changes: list[tuple[tuple[str, Inode | None], ...]]) -> dict[str, Inode]:
    names = dict(names)
    for change in changes:
        for name, inode in change:
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode
    return names


class CrashFile:
    """A file of a `CrashDisk`; every write is an operation."""

    def __init__(self, disk: CrashDisk, file: IO[bytes], inode: Inode) -> None:
        self._disk, self.file, self.inode = disk, file, inode

    def write(self, data: Any) -> int:
        self._disk.step("write")
        self.inode.live += memoryview(data).cast("B")
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


class CrashDisk:
    """`curate.storage.Disk` under `root`, without power from operation `stop` on (None: never)."""

    def __init__(self, root: Path, stop: int | None = None, fail: Callable[[int, str], None] | None = None) -> None:
        self.root, self.stop, self.operations = root, stop, list[str]()
        self._fail = fail
        self._tree = _scan(root)

    def step(self, operation: str) -> None:
        """Count one operation, or stop before it."""
        if self.stop is not None and len(self.operations) >= self.stop:
            raise PowerCut(f"before operation {self.stop}, {operation}")
        if self._fail is not None:
            self._fail(len(self.operations), operation)
        self.operations.append(operation)

    def create(self, path: Path) -> Any:
        self.step(f"create {path.name}")
        file = open(path, "xb", buffering=0)  # noqa: SIM115 - the caller closes it
        inode = Inode()
        self._change(path, inode)
        return CrashFile(self, file, inode)

    def sync(self, file: Any) -> None:
        self.step("sync")
        file.inode.synced = bytes(file.inode.live)

    def sync_directory(self, path: Path) -> None:
        self.step(f"sync {path.name}/")
        if path == self.root or self.root in path.parents:
            directory = self._find(path)
            directory.names, directory.pending = directory.visible, []

    def rename(self, old: Path, new: Path) -> None:
        self.step(f"rename {old.name} {new.name}")
        os.replace(old, new)
        inode = self._find(old)
        if self._find(new.parent).visible.get(new.name) is inode:
            return  # two names of one file: POSIX does nothing
        if old.parent == new.parent:
            self._find(new.parent).pending.append(((old.name, None), (new.name, inode)))
        else:
            self._change(new, inode)
            self._change(old, None)

    def link(self, old: Path, new: Path) -> None:
        self.step(f"link {old.name} {new.name}")
        os.link(old, new)
        self._change(new, self._find(old))

    def unlink(self, path: Path) -> None:
        self.step(f"unlink {path.name}")
        os.unlink(path)
        self._change(path, None)

    def make_directory(self, path: Path) -> None:
        self.step(f"mkdir {path.name}/")
        new = [step for step in (path, *path.parents) if not step.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for step in reversed(new):
            self._change(step, Inode(is_directory=True))

    def surviving(self, target: Path, *, names: str, content: str, seed: int = 0) -> Path:
        """Build in `target` what is found after the cut.

        `names` says which un-synced changes of names happened and `content` what un-synced files hold: "none", "all",
        or "some", drawn from `seed`: half of the names with an odd seed, most of them with an even one.
        """
        shares = {"none": 0.0, "all": 1.0, "some": 0.5 if seed % 2 else 0.85}
        _build(self._tree, target, shares[names], content, random.Random(seed), {})
        return target

    def _find(self, path: Path) -> Inode:
        inode = self._tree
        for part in path.relative_to(self.root).parts:
            inode = inode.visible[part]
        return inode

    def _change(self, path: Path, inode: Inode | None) -> None:
        self._find(path.parent).pending.append(((path.name, inode),))


def _scan(path: Path, seen: dict[int, Inode] | None = None) -> Inode:
    """The model of what is on disk already, all of it durable; names of one file share an inode."""
    seen = {} if seen is None else seen
    if path.is_dir():
        return Inode(is_directory=True, names={child.name: _scan(child, seen) for child in sorted(path.iterdir())})
    number = path.stat().st_ino
    if number not in seen:
        data = path.read_bytes()
        seen[number] = Inode(live=bytearray(data), synced=data)
    return seen[number]


def _build(inode: Inode, target: Path, share: float, content: str, rng: random.Random, made: dict[int, Path]) -> None:
    target.mkdir(exist_ok=True)
    kept = [change for change in inode.pending if rng.random() < share]
    for name, child in _applied(inode.names, kept).items():
        path = target / name
        if child.is_directory:
            _build(child, path, share, content, rng, made)
        elif id(child) in made:
            os.link(made[id(child)], path)
        else:
            path.write_bytes(_survivor(child, content, rng))
            made[id(child)] = path


def _survivor(file: Inode, content: str, rng: random.Random) -> bytes:
    if content == "all" or file.synced == file.live:
        return bytes(file.live)
    known = len(file.synced or b"")
    return bytes(file.live[: known if content == "none" else rng.randint(known, len(file.live))])


LOSSES: tuple[dict[str, Any], ...] = (
    {"names": "none", "content": "none"},
    {"names": "all", "content": "none"},
    {"names": "all", "content": "all"},  # the process was killed, the machine was not
    *({"names": "some", "content": "some", "seed": seed} for seed in range(6)),
)


@contextlib.contextmanager
def installed(disk: CrashDisk) -> Iterator[CrashDisk]:
    """Let every module that writes to the local disk write to `disk`, inside the block."""
    names = ("create", "sync", "sync_directory", "rename", "link", "unlink", "make_directory")
    for name in names:
        setattr(LOCAL, name, getattr(disk, name))
    try:
        yield disk
    finally:
        for name in names:
            delattr(LOCAL, name)
