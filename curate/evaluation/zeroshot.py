"""Zero-shot classification: an image belongs to the class whose prompts, averaged, lie nearest to it.

A class is the normalised mean of the normalised embeddings of its name in every template (arXiv 2103.00020, section
3.1.4; the same as open_clip's `build_zero_shot_classifier`). Cost: one caption per class and template, one image
forward per sample; memory O(classes x width) and the similarities of one batch.
"""

# b images of a batch, C classes, P templates, D width

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from curate.errors import CurateWarning, UsageError
from curate.evaluation.interval import Share, mean_share, wilson
from curate.evaluation.labels import Labels, fill
from curate.evaluation.recall import TIE
from curate.evaluation.streaming import embedded
from curate.models.embed import DualEncoder
from curate.progress import Progress
from curate.shards.sources import ShardSource

PROMPTS = 256  # embedded together


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class: its name, its images and the share of them that it was the first guess for."""

    name: str
    images: int
    top1: Share | None


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Accuracy over `images`. `mean_per_class` is the unweighted mean over the classes that have images.

    With five classes or fewer `top5` is 1 by definition. `skipped` counts samples by reason.
    """

    images: int
    templates: tuple[str, ...]
    top1: Share
    top5: Share
    mean_per_class: Share
    classes: tuple[ClassFigures, ...]
    skipped: dict[str, int]


def classify(
    encoder: DualEncoder,
    sources: Sequence[ShardSource],
    labels: Labels,
    templates: Sequence[str],
    pool: ThreadPoolExecutor,
    *,
    batch_size: int,
    bar: Progress,
) -> ZeroShot:
    """Guess the class of every image, and compare with its label.

    Ties count against the model (`curate.evaluation.recall.TIE`), so two classes of one name are both missed: a
    CurateWarning says so. Errors: UsageError where no image has a label.
    """
    _warn_of_twins(labels.names)
    class_CD = class_embeddings(encoder, labels.names, templates, pool)
    seen: Counter[int] = Counter()
    first: Counter[int] = Counter()
    fifth, skipped = 0, Counter[str]()
    for batch in embedded(encoder, sources, labels.read, pool, batch_size=batch_size, bar=bar):
        before_b = places(batch.image_bD, class_CD, torch.tensor(batch.values, dtype=torch.int64))
        skipped += batch.skipped
        seen.update(batch.values)
        first.update(label for label, before in zip(batch.values, before_b.tolist(), strict=True) if not before)
        fifth += int((before_b < 5).sum())
    if not seen:
        what = ", ".join(f"{n} x {reason}" for reason, n in sorted(skipped.items())) or "the shards are empty"
        raise UsageError(f"no labelled image in {len(sources)} shards ({what}); `curate inspect` shows each sample")
    classes = tuple(
        ClassFigures(name, seen[number], wilson(first[number], seen[number]) if seen[number] else None)
        for number, name in enumerate(labels.names)
    )
    return ZeroShot(
        images=seen.total(),
        templates=tuple(templates),
        top1=wilson(first.total(), seen.total()),
        top5=wilson(fifth, seen.total()),
        mean_per_class=mean_share([one.top1 for one in classes if one.top1 is not None]),
        classes=classes,
        skipped=dict(sorted(skipped.items())),
    )


def class_embeddings(
    encoder: DualEncoder, names: Sequence[str], templates: Sequence[str], pool: ThreadPoolExecutor
) -> Tensor:
    """Unit vectors [C, D] in float32: normalise each prompt, take the mean over the templates, normalise."""
    step = max(1, PROMPTS // len(templates))
    groups = [names[start : start + step] for start in range(0, len(names), step)]
    return torch.cat(list(pool.map(partial(_embedded_group, encoder, templates), groups)))


def places(image_bD: Tensor, class_CD: Tensor, label_b: Tensor) -> Tensor:
    """How many other classes lie at least as near as the right one, int64 [b]; 0 is a hit."""
    sim_bC = image_bD @ class_CD.T
    return (sim_bC >= sim_bC.gather(1, label_b[:, None]) - TIE).sum(1) - 1


def _embedded_group(encoder: DualEncoder, templates: Sequence[str], names: Sequence[str]) -> Tensor:
    prompts = [fill(template, name) for name in names for template in templates]
    text_CPD = encoder.embed_texts(encoder.tokenize(prompts)).view(len(names), len(templates), -1)
    return functional.normalize(text_CPD.mean(1), dim=-1)


def _warn_of_twins(names: Sequence[str]) -> None:
    twins = sorted(name for name, count in Counter(names).items() if count > 1)
    if twins:
        warnings.warn(
            f"{len(twins)} class names occur twice ({', '.join(map(repr, twins[:5]))}): such classes tie, "
            "and their images count as missed",
            CurateWarning,
            stacklevel=3,
        )
