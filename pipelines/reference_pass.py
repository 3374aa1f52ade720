"""What the reference thinks of a training's pairs: scored ahead by the pipeline, or taken from an earlier run.

Costs one forward pass of the reference for each pair that no run has embedded yet; pairs of the trusted set included.
"""

# N pairs of a source, T trusted pairs

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from curate.costs.energy import Metered, meter
from curate.costs.ledger import CostLedger
from curate.errors import CacheMismatch, UsageError
from curate.learner.candidates import Candidates, all_of, read_reference
from curate.learner.dataset import Opened, open_pairs
from curate.learner.files import RunFiles
from curate.learner.settings import TrainSettings
from curate.learner.start import Start
from curate.learner.trust import MOST, Trusted, held_out
from curate.models.embed import DualEncoder
from curate.models.identity import ModelIdentity
from curate.models.load import load_model
from curate.pipelines.engine import Mode
from curate.pipelines.runner import score
from curate.receipts import Store
from curate.run_record import read_run
from curate.shards.sources import ShardSource, expand_shards

PROBES = ("a red circle", "two dogs on a beach at sunset, one of them asleep", "ein rotes Haus")


@dataclass(frozen=True, slots=True)
class Where:
    """On what the reference's pass runs, and an earlier run's scores; none of it changes what comes out."""

    cache: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    engine: Mode | None = None
    allow_remote: bool = False
    quiet: bool = True

    def say(self, line: str) -> None:
        """Tell the user, unless the run is quiet."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def reference_model(settings: TrainSettings, start: Start, *, groups: bool = False) -> DualEncoder | None:
    """The reference, if it is weighed, or `groups` pairs for a policy.

    Errors: UsageError where it is weighed and its loss or tokens differ from the learner's.
    """
    if settings.reference is None or not (settings.uses_reference or groups):
        return None
    reference = load_model(settings.reference, precision=settings.precision, device=settings.device)
    if settings.uses_reference:
        _check_comparable(settings, start, reference)
    return reference


def _check_comparable(settings: TrainSettings, start: Start, reference: DualEncoder) -> None:
    if reference.loss != settings.loss:
        raise UsageError(
            f"the reference {settings.reference} was trained with the {reference.loss} loss, the learner is to be with "
            f"{settings.loss}: their losses do not compare; give --loss {reference.loss}, or another reference"
        )
    ours, theirs = (tokenize(list(PROBES)) for tokenize in (start.tokenizer, reference.tokenizer))
    both = min(ours.shape[1], theirs.shape[1])
    if not torch.equal(ours[:, : both - 1], theirs[:, : both - 1]):
        raise UsageError(
            f"the reference {settings.reference} reads captions with another tokenizer than {settings.model}: their "
            "losses would be of different texts; choose a reference with the learner's tokenizer"
        )


@dataclass(frozen=True, slots=True)
class Referred:
    """Score tables of a source's shards, in their order (none without a reference), and what embedding has cost."""

    tables: tuple[Path, ...] = ()
    ledger: CostLedger = field(default_factory=CostLedger)

    def moved(self, old: Path, new: Path) -> Referred:
        """With the tables below `old` found below `new`."""
        places = (new / path.relative_to(old) if path.is_relative_to(old) else path for path in self.tables)
        return replace(self, tables=tuple(places))


@dataclass(frozen=True, slots=True)
class Referring:
    """A source, and the model that is to embed its pairs; None where none is weighed, nor groups pairs for a policy."""

    settings: TrainSettings
    opened: Opened
    sources: tuple[ShardSource, ...]
    model: DualEncoder | None
    where: Where

    def into(self, output: Path) -> Referred:
        """Embed the pairs, and keep that in `output`; or find what an earlier call or run has made of them.

        What `output` holds of another model, left by a call that was refused, gives way.
        """
        if self.model is None:
            return Referred()
        if output.is_dir() and not _is_of(output, self.model, self.sources):
            shutil.rmtree(output)
        with meter() as metered:
            tables, fresh = _tables_of(self.settings, self.model, self.opened, self.sources, output, self.where)
        return Referred(tuple(tables), _spent(self.model, self.opened, fresh, metered))


def _is_of(output: Path, reference: DualEncoder, sources: Sequence[ShardSource]) -> bool:
    try:
        there = read_run(output)
    except UsageError:
        return False
    stored = ModelIdentity.from_json(there.models["reference"])
    return there.inputs == tuple(sources) and not reference.identity.differences(stored)


def referred_candidates(settings: TrainSettings, opened: Opened, found: Referred) -> Candidates:
    """The pairs to draw from: those that the reference knows, where it is weighed."""
    clean = settings.clean if settings.label is not None else ()
    if not settings.uses_reference:
        return all_of(opened.pairs, clean=clean)
    return all_of(opened.pairs, read_reference(found.tables, opened.pairs.places.id_N16), clean)


