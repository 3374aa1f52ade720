"""The passes of a run, each a list of specs handed to an engine and a list of receipts that comes back.

score -> select -> ledger -> write. A pass reads nothing but the receipts of the one before it, so any of them can be
repeated alone. Cost of the driver: a few hundred bytes per shard and super-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

from curate.errors import UsageError, VerificationError
from curate.formats.img2dataset import SAMPLES_PER_SHARD
from curate.pipelines.accounting import Drawing, LedgerSpec, write_ledger
from curate.pipelines.engine import Engine
from curate.pipelines.planning import SuperBatch, plan_super_batches
from curate.pipelines.ruling import Rule
from curate.pipelines.scoring import ScoreSpec, score_shard
from curate.pipelines.selecting import SelectSpec, select_super_batch
from curate.pipelines.writing import Drawn, WriteSpec, write_shard
from curate.policy.given import GivenPolicy
from curate.policy.quotas import State
from curate.progress import progress
from curate.receipts import Receipt, Store
from curate.run_record import RunRecord
from curate.settings import SelectSettings, WriteSettings

Spec = TypeVar("Spec")

SMALLEST_AUTO_SHARD = 100
AUTO_SHARDS = 8  # open_clip asks for at least one shard per loader worker


@dataclass(frozen=True, slots=True)
class Job:
    """What every pass needs to know: the pinned run, where it lives, what runs it."""

    output: Path
    record: RunRecord
    engine: Engine
    cache: Path | None = None
    quiet: bool = False
    direction: Path | None = None
    given: GivenPolicy | None = None

    @property
    def store(self) -> Store:
        return Store.of(self.output)


def score_pass(job: Job) -> list[Receipt]:
    """Score every input shard; receipts in the order of the inputs."""
    record = job.record
    shared = job.engine.shared_threads
    common = (record.settings.score, record.models, shared or job.engine.threads_per_unit, shared is not None)
    specs = [ScoreSpec(job.output, source, *common, job.cache, job.direction) for source in record.inputs]
    megabytes = [source.size / 1e6 for source in job.record.inputs]
    return run_units(job, "score", score_shard, specs, megabytes, "MB", overlapping=True)


def select_pass(job: Job, scored: Sequence[Receipt], rule: Rule | None = None) -> list[Receipt]:
    """Draw every super-batch; receipts in the order of the super-batches. Under a rule one after the other."""
    specs = select_specs(job, scored)
    amounts = [spec.batch.candidates for spec in specs]
    if rule is not None:
        return _select_in_turn(job, specs, amounts, rule)
    return run_units(job, "select", select_super_batch, specs, amounts, "samples")


def select_specs(job: Job, scored: Sequence[Receipt]) -> list[SelectSpec]:
    """Every super-batch as it is drawn without a policy. Errors: UsageError for a run that draws nothing."""
    settings = job.record.settings.select
    if settings is None:
        raise UsageError(f"{job.output} holds scores only; `curate select {job.output}` draws from them")
    models = scored[0].facts["models"] if scored else {}
    tables = _tables(job, scored)
    return [
        SelectSpec(job.output, batch, _only(tables, batch), models, settings, job.engine.threads_per_unit)
        for batch in super_batches(scored, settings)
    ]


def _select_in_turn(job: Job, specs: Sequence[SelectSpec], amounts: Sequence[float], rule: Rule) -> list[Receipt]:
    """Each super-batch owes what those before it left, so that it waits for them."""
    receipts: list[Receipt] = []
    state = rule.begin()
    with progress("select", sum(amounts), "samples", quiet=job.quiet or not specs) as shown:
        for number, spec in enumerate(specs):
            ruled = replace(spec, ruled=rule.on(state, number))
            [(_, receipt)] = job.engine.run(select_super_batch, [ruled])
            state = State.from_json(receipt.facts["policy"]["state"])
            receipts.append(receipt)
            shown.advance(amounts[number], receipt.facts["policy"]["conflict"])
    return receipts


def super_batches(scored: Sequence[Receipt], settings: SelectSettings) -> tuple[SuperBatch, ...]:
    """The super-batches that these score receipts make."""
    digests = [receipt.facts["digest"] for receipt in scored]
    return plan_super_batches(digests, [receipt.facts["candidates"] for receipt in scored], settings)


def ledger_pass(job: Job, scored: Sequence[Receipt], selected: Sequence[Receipt]) -> list[Receipt]:
    """Write the ledger of every input shard."""
    firsts = list(accumulate((receipt.facts["drawn"] for receipt in selected), initial=0))
    size = samples_per_shard(firsts[-1], job.record.settings.write)
    tables = _tables(job, scored)
    specs = []
    for shard, source in enumerate(job.record.inputs):
        drawings = tuple(
            Drawing(receipt.facts["super_batch"], path_of(job, receipt), receipt.outputs[0].sha256, first)
            for receipt, first in zip(selected, firsts, strict=False)
            if shard in receipt.facts["shards"]
        )
        specs.append(LedgerSpec(job.output, shard, source.url, tables[shard], drawings, size))
    return run_units(job, "ledger", write_ledger, specs, [1.0] * len(specs), "shards")


def write_pass(job: Job, scored: Sequence[Receipt], selected: Sequence[Receipt]) -> list[Receipt]:
    """Write every output shard; receipts in the order of the shards."""
    drawn = sum(receipt.facts["drawn"] for receipt in selected)
    size = samples_per_shard(drawn, job.record.settings.write)
    tables = _tables(job, scored)
    specs, counts = [], []
    for number, start in enumerate(range(0, drawn, size)):
        stop = min(start + size, drawn)
        pieces, shards = _pieces(job, selected, start, stop)
        sources = {shard: job.record.inputs[shard] for shard in shards}
        specs.append(WriteSpec(job.output, number, pieces, sources, {shard: tables[shard] for shard in shards}))
        counts.append(float(stop - start))
    return run_units(job, "write", write_shard, specs, counts, "samples")


def samples_per_shard(samples: int, settings: WriteSettings) -> int:
    """Samples in an output shard: img2dataset's 10,000, fewer where that would leave loader workers without a shard."""
    if settings.samples_per_shard is not None:
        return settings.samples_per_shard
    return min(SAMPLES_PER_SHARD, max(SMALLEST_AUTO_SHARD, math.ceil(samples / AUTO_SHARDS)))


