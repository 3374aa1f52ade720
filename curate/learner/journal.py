"""RUN/log.jsonl: one JSON object per line of what a run did, step by step; cut back to the last state on a resume.

A line takes microseconds. Lines reach the disk when a state does: what a crash loses, the resumed run does again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curate.storage import storage_errors

LOG = "log.jsonl"
Listener = Callable[[dict[str, Any]], None]


class Journal:
    """Appends lines to a file, cut back to `size` bytes first. A listener sees each record, too."""

    def __init__(self, path: Path, size: int = 0, listener: Listener | None = None) -> None:
        self.path, self._listener = path, listener
        with storage_errors(path):
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by close()
            self._file.truncate(min(size, os.fstat(self._file.fileno()).st_size))  # never longer, by zeros
            self._file.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        return self._file.tell()

    def write(self, kind: str, **values: Any) -> None:
        """One record. Numbers that are not finite become null, since JSON has none."""
        record = _plain({"kind": kind, **values})
        with storage_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._listener is not None:
            self._listener(record)

    def sync(self) -> None:
        with storage_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with storage_errors(self.path):
            self._file.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; a torn last line ends it."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if isinstance(record, dict):
                yield record


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return value if isinstance(value, str | int | bool) or value is None else str(value)
