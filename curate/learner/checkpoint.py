"""Write a trained model so that open_clip loads it by itself: `local-dir:DIR`. Visible only when complete.

A checkpoint is three files: open_clip_config.json, open_clip_model.safetensors, and training.json, which says how it
came about. They are written beside the target and moved there in one rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.models.spec import CONFIG_FILE, FEEDFORWARD_FILE, WEIGHTS_FILE
from curate.storage import make_directory, readable_json, replace_directory, replace_file, write_file

TRAINING_FILE = "training.json"


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something. Errors: UsageError; call it before the work, not after."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; a checkpoint is a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path} is not empty; choose another directory, or --overwrite to replace it")
    if overwrite and path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
        raise UsageError(f"{path} holds no {CONFIG_FILE}, so it is not a checkpoint; it is not overwritten")


def save_checkpoint(
    module: nn.Module,
    path: Path,
    *,
    architecture: Mapping[str, Any],
    training: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Save an open_clip module whose model configuration is `architecture`; returns the absolute directory.

    Errors: UsageError where `path` is in use; StorageError where it cannot be written. On any error, and on an
    interrupt, `path` is as it was before.
    """
    path = path.expanduser().absolute()
    check_target(path, overwrite=overwrite)
    staging = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        make_directory(staging)
        for name, data in _files(module, architecture, training, None).items():
            write_file(staging / name, data)
        replace_directory(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def add_checkpoint(
    module: nn.Module,
    run: Path,
    *,
    architecture: Mapping[str, Any],
    training: Mapping[str, Any],
    feedforward: FeedforwardConfig | None = None,
) -> Path:
    """Put the files of a checkpoint into the directory of a run; the configuration last, which makes it one.

    With fast feedforward layers a fourth file says how they are built: curate loads such a checkpoint, open_clip alone
    cannot. Errors: StorageError.
    """
    for name, data in _files(module, architecture, training, feedforward).items():
        replace_file(run / name, data)
    return run


def _files(
    module: nn.Module,
    architecture: Mapping[str, Any],
    training: Mapping[str, Any],
    feedforward: FeedforwardConfig | None,
) -> dict[str, bytes]:
    preprocess = {k: v for k, v in dict(module.visual.preprocess_cfg).items() if k != "size"}  # type: ignore[union-attr,arg-type]
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    files = {WEIGHTS_FILE: save(state, metadata={"format": "pt"}), TRAINING_FILE: readable_json(dict(training))}
    if feedforward is not None:
        files[FEEDFORWARD_FILE] = readable_json(asdict(feedforward))
    return files | {CONFIG_FILE: readable_json({"model_cfg": dict(architecture), "preprocess_cfg": preprocess})}
