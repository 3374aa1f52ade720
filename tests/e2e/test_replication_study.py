"""The replication studies run with a few steps on real data, and what they print is a table of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.making import data_root

STUDY = Path(__file__).parents[2] / "examples" / "replication"


def run(script: str, *arguments: str | Path) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(STUDY / script), *map(str, arguments)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def needed(name: str) -> Path:
    path = data_root() / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.data
@pytest.mark.slow
def test_cifar_arms_and_their_table(tmp_path: Path) -> None:
    """Five arms of three steps each; the table has a row for each, and a second call trains nothing."""
    arms = ("uniform", "handover", "flexi", "alignment", "vit-fff-jest")
    words = (needed("cifar10.parquet"), tmp_path / "runs", "--arms", *arms, "--seeds", "0", "--steps", "3")
    run("study.py", *words, "--eval-every", "3")
    assert run("study.py", *words, "--eval-every", "3") == []
    printed = run("collect.py", tmp_path / "runs", tmp_path)
    assert {line.split("|")[1].strip() for line in printed if line.startswith("| ")} == {"arm", *arms}
    assert json.loads((tmp_path / "results.json").read_text())["handover-noise-0.8"]["0"]["step"] == [0, 3]


@pytest.mark.data
@pytest.mark.slow
def test_retrieval_on_textbooks_and_emoji(tmp_path: Path) -> None:
    """Two arms of two steps on real shards, half of the captions false; recall stands in every row."""
    data = needed("openstax").parent
    words = (data, tmp_path, "--arms", "uniform", "handover", "--seeds", "0", "--noise", "0.5", "--steps", "2",
             "--reference-steps", "2")  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in run("retrieval.py", *words)]
    assert [row[:3] for row in rows] == [["0.5", "uniform", "1"], ["0.5", "handover", "1"]]
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[3:-1])
