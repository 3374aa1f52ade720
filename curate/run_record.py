"""`RUN.json`: what a run is - settings, inputs, models - pinned when it starts, compared when it resumes."""

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


def run_path(output: Path) -> Path:
    """Where an output directory keeps its record."""
    return Path(output) / "_curate" / "RUN.json"


def read_run(output: Path) -> RunRecord:
    """The record of `output`."""
    path = run_path(output)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{output}: no run there ({path} is missing); `curate score SHARDS -o {output}` makes one"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not readable ({error}); it was not written by curate") from error
    inputs = tuple(ShardSource(**source) for source in value["inputs"])
    return RunRecord(checked(RunSettings, value["settings"]), inputs, value["models"], value["tool"])


def pin_run(output: Path, record: RunRecord) -> None:
    """Create the record, or check that the one that is there says the same; RunMismatch names every difference."""
    path = run_path(output)
    refuse_foreign(output)
    make_directory(path.parent)
    if put_if_absent(path, readable_json(record.as_json())):
        return
    differences = list(_differences(read_run(output).as_json(), record.as_json()))
    if differences:
        raise RunMismatch(
            f"{output} belongs to another run: {'; '.join(differences[:6])}. Choose another directory, "
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


def _differences(old: Any, new: Any, where: str = "") -> Any:
    """Readable differences of two records, in the order of their fields."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{where}[{number}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{where}: {len(old)} there, {len(new)} now"
    elif old != new:
        yield f"{where}: {_short(old)} there, {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:28] + "..." + text[-28:]
