"""`curate.evaluate`: load a model once and measure it on labelled shards, captioned shards, or both."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.errors import UsageError
from curate.evaluation.labels import find_labels, read_templates
from curate.evaluation.retrieval import Retrieval, retrieve
from curate.evaluation.streaming import workers
from curate.evaluation.zeroshot import ZeroShot, classify
from curate.models.identity import ModelIdentity
from curate.models.load import load_model
from curate.models.precision import Precision
from curate.progress import progress
from curate.shards.sources import Patterns, ShardSource, expand_shards


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured on which model; a part that was not asked for is None."""

    model: ModelIdentity
    zeroshot: ZeroShot | None
    retrieval: Retrieval | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; recall is keyed by k as a string."""
        plain: dict[str, Any] = asdict(self)
        for side in ("image_to_text", "text_to_image"):
            if plain["retrieval"] is not None:
                plain["retrieval"][side] = {str(k): at for k, at in plain["retrieval"][side].items()}
        return plain


def evaluate(
    checkpoint: str | os.PathLike[str],
    *,
    zeroshot: Patterns = (),
    retrieval: Patterns = (),
    classes: str | os.PathLike[str] | None = None,
    templates: str | os.PathLike[str] | None = None,
    label: str | None = None,
    pool: int | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    batch_size: int = 64,
    quiet: bool = True,
) -> Evaluation:
    """Measure zero-shot accuracy on the shards `zeroshot`, and image-text retrieval on the shards `retrieval`.

    Zero-shot classes are named by `classes` (a line each), else by classnames.txt beside the shards or a folder up, and
    KEY.cls numbers them; or `label` names a field of KEY.json that holds the class. Prompts come from `templates`, else
    zeroshot_classification_templates.txt there, else "a photo of a {c}.". Retrieval takes each line of KEY.txt for a
    caption, and ranks the whole set or pools of `pool` images. The same bits for any number of threads.

    Errors: UsageError for nothing to measure, no classes, a class without a name, or nothing readable; ModelError;
    ShardError. Example: `evaluate("reference", retrieval="heldout/").retrieval.image_to_text[1].recall.value`.
    """
    began = time.perf_counter()
    _check(zeroshot, retrieval, {"classes": classes, "templates": templates, "label": label}, pool, batch_size)
    labelled, captioned = (expand_shards(patterns) if patterns else [] for patterns in (zeroshot, retrieval))
    labels = find_labels(labelled, classes=_path(classes), field=label) if labelled else None
    prompts = read_templates(labelled, _path(templates)) if labelled else ()
    encoder = load_model(os.fspath(checkpoint), precision=precision, device=device)
    guessed = found = None
    with workers() as threads:
        if labels is not None:
            with progress("zero-shot", _megabytes(labelled), "MB", quiet=quiet) as bar:
                guessed = classify(encoder, labelled, labels, prompts, threads, batch_size=batch_size, bar=bar)
        if captioned:
            with progress("retrieval", _megabytes(captioned), "MB", quiet=quiet) as bar:
                found = retrieve(encoder, captioned, threads, pool=pool, batch_size=batch_size, bar=bar)
    return Evaluation(encoder.identity, guessed, found, round(time.perf_counter() - began, 3))


def _check(
    zeroshot: Patterns, retrieval: Patterns, of_labels: dict[str, Any], pool: int | None, batch_size: int
) -> None:
    if not zeroshot and not retrieval:
        raise UsageError("nothing to measure: give --zeroshot SHARDS, --retrieval SHARDS, or both")
    idle = [f"--{name}" for name, value in of_labels.items() if value is not None and not zeroshot]
    idle += ["--pool"] if pool is not None and not retrieval else []
    if idle:
        owner = "--retrieval" if zeroshot else "--zeroshot"
        raise UsageError(f"{', '.join(idle)} would do nothing without {owner}")
    if pool is not None and pool < 1:
        raise UsageError(f"--pool {pool} must be at least 1")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} must be at least 1")


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)


def _megabytes(sources: Sequence[ShardSource]) -> float:
    return sum(source.size for source in sources) / 1e6
