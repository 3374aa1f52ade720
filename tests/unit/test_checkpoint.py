"""Checkpoints: readable by open_clip alone, complete or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from curate.errors import StorageError, UsageError
from curate.learner.checkpoint import save_checkpoint
from curate.models.build import build_untrained
from curate.models.configs import PREPROCESS
from curate.models.load import load_model
from tests.conftest import MINI, make_checkpoint

FOREIGN = """
import sys, open_clip, torch
assert not any(name.split(".")[0] == "curate" for name in sys.modules)
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
tokens = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["a red circle"])
model.eval()
with torch.no_grad():
    print(*model.encode_text(tokens, normalize=True)[0].tolist(), sep=",")
"""


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def save(path: Path, **more: Any) -> Path:
    return save_checkpoint(
        build_untrained(MINI, seed=0, preprocess=PREPROCESS), path, architecture=MINI, training={"steps": 1}, **more
    )


def test_open_clip_loads_it_without_us(tiny_checkpoint: Path) -> None:
    """A process that never imports curate loads model and tokenizer, offline, and embeds as we do."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(tiny_checkpoint)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    theirs = torch.tensor([float(x) for x in done.stdout.strip().splitlines()[-1].split(",")])
    model = load_model(str(tiny_checkpoint))
    ours = model.embed_texts(model.tokenize(["a red circle"]))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_three_files(tmp_path: Path) -> None:
    """A checkpoint is its configuration, its weights and its history, and nothing is left beside it."""
    path = save(tmp_path / "new" / "model")
    assert names(path) == ["open_clip_config.json", "open_clip_model.safetensors", "training.json"]
    assert json.loads((path / "training.json").read_text()) == {"steps": 1}
    assert names(path.parent) == ["model"]


def test_refuses_what_is_there(tmp_path: Path) -> None:
    """A directory in use is refused; an earlier checkpoint is replaced when asked; anything else never."""
    path = save(tmp_path / "model")
    with pytest.raises(UsageError, match="not empty"):
        save(path)
    save(path, overwrite=True)
    assert names(tmp_path) == ["model"]
    (path / "open_clip_config.json").unlink()
    with pytest.raises(UsageError, match="not a checkpoint"):
        save(path, overwrite=True)


def test_empty_directory_is_used(tmp_path: Path) -> None:
    """A directory that the user made beforehand is filled."""
    (tmp_path / "model").mkdir()
    assert "training.json" in names(save(tmp_path / "model"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_save_leaves_the_old_one(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt or a full disk while saving keeps the earlier checkpoint and no half-written one."""
    path = make_checkpoint(tmp_path / "model", "softmax")
    before = (path / "open_clip_model.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("curate.storage.LOCAL.sync", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        save(path, overwrite=True)
    assert names(tmp_path) == ["model"]
    assert (path / "open_clip_model.safetensors").read_bytes() == before
