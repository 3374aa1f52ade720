"""Notes of the command line: our warnings, one line each on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from curate.errors import CurateWarning


@contextmanager
def notes_as_lines() -> Iterator[None]:
    """Show a CurateWarning as `curate: note: ...`, whatever the process filters; leave other warnings as they are."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
            if issubclass(category, CurateWarning):
                print(f"curate: note: {message}", file=sys.stderr)
            else:
                shown(message, category, *rest, **named)

        warnings.simplefilter("default", CurateWarning)
        warnings.showwarning = show
        yield
