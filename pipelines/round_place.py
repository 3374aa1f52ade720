"""Whose the output directory of a recipe is: pin the recipe, go on with it, or put another one in its place.

    OUT/recipe.json        the recipe, its inputs and their digest; pinned when the run begins
    OUT/_curate/REPLACED   an earlier run is being removed; whoever finds it removes the rest first, then begins

The mark comes first, so a call that is killed leaves the earlier run whole or one that no call takes for a run: parts
of it are never gone on with. What a recipe did not write stays. Costs the unlinking.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from curate.errors import RunMismatch, StorageError, UsageError
from curate.run_record import differences
from curate.storage import make_directory, put_if_absent, readable_json, remove, replace_file, sync_directory

RECORD: Final = "recipe.json"
_MARK: Final = "REPLACED"  # below OUT/_curate


def begin(output: Path, record: dict[str, Any], *, overwrite: bool, check: Callable[[], None]) -> None:
    """Pin the recipe, or check that the one that was begun there is the same.

    `check` raises what the recipe would be refused for; it is asked before `overwrite` removes an earlier run.
    Errors: UsageError; RunMismatch, naming every difference.
    """
    path, mark = output / RECORD, output / "_curate" / _MARK
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; the output of a recipe is a directory")
    there = path.is_file() or mark.is_file()
    if output.is_dir() and any(output.iterdir()) and not there:
        raise UsageError(f"{output} is not empty and holds no run of a recipe; choose another directory")
    if overwrite and there:
        check()
        make_directory(mark.parent)
        replace_file(mark, b"an earlier run is being removed\n")
    if mark.is_file():
        _clear(output)
    make_directory(output / "_curate")
    if put_if_absent(path, readable_json(record)):
        remove(mark)
        return
    if refuse_change(output, record)["rounds"] < record["rounds"]:
        replace_file(path, readable_json(record))


def refuse_change(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record that is there, if any. Errors: RunMismatch where it is of another recipe."""
    path = output / RECORD
    if not path.is_file() or (output / "_curate" / _MARK).is_file():
        return record
    there: dict[str, Any] = json.loads(path.read_bytes())
    now = json.loads(readable_json(record))
    found = [*differences(there["recipe"], now["recipe"]), *differences(there["inputs"], now["inputs"], "inputs")]
    if there["rounds"] > now["rounds"]:
        found.append(f"rounds: {there['rounds']} there, {now['rounds']} now")
    if found:
        raise RunMismatch(
            f"{output} belongs to another recipe: {'; '.join(found[:6])}. Choose another output, or --overwrite to "
            "begin anew"
        )
    return there


def written(output: Path) -> list[Path]:
    """What a recipe has written there, and `begin` would remove."""
    names = ("reference", "_curate", "summary.json", RECORD)
    return [*sorted(output.glob("round-*")), *(output / name for name in names)]


def _clear(output: Path) -> None:
    """Remove a run that is marked; of `_curate` all but the mark."""
    own = output / "_curate"
    for path in (*own.glob("*"), *written(output)):
        if path not in (own, own / _MARK):
            _remove(path)
    for folder in (own, output):
        sync_directory(folder)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            remove(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be removed: {error.strerror or error}; the same command goes on when it can be"
        ) from error
