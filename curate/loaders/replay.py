"""Replay a training from the sub-batches that it teed: the pixels and tokens of every step, as the trainer saw them.

`SubBatches` with any transform gives the same pairs; this gives the same *numbers*: JPEGs are decoded at the reduced
scale that the trainer's preprocessing allows, and resized by its rule to uint8. A few tens of microseconds a pair more
than the decode.
"""

# b sub-batch, C channels, H, W height and width, T tokens

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from curate.errors import VerificationError
from curate.images.decode import ImageRejected, decode_rgb
from curate.loaders.subbatches import SubBatch, SubBatches
from curate.models.preprocess import Preprocess


def replay(
    out_dir: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Callable[[list[str]], Any],
    *,
    workers: int = 0,
    allow_unfinished: bool = False,
) -> Iterator[SubBatch]:
    """The sub-batches of `out_dir` in order of step: `images` uint8 [b, C, H, W], `captions` what `tokenizer` gives.

    `model` is an open_clip model, of which only the preprocessing is asked (`model.visual.preprocess_cfg`); `tokenizer`
    gets the list of captions of a sub-batch. Step k trained on the k-th of them, so the whole training in plain torch
    is its optimiser over this iterator. With a run that trained from scratch at a constant rate:

    >>> model = open_clip.create_model("ViT-B-32"); tokenizer = open_clip.get_tokenizer("ViT-B-32")   # doctest: +SKIP
    >>> optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))                  # doctest: +SKIP
    >>> for batch in replay("chosen", model, tokenizer):                                               # doctest: +SKIP
    ...     image_BD, text_BD = embed_pairs(model, batch.images, batch.captions)
    ...     sigmoid_loss(image_BD, text_BD, model.logit_scale.exp(), model.logit_bias).backward()
    ...     optimiser.step(); optimiser.zero_grad()

    (`embed_pairs` is `curate.learner.embedding.embed_pairs`, `sigmoid_loss` is in `curate.learner.losses`.) Settings of
    the training, its rates and its seed are in `out_dir/_curate/RUN.json` under `settings.train`.

    Errors: UsageError if the tee has not finished; VerificationError if the files contradict each other.
    """
    rule = Preprocess.from_config(_config(model))
    batches = SubBatches(out_dir, decode=False, tokenizer=tokenizer, allow_unfinished=allow_unfinished)
    prepare: Any = _Prepare(rule)  # without a batch size it gets one item, which torch's stubs do not know
    yield from DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=prepare)


@dataclass(frozen=True, slots=True)
class _Prepare:
    """Encoded images to uint8 pixels; a class, so that it travels to a worker."""

    rule: Preprocess

    def __call__(self, batch: SubBatch) -> SubBatch:
        pixels = [self._pixels(image, key) for image, key in zip(batch.images, batch.keys, strict=True)]
        return replace(batch, images=torch.stack(pixels))

    def _pixels(self, image: bytes, key: str) -> torch.Tensor:
        try:
            rgb_HWC, _ = decode_rgb(image, min_side=self.rule.min_side)
        except ImageRejected as error:
            raise VerificationError(
                f"sample {key!r}: its image no longer decodes ({error}); `curate verify`"
            ) from error
        return torch.from_numpy(self.rule(rgb_HWC))


def _config(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.visual.preprocess_cfg
    return config
