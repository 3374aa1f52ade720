"""The study of gradient estimators runs with tiny settings: every part, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "examples" / "estimators"


def run(script: str, *arguments: str, cwd: Path) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(STUDY / script), *arguments]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_part_of_the_study_runs(tmp_path: Path) -> None:
    """Two arms learn for a moment, two depths are weighed, three steps are timed; a second call repeats nothing."""
    words = ("curves", "--arms", "backprop", "forward", "--rates", "1e-3", "--samples", "60", "--held", "20",
             "--seconds", "0.1", "--points", "2", "--batch", "8")  # fmt: skip
    lines = run("study.py", *words, cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == ["backprop/0.001", "forward/0.001"]
    assert run("study.py", *words, cwd=tmp_path) == []
    run("study.py", "memory", "--arms", "backprop", "forward", "--depths", "1", "2", "--batch", "4", cwd=tmp_path)
    run("study.py", "time", "--arms", "backprop", "forward", "fff leaves alone, forward", "--width", "64", "--layers",
        "1", "--batch", "4", "--rounds", "1", cwd=tmp_path)  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["curves"]["backprop/0.001"]) == {"seconds", "steps", "loss", "recall"}
    assert set(results["memory"]) == {"backprop/1", "forward/1", "backprop/2", "forward/2"}
    assert results["time"]["backprop/64"]["ratio"] == 1
    assert "fff leaves alone, forward/64" in results["time"]


@pytest.mark.slow
def test_agreement_of_workers_is_a_table(tmp_path: Path) -> None:
    """One row for each step asked for, between 1 / W and what contradiction makes of it."""
    lines = run("agreement.py", "--samples", "220", "--steps", "0", cwd=tmp_path)
    assert lines[0] == "| step | 2 workers | 4 workers | 8 workers |"
    shares = [float(cell) for cell in lines[2].strip("| ").split(" | ")[1:]]
    assert all(share > 0.9 / workers for share, workers in zip(shares, (2, 4, 8), strict=True))
