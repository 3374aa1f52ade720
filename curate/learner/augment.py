"""Shift and zoom training images by up to a tenth. No mirror images: captions say left and right. O(B C H W)."""

# B batch, C channels, H, W height and width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augmented(image_BCHW: Tensor, *, seed: int, step: int) -> Tensor:
    """The uint8 images of a step (counted from 0) of a run with this seed, shifted and zoomed as the trainer does."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1) % 2**63
    return shift_and_zoom(image_BCHW, torch.Generator().manual_seed(mixed))


def shift_and_zoom(image_BCHW: Tensor, dice: torch.Generator, *, extent: float = 0.1) -> Tensor:
    """Each uint8 image zoomed by 1 +- extent and moved by up to extent of its side; edges are repeated; uint8 out."""
    B = len(image_BCHW)
    zoom_B11, x_B11, y_B11 = (extent * (2 * torch.rand(B, 1, 1, generator=dice) - 1) for _ in range(3))
    identity_B23 = torch.eye(2, 3).expand(B, 2, 3) * (1 + zoom_B11)
    shift_B23 = torch.cat([torch.zeros(B, 2, 2), torch.cat([x_B11, y_B11], dim=1)], dim=2)
    grid = functional.affine_grid(identity_B23 + shift_B23, list(image_BCHW.shape), align_corners=False)
    moved = functional.grid_sample(
        image_BCHW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.round().clamp(0, 255).to(torch.uint8)
