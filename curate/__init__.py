"""Pick, from many image-text pairs, the ones a model can learn from now.

Only the standard library is imported here, so that `curate --help` answers before torch has loaded; each public
name is fetched from its module when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Installed from a wheel, `curate.kernels` and `curate.pipelines` lie inside this package. In a checkout they lie beside
# it, where an entry of its own on the import path would shadow the registry's `kernels`; so the root joins __path__.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_PUBLIC = {
    "CurateError": ("curate.errors", "CurateError"),
    "CurateWarning": ("curate.errors", "CurateWarning"),
    "FastFeedforward": ("curate.feedforward.leaf", "FastFeedforward"),
    "FeedforwardConfig": ("curate.feedforward.config", "FeedforwardConfig"),
    "JointSelector": ("curate.loaders.joint", "JointSelector"),
    "PathFeedforward": ("curate.feedforward.path", "PathFeedforward"),
    "SelectionView": ("curate.loaders.view", "SelectionView"),
    "SubBatches": ("curate.loaders.subbatches", "SubBatches"),
    "audit": ("curate.pipelines.auditing", "audit"),
    "demo": ("curate.pipelines.demonstration", "demo"),
    "doctor": ("curate.examination", "examine"),
    "evaluate": ("curate.evaluation.measure", "evaluate"),
    "explain": ("curate.explanation", "explain"),
    "inspect": ("curate.inspection", "inspect_shards"),
    "plan": ("curate.pipelines.runner", "plan"),
    "probe": ("curate.learner.probing", "probe_shards"),
    "replace_feedforward": ("curate.feedforward.surgery", "replace_feedforward"),
    "run": ("curate.pipelines.rounds", "run"),
    "score": ("curate.pipelines.runner", "score"),
    "select": ("curate.pipelines.repeating", "select"),
    "train": ("curate.pipelines.training", "train"),
    "verify": ("curate.verification", "verify"),
    "write": ("curate.pipelines.repeating", "write"),
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'curate' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
