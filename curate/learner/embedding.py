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
    return embed_images(module, image_BCHW), embed_texts(module, token_BT, trimmed=trimmed)


def embed_images(module: Any, image_BCHW: Tensor) -> Tensor:
    """The image half of `embed_pairs`."""
    settings = module.visual.preprocess_cfg
    mean, std = (torch.tensor(settings[k], device=image_BCHW.device).view(-1, 1, 1) for k in ("mean", "std"))
    image_BD = plain_image(module, (image_BCHW.float() / 255 - mean) / std)
    return functional.normalize(image_BD.float(), dim=-1)


def embed_texts(module: Any, token_BT: Tensor, *, trimmed: bool = True, length: int | None = None) -> Tensor:
    """The text half. `length`: cut at so many tokens, for a batch that has to run at the length of another."""
    parts = text_parts(module) if trimmed else None
    if parts is None:
        text_BD = plain_text(module, token_BT)
    else:
        text_BD = encode_text_trimmed(parts, token_BT, group=None, length=length)
    return functional.normalize(text_BD.float(), dim=-1)