def _pieces(job: Job, selected: Sequence[Receipt], start: int, stop: int) -> tuple[tuple[Drawn, ...], list[int]]:
    """What positions `start..stop` of the whole selection are made of, and the input shards behind them."""
    pieces, shards, position = [], set(), 0
    for receipt in selected:
        first, last = max(start - position, 0), min(stop - position, receipt.facts["drawn"])
        if first < last:
            number, output = receipt.facts["super_batch"], receipt.outputs[0]
            pieces.append(Drawn(number, path_of(job, receipt), output.sha256, first, last))
            shards.update(receipt.facts["shards"])
        position += receipt.facts["drawn"]
    return tuple(pieces), sorted(shards)


def _tables(job: Job, scored: Sequence[Receipt]) -> dict[int, tuple[Path, str]]:
    return {shard: (path_of(job, receipt), receipt.outputs[0].sha256) for shard, receipt in enumerate(scored)}


def _only(tables: dict[int, tuple[Path, str]], batch: SuperBatch) -> dict[int, tuple[Path, str]]:
    return {piece.shard: tables[piece.shard] for piece in batch.pieces}


def path_of(job: Job, receipt: Receipt) -> Path:
    """Where the first file of a receipt is. Errors: VerificationError if it is gone."""
    path = job.store.locate(receipt.outputs[0])
    if path is None:
        gone = job.store.root / receipt.outputs[0].path
        raise VerificationError(f"{gone} is gone; run `curate score` again to remake it")
    return path


class Running(Protocol):
    """What runs units, and whether it may say so."""

    @property
    def engine(self) -> Engine: ...
    @property
    def quiet(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Passing:
    """A `Running` for a pass that belongs to no pinned run of `curate score`."""

    engine: Engine
    quiet: bool


def run_units(
    job: Running,
    title: str,
    unit: Callable[[Spec], Receipt],
    specs: Iterable[Spec],
    amounts: Sequence[float],
    name: str,
    *,
    overlapping: bool = False,
) -> list[Receipt]:
    """The receipts of `unit` over `specs`, in their order; a bar shows `amounts` in units called `name`.

    `overlapping`: units share the threads of their process, where there is one, and begin before the last has ended.
    """
    specs = list(specs)
    receipts: dict[int, Receipt] = {}
    with progress(title, sum(amounts), name, quiet=job.quiet or not specs) as shown:
        for position, receipt in job.engine.run(unit, specs, overlapping=overlapping):
            receipts[position] = receipt
            shown.advance(amounts[position], _note(receipt.facts))
    return [receipts[position] for position in range(len(specs))]


def _note(facts: dict[str, Any]) -> str:
    quarantined = sum(facts.get("reasons", {}).values())
    return f"{quarantined} quarantined in {Path(facts['shard']).name}" if quarantined else ""
