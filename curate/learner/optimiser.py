"""AdamW with warm-up and cosine decay, as the JEST paper trains (arXiv 2406.17711, appendix): beta2 0.95, not 0.999."""

from __future__ import annotations

import math

import torch
from torch import nn

from curate.learner.settings import TrainSettings


def make_optimiser(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Matrices and kernels are decayed; gains, biases, embeddings, scale and bias of the loss are not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
    kept = [p for name, p in named if p.ndim <= 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, settings: TrainSettings, step: int, steps: int) -> float:
    """Set and return the learning rate of a step, counted from 0: linear warm-up, then a half cosine to zero."""
    warm = max(1, round(settings.warmup * steps))
    share = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    for group in optimiser.param_groups:
        group["lr"] = settings.lr * share
    return settings.lr * share
