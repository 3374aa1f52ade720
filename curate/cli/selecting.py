"""Verbs that score, select and write."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from curate.cli.options import LOCAL, EngineOptions, Flag, Json, Output, Shards, To
from curate.cli.printing import console, print_json, print_result


def score(
    *shards: str,
    output: Output,
    reference: str,
    learner: str | None = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int = 20_480,
    chunks: int = 16,
    criterion: Literal["learnability", "easy-reference", "hard-learner", "alignment"] | None = None,
    gain: float | None = None,
    loss: Literal["sigmoid", "softmax", "auto"] = "auto",
    seed: int = 0,
    deduplicate: Literal["off", "exact", "near"] = "exact",
    trusted: Shards = (),
    trusted_size: int = 256,
    policy: Path | None = None,
    labels: Path | None = None,
    on: Literal["key", "uid", "sample_id"] | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 64,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    reference_cache: Path | None = None,
    scores_only: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Score shards with a reference model (and the learner), select sub-batches, write them to new shards.

    The same command again resumes an interrupted run. Exit code 3: finished, but a shard lost more than --tolerance.

    Example: curate score shards/ -o filtered --reference ViT-B-32:laion2b_s34b_b79k --keep 0.2 --dry-run

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs of WebDataset shards.
    reference
        A small pretrained model: an open_clip name (ViT-B-32:laion2b_s34b_b79k), hf-hub:..., local-dir:..., or a
        directory that `curate train` wrote.
    learner
        The model that is to learn, at the checkpoint it has now; needed by all criteria but easy-reference.
    keep
        Share of the candidates that is kept (0.2 unless --sub-batch is given).
    sub_batch
        Samples drawn from each super-batch, instead of --keep.
    super_batch
        Candidates that are drawn from together.
    chunks
        Steps in which a sub-batch is drawn.
    criterion
        learnability (with a learner; else easy-reference) finds what can be learned now; easy-reference is the
        stronger noise filter; hard-learner takes noise for difficulty. alignment (where --trusted is given) finds what
        moves the learner as trusted pairs would.
    gain
        Sharpness of the draw: 100 unless given; for alignment 2, in logits per standard deviation of its ranks.
    loss
        The models' own, unless given.
    deduplicate
        Drop copies within a super-batch first: the sampler is drawn to them. near: by perceptual hash.
    trusted
        Shards of clean pairs like those the learner is for; scores each candidate by how far a step on it lowers the
        learner's loss on them (three more forward passes).
    trusted_size
        Pairs of these that are used, at most.
    policy
        A YAML file of floors and ceilings for groups, which every sub-batch keeps to; what that costs is printed, and
        certificate.json says what each group was owed and got. Columns and groups that no sample has are
        told before anything is scored.
    labels
        A CSV or parquet file with the groups of the samples that the policy names.
    on
        The column that labels are joined on: key unless given.
    precision
        auto: bf16 where the hardware computes it, checked against fp32.
    batch_size
        Samples that are embedded together; part of what fixes the bits of a score.
    samples_per_shard
        Samples in an output shard, at most 10000; fewer by default for small outputs, so that loaders have 8 shards.
    tolerance
        Share of a shard's samples that may be lost before the run ends with exit code 3.
    reference_cache
        An earlier output whose reference embeddings are used again; refused if they are of another model.
    scores_only
        Stop after scoring; `curate select` draws later.
    dry_run
        Print the plan (samples, super-batches, FLOPs, bytes, time) and write nothing.
    overwrite
        Replace a run that is in the output directory, when the new one is scored: refused before that (as for a policy
        that cannot be met) it leaves the earlier one as it was, and its own scores in _curate/next for the next call.
    """
    from curate.pipelines import runner

    values: dict[str, Any] = {
        "reference": reference, "learner": learner, "keep": keep, "sub_batch": sub_batch, "super_batch": super_batch,
        "chunks": chunks, "criterion": criterion, "gain": gain, "loss": loss, "seed": seed,
        "deduplicate": deduplicate, "trusted": trusted, "trusted_size": trusted_size, "policy": policy,
        "labels": labels, "on": on, "precision": precision, "batch_size": batch_size,
        "samples_per_shard": samples_per_shard, "reference_cache": reference_cache,
    }  # fmt: skip
    if dry_run:
        plan = runner.plan(shards, output, **values)
        if json:
            return print_json(plan.as_json())
        from curate.reports import render_plan

        render_plan(plan, console())
        return 0
    result = runner.score(
        shards, output, **values, **asdict(running), tolerance=tolerance, scores_only=scores_only,
        overwrite=overwrite, quiet=False,
    )  # fmt: skip
    return print_result(result, json)


def select(
    out: Path,
    /,
    *,
    output: To = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int | None = None,
    chunks: int | None = None,
    criterion: Literal["learnability", "easy-reference", "hard-learner", "alignment"] | None = None,
    gain: float | None = None,
    loss: Literal["sigmoid", "softmax"] | None = None,
    seed: int | None = None,
    deduplicate: Literal["off", "exact", "near"] | None = None,
    policy: Path | None = None,
    labels: Path | None = None,
    on: Literal["key", "uid", "sample_id"] | None = None,
    no_policy: Flag = False,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Draw anew from the scores stored in OUT, without a model; what is not given stays as it was.

    The shards written from the earlier selection are taken back; `curate write` writes the new ones.

    Example: curate select filtered -o stricter --keep 0.1

    Parameters
    ----------
    out
        An output directory of `curate score`.
    keep, sub_batch, super_batch, chunks, criterion, gain, loss, seed, deduplicate, policy, labels, on
        As in `curate score`.
    no_policy
        Draw without the policy that OUT has.
    """
    from curate.pipelines import repeating

    result = repeating.select(
        out, to=output, keep=keep, sub_batch=sub_batch, super_batch=super_batch, chunks=chunks, criterion=criterion,
        gain=gain, loss=loss, seed=seed, deduplicate=deduplicate, policy=policy, labels=labels, on=on,
        no_policy=no_policy, **asdict(running), quiet=False,
    )  # fmt: skip
    code = print_result(result, json)
    if not json:
        print(f"next: curate write {result.output}", file=sys.stderr)
    return code


def write(
    out: Path,
    /,
    *,
    output: To = None,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Write the shards of the selection stored in OUT, without a model.

    Example: curate write filtered -o resharded --samples-per-shard 1000

    Parameters
    ----------
    out
        An output directory of `curate score` or `curate select`.
    samples_per_shard
        Samples in an output shard, at most 10000.
    tolerance
        As in `curate score`.
    """
    from curate.pipelines import repeating

    result = repeating.write(
        out, to=output, samples_per_shard=samples_per_shard, tolerance=tolerance, **asdict(running), quiet=False
    )
    return print_result(result, json)
