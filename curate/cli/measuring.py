"""The verb that measures a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from curate.cli.options import Json, Shards
from curate.cli.printing import console, print_json


def evaluate(
    checkpoint: str,
    /,
    *,
    zeroshot: Shards = (),
    retrieval: Shards = (),
    classes: Path | None = None,
    templates: Path | None = None,
    label: str | None = None,
    pool: int | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 64,
    json: Json = False,
) -> int:
    """Measure a model on labelled or captioned shards: zero-shot accuracy, and recall of image-text retrieval.

    Every share comes with a 95 % interval. A sample that cannot be read is counted under its reason and left out.

    Example: curate evaluate reference --zeroshot cifar10/test --retrieval heldout/ --pool 100

    Parameters
    ----------
    checkpoint
        An open_clip name (ViT-B-32:laion2b_s34b_b79k), hf-hub:..., local-dir:..., or a directory that `curate train`
        wrote.
    zeroshot
        Shards of labelled images: KEY.cls holds the number of the class.
    retrieval
        Shards of images with captions, one caption in each line of KEY.txt.
    classes
        Names of the classes, one in each line; otherwise classnames.txt beside the zero-shot shards or a folder up.
    templates
        Prompts, one in each line, with {c} or {} where the name goes; otherwise
        zeroshot_classification_templates.txt beside the shards or a folder up, else "a photo of a {c}.".
    label
        Take the class from this field of KEY.json; without --classes its distinct values are the classes.
    pool
        Rank among consecutive pools of this many images instead of the whole set.
    batch_size
        Images that are embedded together.
    """
    from curate.evaluation.measure import evaluate
    from curate.evaluation.tables import render_evaluation

    result = evaluate(
        checkpoint, zeroshot=zeroshot, retrieval=retrieval, classes=classes, templates=templates, label=label,
        pool=pool, precision=precision, batch_size=batch_size, quiet=False,
    )  # fmt: skip
    if json:
        return print_json(result.as_json())
    render_evaluation(result, console())
    return 0
