"""The pool that a finished selection was drawn from, read back from what the run left: one row per readable sample.

A run of `curate score` (or select, write, train --write-shards) has a ledger; a training has its log of chosen samples.
Beside either stand the score tables, for digests and embeddings. Memory: about 300 bytes a row, and 2 bytes per
embedding number where clusters are asked for.
"""

# N rows of the pool, D embedding width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate import scores
from curate.chosen import Training, read_log, read_training
from curate.errors import UsageError, VerificationError
from curate.ledger import ledger_files
from curate.pipelines.engine import Engine
from curate.pipelines.originals import OriginalSpec, by_digest, describe_shard, stored_scores
from curate.pipelines.passes import Passing, run_units
from curate.receipts import Store
from curate.run_record import TeeRecord, read_record, run_path
from curate.shards.sources import ShardSource

IMAGES: Final = ("image_digest", "dhash")
EMBEDDING: Final = "ref_image"
_DESCRIBED: Final = ("sample_id", "ordinal", "key", "uid", "width", "height", "caption_bytes", "sharpness", "reason")
_LOSSES: Final = ("reference_loss", "learner_loss")


@dataclass(frozen=True, slots=True)
class AuditedPool:
    """What could have been selected, and what was.

    `rows` has the ledger's columns where there is a ledger, `shard` (number of the input shard, int32), `shard_url`,
    image digests, and `ref_image` where a reference scored the pool. `times_N`: how often each row was drawn; `steps`:
    whether `sub_batch` counts the steps of a training, so that early ones can be set against late ones.
    """

    name: str
    rows: pa.Table
    times_N: NDArray[np.int64]
    sources: tuple[ShardSource, ...]
    steps: bool
    notes: tuple[str, ...] = ()

    @property
    def repeats(self) -> bool:
        """Can a row be drawn more than once, as by a training?"""
        return self.steps or int(self.times_N.max(initial=0)) > 1

    def place(self, row: int) -> tuple[str, int] | None:
        """The shard and the ordinal of a row; None for a pool without shards."""
        if "shard_url" not in self.rows.column_names:
            return None
        return self.rows["shard_url"][row].as_py(), self.rows["ordinal"][row].as_py()

    def numbers(self, name: str) -> NDArray[np.float64] | None:
        """A column as numbers, NaN for nulls; None where there is none, or nothing in it."""
        if name not in self.rows.column_names or self.rows[name].null_count == len(self.rows):
            return None
        values: NDArray[np.float64] = self.rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values


def read_selection(output: Path, engine: Engine, *, place: Path, quiet: bool) -> AuditedPool:
    """The pool of an output of `curate score`, `select`, `write` or `train`.

    What has to be read anew of a training's inputs is kept below `place`.

    Errors: UsageError where there is neither ledger nor training, or nothing was selected yet.
    """
    if run_path(output).is_file():
        return _with_ledger(output)
    if (output / "_curate" / "TRAIN.json").is_file():
        return _with_log(output, engine, place, quiet=quiet)
    raise UsageError(
        f"{output}: no run of curate there; name an output of `curate score` or `curate train`, or a pool parquet with "
        "--selected"
    )


def _with_ledger(output: Path) -> AuditedPool:
    record = read_record(output)
    if isinstance(record, TeeRecord):
        scored = stored_scores(read_training(record.run), None) if record.models else output
        tables = _by_digest(output if scored is None else scored, record.digests)
    else:
        store = Store.of(output)
        by_url = {receipt.facts["shard"]: store.locate(receipt.outputs[0]) for receipt in store.receipts("score")}
        tables = [by_url.get(source.url) for source in record.inputs]
    files = {int(file.stem): file for file in ledger_files(output)}
    parts = [
        _beside(pq.read_table(files[number]), table, number) for number, table in enumerate(tables) if number in files
    ]
    rows = _stacked(parts, [source.url for source in record.inputs])
    read = rows.filter(pc.not_equal(rows["status"], "quarantined"))
    times_N = read["times_selected"].fill_null(0).to_numpy().astype(np.int64)
    steps, notes = isinstance(record, TeeRecord), _unread(len(rows) - len(read), "; the ledger has a reason for each")
    return AuditedPool(str(output), read, times_N, record.inputs, steps, notes)


