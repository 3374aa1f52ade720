"""ruff finds nothing, and would format nothing differently."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_content(arguments: tuple[str, ...]) -> None:
    """`ruff check` and `ruff format --check` pass over the whole repository."""
    command = [sys.executable, "-m", "ruff", *arguments, "--output-format=concise", "."]
    if arguments[0] == "format":
        command.remove("--output-format=concise")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
