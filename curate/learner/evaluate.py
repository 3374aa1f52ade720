"""Measure retrieval on pairs that a training run holds open, with the ranking of `curate.evaluation`."""

# N pairs, D embedding width

from __future__ import annotations

import torch

from curate.errors import UsageError
from curate.evaluation.recall import recall
from curate.learner.dataset import PairSource
from curate.models.embed import DualEncoder

BATCH = 64


def retrieval(encoder: DualEncoder, pairs: PairSource, *, pool: int = 100) -> dict[str, float]:
    """Recall at one in both directions, over consecutive pools of `pool` pairs; chance is 1 / pool.

    Ties count against the model. Errors: UsageError where no pair is readable.
    Example: `{"pairs": 500, "pool": 100, "image_to_text": 0.81, "text_to_image": 0.79}`.
    """
    images, texts = [], []
    for first in range(0, len(pairs), BATCH):
        image_BCHW, token_BT = pairs.batch(range(first, min(first + BATCH, len(pairs))))
        images.append(encoder.embed_images(image_BCHW))
        texts.append(encoder.embed_texts(token_BT))
    if not sum(map(len, images)):
        raise UsageError("retrieval: none of the held-out pairs is readable")
    image_ND, text_ND = torch.cat(images), torch.cat(texts)
    found = recall(image_ND, text_ND, torch.arange(len(image_ND)), pool=pool, ks=(1,))
    return {
        "pairs": found.images,
        "pool": found.pool,
        "image_to_text": found.image_to_text[1] / found.images,
        "text_to_image": found.text_to_image[1] / found.captions,
    }
