"""Every example runs as its docstring says, on a tiny run, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
OURS = (
    "score_in_python.py",
    "webdataset_loader.py",
    "torch_loop.py",
    "selection_view.py",
    "online_selection.py",
    "open_clip_training.py",
    "fast_feedforward.py",
)


def run_example(name: str, *arguments: str | Path, cwd: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_webdataset_loader_counts_the_samples(output: Any, tmp_path: Path) -> None:
    """The example reads every sample of every shard."""
    printed = run_example("webdataset_loader.py", output.out, cwd=tmp_path)
    assert printed.splitlines()[-1] == "48 samples in 4 shards"
    assert repr(output.captions[0]) in printed


def test_score_in_python_filters_and_explains(output: Any, tmp_path: Path) -> None:
    """From shards to a verified filtered dataset and an explanation, in one short script."""
    lines = run_example("score_in_python.py", *output.inputs, "--steps", "3", cwd=tmp_path).splitlines()
    samples = 40 * (len(output.inputs) - 1)
    assert lines[0].startswith(f"{samples // 4} of {samples} samples kept")
    assert lines[1] == "verified"
    assert (tmp_path / "filtered" / "_curate" / "SUCCESS.json").exists()


def test_selection_view_reads_the_original_shards(output: Any, tmp_path: Path) -> None:
    """The view holds what was selected, in selection order, read from the input shards."""
    lines = run_example("selection_view.py", output.out, *output.inputs, cwd=tmp_path).splitlines()
    assert lines[0].endswith(repr(output.captions[0]))
    assert lines[-1].startswith(f"{len(output.selected)} selected samples")


def test_torch_loop_trains_on_each_sub_batch(output: Any, tmp_path: Path) -> None:
    """The loss of the tiny model falls over three epochs of eight sub-batches."""
    lines = run_example("torch_loop.py", output.out, cwd=tmp_path).splitlines()
    assert [line.split(", mean")[0] for line in lines] == [f"epoch {epoch}: 8 sub-batches" for epoch in range(3)]
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[-1] < losses[0]


def test_online_selection_trains_on_a_fifth(output: Any, tmp_path: Path) -> None:
    """Of four super-batches of 20 the loop trains on four sub-batches of 4."""
    printed = run_example("online_selection.py", *output.inputs, cwd=tmp_path)
    assert printed.splitlines()[-1] == "4 super-batches of 20 looked at, 16 samples trained on"
    assert len(re.findall(r"  step \d: 4 samples, loss", printed)) == 4


def test_fast_feedforward_converts_and_trains(output: Any, tmp_path: Path) -> None:
    """All four blocks are converted, the model trains on, and the report counts what its layers cost."""
    printed = run_example("fast_feedforward.py", output.out, cwd=tmp_path)
    assert len(re.findall(r"256 neurons -> .* unexplained", printed)) == 4
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+)", printed)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "visual.transformer.resblocks.0.mlp" in printed


def test_open_clip_training_writes_a_checkpoint(output: Any, tmp_path: Path) -> None:
    """open_clip's own trainer runs the printed command to the end, whichever webdataset is installed."""
    lines = run_example("open_clip_training.py", output.out, "--logs", tmp_path / "logs", cwd=tmp_path).splitlines()
    assert lines[0].startswith("python -m open_clip_train.main --train-data ")
    checkpoint = Path(lines[-1].removeprefix("checkpoint: "))
    assert checkpoint.name == "epoch_1.pt"
    assert checkpoint.is_file()


@pytest.mark.parametrize("name", OURS)
def test_example_stands_in_the_table(name: str) -> None:
    """The README's table names the example, and its docstring shows the command."""
    assert f"| `{name}` |" in (EXAMPLES / "README.md").read_text()
    assert f"\n    python examples/{name} " in (EXAMPLES / name).read_text()
