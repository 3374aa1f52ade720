"""Verbs that train models and measure them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from curate.cli.options import Flag, Json, Output
from curate.cli.printing import console, print_json, print_lines

Shards = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def train(
    *shards: str,
    output: Output,
    model: str = "curate-tiny",
    criterion: Literal["uniform"] = "uniform",
    loss: Literal["sigmoid", "softmax"] = "sigmoid",
    batch: int = 128,
    steps: int | None = None,
    epochs: float = 10.0,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    augment: Flag = False,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    eval_shards: Shards = (),
    overwrite: Flag = False,
    json: Json = False,
) -> int:
    """Fit a small open_clip model on shards, drawn uniformly, and save a checkpoint that open_clip loads.

    It makes references: `curate score ... --reference CKPT`, or in open_clip `local-dir:CKPT`.

    Example: curate train shards/ -o reference --model curate-tiny --epochs 5

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs.
    model
        curate-tiny, curate-small, or any architecture of open_clip.
    steps
        Optimiser steps; instead of --epochs.
    augment
        Shift and zoom images by up to a tenth.
    eval_shards
        Shards on which image-text retrieval is measured at the end.
    overwrite
        Replace a checkpoint that is in the output directory.
    """
    from curate.learner.train import train
    from curate.reports import fitted_line, training_bar

    settings: dict[str, Any] = {
        "model": model, "criterion": criterion, "loss": loss, "batch": batch, "steps": steps, "epochs": epochs,
        "lr": lr, "weight_decay": weight_decay, "warmup": warmup, "augment": augment, "seed": seed,
        "precision": precision, "eval_shards": eval_shards,
    }  # fmt: skip
    with training_bar() as report:
        result = train(shards, output, overwrite=overwrite, progress=report, **settings)
    if json:
        return print_json({**asdict(result), "path": str(result.path)})
    print(fitted_line(result), file=sys.stderr)
    return print_lines([f"local-dir:{result.path}"])


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
