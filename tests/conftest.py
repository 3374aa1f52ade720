"""Fixtures that several test files share: small checkpoints in our own format, made once per session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest

# Small models gain nothing from threads, and several test processes would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A tenth of curate-tiny: 32 pixels, 24 tokens; loads and embeds in a few hundredths of a second.
MINI: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_checkpoint(
    path: Path, loss: Literal["sigmoid", "softmax"], *, config: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """Save an untrained model with distinct weights; its embeddings differ between inputs, but mean nothing."""
    import torch

    from curate.learner.checkpoint import save_checkpoint
    from curate.models.build import build_untrained
    from curate.models.configs import PREPROCESS, with_loss

    architecture = with_loss(config or MINI, loss)
    module = build_untrained(architecture, seed=seed, preprocess=PREPROCESS)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bn3.weight"):  # zero at the start, which would make every residual block an identity
                parameter.fill_(0.5)
    return save_checkpoint(module, path, architecture=architecture, training={"settings": {"seed": seed}})


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the name "mini", which trains in milliseconds a step."""
    from curate.models import configs

    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a small sigmoid model."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "sigmoid", "sigmoid")


@pytest.fixture(scope="session")
def tiny_softmax_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a small softmax model."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "softmax", "softmax", seed=1)
