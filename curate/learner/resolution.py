"""Embed images at a lower resolution with the same weights, and train on both resolutions in one contrastive loss.

A vision transformer, and the attention pool of a CLIP ResNet, have a position for each cell of a grid. For a smaller
grid the positions are interpolated (bicubic, antialiased, as open_clip does when it loads a checkpoint), here as a
matrix product inside the graph: gradients and tangents reach the positions that are stored, with the same bits on every
run. At half the side a transformer's image tower costs about a quarter. Scoring at low resolution works only if part of
the training batch has it too (Flexi-JEST, Evans et al. 2024, arXiv 2406.17711, section 3.3): half, in `FlexiProblem`.
"""

# B images, m at full and n at low resolution, C channels, H, W height and width, h, w those of the low resolution,
# G, g cells of a grid and of a smaller one along one side, P prefix tokens (class token, registers), D width

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from curate.costs.flops import Size, sample_work
from curate.errors import UsageError
from curate.estimators.problem import DualEncoderProblem, Embeddings
from curate.estimators.swapping import swapped
from curate.learner.embedding import embed_images, embed_pairs
from curate.learner.problem import LearnerProblem

_RESNET_STRIDE = 32
_TAKEN: WeakKeyDictionary[nn.Module, set[Size]] = WeakKeyDictionary()  # sizes that other towers were seen to take


