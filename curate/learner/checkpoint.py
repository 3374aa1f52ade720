"""Write a trained model so that open_clip loads it by itself: `local-dir:DIR`. Visible only when complete.

A checkpoint is three files: open_clip_config.json, open_clip_model.safetensors, and training.json, which says how it
came about. They are written beside the target and moved there in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from curate.errors import StorageError, UsageError
from curate.models.spec import CONFIG_FILE, WEIGHTS_FILE

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
    preprocess = {k: v for k, v in dict(module.visual.preprocess_cfg).items() if k != "size"}  # type: ignore[union-attr,arg-type]
    config = {"model_cfg": dict(architecture), "preprocess_cfg": preprocess}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be written ({error.strerror}); choose another place") from error
    try:
        _write_json(staging / CONFIG_FILE, config)
        _write_json(staging / TRAINING_FILE, dict(training))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        save_file(state, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        _sync(staging / WEIGHTS_FILE)
        staging.chmod(0o777 & ~_umask())
        _replace(staging, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _replace(staging: Path, path: Path) -> None:
    """Move `staging` to `path`; an earlier checkpoint steps aside first, and comes back if the move fails."""
    if not path.exists() or not any(path.iterdir()):
        os.replace(staging, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    os.replace(path, aside)
    try:
        os.replace(staging, path)
    except BaseException:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # mkdtemp gives 0700; a checkpoint should be as readable as any file the user makes
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
