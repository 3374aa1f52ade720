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

In `curate score` several threads share one direction (`moving`); to choose from a super-batch by such scores is
`curate.selection.independent.draw_alone`.
"""

# B candidates (the scoring batch), b rows of a tile, D embedding width, C channels, H, W height and width, T tokens

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators.problem import DualEncoderProblem, head_of, trainable
from curate.estimators.swapping import attention_for_tangents, swapped
from curate.models.modes import evaluating

Batch = tuple[Tensor, Tensor]  # uint8 images [B, C, H, W], token ids [B, T]
TILE_ROWS = 512


class Derivatives(Protocol):
    """<grad l_i, direction> of the candidates of one scoring batch, float32 [B]; `micro_batch` bounds memory."""

    def __call__(self, candidates: Batch, *, micro_batch: int = 64) -> Tensor: ...


def alignment_scores(module: Any, trusted: Batch, candidates: Batch, *, micro_batch: int = 64) -> Tensor:
    """<grad l_i, v> for every candidate, float32 [B], v being the gradient of the module's loss on the trusted batch.

    `module` is an open_clip model with weights in float32; its loss is sigmoid where it has a `logit_bias`. Gradients,
    training mode and attention settings are left as they were; autocast does not reach inside. On a GPU, TF32
    holds as it is set there, and leaves three digits. `micro_batch` bounds memory and changes nothing else.
    Errors: UsageError for weights that are not float32, an empty batch, or a gradient that is not finite.

    Example: `alignment_scores(model, (image_64CHW, token_64T), (image_320CHW, token_320T)).topk(64).indices` are the
    candidates that pull most towards the trusted ones.
    """
    direction = trusted_gradient(module, trusted, micro_batch=micro_batch)
    return directional_derivatives(module, direction, candidates, micro_batch=micro_batch)


def trusted_gradient(module: Any, trusted: Batch, *, micro_batch: int = 64) -> dict[str, Tensor]:
    """The gradient of the module's loss on a batch, by name of the parameter; `.grad` is not touched.

    Embeddings first, then a forward and a backward pass for each micro-batch with the loss's slope at these: four
    forward passes, and the memory of one micro-batch. Errors: as `alignment_scores`.
    """
    problem = DualEncoderProblem(module)
    named = _parameters(module)
    _check_batch("trusted", trusted)
    with _evaluating(module):
        with torch.no_grad():
            embedded = _embedded(module, trusted, micro_batch)
        head = head_of(problem, embedded)
        found = dict(head.parameters)
        slopes = (slope.split(micro_batch) for slope in head.gradient if slope is not None)
        for piece, *slope in zip(_pieces(trusted, micro_batch), *slopes, strict=True):
            for name, gradient in _pulled_back(problem, named, piece, slope).items():
                found[name] = found[name] + gradient if name in found else gradient
    if not all(bool(torch.isfinite(g).all()) for g in found.values()):
        raise UsageError("the gradient on the trusted batch is not finite; look at the loss there, or lower the scale")
    return found


def _pulled_back(
    problem: DualEncoderProblem, named: dict[str, nn.Parameter], piece: Batch, slope: list[Tensor]
) -> dict[str, Tensor]:
    """The loss's slope at the embeddings of a micro-batch, as a gradient of the parameters behind them."""
    with torch.enable_grad():
        product = torch.stack([(z_BD * s_BD).sum() for z_BD, s_BD in zip(problem.embed(piece), slope, strict=True)])
    if not product.requires_grad:
        return {}  # both towers are frozen
    gradients = torch.autograd.grad(product.sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def directional_derivatives(
    module: Any, direction: Mapping[str, Tensor], candidates: Batch, *, micro_batch: int = 64
) -> Tensor:
    """<grad l_i, direction> for every candidate, float32 [B]; `direction` is any tensor per parameter, by name.

    A parameter that is not named stands still. Errors: as `alignment_scores`, and UsageError for a name or a shape that
    the module does not have.
    """
    with moving(module, direction) as derive:
        return derive(candidates, micro_batch=micro_batch)


@contextlib.contextmanager
def moving(module: Any, direction: Mapping[str, Tensor]) -> Iterator[Derivatives]:
    """`directional_derivatives` for many scoring batches, which several threads may ask for at once.

    The module may be used meanwhile: tangents are put on a copy of its structure that shares its weights and buffers.
    Errors: as `directional_derivatives`.
    """
    named = _parameters(module)
    _check_direction(named, direction)
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    double = copy.deepcopy(module, shared).eval()
    with _tangents():
        duals = {named[name]: forward_ad.make_dual(named[name].detach(), v) for name, v in direction.items()}
        with swapped(double, duals):
            yield partial(_derivatives, double)


def _derivatives(double: Any, candidates: Batch, *, micro_batch: int = 64) -> Tensor:
    _check_batch("candidates", candidates)
    with torch.no_grad(), torch.autocast(candidates[0].device.type, enabled=False):
        image_BD, text_BD = _embedded(double, candidates, micro_batch)
        term_B = own_terms(image_BD, text_BD, double.logit_scale.exp(), double.logit_bias)
        slope_B = forward_ad.unpack_dual(term_B).tangent
        return torch.zeros_like(term_B) if slope_B is None else slope_B.clone()


def alignment_flops(forward: float, *, trusted: int, candidates: int) -> float:
    """FLOPs of `trusted_gradient` (0 trusted: none) and of scoring candidates; `forward` is one sample's forward pass.

    A trusted sample costs four forward passes. A candidate costs three: beside each product stand two, one with either
    factor's tangent; in time these were 3.2 (tests/bench/bench_alignment.py). The scoring batch's own similarities are
    left out. Example: forward 1e9, 256 trusted and 640 candidates: 4e9 * 256 + 3e9 * 640 = 2.94e12.
    """
    return forward * (4.0 * trusted + 3.0 * candidates)


class _Tangents:
    """One level of tangents, and attention that has them, for all threads that are inside: torch keeps one of each."""

    def __init__(self) -> None:
        self._lock, self._inside, self._held = threading.Lock(), 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._held.enter_context(attention_for_tangents())
                self._held.enter_context(forward_ad.dual_level())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._held.close()


_tangents = _Tangents()


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
    pieces = map(DualEncoderProblem(module).embed, _pieces(candidates, micro_batch))
    image_BD, text_BD = (torch.cat(side) for side in zip(*pieces, strict=True))
    return image_BD, text_BD


def _pieces(batch: Batch, micro_batch: int) -> Iterator[Batch]:
    if micro_batch < 1:
        raise UsageError(f"micro_batch {micro_batch} must be at least 1")
    image_BCHW, token_BT = batch
    return zip(image_BCHW.split(micro_batch), token_BT.split(micro_batch), strict=True)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast for a while."""
    with evaluating(module), torch.autocast(next(module.parameters()).device.type, enabled=False):
        yield


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
