"""Measure retrieval on held-out pairs: how often the nearest of `pool` captions is the image's own, and the reverse."""

# N pairs, P pool, D embedding width

from __future__ import annotations

import torch

from curate.learner.dataset import PairSource
from curate.models.embed import DualEncoder


def retrieval(encoder: DualEncoder, pairs: PairSource, *, pool: int = 100) -> dict[str, float]:
    """Recall at one in both directions, over consecutive pools of `pool` pairs; chance is 1 / pool.

    Example: `{"pairs": 500, "pool": 100, "image_to_text": 0.81, "text_to_image": 0.79}`.
    """
    hits, seen = torch.zeros(2), 0
    size = min(pool, len(pairs))
    for first in range(0, len(pairs) - size + 1, size):
        image, text = pairs.batch(range(first, first + size))
        sim_PP = encoder.embed_images(image) @ encoder.embed_texts(text).T
        own_P = torch.arange(len(sim_PP))
        hits += torch.stack([(sim_PP.argmax(dim).eq(own_P)).float().sum() for dim in (1, 0)])
        seen += len(sim_PP)
    image_to_text, text_to_image = (hits / max(1, seen)).tolist()
    return {"pairs": seen, "pool": size, "image_to_text": image_to_text, "text_to_image": text_to_image}
