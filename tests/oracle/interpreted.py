"""Run the cases of a test file under Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def passes_interpreted(file: str) -> None:
    """AssertionError unless all cases of the file pass, and none is skipped, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not under_the_interpreter", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert " passed" in done.stdout, done.stdout[-600:]
    assert "skipped" not in done.stdout, done.stdout[-600:]
