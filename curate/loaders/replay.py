"""Replay a training from the sub-batches that it teed: the pixels and tokens of every step, as the trainer saw them.

`SubBatches` with any transform gives the same pairs; this gives the same *numbers*: JPEGs are decoded at the reduced
scale that the trainer's preprocessing allows, resized by its rule to uint8, and moved by the step's dice where it
augmented. A few tens of microseconds a pair more than the decode.
"""

# b sub-batch, C channels, H, W height and width, T tokens

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from curate.errors import VerificationError
from curate.images.decode import ImageRejected, decode_rgb
from curate.learner.augment import augmented
from curate.loaders.subbatches import SubBatch, SubBatches
from curate.models.preprocess import Preprocess
from curate.run_record import TeeRecord, read_record


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
    gets the list of captions of a sub-batch. Step k trained on the k-th of them, so the whole training is a plain loop
    over this iterator. With the optimiser and rates of the run it ends in its weights, bit for bit on the same machine
    and number of threads (tests/e2e/test_replayed_training.py does it in plain torch):

    >>> settings = parse_settings(record["settings"]["train"])       # of chosen/_curate/RUN.json    # doctest: +SKIP
    >>> model = prepare(settings).module.to(memory_format=torch.channels_last).train()              # doctest: +SKIP
    >>> optimiser = make_optimiser(model, settings); steps = len(curate.SubBatches("chosen"))        # doctest: +SKIP
    >>> for step, batch in enumerate(replay("chosen", model, tokenizer)):                            # doctest: +SKIP
    ...     set_rate(optimiser, settings, step, steps)
    ...     image_bD, text_bD = embed_pairs(model, batch.images, batch.captions)
    ...     sigmoid_loss(image_bD, text_bD, model.logit_scale.exp(), model.logit_bias).backward()
    ...     nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient)
    ...     optimiser.step(); optimiser.zero_grad(); model.logit_scale.data.clamp_(max=math.log(100))

    (These names are in `curate.learner`: `settings`, `start`, `optimiser`, `embedding`, `losses`.) bf16 puts
    `embed_pairs` under `torch.autocast`; flexi embeds by `FlexiProblem` of `curate.learner.resolution`. Gradients then
    differ by rounding alone (losses by 1e-6 of their size in a run of a few steps) where a forward pass of open_clip
    stands for `embed_pairs`, where the run reused its scoring pass, and where captions repeat so often that it embedded
    each distinct one once. Estimators other than backprop are replayed from their seeds (`curate.estimators.replay`),
    and penalties of fast feedforward layers are part of the loss.

    Errors: UsageError if the tee has not finished; VerificationError if the files contradict each other.
    """
    rule, settings = Preprocess.from_config(_config(model)), _training(out_dir)
    batches = SubBatches(out_dir, decode=False, tokenizer=tokenizer, allow_unfinished=allow_unfinished)
    prepare: Any = _Prepare(rule)  # without a batch size it gets one item, which torch's stubs do not know
    for batch in DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=prepare):
        if settings.get("augment"):
            moved = augmented(batch.images, seed=settings["seed"], step=batch.sub_batch)
            yield replace(batch, images=moved)
        else:
            yield batch


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


def _training(out_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the training that chose these sub-batches; nothing where `curate score` did."""
    record = read_record(Path(out_dir))
    return record.train if isinstance(record, TeeRecord) else {}


def _config(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.visual.preprocess_cfg
    return config
