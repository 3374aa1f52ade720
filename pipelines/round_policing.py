"""A recipe's policy held against the candidates of every round, before any model runs.

Who may be drawn is told by decoding the pool once, without a model (some 1,500 images of 256 pixels a second and core):
readable pairs, no copy of another, in the super-batches of each round's own seed. Where groups, or near-duplicates, are
known after scoring only, names are looked up and nothing more. What is read is kept in a directory that the caller
names, and found there by a call that comes after a killed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from curate.errors import UsageError
from curate.pipelines.engine import Engine
from curate.pipelines.originals import OriginalSpec, describe_shard
from curate.pipelines.passes import Job, Passing, run_units, super_batches
from curate.pipelines.policing import check_before_scores, rule_of
from curate.pipelines.round_plan import Part
from curate.pipelines.runner import drawn, list_shards
from curate.policy.ahead import scored_names
from curate.policy.given import GivenPolicy
from curate.receipts import Receipt, Store
from curate.run_record import RunRecord
from curate.settings import RunSettings, ScoreSettings, SelectSettings, WriteSettings, checked
from curate.shards.sources import ShardSource, open_shard, shard_digest

_DECODED: Final = "sharpness"  # of the size at which a model reads images


def check_policy_of_rounds(
    parts: Sequence[Part], given: GivenPolicy, engine: Engine, beside: Path, *, quiet: bool
) -> None:
    """Refuse a policy that one of these scorings, a round each, could not keep to; `beside` holds what is read.

    Errors: UsageError, with the number of the round, as `rule_of`.
    """
    first, seen = parts[0], set[int]()
    sources = list_shards(first.shards)
    Store.of(beside).prepare()
    check_before_scores(Job(beside, _record(first, given, sources), engine, quiet=quiet, given=given))
    if _needs_scores(given, first):
        return
    described = _described(sources, engine, beside, quiet=quiet)
    for number, part in enumerate(parts, 1):
        record = _record(part, given, sources)
        assert record.settings.select is not None
        count = len(super_batches(described, record.settings.select))
        if count > 1 or count not in seen:  # a single super-batch is the same with every seed
            with _round(number):
                rule_of(Job(beside, record, engine, quiet=True, given=given), described)
        seen.add(count)


def selecting(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a draw but for criterion and loss."""
    size = drawn(options.get("keep"), options.get("sub_batch"), options.get("super_batch", 20_480))
    return size | {name: options[name] for name in ("chunks", "gain", "seed", "deduplicate") if name in options}


def _needs_scores(given: GivenPolicy, part: Part) -> bool:
    """Are there groups, or near-duplicates, that only the score pass can tell?"""
    named = {name for column in given.policy.columns for name in (*column.parts, *column.confounders)}
    return bool(scored_names(given)) or _DECODED in named or part.options.get("deduplicate") == "near"


@contextlib.contextmanager
def _round(number: int) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"round {number}: {error}") from error


def _described(sources: Sequence[ShardSource], engine: Engine, beside: Path, *, quiet: bool) -> list[Receipt]:
    digests = []
    for source in sources:
        with open_shard(source) as data:
            digests.append(shard_digest(data))
    threads = engine.threads_per_unit
    specs = [OriginalSpec(beside, one, digest, threads) for one, digest in zip(sources, digests, strict=True)]
    sizes = [source.size / 1e6 for source in sources]
    return run_units(Passing(engine, quiet), "describe", describe_shard, specs, sizes, "MB")


def _record(part: Part, given: GivenPolicy, sources: tuple[ShardSource, ...]) -> RunRecord:
    """As much of a run's record as its draws depend on; criterion and loss are named, and change no candidate."""
    select = selecting(part.options) | {"criterion": "easy-reference", "loss": "sigmoid", "policy": given.settings}
    settings = RunSettings(
        score=checked(ScoreSettings, {"reference": part.options["reference"]}),
        select=checked(SelectSettings, select),
        write=checked(WriteSettings, {}),
    )
    return RunRecord(settings, sources, {})
