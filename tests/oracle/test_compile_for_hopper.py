"""The Triton kernels compile for an H200; what they compute is tested beside this, in the interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="triton's assembler is a program for Linux")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Every kernel compiles, and in half precision those of products use Hopper's matrix unit without a spill."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle.compile_for_hopper"],
        cwd=Path(__file__).resolve().parents[2], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "compiled"
    products = [line for line in lines if "BN=128" in line]
    assert len(products) >= 9, done.stdout
    for line in products:
        assert "stack 0," in line, line
        assert not line.endswith("wgmma 0"), line
