"""What a user of the demonstration's pool would have at hand for an audit: a CSV of labels, joined by key.

The group is the one that is planted to be treated unevenly; the looks of the first shape and the ground are there so
that there is something to find besides, and nothing was planted in them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from curate.demonstration.scenes import Scene
from curate.storage import replace_file

LOOKS: Final = ("shape", "colour", "pattern", "size", "count")
LABELS: Final = ("group", *LOOKS, "ground")


def looks_of(scene: Scene) -> dict[str, str]:
    """The labels of a scene but for its group. Example: shape "ring", colour "yellow", ..., ground "navy"."""
    first = scene.groups[0]
    return {name: str(getattr(first, name)) for name in LOOKS} | {"ground": scene.ground}


def write_labels(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `key` and `LABELS` of `rows`, one line per sample."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["key", *LABELS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, sink.getvalue().encode())
    return path