def _with_log(run: Path, engine: Engine, place: Path, *, quiet: bool) -> AuditedPool:
    """A training that wrote no shards: its inputs' tables, and what its log says was drawn."""
    training = read_training(run)
    scored = stored_scores(training, None)
    if scored is None:
        tables = _described(training, engine, place / "_curate" / "described", quiet=quiet)
    else:
        tables = _by_digest(scored, training.digests)
    parts = []
    for number, table in enumerate(tables):
        assert table is not None, "stored scores cover every shard"
        there = set(pq.read_schema(table).names)
        parts.append(
            _beside(scores.read_table(table, [c for c in (*_DESCRIBED, *_LOSSES) if c in there]), table, number)
        )
    rows = _stacked(parts, [source.url for source in training.inputs])
    every = len(rows)
    rows = rows.filter(pc.is_null(rows["reason"])).drop_columns(["reason"])
    times_N, first_N, score_N = _draws(run, rows)
    if not times_N.any():
        raise UsageError(f"{run}: its log holds no step yet, so nothing was selected; audit it when some are done")
    rows = rows.append_column("sub_batch", pa.array(first_N, mask=times_N == 0))
    rows = rows.append_column("score", pa.array(score_N, mask=np.isnan(score_N)))
    return AuditedPool(str(run), rows, times_N, training.inputs, steps=True, notes=_unread(every - len(rows)))


def _unread(count: int, more: str = "") -> tuple[str, ...]:
    told = f"{count:,} samples could not be read and are not in the pool{more}"
    return (told,) if count else ()


def _draws(run: Path, rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per row [N]: times drawn, the step (from 0) of the first time, and the logit then."""
    place = {
        pair: row for row, pair in enumerate(zip(*(rows[c].to_pylist() for c in ("shard", "ordinal")), strict=True))
    }
    times_N, first_N = np.zeros(len(rows), np.int64), np.full(len(rows), -1, np.int64)
    score_N = np.full(len(rows), np.nan)
    for segment in read_log(run):
        columns = (segment.table[name].to_pylist() for name in ("shard", "row", "step", "score"))
        for shard, ordinal, step, score in zip(*columns, strict=True):
            row = place[shard, ordinal]
            times_N[row] += 1
            if first_N[row] < 0:
                first_N[row], score_N[row] = step - 1, np.nan if score is None else score
    return times_N, first_N, score_N


def _described(training: Training, engine: Engine, place: Path, *, quiet: bool) -> list[Path | None]:
    """Tables of the input shards without any model, made once and kept in `place`."""
    store = Store.of(place)
    store.prepare()
    specs = [
        OriginalSpec(place, source, digest, engine.threads_per_unit)
        for source, digest in zip(training.inputs, training.digests, strict=True)
    ]
    sizes = [source.size / 1e6 for source in training.inputs]
    receipts = run_units(Passing(engine, quiet), "describe", describe_shard, specs, sizes, "MB")
    return [store.locate(receipt.outputs[0]) for receipt in receipts]


def _by_digest(scored: Path, digests: Sequence[str]) -> list[Path | None]:
    found, store = by_digest(scored), Store.of(scored)
    return [store.locate(found[digest].outputs[0]) if digest in found else None for digest in digests]


def _beside(rows: pa.Table, table: Path | None, number: int) -> pa.Table:
    """The rows of one shard with what only its score table has; both are in the order of the ordinals."""
    if "shard" in rows.column_names:
        rows = rows.drop_columns(["shard"])
    rows = rows.append_column("shard", pa.array(np.full(len(rows), number, np.int32)))
    if table is None:
        return rows
    there = pq.read_schema(table)
    names = [
        name for name in (*IMAGES, EMBEDDING) if name in there.names and not pa.types.is_null(there.field(name).type)
    ]
    more = scores.read_table(table, ["sample_id", *names])
    if not more["sample_id"].equals(rows["sample_id"].cast(more["sample_id"].type)):
        raise VerificationError(f"{table} has other samples than the ledger of shard {number}; run `curate verify`")
    for name in names:
        rows = rows.append_column(name, more[name])
    return rows


def _stacked(parts: Sequence[pa.Table], urls: Sequence[str]) -> pa.Table:
    rows = pa.concat_tables(parts, promote_options="permissive")
    named = pa.DictionaryArray.from_arrays(rows["shard"].combine_chunks(), pa.array(urls, pa.string()))
    return rows.append_column("shard_url", named)
