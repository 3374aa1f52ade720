"""mypy --strict over the library as a wheel lays it out: kernels and pipelines are checked with the rest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BYTECODE = shutil.ignore_patterns("__pycache__")


@pytest.mark.slow
def test_the_library_type_checks(tmp_path: Path) -> None:
    """mypy with the repository's strict settings reports nothing in curate, curate.kernels and curate.pipelines."""
    package = shutil.copytree(ROOT / "curate", tmp_path / "curate", ignore=BYTECODE)
    for floor in ("kernels", "pipelines"):
        shutil.copytree(ROOT / floor, package / floor, ignore=BYTECODE)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache" / "staged")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "-p", "curate"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    checked = int(done.stdout.rpartition("no issues found in ")[2].split()[0])
    assert checked >= len(list(tmp_path.rglob("*.py")))  # a folder without an __init__.py counts as well
