"""Score candidates by how much a step along a direction, say a trusted set's gradient, would lower their own loss.

With v the gradient of the loss on a trusted batch, the score of candidate i is <grad l_i, v>: positive where a step
down l_i also lowers the loss that is trusted. One forward pass with tangents gives it for every candidate at once,
where otherwise a backward pass per candidate would be run; memory does not grow with depth. l_i is the candidate's own
part of the loss in its scoring batch, which is all candidates that are given together:

    sigmoid   M_ii + sum over j != i of (M_ij + M_ji): what leaves the sum over all pairs if i leaves the batch
    softmax   (LSE_j a s_ij + LSE_j a s_ji) / 2 - a s_ii: its two cross-entropies, whose mean over i is the loss

with M_ij = softplus(-(a s_ij + b)) where i = j, and softplus(a s_ij + b) elsewhere, a the scale and b the bias. These
are the terms by which the joint sampler judges a candidate (arXiv 2406.17711, Algorithms 2 and 3). Models run in
evaluation mode: a batch norm in training would let candidates of one micro-batch change each other's score.
"""

# B candidates (the scoring batch), b rows of a tile, D embedding width, C channels, H, W height and width, T tokens

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators.problem import DualEncoderProblem, trainable
from curate.estimators.swapping import attention_for_tangents, swapped

Batch = tuple[Tensor, Tensor]  # uint8 images [B, C, H, W], token ids [B, T]
TILE_ROWS = 512


def alignment_scores(module: Any, trusted: Batch, candidates: Batch, *, micro_batch: int = 64) -> Tensor:
    """<grad l_i, v> for every candidate, float32 [B], v being the gradient of the module's loss on the trusted batch.

    `module` is an open_clip model with weights in float32; its loss is sigmoid where it has a `logit_bias`. Gradients,
    training mode and attention settings are left as they were; autocast does not reach inside. On a GPU, TF32
    holds as it is set there, and leaves three digits. `micro_batch` bounds memory and changes nothing else.
    Errors: UsageError for weights that are not float32, an empty batch, or a gradient that is not finite.

    Example: `alignment_scores(model, (image_64CHW, token_64T), (image_320CHW, token_320T)).topk(64).indices` are the
    candidates that pull most towards the trusted ones.
    """
    return directional_derivatives(module, trusted_gradient(module, trusted), candidates, micro_batch=micro_batch)


def trusted_gradient(module: Any, trusted: Batch) -> dict[str, Tensor]:
    """The gradient of the module's loss on a batch, by name of the parameter; `.grad` is not touched.

    One forward and one backward pass. Errors: as `alignment_scores`.
    """
    problem = DualEncoderProblem(module)
    named = _parameters(module)
    _check_batch("trusted", trusted)
    with _evaluating(module), torch.enable_grad():
        loss = problem.loss(*problem.embed(trusted))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
    if not all(bool(torch.isfinite(g).all()) for g in found.values()):
        raise UsageError("the gradient on the trusted batch is not finite; look at the loss there, or lower the scale")
    return found


def directional_derivatives(
    module: Any, direction: Mapping[str, Tensor], candidates: Batch, *, micro_batch: int = 64
) -> Tensor:
    """<grad l_i, direction> for every candidate, float32 [B]; `direction` is any tensor per parameter, by name.

    A parameter that is not named stands still. Errors: as `alignment_scores`, and UsageError for a name or a shape that
    the module does not have.
    """
    named = _parameters(module)
    _check_batch("candidates", candidates)
    _check_direction(named, direction)
    if micro_batch < 1:
        raise UsageError(f"micro_batch {micro_batch} must be at least 1")
    with _evaluating(module), torch.no_grad(), attention_for_tangents(), forward_ad.dual_level():
        moving = {named[name]: forward_ad.make_dual(named[name].detach(), v) for name, v in direction.items()}
        with swapped(module, moving):
            image_BD, text_BD = _embedded(module, candidates, micro_batch)
            term_B = own_terms(image_BD, text_BD, module.logit_scale.exp(), module.logit_bias)
        slope_B = forward_ad.unpack_dual(term_B).tangent
        return torch.zeros_like(term_B) if slope_B is None else slope_B.clone()


def own_terms(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """l_i for each pair of a scoring batch of unit vectors, [B]; softmax where `bias` is None. Differentiable.

    O(B^2 D) time, and without a graph O(B) memory beside one tile of 512 rows.
    Example: B = 2, orthonormal and matched, scale 1: 0.3133 each for softmax, 0.3133 + 2 log 2 = 1.6996 for sigmoid
    with bias 0.
    """
    offset = torch.zeros_like(scale) if bias is None else bias
    own_B = scale * (image_BD * text_BD).sum(1) + offset
    row_B, column_B = (_rows(*sides, scale, bias) for sides in ((image_BD, text_BD), (text_BD, image_BD)))
    return (row_B + column_B) / 2 - own_B if bias is None else row_B + column_B + functional.softplus(-own_B)


def _rows(query_BD: Tensor, key_BD: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Per query: the log-sum-exp over its logits; for sigmoid the sum of softplus over the logits of foreign keys."""
    rows = []
    for start in range(0, len(query_BD), TILE_ROWS):
        logit_bB = scale * (query_BD[start : start + TILE_ROWS] @ key_BD.T)
        if bias is None:
            rows.append(logit_bB.logsumexp(1))
        else:
            row_B = torch.arange(len(key_BD), device=key_BD.device)
            foreign_bB = row_B[start : start + len(logit_bB), None] != row_B
            rows.append((functional.softplus(logit_bB + bias) * foreign_bB).sum(1))
    return torch.cat(rows)


def _embedded(module: Any, candidates: Batch, micro_batch: int) -> Batch:
    problem = DualEncoderProblem(module)
    pieces = zip(*(tensor.split(micro_batch) for tensor in candidates), strict=True)
    image_BD, text_BD = (torch.cat(side) for side in zip(*map(problem.embed, pieces), strict=True))
    return image_BD, text_BD


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast for a while; every part trains again afterwards if it did before."""
    training = [part for part in module.modules() if part.training]
    device = next(module.parameters()).device.type
    try:
        module.eval()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for part in training:
            part.training = True


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    named = trainable(module)
    other = sorted({str(p.dtype) for p in module.parameters() if p.dtype != torch.float32})
    if other:
        raise UsageError(f"alignment needs weights in float32, these are {', '.join(other)}; load with precision fp32")
    return named


def _check_batch(name: str, batch: Batch) -> None:
    image_BCHW, token_BT = batch
    if not len(image_BCHW) or len(image_BCHW) != len(token_BT):
        raise UsageError(f"{name}: {len(image_BCHW)} images and {len(token_BT)} captions; give as many, at least one")


def _check_direction(named: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    if unknown := sorted(set(direction) - set(named)):
        raise UsageError(f"direction: no trainable parameter is called {', '.join(unknown[:5])}")
    for name, v in direction.items():
        if v.shape != named[name].shape:
            raise UsageError(f"direction: {name} is {tuple(v.shape)}, the parameter {tuple(named[name].shape)}")
