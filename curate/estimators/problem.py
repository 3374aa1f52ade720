"""What an estimator needs to know: the parameters, embeddings of a batch, and the loss over those embeddings.

The loss is split off because everything behind the embeddings is tiny: its exact gradient G = dL/dZ costs O(B^2 D), and
tells each example's own share <G_n, zdot_n> of a directional derivative.
"""

# B batch, D embedding width, C channels, H, W height and width, T tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import UsageError
from curate.learner.embedding import embed_pairs
from curate.learner.losses import sigmoid_loss, softmax_loss
from curate.models.towers import pooled_position, text_parts

Embeddings = tuple[Tensor, ...]


class Problem(Protocol):
    """A model, and a loss that is split at its embeddings. Parameters that require a gradient are estimated.

    The first dimension of every embedding counts examples. An embedding that is not floating point (labels) is handed
    to the loss as it is; one without dimensions belongs to no example (`curate.estimators.penalised`).
    """

    @property
    def module(self) -> nn.Module:
        """Owner of all parameters."""

    def embed(self, batch: Any) -> Embeddings:
        """The embeddings of a batch, [B, ...] each; run with or without gradients, and with tangents."""

    def loss(self, *embeddings: Tensor) -> Tensor:
        """A scalar. It may use parameters too (scale and bias)."""

    def side(self, name: str) -> int | None:
        """Which embedding alone depends on the named parameter; None: several, or only the loss does."""

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:
        """The embedding that a block's output would be if it were the last; None where that is not known."""


@dataclass(frozen=True, slots=True)
class DualEncoderProblem:
    """An open_clip model with the sigmoid loss where it has a `logit_bias`, the softmax loss where it has none.

    A batch is (uint8 images [B, C, H, W], token ids [B, T]). Captions are cut at the longest of the batch, unless an
    estimator has put a hook on a block, which must then run as a module.
    Example: `Backprop().estimate(DualEncoderProblem(model), (image_BCHW, token_BT), seed=0, step=0).loss`.
    """

    module: Any

    def embed(self, batch: Any) -> Embeddings:
        parts = text_parts(self.module)
        hooked = parts is not None and any(_is_hooked(block) for block in parts.transformer.resblocks)
        return embed_pairs(self.module, *batch, trimmed=not hooked)

    def loss(self, *embeddings: Tensor) -> Tensor:
        image_BD, text_BD = embeddings
        scale, bias = self.module.logit_scale.exp(), self.module.logit_bias
        return softmax_loss(image_BD, text_BD, scale) if bias is None else sigmoid_loss(image_BD, text_BD, scale, bias)

    def side(self, name: str) -> int | None:
        if name.startswith("logit_"):
            return None
        return 0 if name.startswith("visual.") else 1

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:
        """Through the tower's own last norm and projection, for towers that pool one token; else None."""
        if side == 1:
            parts = text_parts(self.module)
            if parts is None or output.ndim != 3:
                return None
            row_B = torch.arange(len(output), device=output.device)
            pooled_BW = parts.ln_final(output[row_B, pooled_position(parts, batch[1])])
            return functional.normalize(_project(parts.projection, pooled_BW).float(), dim=-1)
        tower = self.module.visual
        if type(tower) is not VisionTransformer or tower.attn_pool is not None or tower.pool_type != "tok":
            return None
        return functional.normalize(_project(tower.proj, tower.ln_post(output[:, 0])).float(), dim=-1)


@dataclass(frozen=True, slots=True)
class ModuleProblem:
    """Any module with any loss: a batch is (inputs, targets), the loss is criterion(module(inputs), targets).

    Example: `ModuleProblem(nn.Linear(3, 2), functional.cross_entropy)` with a batch ([B, 3] floats, [B] labels).
    """

    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]

    def embed(self, batch: Any) -> Embeddings:
        inputs, targets = batch
        return self.module(inputs), targets

    def loss(self, *embeddings: Tensor) -> Tensor:
        return self.criterion(*embeddings)

    def side(self, name: str) -> int | None:  # noqa: ARG002
        return 0

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:  # noqa: ARG002
        return None


@dataclass(frozen=True, slots=True)
class Head:
    """The loss at given embeddings: its value, dL/dZ per embedding (None for labels), dL/d parameter for its own."""

    loss: float
    gradient: tuple[Tensor | None, ...]
    parameters: dict[str, Tensor]


def head_of(problem: Problem, embeddings: Embeddings) -> Head:
    """Differentiate the loss exactly at detached embeddings; O(B^2 D) for a contrastive loss."""
    leaves = tuple(z.detach().requires_grad_(z.is_floating_point()) for z in embeddings)
    named = trainable(problem.module)
    wanted = [z for z in leaves if z.requires_grad]
    with torch.enable_grad():
        loss = problem.loss(*leaves)
    gradients = torch.autograd.grad(loss, [*wanted, *named.values()], allow_unused=True)
    of_leaf = iter(gradients[: len(wanted)])
    own = zip(named, gradients[len(wanted) :], strict=True)
    return Head(
        float(loss.detach()),
        tuple(next(of_leaf) if z.requires_grad else None for z in leaves),
        {name: gradient for name, gradient in own if gradient is not None},
    )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; a shared one once. Errors: UsageError where there are none."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise UsageError("no parameter of the module requires a gradient; nothing is to be estimated")
    return named


def _project(projection: Any, x_BW: Tensor) -> Tensor:
    if projection is None:
        return x_BW
    made: Tensor = projection(x_BW) if isinstance(projection, nn.Module) else x_BW @ projection
    return made


def _is_hooked(block: nn.Module) -> bool:
    return bool(block._forward_pre_hooks or block._forward_hooks or "forward" in vars(block))
