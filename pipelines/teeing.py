"""Tee what a training chooses into new shards: the same sub-batches in the same order, for any loader to replay.

    RUN's log of chosen sub-batches -> packed into shards of whole sub-batches -> written (bytes copied by offset)
                                    -> counted per input sample -> ledger, manifest, SUCCESS

`tee` may be called again and again while the training goes on: each call writes the shards that are complete, and what
is there already stands in receipts. The last call (`final=True`) writes the rest and proves the accounting. A sample
chosen at many steps is written as many times, under a key of its own each time. Cost of a call: one pass over the log
(32 bytes hashed a row); of a new shard: its bytes copied and hashed, and the score tables of its input shards read.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from curate.chosen import log_digest, read_log, read_training
from curate.errors import UsageError, VerificationError
from curate.formats.img2dataset import SAMPLES_PER_SHARD
from curate.formats.openclip import train_command
from curate.models.configs import CONFIGS
from curate.pipelines import finishing, passes
from curate.pipelines.accounting import TeeLedgerSpec, write_tee_ledger
from curate.pipelines.certifying import take_memberships
from curate.pipelines.engine import Engine
from curate.pipelines.finishing import Receipts
from curate.pipelines.originals import OriginalSpec, by_digest, describe_shard, stored_scores
from curate.pipelines.packing import Packed, count_choices, pack
from curate.pipelines.teed_shards import TeeSpec, write_teed
from curate.receipts import Output, Receipt, Store
from curate.run_record import TeeRecord, pin_run, read_record, read_run, refuse_foreign, run_path
from curate.settings import WriteSettings, checked


@dataclass(frozen=True, slots=True)
class TeeResult:
    """What a call left in `output`: shards, pairs in them (with repeats), and the last step that they hold in full.

    `counts`, `reasons` and `train_command` are there after the final call.
    """

    output: Path
    shards: tuple[str, ...]
    samples: int
    steps: int
    finished: bool
    counts: dict[str, int] | None = None
    reasons: dict[str, int] | None = None
    train_command: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "shards": list(self.shards),
            "samples": self.samples,
            "steps": self.steps,
            "finished": self.finished,
            "counts": self.counts,
            "reasons": self.reasons,
            "train_command": self.train_command,
        }


@dataclass(frozen=True, slots=True)
class Tee:
    """A pinned tee: what its passes need to know."""

    output: Path
    record: TeeRecord
    engine: Engine
    scores: Path | None
    quiet: bool

    @property
    def store(self) -> Store:
        return Store.of(self.output)


def pin_tee(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    samples_per_shard: int | None = None,
    samples: int | None = None,
    scores: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> TeeRecord:
    """Claim `output` for what the training in `run` chooses: a trainer calls this before its first step.

    `samples_per_shard`: at most 10,000; without it shards hold 10,000, or an eighth of `samples` (the pairs that the
    whole training will draw) where that is fewer. `scores`: a run of `curate score --scores-only` over the same shards
    (RUN/_curate/reference where there is one), so that no shard is read for its index again. `overwrite` removes a tee
    or run that is there.

    Errors: UsageError where `run` has no TRAIN.json or `output` holds something else; RunMismatch where it belongs to
    another training.
    """
    checked(WriteSettings, {"samples_per_shard": samples_per_shard})
    if samples is not None and samples < 1:
        raise UsageError(f"samples {samples}: the pairs that the training will draw, at least one")
    target = Path(output).expanduser().absolute()
    refuse_foreign(target)
    if overwrite and target.exists():
        finishing.reopen(target, keep=())
        shutil.rmtree(target / "_curate", ignore_errors=True)
    return _pinned(run, target, samples_per_shard, samples, scores)[0]


def _pinned(
    run: str | os.PathLike[str],
    target: Path,
    samples_per_shard: int | None,
    samples: int | None,
    scores: str | os.PathLike[str] | None,
) -> tuple[TeeRecord, Path | None]:
    """The record of `target`, created if absent, and where the score tables are."""
    training = read_training(Path(run).expanduser().absolute())
    stored = None if scores is None and _without_scores(target) else stored_scores(training, scores)
    models = {} if stored is None else read_run(stored).models
    known = (training.run, training.settings, training.inputs, training.digests)
    record = TeeRecord(*known, models, samples_per_shard, samples)
    pin_run(target, record)
    Store.of(target).prepare()
    return record, stored


def _without_scores(target: Path) -> bool:
    """Did the tee that is there begin without scores? Then it goes on so, whatever has come to be since."""
    if not run_path(target).is_file():
        return False
    record = read_record(target)
    return isinstance(record, TeeRecord) and not record.models


def tee(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    engine: Engine,
    *,
    samples_per_shard: int | None = None,
    samples: int | None = None,
    scores: str | os.PathLike[str] | None = None,
    final: bool = False,
    quiet: bool = True,
) -> TeeResult:
    """Write the sub-batches in `run`'s log to shards in `output`: the complete ones, or with `final` all, and finish.

    Other arguments are those of `pin_tee`, the same in every call. Whole sub-batches go into a shard, in order of step
    and rank; only one that is larger than a shard is parted. The sidecar's `sub_batch` is the step minus one.

    Errors: as `pin_tee`; ShardError where an input shard is not the one that was trained on; VerificationError where
    the log contradicts itself or the shards. Whatever stopped a call, the next one goes on.
    Example: 60 steps of 40 pairs, samples_per_shard=100: 30 shards of 80 pairs, `curate.SubBatches(output)` yields 60.
    """
    checked(WriteSettings, {"samples_per_shard": samples_per_shard})
    target = Path(output).expanduser().absolute()
    record, stored = _pinned(run, target, samples_per_shard, samples, scores)
    job = Tee(target, record, engine, stored, quiet)
    packed = [one for one in pack(read_log(record.run), _shard_size(record)) if one.complete or final]
    _check_shards(packed, len(record.inputs), record.run)
    if not packed and not final:
        return TeeResult(job.output, (), 0, 0, finished=False)
    scored = _score_receipts(job)
    tables = _tables(job, scored)
    written = _write(job, packed, tables)
    if not final:
        return _publish(job, packed, written)
    return _finish(job, packed, Receipts(scored, (), _ledger(job, packed, tables), written))


def _shard_size(record: TeeRecord) -> int:
    """Samples that a shard may hold; without an explicit size at least one sub-batch of the first step."""
    if record.samples_per_shard is not None:
        return record.samples_per_shard
    total = SAMPLES_PER_SHARD * passes.AUTO_SHARDS if record.samples is None else record.samples
    size = passes.samples_per_shard(total, WriteSettings())
    first = next(read_log(record.run), None)
    if first is None:
        return size
    sub_batch = next(stop - start for start, stop in first.spans)
    return min(SAMPLES_PER_SHARD, math.ceil(size / sub_batch) * sub_batch)


def _check_shards(packed: Sequence[Packed], inputs: int, run: Path) -> None:
    named = {shard for one in packed for shard in one.shards}
    if named - set(range(inputs)):
        raise VerificationError(f"{run}: its log names input shard {max(named)}, TRAIN.json has {inputs} of them")


def _score_receipts(job: Tee) -> list[Receipt]:
    """One receipt per input shard: the stored scores, or what reading it gives without a model."""
    known = list(zip(job.record.inputs, job.record.digests, strict=True))
    if job.scores is not None:
        stored = by_digest(job.scores)  # under whatever names the shards had then
        return [replace(stored[d], facts=stored[d].facts | {"shard": source.url}) for source, d in known]
    threads = job.engine.threads_per_unit
    specs = [OriginalSpec(job.output, source, digest, threads) for source, digest in known]
    return passes.run_units(job, "read", describe_shard, specs, [one.source.size / 1e6 for one in specs], "MB")


def _tables(job: Tee, scored: Sequence[Receipt]) -> dict[int, tuple[Path, str]]:
    store = Store.of(job.scores or job.output)
    located = [(store.locate(receipt.outputs[0]), receipt.outputs[0].sha256) for receipt in scored]
    if any(path is None for path, _ in located):
        raise VerificationError(f"{store.root}: a score table is gone; run the same command again, it is made anew")
    return {shard: (path, sha256) for shard, (path, sha256) in enumerate(located) if path is not None}


def _write(job: Tee, packed: Sequence[Packed], tables: dict[int, tuple[Path, str]]) -> list[Receipt]:
    specs = [
        TeeSpec(
            job.output,
            one,
            {shard: job.record.inputs[shard] for shard in one.shards},
            {shard: tables[shard] for shard in one.shards},
        )
        for one in packed
    ]
    return passes.run_units(job, "write", write_teed, specs, [float(one.samples) for one in packed], "samples")


def _ledger(job: Tee, packed: Sequence[Packed], tables: dict[int, tuple[Path, str]]) -> list[Receipt]:
    choices = count_choices(read_log(job.record.run))
    firsts = np.cumsum([0, *(one.samples for one in packed)])
    number = np.searchsorted(firsts, choices["position"], side="right") - 1
    out = np.stack([number, choices["position"] - firsts[number]], axis=1)
    shards = range(len(job.record.inputs))
    bounds = np.searchsorted(choices["shard"], [*shards, len(shards)])
    specs = [
        TeeLedgerSpec(
            job.output,
            shard,
            job.record.inputs[shard].url,
            tables[shard],
            choices[bounds[shard] : bounds[shard + 1]],
            out[bounds[shard] : bounds[shard + 1]],
        )
        for shard in shards
    ]
    return passes.run_units(job, "ledger", write_tee_ledger, specs, [1.0] * len(specs), "shards")


def _publish(job: Tee, packed: Sequence[Packed], written: Sequence[Receipt]) -> TeeResult:
    """Give the complete shards of a training that goes on their names."""
    if finishing.withdraw(job, {receipt.unit for receipt in written}):
        for receipt in written:
            if not all(_is_published(job, output) for output in receipt.outputs):
                job.store.publish_outputs(receipt)
    return TeeResult(
        job.output, _names(written), sum(one.samples for one in packed), _last_step(packed), finished=False
    )


def _is_published(job: Tee, output: Output) -> bool:
    try:
        return (job.store.root / output.path).samefile(job.output / str(output.published))
    except FileNotFoundError:
        return False


def _names(written: Sequence[Receipt]) -> tuple[str, ...]:
    return tuple(str(receipt.outputs[0].published) for receipt in written)


def _last_step(packed: Sequence[Packed]) -> int:
    """The last step that the shards hold in full: a sub-batch that is parted may go on in the next one."""
    return packed[-1].steps[1] - (not packed[-1].whole) if packed else 0


def _finish(job: Tee, packed: Sequence[Packed], receipts: Receipts) -> TeeResult:
    finishing.withdraw(job, {receipt.unit for receipt in receipts})
    finishing.remove_stale(job, receipts)
    samples = sum(one.samples for one in packed)
    chosen: dict[str, Any] = {
        "steps": _last_step(packed),
        "samples": samples,
        "log": log_digest(read_log(job.record.run)),
    }
    take_memberships(job.store, job.record.run)
    manifest = finishing.finish(job, receipts, success=True, more={"chosen": chosen})
    names = _names(receipts.written)
    return TeeResult(
        job.output,
        names,
        samples,
        chosen["steps"],
        finished=True,
        counts=manifest["counts"],
        reasons=manifest["reasons"],
        train_command=_train_command(job, names, samples),
    )


def _train_command(job: Tee, names: tuple[str, ...], samples: int) -> str | None:
    """open_clip's command for the new shards: the architecture anew, or for one of ours the model that was trained."""
    if not names:
        return None
    train = job.record.train
    name = str(train.get("model", "")).partition(":")[0]
    unknown = not name or name in CONFIGS or "/" in name or name in ("hf-hub", "local-dir")
    model = f"local-dir:{job.record.run}" if unknown else name
    return train_command(job.output, names, samples, model, sigmoid=train.get("loss") == "sigmoid")
