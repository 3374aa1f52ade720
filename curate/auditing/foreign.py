"""A pool and a selection that other tools made: a parquet of the pool, and the keys or uids that were selected.

DataComp's metadata and subset files, a list of keys, or any parquet with `key` or `uid`. Nothing is guessed in silence:
ids that repeat, are missing or do not meet are counted, and too few met are refused. Captions are read here, in one
process, as fast as `curate.auditing.traits` reads them; the pool's table is held whole.
"""

# N rows of the pool, M selected ids

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.auditing.columns import shown
from curate.auditing.foreign_ids import IDS, Selected, ids_of, read_selected
from curate.auditing.given_columns import is_list
from curate.auditing.metadata import OUTCOMES
from curate.auditing.traits import TEXT, TraitSettings, caption_reader, with_facts
from curate.errors import UsageError

LEAST_FOUND: Final = 0.95
CAPTIONS: Final = ("caption", "text")
SIZES: Final = {"width": ("width", "original_width"), "height": ("height", "original_height")}
SHA256: Final = "sha256"  # of the image's bytes, as DataComp has it
DIGEST: Final = "image_digest"
_HEX: Final = re.compile("[0-9a-fA-F]{64}")
_BATCH: Final = 65_536
_SCALAR: Final = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)


@dataclass(frozen=True, slots=True)
class Foreign:
    """The pool as `curate.auditing.assembling.assemble` takes it, and how often each row was selected (`times_N`).

    `rows` has every column of the pool that can be a group; `traits` are in the same order. `found` of `selected` ids
    (repeats counted) are in the pool; `notes` are sentences without a full stop.
    """

    rows: pa.Table
    traits: pa.Table
    times_N: NDArray[np.int64]
    on: str
    selected: int
    found: int
    notes: tuple[str, ...]


def read_foreign(
    pool: Path,
    selected: Path,
    settings: TraitSettings,
    *,
    on: str | None = None,
    caption: str | None = None,
    least_found: float = LEAST_FOUND,
    lists: Collection[str] = (),
) -> Foreign:
    """Read a pool (parquet, or a directory of them) and what was selected of it.

    `selected` is a `.npy` of DataComp uids, a `.txt` of keys or uids, one a line, or a parquet with either. `on`: key
    or uid; by default uid where the selected are uids. `caption`: the captions' column; by default caption or text.
    `lists`: names of columns that are read where they hold lists, too; others of lists are left out, as they are large.
    An id that is selected n times counts n times. Errors: UsageError for files that are none of these, no id column,
    one of `lists` that holds lists of something else than text, whole numbers or true and false, fewer than
    `least_found` of the selected in the pool, or a selected id that several rows of the pool have.
    Example: 4 rows of which "a" and "c" are listed, "a" twice: times_N is [2, 0, 1, 0].
    """
    table, name = _read_pool(pool, lists), shown(pool.name)
    chosen = read_selected(selected, _ids_there(pool, table), on)
    id_N = ids_of(table[chosen.on], chosen.on)
    times_N, found, notes = _times(name, id_N, chosen, least_found)
    text = _caption_column(table, caption)
    rows = _rows(table)
    traits = _traits(table, rows, text, settings, name)
    if text is None:
        notes.append(f"{name} has no column of captions ({' or '.join(CAPTIONS)}): nothing is known of them")
    return Foreign(rows, traits, times_N, chosen.on, len(chosen.ids), found, tuple(notes))


def _read_pool(pool: Path, lists: Collection[str]) -> pa.Table:
    files = sorted(pool.rglob("*.parquet")) if pool.is_dir() else [pool]
    if not files:
        raise UsageError(f"{pool}: no parquet file in it")
    try:
        tables = [pq.read_table(file, columns=_readable(file, lists)) for file in files]
        table = pa.concat_tables(tables, promote_options="permissive")
    except OSError as error:
        raise UsageError(f"{pool}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise UsageError(
            f"{pool}: {str(error).splitlines()[0]}; a pool is a parquet file, or a directory of them"
        ) from error
    if not len(table):
        raise UsageError(f"{pool}: it has no rows; there is nothing to audit")
    return table


def _readable(file: Path, lists: Collection[str]) -> list[str]:
    """Columns of one value a row, and of lists those that are asked for: no embeddings or records."""
    schema = pq.read_schema(file)
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{file}: the column {shown(twice)!r} is there twice")
    for field in schema:
        if field.name in lists and is_list(field.type) and not _is_listed(field.type):
            raise UsageError(
                f"{file}: {shown(field.name)!r} holds lists of {field.type.value_type}; groups are lists of text, of "
                "whole numbers or of true and false"
            )
    return [
        field.name for field in schema
        if _is_text(field.type) or any(test(field.type) for test in _SCALAR)
        or (field.name in lists and _is_listed(field.type))
    ]  # fmt: skip


def _ids_there(pool: Path, table: pa.Table) -> tuple[str, ...]:
    there = tuple(name for name in IDS if name in table.column_names)
    if not there:
        names = ", ".join(shown(name) for name in table.column_names[:20])
        raise UsageError(f"{pool}: no column {' or '.join(IDS)} to find the selected by; there are: {names}")
    return there


