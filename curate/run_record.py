"""`RUN.json`: what a run is - settings, inputs, models - pinned when it starts, compared when it resumes.

A directory holds either a run of `curate score` (RunRecord) or what a training chose (TeeRecord).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate import __version__
from curate.errors import RunMismatch, UsageError
from curate.settings import RunSettings, checked
from curate.shards.sources import ShardSource
from curate.storage import make_directory, put_if_absent, readable_json, replace_file


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The pinned run. `models` maps a role to its identity as JSON."""

    settings: RunSettings
    inputs: tuple[ShardSource, ...]
    models: dict[str, Any]
    tool: str = __version__

    def as_json(self) -> dict[str, Any]:
        inputs = [{"url": source.url, "size": source.size, "etag": source.etag} for source in self.inputs]
        settings = self.settings.model_dump()
        return {"schema": 1, "tool": self.tool, "settings": settings, "inputs": inputs, "models": self.models}


@dataclass(frozen=True, slots=True)
class TeeRecord:
    """The pinned tee of a training: where its log is, what TRAIN.json says, and how large the new shards are.

    `samples_per_shard` and `samples` (pairs that the whole training draws) size the shards; `models` has the reference
    where its scores were at hand.
    """

    run: Path
    train: dict[str, Any]
    inputs: tuple[ShardSource, ...]
    digests: tuple[str, ...]
    models: dict[str, Any]
    samples_per_shard: int | None = None
    samples: int | None = None
    tool: str = __version__

    def as_json(self) -> dict[str, Any]:
        inputs = [
            {"url": source.url, "size": source.size, "etag": source.etag, "digest": digest}
            for source, digest in zip(self.inputs, self.digests, strict=True)
        ]
        write = {"samples_per_shard": self.samples_per_shard, "samples": self.samples}
        settings = {"train": self.train, "write": write}
        record = {"schema": 1, "tool": self.tool, "settings": settings, "inputs": inputs, "models": self.models}
        return record | {"run": str(self.run)}


Record = RunRecord | TeeRecord


def run_path(output: Path) -> Path:
    """Where an output directory keeps its record."""
    return Path(output) / "_curate" / "RUN.json"


def read_run(output: Path) -> RunRecord:
    """The record of a run of `curate score`. Errors: UsageError where `output` has none, or has that of a training."""
    record = read_record(output)
    if isinstance(record, TeeRecord):
        raise UsageError(
            f"{output} holds the sub-batches that a training chose ({record.run}), not scores to draw from; name an "
            "output of `curate score`"
        )
    return record


def read_record(output: Path) -> Record:
    """The record of `output`, whichever kind it is."""
    path = run_path(output)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{output}: no run there ({path} is missing); `curate score SHARDS -o {output}` makes one"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not readable ({error}); it was not written by curate") from error
    return _tee_record(value) if "train" in value["settings"] else _run_record(value)


def _run_record(value: dict[str, Any]) -> RunRecord:
    inputs = tuple(ShardSource(**source) for source in value["inputs"])
    return RunRecord(checked(RunSettings, value["settings"]), inputs, value["models"], value["tool"])


def _tee_record(value: dict[str, Any]) -> TeeRecord:
    inputs = tuple(ShardSource(one["url"], one["size"], one["etag"]) for one in value["inputs"])
    digests = tuple(one["digest"] for one in value["inputs"])
    train, write = value["settings"]["train"], value["settings"]["write"]
    return TeeRecord(Path(value["run"]), train, inputs, digests, value["models"], **write, tool=value["tool"])


def pin_run(output: Path, record: Record) -> None:
    """Create the record, or check that the one that is there says the same; RunMismatch names every difference."""
    path = run_path(output)
    refuse_foreign(output)
    make_directory(path.parent)
    if put_if_absent(path, readable_json(record.as_json())):
        return
    found = list(differences(read_record(output).as_json(), record.as_json()))
    if found:
        raise RunMismatch(
            f"{output} belongs to another run: {'; '.join(found[:6])}. Choose another directory, "
            "add --overwrite, or use `curate select` to draw anew from the same scores"
        )


def repin_run(output: Path, record: RunRecord) -> None:
    """Replace the record; for `curate select` and `curate write`, whose purpose is to change what it says."""
    make_directory(run_path(output).parent)
    replace_file(run_path(output), readable_json(record.as_json()))


def refuse_foreign(output: Path) -> None:
    """Refuse a directory that has files but no run in it."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; -o names a directory")
    if run_path(output).exists() or not output.is_dir():
        return
    if any(path.name != "_curate" for path in output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no run of curate; choose another directory")


def differences(old: Any, new: Any, where: str = "") -> Any:
    """Readable differences of two records, in the order of their fields."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, f"{where}[{number}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{where}: {len(old)} there, {len(new)} now"
    elif old != new:
        yield f"{where}: {_short(old)} there, {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:28] + "..." + text[-28:]
