"""Small problems with known properties for the estimator tests, and ways to look at gradients as one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.estimators.backprop import Backprop
from curate.estimators.problem import DualEncoderProblem, ModuleProblem, Problem, trainable
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.surgery import replace_feedforward
from curate.models.build import build_untrained
from curate.models.configs import PREPROCESS, with_loss

# B batch, T tokens, V vocabulary, P all numbers of a model in one vector
VOCABULARY, CONTEXT = 60, 10


def dual_encoder(loss: Any = "sigmoid", *, width: int = 16, layers: int = 1, convolutional: bool = False) -> Any:
    """An open_clip model of 16 pixels and 10 tokens, in training mode, its activations of ordinary size."""
    vision: dict[str, Any] = {"image_size": 16, "layers": layers, "width": width, "patch_size": 8, "head_width": 8}
    if convolutional:
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": width, "heads": 2, "layers": layers}
    config = with_loss({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, loss)
    module: Any = build_untrained(config, seed=0, preprocess=PREPROCESS)
    with torch.no_grad():
        module.token_embedding.weight.mul_(20)  # open_clip starts it at 0.02
    return module.train()


def pairs(batch: int = 6, *, pixels: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """uint8 images and captions of 4 to 7 tokens; the largest token ends a caption."""
    dice = torch.Generator().manual_seed(seed)
    image_BCHW = torch.randint(0, 256, (batch, 3, pixels, pixels), generator=dice, dtype=torch.uint8)
    token_BT = torch.zeros(batch, CONTEXT, dtype=torch.long)
    for n in range(batch):
        length = 4 + n % 4
        token_BT[n, :length] = torch.randint(1, VOCABULARY - 1, (length,), generator=dice)
        token_BT[n, length] = VOCABULARY - 1
    return image_BCHW, token_BT


def classifier(*, fast: bool = False) -> tuple[ModuleProblem, tuple[Tensor, Tensor]]:
    """A two-layer network on 12 points in 3 dimensions; with `fast`, a fast feedforward layer of 8 leaves within."""
    dice = torch.Generator().manual_seed(0)
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    middle: nn.Module = nn.GELU()
    if fast:
        middle = FastFeedforward(6, depth=3, leaf_width=4, generator=dice)
    module = nn.Sequential(nn.Linear(3, 6), middle, nn.Linear(6, 4))
    torch.set_rng_state(torch_state)
    points, labels = torch.randn(12, 3, generator=dice), torch.randint(0, 4, (12,), generator=dice)
    return ModuleProblem(module, functional.cross_entropy), (points, labels)


def with_leaves(**settings: Any) -> DualEncoderProblem:
    """A dual encoder with fast feedforward layers of 8 leaves in both towers."""
    module = dual_encoder(**settings)
    replace_feedforward(module, FeedforwardConfig(depth=3, leaf_width=6))
    return DualEncoderProblem(module)


def gradient(problem: Problem) -> Tensor:
    """.grad of all trainable parameters, [P] float64."""
    return torch.cat([p.grad.flatten().double() for p in trainable(problem.module).values() if p.grad is not None])


def exact(problem: Problem, batch: Any) -> Tensor:
    """Backprop's gradient, [P] float64."""
    Backprop().estimate(problem, batch, seed=0, step=0)
    return gradient(problem)


def estimates(estimator: Any, problem: Problem, batch: Any, seeds: int) -> Tensor:
    """One estimate per seed, [seeds, P] float64."""
    made = []
    for seed in range(seeds):
        estimator.estimate(problem, batch, seed=seed, step=0)
        made.append(gradient(problem))
    return torch.stack(made)
