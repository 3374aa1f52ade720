"""The verb that trains."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from curate.cli.options import LOCAL, EngineOptions, Flag, Json, Output, Shards
from curate.cli.printing import print_json, print_lines


def train(
    *shards: str,
    output: Output,
    model: str = "curate-tiny",
    reference: str | None = None,
    criterion: Literal["uniform", "learnability", "easy-reference", "hard-learner", "alignment"] | None = None,
    filter_ratio: float = 0.8,
    batch: int = 128,
    steps: int | None = None,
    epochs: float = 10.0,
    loss: Literal["sigmoid", "softmax"] = "sigmoid",
    gain: float | None = None,
    chunks: int = 16,
    handover: str = "auto",
    trusted: Shards = (),
    watch_every: int = 50,
    scoring: Literal["full", "flexi"] = "full",
    lag: int = 0,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    augment: Flag = False,
    ffn: Literal["dense", "fff"] = "dense",
    ffn_depth: int = 3,
    ffn_leaf_width: int | None = None,
    estimator: str = "backprop",
    tangents: int = 1,
    rules: str = "",
    estimator_workers: int = 1,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    eval_shards: Annotated[Shards, Parameter(name=["--eval", "--eval-shards"])] = (),
    zeroshot: Shards = (),
    zeroshot_label: str | None = None,
    eval_every: int | None = None,
    checkpoint_every: int = 200,
    label: str | None = None,
    clean: Shards = ("true", "null", "none", "clean"),
    policy: Path | None = None,
    labels: Path | None = None,
    on: Literal["key", "uid", "sample_id"] | None = None,
    write_shards: Path | None = None,
    baseline: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = (),
    grams_per_kwh: float | None = None,
    reference_cache: Path | None = None,
    overwrite: Flag = False,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Train an open_clip model on what it can learn from now: each step's batch is drawn jointly from a super-batch.

    RUN is a checkpoint that open_clip loads as local-dir:RUN, with report.html, log.jsonl and TensorBoard events in it.
    The same command again resumes an interrupted run. Without a reference, batches are drawn uniformly.

    Example: curate train shards/ -o run --model curate-tiny --reference small --filter-ratio 0.8 --steps 500

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs of WebDataset shards.
    model
        curate-tiny, curate-small, any architecture of open_clip, or a checkpoint to go on from (local-dir:...).
    reference
        A small pretrained model, as for `curate score`; its scores are computed ahead, or read from --reference-cache.
    criterion
        What a batch is drawn for: learnability where there is a reference, else uniform.
    filter_ratio
        Share of each super-batch that is left out: 0.8 draws --batch pairs from five times as many.
    steps
        Optimiser steps; instead of --epochs.
    gain
        Sharpness of the draw: 100 as in the paper (for alignment 2, in logits per standard deviation).
    chunks
        Parts in which a batch is drawn, each given those before it.
    handover
        auto, off, or a schedule of phases such as 0:learnability@100,400:trim@0.6,1200:uniform.
    trusted
        A few hundred clean pairs on which learner and reference are compared for the handover, or that alignment
        follows; without them, some pairs of the pool are held out.
    watch_every
        Steps between two such comparisons.
    scoring
        flexi scores at half resolution and trains every second image of a batch at it.
    lag
        Use scores that are this many steps old, and log what that changes.
    augment
        Shift and zoom images by up to a tenth.
    ffn
        fff puts fast feedforward layers in place of the dense ones (curate loads such a checkpoint, open_clip cannot).
    ffn_depth
        Depth of their trees: 2**depth leaves.
    ffn_leaf_width
        Neurons of a leaf; as many in all as the dense layer has, unless given.
    estimator
        How gradients are made: backprop, backprop-checkpoint, forward, forward-dense, forward-activity,
        forward-local, local-backprop, forward-exact, zeroth-order or hybrid; see `curate probe`.
    tangents
        Directions per step of an estimator that has them.
    rules
        For hybrid, the first that matches decides: "logit_*:exact,*:backprop".
    estimator_workers
        Share a forward gradient among so many worker processes: embeddings and scalars travel, gradients do not.
    eval_shards
        Held-out shards for image-text retrieval, at the end and every --eval-every steps. Held-out pairs whose images
        are trained on, too, are counted in a warning before the run and in its report.
    zeroshot
        Labelled shards for zero-shot accuracy, likewise.
    zeroshot_label
        The field of KEY.json that holds the class; without it, KEY.cls does.
    checkpoint_every
        Steps between two states from which the run can be resumed.
    label
        A field of KEY.json that tells clean pairs from others, for the report.
    clean
        Its values for clean pairs; null is a missing field.
    policy
        Hold every draw to the floors and ceilings that this YAML file gives groups; RUN/certificate.json says what came
        of it. In a uniform draw pairs give way to others of --filter-ratio's super-batch. Near-duplicates and embedding
        clusters are groups where --reference is given, which then embeds all pairs first.
    labels
        A CSV or parquet file with the groups that the policy speaks of, where captions do not tell them.
    on
        What labels are joined on: key (unless given), uid or sample_id. Samples that curate wrote anew are looked up by
        what they were called before.
    write_shards
        Write the chosen batches to new shards there, in the order trained on, for any loader to replay.
    baseline
        Finished runs to compare with in the report, such as one with --criterion uniform; pairs are made by seed.
    grams_per_kwh
        CO2 per kWh of your electricity, by which the report turns joules into grams; there is no default.
    reference_cache
        An output of `curate score` with the same reference, whose embeddings are used.
    overwrite
        Remove the run that is in the output directory, and begin anew; other files there stay. A policy that cannot be
        met is refused before that.
    """
    from curate.pipelines.training import train
    from curate.reports import fitted_line, policy_lines, training_bar

    settings: dict[str, Any] = {
        "model": model, "reference": reference, "criterion": criterion, "loss": loss, "batch": batch, "steps": steps,
        "filter_ratio": filter_ratio, "gain": gain, "chunks": chunks, "handover": handover, "trusted": trusted,
        "watch_every": watch_every, "scoring": scoring, "lag": lag, "epochs": epochs, "lr": lr,
        "weight_decay": weight_decay, "warmup": warmup, "augment": augment, "ffn": ffn, "ffn_depth": ffn_depth,
        "ffn_leaf_width": ffn_leaf_width, "estimator": estimator, "tangents": tangents, "rules": rules,
        "estimator_workers": estimator_workers, "seed": seed,
        "precision": precision, "eval_shards": eval_shards, "zeroshot": zeroshot, "zeroshot_label": zeroshot_label,
        "eval_every": eval_every, "checkpoint_every": checkpoint_every, "label": label, "clean": clean,
    }  # fmt: skip
    with training_bar() as report:
        result = train(
            shards, output, overwrite=overwrite, write_shards=write_shards, baselines=baseline,
            policy=policy, labels=labels, on=on,
            grams_per_kwh=grams_per_kwh, reference_cache=reference_cache, progress=report, quiet=False,
            **asdict(running), **settings,
        )  # fmt: skip
    if json:
        return print_json(result.as_json())
    kept = [] if result.certificate is None else policy_lines(result.certificate)
    print(fitted_line(result), *kept, sep="\n", file=sys.stderr)
    return print_lines([f"local-dir:{result.path}"])
