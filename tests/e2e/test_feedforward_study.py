"""The quality study of fast feedforward layers runs on a few hundred real images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.making import data_root

STUDY = Path(__file__).parents[2] / "examples" / "feedforward_quality"


def run(script: str, *arguments: str | Path, cwd: Path) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(STUDY / script), *map(str, arguments), "--images", "256", "--epochs", "1"]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def images() -> Path:
    """The parquet file of CIFAR-10, or a skip that says why."""
    path = data_root() / "cifar10.parquet"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.data
def test_study_and_conversion_on_a_few_images(images: Path, tmp_path: Path) -> None:
    """Two arms train and log every token's leaf; the dense one is then converted, measured and trained on."""
    words = ("--arms", "dense-256", "fff-24+8", "--seeds", "0", "--save", "weights")
    lines = run("study.py", images, *words, cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == ["dense-256 seed 0 epoch 1", "fff-24+8 seed 0 epoch 1"]
    results = json.loads((tmp_path / "results.json").read_text())
    fff = results["fff-24+8/0"]
    assert [sum(layer) for layer in fff["usage"][-1]] == [256 * 16] * 3
    assert (results["dense-256/0"]["operations"], fff["operations"]) == (4 * 64 * 256, 4 * 64 * 32 + 2 * 64 * 3)

    converted = run("upcycling.py", images, "weights/dense-256-0.pt", cwd=tmp_path)
    names = ["upcycled-32", "upcycled-24+8", "pruned", "continued"]
    assert [line.split(":")[0] for line in converted[::2]] == names