def _times(
    name: str, id_N: pa.Array, chosen: Selected, least: float
) -> tuple[NDArray[np.int64], int, list[str]]:  # fmt: skip
    """How often each row was selected, how many of the selected ids were found, and what was odd."""
    counted = pc.value_counts(chosen.ids)
    ids, count_M = counted.field("values"), counted.field("counts").to_numpy()
    at_N = pc.index_in(id_N, value_set=ids).fill_null(-1).to_numpy()
    rows_M = np.bincount(at_N[at_N >= 0], minlength=len(ids))
    found, M = int(count_M[rows_M > 0].sum()), len(chosen.ids)
    if found < least * M or not found:
        first = ids[int(np.argmin(rows_M > 0))].as_py()
        raise UsageError(
            f"{shown(chosen.name)}: {found:,} of the {M:,} selected {chosen.on}s are in {name} ({found / M:.1%}), "
            f"fewer than the {least:.0%} asked for; the first that is not is {shown(first)!r}, the pool's first is "
            f"{shown(id_N[0].as_py() or 'none')!r}. Name the pool that it was selected from"
        )
    shared = np.flatnonzero(rows_M > 1)
    if len(shared):
        first = ids[int(shared[0])].as_py()
        raise UsageError(
            f"{name}: {len(shared):,} selected {chosen.on}s stand in several rows, first {shown(first)!r}: "
            "which of them was selected cannot be told. Keep one row per sample"
        )
    times_N = np.where(at_N >= 0, count_M[at_N], 0).astype(np.int64)
    return times_N, found, _odd(name, id_N, chosen, found, int((count_M > 1).sum()))


def _odd(name: str, id_N: pa.Array, chosen: Selected, found: int, repeated: int) -> list[str]:
    """What a reader must know of how the two files met."""
    M, N = len(chosen.ids), len(id_N)
    without = id_N.null_count
    again = N - without - pc.count_distinct(id_N, mode="only_valid").as_py()
    notes = [f"{found:,} of {M:,} selected {chosen.on}s are in {name}, which has {N:,} rows ({found / M:.1%})"]
    if repeated:
        notes.append(f"{repeated:,} {chosen.on}s were selected several times; each counts as often")
    if without:
        notes.append(f"{without:,} rows of {name} have no {chosen.on}: they are in the pool and cannot be selected")
    if again:
        notes.append(f"{again:,} rows of {name} repeat a {chosen.on} that was not selected: each is a row of the pool")
    return notes


def _caption_column(table: pa.Table, asked: str | None) -> str | None:
    name = asked or next((one for one in CAPTIONS if one in table.column_names), None)
    if asked is not None and asked not in table.column_names:
        raise UsageError(
            f"no column {shown(asked)!r} of captions in the pool; there are: {', '.join(table.column_names)}"
        )
    if name is not None and not _is_text(table[name].type):
        raise UsageError(f"the column {shown(name)!r} holds {table[name].type}; captions are text")
    return name


def _rows(table: pa.Table) -> pa.Table:
    """The pool's own columns under the names that an audit knows, and a number for each row."""
    own = (*OUTCOMES, "sample_id", DIGEST, "dhash")
    columns = {name: _plain(table[name]) for name in table.column_names if name not in own}
    if SHA256 in columns and _is_text(table[SHA256].type):
        columns[DIGEST] = _digests(columns[SHA256])
    for name, known_as in SIZES.items():
        there = next((one for one in known_as if one in columns and _is_size(table[one].type)), None)
        columns.pop(name, None)
        if there is not None:
            columns[name] = table[there].cast(pa.float64()).fill_null(0).cast(pa.int64(), safe=False)
    numbers = np.arange(len(table), dtype=">u8").tobytes()
    padded = np.zeros((len(table), 16), np.uint8)
    padded[:, 8:] = np.frombuffer(numbers, np.uint8).reshape(-1, 8)
    ids = pa.Array.from_buffers(pa.binary(16), len(table), [None, pa.py_buffer(padded.tobytes())])
    return pa.table({"sample_id": ids, **columns})


def _digests(column: pa.ChunkedArray) -> pa.Array:
    """Hexadecimal digits as 32 bytes; null where they are none."""
    texts = (text if text is not None and _HEX.fullmatch(text) else None for text in column.to_pylist())
    return pa.array([None if text is None else bytes.fromhex(text) for text in texts], pa.binary(32))


def _traits(table: pa.Table, rows: pa.Table, text: str | None, settings: TraitSettings, name: str) -> pa.Table:
    reader = caption_reader(settings)
    captions = pa.chunked_array([pa.nulls(len(rows), TEXT)]) if text is None else table[text].cast(TEXT)
    parts = [reader.read(captions.slice(start, _BATCH).to_pylist()) for start in range(0, len(rows), _BATCH)]
    read = pa.concat_tables(parts)
    url = table["url"].cast(TEXT) if "url" in table.column_names and _is_text(table["url"].type) else None
    columns: dict[str, Any] = {"sample_id": rows["sample_id"], "caption": captions}
    columns["url"] = pa.nulls(len(rows), TEXT) if url is None else url
    facts = reader.facts | {"json_fields": [], "table": name, "url": f"url in {name}"}
    return with_facts(pa.table(columns | {one: read[one] for one in read.column_names}), facts)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_listed(kind: pa.DataType) -> bool:
    """Lists whose values can be groups; embeddings are lists of fractions."""
    inner = kind.value_type if is_list(kind) else None
    tests = (_is_text, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    return inner is not None and any(test(inner) for test in tests)


def _is_size(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
