"""Measure a learner on held-out shards while it trains: retrieval, zero-shot accuracy. A forward pass of each pair.

The same code as `curate evaluate`, on the module as it is; decoded images of the retrieval shards stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from curate.evaluation.labels import Labels, find_labels, read_templates
from curate.evaluation.streaming import workers
from curate.evaluation.zeroshot import classify
from curate.learner.dataset import PairSource, open_pairs
from curate.learner.evaluate import retrieval
from curate.learner.settings import TrainSettings
from curate.learner.start import Start
from curate.models.load import encoder_of
from curate.models.modes import evaluating
from curate.models.precision import choose_device
from curate.progress import Silent
from curate.shards.sources import ShardSource, expand_shards

POOL = 100  # images that a caption is ranked among


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured, opened once. Made by `opened_measure`."""

    start: Start
    name: str
    device: torch.device
    captioned: PairSource | None
    labelled: tuple[ShardSource, ...]
    labels: Labels | None
    prompts: tuple[str, ...]
    threads: ThreadPoolExecutor

    def __call__(self) -> dict[str, Any]:
        """{"retrieval": {...} or None, "zeroshot": {...} or None} of the module as it is now."""
        module: Any = self.start.module
        with evaluating(module):
            encoder = encoder_of(
                module, self.name, self.start.tokenizer, architecture=self.start.architecture, device=self.device
            )
            found = None if self.captioned is None else retrieval(encoder, self.captioned, pool=POOL)
            guessed = None
            if self.labels is not None:
                figures = classify(
                    encoder, self.labelled, self.labels, self.prompts, self.threads, batch_size=64, bar=Silent()
                )
                accuracy = figures.top1.value
                guessed = {"samples": figures.images, "classes": len(figures.classes), "accuracy": accuracy}
        return {"retrieval": found, "zeroshot": guessed}


@contextmanager
def opened_measure(start: Start, settings: TrainSettings) -> Iterator[Measure | None]:
    """Open what the settings name for evaluation; None where they name nothing. Errors: as `curate evaluate`."""
    if not settings.eval_shards and not settings.zeroshot:
        yield None
        return
    with ExitStack() as stack:
        captioned = None
        if settings.eval_shards:
            sources = expand_shards(settings.eval_shards)
            opened = open_pairs(sources, start.tokenizer, start.rule, memory_gb=settings.memory_gb)
            captioned = stack.enter_context(opened).pairs
        labelled = tuple(expand_shards(settings.zeroshot)) if settings.zeroshot else ()
        yield Measure(
            start,
            settings.model,
            choose_device(settings.device),
            captioned,
            labelled,
            find_labels(labelled, field=settings.zeroshot_label) if labelled else None,
            read_templates(labelled, None) if labelled else (),
            stack.enter_context(workers()),
        )