@dataclass(frozen=True, slots=True)
class FlexiProblem(LearnerProblem):
    """A learner that sees part of each batch at low resolution; one loss goes over all pairs.

    A batch is (uint8 images [m, C, H, W], uint8 images [n, C, h, w], token ids [m + n, T]); embeddings come in that
    order. Without images of either size m or n is 0. Running statistics of batch norms follow the full images alone.
    Example: `Backprop().estimate(FlexiProblem(model), (image_mCHW, shrink(image_nCHW, (112, 112)), token_BT), ...)`.
    """

    def embed(self, batch: Any) -> Embeddings:
        image_mCHW, image_nChw, token_BT = batch
        if not len(image_mCHW):
            with _low(self.module, image_nChw):
                return LearnerProblem.embed(self, (image_nChw, token_BT))
        image_mD, text_BD = LearnerProblem.embed(self, (image_mCHW, token_BT))
        if not len(image_nChw):
            return image_mD, text_BD
        cast = torch.autocast(image_nChw.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        with cast, _low(self.module, image_nChw):
            image_nD = embed_images(self.module, image_nChw)
        return torch.cat([image_mD, image_nD]), text_BD

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:
        """As in `DualEncoderProblem` for captions; None for images, whose blocks run twice."""
        return DualEncoderProblem.read(self, side, output, (None, batch[2])) if side else None


def embed_low(module: Any, image_BChw: Tensor, token_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`embed_pairs` of images of any size that the tower takes; at its own size the same bits.

    Differentiable in both modes. Batch norms in training use the batch's statistics and keep none.
    Errors: UsageError, as `at_size`.
    """
    with _low(module, image_BChw):
        return embed_pairs(module, image_BChw, token_BT)


def full_size(module: Any) -> Size:
    """Height and width that the image tower was made for."""
    size = module.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def low_size(module: Any, factor: float = 0.5) -> Size:
    """Height and width near `factor` of the model's own, in whole patches (of 32 pixels in a CLIP ResNet).

    Example: ViT-B-32 at 224 pixels: 112 is half way between 96 and 128, and the larger is taken.
    Errors: UsageError for a factor outside 0 to 1, and where no smaller size in whole patches is left.
    """
    if not 0 < factor < 1:
        raise UsageError(f"low resolution: factor {factor} of the image's side is not between 0 and 1")
    full, stride = full_size(module), _stride(module.visual)
    low = tuple(
        max(step, step * math.floor(side * factor / step + 0.5)) for side, step in zip(full, stride, strict=True)
    )
    if low[0] >= full[0] or low[1] >= full[1]:
        raise UsageError(
            f"low resolution: {factor} of {full[0]} x {full[1]} pixels, in steps of {stride[0]} x {stride[1]}, leaves "
            "no smaller image; choose a smaller factor, a model with more or smaller patches, or --scoring full"
        )
    return low[0], low[1]


def low_cost(module: nn.Module, size: Size, tokens: int | None = None, *, training: bool = True) -> float:
    """What a pair costs at `size`, captions included, over what it costs at the model's own: A in the cost factor.

    Captions are as long at either size, so that a heavy text tower keeps the factor near 1. `training`: forth and back,
    else the scoring pass. Example: ViT-B-32 at 128 pixels: 0.42 with captions of 16 tokens, 0.61 with 77.
    """
    full = sample_work(module, tokens, training=training)
    with at_size(module, size):
        low = sample_work(module, tokens, size=size, training=training)
    return low.step / full.step


def shrink(image_BCHW: Tensor, size: Size) -> Tensor:
    """uint8 images at a smaller size: means of whole pixels where the sides divide, else antialiased bilinear.

    Example: a 2 x 2 image of 0, 0, 1, 1 at size (1, 1) is 0: halves go to the even number. Errors: UsageError for a
    larger size.
    """
    H, W = image_BCHW.shape[-2:]
    h, w = size
    if not (1 <= h <= H and 1 <= w <= W):
        raise UsageError(f"images of {H} x {W} pixels cannot shrink to {h} x {w}")
    if (h, w) == (H, W):
        return image_BCHW
    if H % h == 0 and W % w == 0:
        small = functional.avg_pool2d(image_BCHW.float(), (H // h, W // w))
    else:
        small = functional.interpolate(
            image_BCHW.float(), size=(h, w), mode="bilinear", antialias=True, align_corners=False
        )
    return small.round_().clamp_(0, 255).to(torch.uint8)


@contextmanager
def at_size(module: Any, size: Size) -> Iterator[None]:
    """Within, the image tower of `module` takes images of `size`; at its own size nothing is touched.

    The module must not run in another thread meanwhile. Errors: UsageError where the tower is made for one size only,
    or where nothing of the image would be left.
    """
    tower = module.visual
    if size == full_size(module):
        yield
        return
    with ExitStack() as stack:
        _enter(stack, tower, size)
        yield


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Within, batch norms in training normalise by the batch, and leave their running statistics as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    kept = [(norm, norm.momentum, norm._buffers.get("num_batches_tracked")) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm._buffers["num_batches_tracked"] = None
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = batches


@contextmanager
def _low(module: Any, image_BChw: Tensor) -> Iterator[None]:
    size = (int(image_BChw.shape[-2]), int(image_BChw.shape[-1]))
    still = nullcontext() if size == full_size(module) else still_statistics(module.visual)
    with at_size(module, size), still:
        yield


def _enter(stack: ExitStack, tower: Any, size: Size) -> None:
    if isinstance(tower, VisionTransformer):
        grid = (size[0] // tower.patch_size[0], size[1] // tower.patch_size[1])
        _swap(stack, tower, "positional_embedding", tower.grid_size, _whole(grid, size, tower))
    elif isinstance(tower, ModifiedResNet):
        side = math.isqrt(len(tower.attnpool.positional_embedding) - 1)
        # the first convolution rounds up, the four poolings after it down
        grid = (-(-size[0] // 2) // 16, -(-size[1] // 2) // 16)
        _swap(stack, tower.attnpool, "positional_embedding", (side, side), _whole(grid, size, tower))
    else:
        trunk: Any = getattr(tower, "trunk", None)
        if _has_grid(trunk):
            patches = trunk.patch_embed
            grid = _whole((size[0] // patches.patch_size[0], size[1] // patches.patch_size[1]), size, tower)
            _swap(stack, trunk, "pos_embed", patches.grid_size, grid)
            stack.callback(setattr, patches, "strict_img_size", patches.strict_img_size)
            patches.strict_img_size = False
        _try(tower, size)


def _swap(stack: ExitStack, owner: Any, name: str, grid: Any, smaller: Size) -> None:
    stored = getattr(owner, name)
    made = resize_positions(stored, (int(grid[0]), int(grid[1])), smaller)
    stack.enter_context(swapped(owner, {stored: made}))


def resize_positions(position: Tensor, grid: Size, smaller: Size) -> Tensor:
    """Positions [P + G G', D] (or with a leading 1) of a grid G x G', for one of g x g'; those of prefix tokens stay.

    Example: ViT-B-32 holds 1 + 7 * 7 positions; at 128 pixels it has 1 + 4 * 4.
    """
    flat = position.reshape(-1, position.shape[-1])
    prefix, cells = flat[: len(flat) - grid[0] * grid[1]], flat[len(flat) - grid[0] * grid[1] :]
    with torch.autocast(position.device.type, enabled=False):
        rows_gG, columns_gG = (
            _weights(G, g).to(device=cells.device, dtype=cells.dtype) for G, g in zip(grid, smaller, strict=True)
        )
        part = rows_gG @ cells.reshape(grid[0], -1)
        part = columns_gG @ part.reshape(smaller[0], grid[1], -1)
    made = torch.cat([prefix, part.reshape(smaller[0] * smaller[1], -1)])
    return made.reshape(*position.shape[:-2], *made.shape)


@lru_cache(maxsize=32)
def _weights(G: int, g: int) -> Tensor:
    """The matrix [g, G] of torch's antialiased bicubic interpolation along one side, float64."""
    unit_1GG = torch.eye(G, dtype=torch.float64)[None, None]
    return functional.interpolate(unit_1GG, size=(g, G), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def _whole(grid: Size, size: Size, tower: Any) -> Size:
    if min(grid) < 1:
        raise UsageError(
            f"an image of {size[0]} x {size[1]} pixels leaves nothing in a {_name(tower)}; it needs at least "
            f"{_stride(tower)[0]} x {_stride(tower)[1]}"
        )
    return grid


def _stride(tower: Any) -> Size:
    """What low sizes are multiples of."""
    if isinstance(tower, VisionTransformer):
        return int(tower.patch_size[0]), int(tower.patch_size[1])
    if isinstance(tower, ModifiedResNet):
        return _RESNET_STRIDE, _RESNET_STRIDE
    trunk: Any = getattr(tower, "trunk", None)
    if _has_grid(trunk):
        return int(trunk.patch_embed.patch_size[0]), int(trunk.patch_embed.patch_size[1])
    reductions = [int(stage["reduction"]) for stage in getattr(trunk, "feature_info", None) or ()]
    return (max(reductions), max(reductions)) if reductions else (1, 1)


def _has_grid(trunk: Any) -> bool:
    """Is this a timm transformer with one learned position for each patch, and nothing else that knows the grid?"""
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    return (
        type(trunk) is TimmTransformer
        and isinstance(trunk.pos_embed, Tensor)
        and not trunk.dynamic_img_size
        and hasattr(trunk.patch_embed, "strict_img_size")
    )


def _try(tower: nn.Module, size: Size) -> None:
    """Run one blank image through an unknown tower, once for each size; its state is left as it was."""
    if size in _TAKEN.setdefault(tower, set()):
        return
    parameter = next(tower.parameters())
    training = [module for module in tower.modules() if module.training]
    blank = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tower.eval()
            tower(blank)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the image tower, a {_name(tower)}, takes no image of {size[0]} x {size[1]} pixels ({first}); flexi needs "
            "a vision transformer of open_clip, a CLIP ResNet, or a tower that takes any size; use --scoring full"
        ) from error
    finally:
        for module in training:
            module.training = True
    _TAKEN[tower].add(size)


def _name(tower: Any) -> str:
    trunk = getattr(tower, "trunk", None)
    return type(tower).__name__ if trunk is None else f"{type(tower).__name__} with a {type(trunk).__name__}"
