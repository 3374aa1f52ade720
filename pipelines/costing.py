"""What a run would cost, before it runs: samples, super-batches, FLOPs, bytes, and time from a short probe.

FLOPs are counted per sample from the models; the factor is over training the chosen sub-batches plainly (three forward
passes a sample), as in Evans et al. 2024, section 4. Costs one read of the shards' headers and one batch of scoring.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from curate.costs.flops import selection_flops
from curate.costs.ledger import factor_over_iid
from curate.models.embed import DualEncoder
from curate.pipelines.aligning import Aligner, aligned_learner
from curate.pipelines.modelling import ModelChoice
from curate.pipelines.planning import SuperBatch, plan_super_batches
from curate.reading import ReadLimits, Sample, read_sample
from curate.run_record import RunRecord
from curate.selection.alignment import alignment_flops, moving
from curate.settings import SelectSettings
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard
from curate.shards.tarindex import index_tar

PROBE_SAMPLES = 48
UNKNOWN_DIGEST = "0" * 64  # the plan needs counts, not ids; the digest would cost a read of every byte


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of `curate score`.

    `flops` has reference, learner, alignment (with trusted pairs), selection and total; `factor` is the cost of scoring
    and training the chosen sub-batches once over training them alone (None without a learner: the reference is then all
    that is paid). `seconds` is an estimate from `probed` samples scored on one core.
    """

    shards: int
    samples: int
    quarantined: int
    super_batches: int
    super_batch: int
    sub_batch: int
    selected: int
    bytes_in: int
    bytes_scores: int
    bytes_out: int
    flops: dict[str, float]
    factor: float
    factor_of: str
    seconds: float
    probed: int
    samples_per_second: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_costs(record: RunRecord, choice: ModelChoice, *, cached: bool, cores: int) -> Plan:
    """Index the shards, count, and probe one batch."""
    settings = record.settings.select or SelectSettings(criterion=choice.criterion, loss=choice.loss)
    entries = [_entries(source) for source in record.inputs]
    candidates = [sum(entry.reason is None for entry in shard) for shard in entries]
    batches = plan_super_batches([UNKNOWN_DIGEST] * len(entries), candidates, settings)
    models = {role: model for role, model in choice.models.items() if not (cached and role == "reference")}
    aligned = None if choice.settings.trusted is None else aligned_learner(choice.settings)
    rate, probed, tokens = _probe(record, entries, models, aligned)
    total, selected = sum(candidates), sum(batch.size for batch in batches)
    flops = _flops(models, batches, settings, choice, total, tokens)
    factor, factor_of = _factor(choice, flops, total, selected, tokens)
    bytes_in = sum(source.size for source in record.inputs)
    return Plan(
        shards=len(entries),
        samples=sum(map(len, entries)),
        quarantined=sum(map(len, entries)) - total,
        super_batches=len(batches),
        super_batch=max((batch.candidates for batch in batches), default=0),
        sub_batch=max((batch.size for batch in batches), default=0),
        selected=selected,
        bytes_in=bytes_in,
        bytes_scores=total * (sum(4 * model.width for model in choice.models.values()) + 300),
        bytes_out=round(bytes_in * selected / total) if total else 0,
        flops=flops,
        factor=factor,
        factor_of=factor_of,
        seconds=total / (rate * cores) if rate else 0.0,
        probed=probed,
        samples_per_second=rate * cores,
    )


def _entries(source: ShardSource) -> list[SampleEntry]:
    with open_shard(source) as data:
        return group_samples(index_tar(data), UNKNOWN_DIGEST)


def _probe(
    record: RunRecord,
    entries: list[list[SampleEntry]],
    models: dict[str, DualEncoder],
    aligned: DualEncoder | None,
) -> tuple[float, int, float]:
    """(samples per second on one core, samples probed, mean caption tokens) of one batch, after a few to warm up."""
    limits = ReadLimits(min_side=max((model.min_side for model in models.values()), default=None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for source, shard in zip(record.inputs, entries, strict=True):
            with open_shard(source) as data:
                good = [entry for entry in shard if entry.reason is None]
                _embed(list(_read(data, good[:4], limits)), models, aligned)
                started = time.perf_counter()
                samples = list(islice(_read(data, good, limits), PROBE_SAMPLES))
                tokens = _embed(samples, models, aligned)
                seconds = time.perf_counter() - started
            if samples:
                return len(samples) / seconds, len(samples), tokens
    finally:
        torch.set_num_threads(threads)
    return 0.0, 0, 0.0


def _read(data: memoryview, entries: list[SampleEntry], limits: ReadLimits) -> Iterator[Sample]:
    return (sample for entry in entries if (sample := read_sample(data, entry, limits)).reason is None)


def _embed(samples: list[Sample], models: dict[str, DualEncoder], aligned: DualEncoder | None) -> float:
    """Embed the samples with every model, and score them along any direction; mean tokens of their captions."""
    lengths = [0.0]
    for model in models.values():
        pixels = [model.preprocess(sample.rgb_HWC) for sample in samples if sample.rgb_HWC is not None]
        if not pixels:
            continue
        model.embed_images(torch.from_numpy(np.stack(pixels)))
        token_BT = model.tokenize([sample.caption or "" for sample in samples])
        model.embed_texts(token_BT)
        lengths.append(float((token_BT != 0).sum(1).float().mean()))
    if aligned is not None and samples:
        image_BCHW = aligned.preprocess_batch([sample.rgb_HWC for sample in samples if sample.rgb_HWC is not None])
        anywhere = {name: p.detach() for name, p in aligned.module.named_parameters() if p.requires_grad}
        with moving(aligned.module, anywhere) as derivatives:
            Aligner(aligned, derivatives, len(samples))([image_BCHW], [sample.caption or "" for sample in samples])
    return max(lengths)


def _flops(
    models: dict[str, DualEncoder],
    batches: tuple[SuperBatch, ...],
    settings: SelectSettings,
    choice: ModelChoice,
    samples: int,
    tokens: float,
) -> dict[str, float]:
    flops = {role: samples * model.flops_per_sample(round(tokens)) for role, model in models.items()}
    widths = sum(model.width for role, model in choice.models.items() if _drawn_with(role, settings))
    if (trusted := choice.settings.trusted_size) is not None:
        forward = choice.models["learner"].flops_per_sample(round(tokens))
        flops["alignment"] = alignment_flops(forward, trusted=trusted, candidates=samples)
    flops["selection"] = sum(
        selection_flops(batch.candidates, batch.size, widths, settings.chunks) for batch in batches
    )
    return flops | {"total": sum(flops.values())}


def _drawn_with(role: str, settings: SelectSettings) -> bool:
    """Does the draw compare the model's embeddings?"""
    alone = {"easy-reference": "reference", "hard-learner": "learner", "alignment": None}
    return alone.get(settings.criterion, role) == role


def _factor(
    choice: ModelChoice, flops: dict[str, float], samples: int, selected: int, tokens: float
) -> tuple[float, str]:
    """Cost of scoring plus one training step on each chosen sample, over the training step alone."""
    role = "learner" if "learner" in choice.models else "reference"
    what = "the learner" if role == "learner" else "a model of the reference's size"
    if not selected:
        return 1.0, what
    forward = choice.models[role].flops_per_sample(round(tokens))
    return factor_over_iid(samples / selected, forward=forward, scoring=flops["total"] / samples), what