def _spent(reference: DualEncoder, opened: Opened, fresh: int, metered: Metered) -> CostLedger:
    """The bill for `fresh` pairs of a source."""
    tokens = max(1, round(float((opened.pairs.token_NT != 0).sum(1).float().mean())))
    flops = fresh * reference.flops_per_sample(tokens)
    return CostLedger().add("reference", samples=fresh, flops=flops, seconds=metered.seconds, energy=metered.energy)


def _tables_of(
    settings: TrainSettings,
    reference: DualEncoder,
    opened: Opened,
    sources: Sequence[ShardSource],
    output: Path,
    where: Where,
) -> tuple[list[Path], int]:
    """Score tables of the shards, in their order, and how many pairs had to be embedded: from the cache if it has all
    shards, else scored now."""
    if where.cache is not None:
        check_cache(where.cache, reference)
        stored = _tables(where.cache)
        if all(digest in stored for digest in opened.digests):
            return [stored[digest] for digest in opened.digests], 0
    return _scored(settings, sources, opened, output, where)


def _scored(
    settings: TrainSettings, sources: Sequence[ShardSource], opened: Opened, output: Path, where: Where
) -> tuple[list[Path], int]:
    """Have the pipeline score shards with the reference: their tables, in the order of the shards, and how many pairs
    it embedded rather than found in the cache."""
    score(
        [source.url for source in sources],
        output,
        reference=str(settings.reference),
        precision=settings.precision,
        reference_cache=where.cache,
        workers=where.workers,
        scheduler=where.scheduler,
        engine=where.engine,
        allow_remote_scheduler=where.allow_remote,
        tolerance=1.0,
        scores_only=True,
        quiet=where.quiet,
    )
    stored, receipts = _tables(output), Store.of(output).receipts("score")
    fresh = sum(receipt.facts["candidates"] for receipt in receipts if not receipt.facts["reference_cached"])
    return [stored[digest] for digest in opened.digests], fresh


def check_cache(cache: Path, reference: DualEncoder) -> None:
    """Errors: CacheMismatch for stored embeddings that another model made, naming every difference."""
    stored = ModelIdentity.from_json(read_run(cache).models["reference"])
    if found := reference.identity.differences(stored):
        raise CacheMismatch(
            f"--reference-cache {cache} was made by {stored.name}, not by this reference: {'; '.join(found)}. Leave "
            "the option out to embed anew"
        )


def _tables(output: Path) -> dict[str, Path]:
    store = Store.of(output)
    found = ((receipt.facts["digest"], store.locate(receipt.outputs[0])) for receipt in store.receipts("score"))
    return {digest: path for digest, path in found if path is not None}


def trusted_pairs(
    settings: TrainSettings,
    start: Start,
    reference: DualEncoder | None,
    candidates: Candidates,
    files: RunFiles,
    where: Where,
) -> tuple[Trusted | None, Candidates, CostLedger]:
    """The trusted pairs, where the run has a use for them; the candidates without those that were held out; and what
    embedding the trusted ones with the reference has cost. Of many pairs some are taken by the seed."""
    if not _uses_trusted(settings):
        return None, candidates, CostLedger()
    if not settings.trusted:
        where.say("no --trusted pairs: some of the pool are held out to compare learner and reference by")
        return *held_out(candidates, settings.seed), CostLedger()
    sources = tuple(expand_shards(settings.trusted))
    with open_pairs(sources, start.tokenizer, start.rule, memory_gb=settings.memory_gb) as opened:
        row_T, image_TCHW, token_TC = opened.pairs.read(_some(len(opened.pairs), settings.seed))
        if reference is None:
            return Trusted(image_TCHW, token_TC), candidates, CostLedger()
        with meter() as metered:
            tables, fresh = _scored(settings, sources, opened, files.trusted, where)
            known = read_reference(tables, opened.pairs.places.id_N16[row_T])
        row_n = np.flatnonzero(known.known_N)
        if not len(row_n):
            raise UsageError("--trusted: the reference could read none of these pairs; `curate inspect` shows why")
        trusted = Trusted(image_TCHW[torch.from_numpy(row_n)], token_TC[torch.from_numpy(row_n)], known.rows(row_n))
        return trusted, candidates, _spent(reference, opened, fresh, metered)


def check_trusted(settings: TrainSettings, start: Start) -> None:
    """Errors: as `trusted_pairs`, for shards without a pair that can be read."""
    if settings.trusted and _uses_trusted(settings):
        sources = expand_shards(settings.trusted)
        with open_pairs(sources, start.tokenizer, start.rule, memory_gb=settings.memory_gb):
            pass


def _uses_trusted(settings: TrainSettings) -> bool:
    return settings.criterion == "alignment" or (settings.handover == "auto" and settings.uses_reference)


def _some(count: int, seed: int) -> NDArray[np.int64]:
    """At most `MOST` of so many pairs; any of them, since shards may be sorted."""
    dice = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63 + 2], np.uint64)))
    return dice.permutation(count)[:MOST]
