"""What goes to standard output and what to standard error; each function returns the exit code of having printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from curate.results import RunResult


def fail(message: str, code: int) -> int:
    print(f"curate: {message}", file=sys.stderr)
    return code


def console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))
    return 0


def print_lines(lines: Iterable[str]) -> int:
    print("\n".join(lines))
    return 0


def print_result(result: RunResult, as_json: bool) -> int:
    """The summary, and as the last line open_clip's command for the new shards."""
    if as_json:
        return print_json(result.as_json())
    from curate.formats.openclip import webdataset_note
    from curate.reports import result_lines

    print("\n".join(result_lines(result)), file=sys.stderr)
    if result.train_command is not None:
        if note := webdataset_note():
            print(f"curate: note: {note}", file=sys.stderr)
        print(result.train_command)
    return 0
