"""Embeddings of a training batch with their graph: uint8 images and token ids in, unit vectors in float32 out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curate.models.embed import plain_image, plain_text
from curate.models.towers import encode_text_trimmed, text_parts

# B batch, C channels, H, W height and width, T tokens, D embedding width


def embed_pairs(module: Any, image_BCHW: Tensor, token_BT: Tensor, *, trimmed: bool = True) -> tuple[Tensor, Tensor]:
    """Image and text embeddings [B, D] of an open_clip model, normalised with its own mean and std beforehand.

    `trimmed` cuts captions at the longest of the batch where the text tower allows it: the same numbers for less.
    Without it every block of the tower runs as a module, which hooks on blocks need.
    """
    settings = module.visual.preprocess_cfg
    mean, std = (torch.tensor(settings[k], device=image_BCHW.device).view(-1, 1, 1) for k in ("mean", "std"))
    image_BD = plain_image(module, (image_BCHW.float() / 255 - mean) / std)
    parts = text_parts(module) if trimmed else None
    text_BD = plain_text(module, token_BT) if parts is None else encode_text_trimmed(parts, token_BT, group=None)
    return functional.normalize(image_BD.float(), dim=-1), functional.normalize(text_BD.float(), dim=-1)
