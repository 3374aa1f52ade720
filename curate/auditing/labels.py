"""A user's labels: a CSV or parquet file joined to the pool by key, uid or sample id.

A join that goes wrong in silence gives wrong numbers with narrow intervals. So keys are text (never 7 for "007"), a key
that is given twice with different labels is refused, and so is a key that stands for several samples of the pool; both
sides' match rates are part of the provenance, and too low a rate is refused. Samples that curate has written anew have
new keys and ids: labels are joined by the old ones where the file has these (`curate.auditing.renamed`).
Read whole: about 100 bytes per row of the file.
"""

# N samples of the pool, M rows of the file

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.auditing.columns import UNKNOWN, Column, LabelError, check_group_count, distinct_names, shown
from curate.auditing.renamed import ORIGINAL_ID, ORIGINAL_KEY
from curate.errors import UsageError

JOINS: Final = ("key", "uid", "sample_id")
LEAST_MATCH: Final = 0.5
_LARGEST_CSV: Final = 1 << 33  # 8 GiB; parquet beyond that


@dataclass(frozen=True, slots=True)
class Match:
    """How a file met the pool, in rows. `without_key` and `repeated` (same key, same labels) are rows of the file;
    `originals` says that samples were looked up by what they were called before curate wrote them anew."""

    pool: int
    pool_matched: int
    file: int
    file_matched: int
    without_key: int
    repeated: int
    originals: bool = False

    @property
    def rate(self) -> float:
        """The share of the pool that the file has a row for."""
        return self.pool_matched / self.pool if self.pool else 0.0

    def __str__(self) -> str:
        parts = [
            f"{self.pool_matched:,} of {self.pool:,} samples matched ({self.rate:.1%})",
            f"{self.file_matched:,} of the file's {self.file:,} rows used",
            *([f"{self.without_key:,} rows without a key"] if self.without_key else []),
            *([f"{self.repeated:,} rows repeated"] if self.repeated else []),
            *(["by what the samples were called before they were selected"] if self.originals else []),
        ]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Labels:
    """The columns of a label file along the pool, and how they were joined."""

    columns: tuple[Column, ...]
    match: Match


def join_labels(
    file: Path,
    pool: pa.Table,
    *,
    on: str = "key",
    columns: Sequence[str] | None = None,
    least_match: float = LEAST_MATCH,
    label_errors: Mapping[str, LabelError] | None = None,
) -> Labels:
    """The labels of `file` along `pool`, which has the column `on` (sample_id as 16 bytes or 32 hexadecimal digits).

    `columns` defaults to all of the file but the key. A blank or null label is unknown. Errors: UsageError, saying
    what and what next, for a file that is none, a key that is ambiguous on either side, a share of the pool below
    `least_match`, labels that are no classes, or more than 1,000 of them.
    Example: a pool of 4 and a file with 3 of its keys and one of another pool: rate 0.75, coverage 0.75 or less.
    """
    if on not in JOINS:
        raise UsageError(f"--on {on}: labels are joined on {', '.join(JOINS)}")
    table = _read(file)
    names = _wanted(file, table, on, columns)
    key_M = _keys(table[on], on)
    row_of, repeated = _rows_by_key(file, table.select(names), key_M, on)
    key_N, id_N = _followed(file, pool, row_of, on)
    _refuse_shared_keys(key_N, id_N, row_of, on)
    row_N = np.fromiter((row_of.get(key or "", UNKNOWN) for key in key_N), np.int64, len(key_N))
    match = _match(key_M, key_N, row_N, repeated, originals=id_N is not None)
    _refuse_low_rate(file, match, on, least_match, key_M, key_N)
    errors = label_errors or {}
    made = [_column(file, table[name], name, row_N, match, on, errors.get(name)) for name in names]
    return Labels(tuple(made), match)


def label_names(file: Path) -> list[str]:
    """The names of the file's columns, keys among them, without reading its rows. Errors: as `join_labels`."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(4)
        if start == b"PAR1":
            return list(pq.read_schema(file).names)
        with pacsv.open_csv(file, parse_options=_parsing(file)) as reader:
            return list(reader.schema.names)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {str(error).splitlines()[0]}") from error


def check_labels(file: Path, *, on: str = "key", columns: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """All that `join_labels` can refuse without a pool; the groups of each column, whichever pool they are for.

    Reads the file once, so that nobody waits for a pass over shards to hear of it. Errors: as `join_labels`.
    """
    table = _read(file)
    names = _wanted(file, table, on, columns)
    groups = {name: pc.unique(_as_text(file, table[name], name)).drop_null().to_pylist() for name in names}
    key_M = _keys(table[on], on)
    if not any(key_M):
        raise UsageError(f"{file}: no row has a {on}, so that nothing could be joined")
    _rows_by_key(file, table.select(names), key_M, on)
    return {name: distinct_names(sorted(found)) for name, found in groups.items()}


def _parsing(file: Path) -> pacsv.ParseOptions:
    tab = "\t" if file.suffix.lower() == ".tsv" else ","
    return pacsv.ParseOptions(delimiter=tab, newlines_in_values=True)


def _read(file: Path) -> pa.Table:
    try:
        with open(file, "rb") as opened:
            start = opened.read(4)
        if start == b"PAR1":
            return _unique_names(file, pq.read_schema(file).names, pq.read_table(file))
        if file.suffix.lower() not in (".csv", ".tsv", ".txt"):
            raise UsageError(f"{file}: labels are a CSV (.csv, .tsv) or a parquet file")
        return _read_csv(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {str(error).splitlines()[0]}") from error


def _read_csv(file: Path) -> pa.Table:
    """Every value as text: no number is guessed, so "007" stays a key."""
    if file.stat().st_size > _LARGEST_CSV:
        raise UsageError(f"{file}: larger than 8 GiB; write it as parquet")
    parse = _parsing(file)
    with pacsv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    _unique_names(file, names, None)
    types = dict.fromkeys(names, pa.string())
    return pacsv.read_csv(file, parse_options=parse, convert_options=pacsv.ConvertOptions(column_types=types))


def _unique_names(file: Path, names: list[str], table: pa.Table | None) -> pa.Table:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{file}: the column {shown(twice[0])!r} is there twice")
    return table


def _wanted(file: Path, table: pa.Table, on: str, columns: Sequence[str] | None) -> list[str]:
    there = ", ".join(map(shown, table.column_names[:20]))
    missing = [name for name in (on, *(columns or ())) if name not in table.column_names]
    if missing:
        raise UsageError(f"{file}: no column {shown(missing[0])!r}; there are: {there}")
    names = list(columns) if columns else [name for name in table.column_names if name not in JOINS]
    if not names:
        raise UsageError(f"{file}: no column of labels beside {on!r}")
    return names


def _keys(column: pa.ChunkedArray, on: str) -> list[str | None]:
    """Keys as text, blank ones None; sample ids and uids as lower-case hexadecimal digits."""
    if pa.types.is_fixed_size_binary(column.type) or pa.types.is_binary(column.type):
        return [None if one is None else one.hex() for one in column.to_pylist()]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.string())
    texts = ((one or "").strip() for one in column.to_pylist())
    return [(text if on == "key" else text.lower()) or None for text in texts]


def _rows_by_key(file: Path, labels: pa.Table, key_M: list[str | None], on: str) -> tuple[dict[str, int], int]:
    """The first row of each key, and how many rows repeat an earlier one word for word."""
    row_of: dict[str, int] = {}
    again: list[tuple[int, int]] = []
    for row, key in enumerate(key_M):
        if key is not None and row_of.setdefault(key, row) != row:
            again.append((row, row_of[key]))
    if again:
        later, first = (labels.take([pair[side] for pair in again]) for side in (0, 1))
        differing = [n for n, (a, b) in enumerate(zip(later.to_pylist(), first.to_pylist(), strict=True)) if a != b]
        if differing:
            key = key_M[again[differing[0]][0]] or ""
            raise UsageError(
                f"{file}: {len(differing):,} rows repeat a {on} with other labels, first {shown(key)!r} in rows "
                f"{again[differing[0]][1] + 1} and {again[differing[0]][0] + 1}; keep one row per sample"
            )
    return row_of, len(again)


def _followed(
    file: Path, pool: pa.Table, row_of: Mapping[str, int], on: str
) -> tuple[list[str | None], list[bytes | None] | None]:
    """The keys by which samples are looked up: theirs, or what they were called before curate wrote them anew, then
    with their ids of that time. Errors: UsageError where a key of the file may be either."""
    key_N = _keys(pool[on], on)
    name = {"key": ORIGINAL_KEY, "sample_id": ORIGINAL_ID}.get(on)
    if name not in pool.column_names:
        return key_N, None
    id_N: list[bytes | None] = pool[ORIGINAL_ID].to_pylist()
    old_N = [old or key for old, key in zip(_keys(pool[name], on), key_N, strict=True)]
    new = sum(key in row_of for key, sample in zip(key_N, id_N, strict=True) if sample is not None)
    old = sum(key in row_of for key, sample in zip(old_N, id_N, strict=True) if sample is not None)
    if new and old:
        raise UsageError(
            f"{file}: curate wrote these shards and gave their samples new {on}s; {new:,} of them are in the file, and "
            f"{old:,} of those that the samples had before, so it cannot be told which are meant. Join on uid"
        )
    return (old_N, id_N) if old else (key_N, None)


def _refuse_shared_keys(
    key_N: list[str | None], id_N: list[bytes | None] | None, row_of: Mapping[str, int], on: str
) -> None:
    """A key of several samples names none of them. A uid may stand several times: it is one sample, repeated; so may an
    original key, with the same id."""
    if on != "key":
        return
    seen: dict[str, bytes | None] = {}
    shared: list[str] = []
    for row, key in enumerate(key_N):
        if key is not None and key in row_of:
            sample = None if id_N is None else id_N[row]
            if key in seen and (sample is None or seen[key] != sample):
                shared.append(key)
            seen.setdefault(key, sample)
    if shared:
        raise UsageError(
            f"{len(shared):,} samples of the pool have a key that an earlier one has too, first {shown(shared[0])!r}: "
            "keys repeat between its shards. Join on sample_id or uid"
        )


def _match(
    key_M: list[str | None], key_N: list[str | None], row_N: NDArray[np.int64], repeated: int, *, originals: bool
) -> Match:
    there = set(key_N)
    used = sum(key is not None and key in there for key in key_M)
    return Match(len(key_N), int((row_N >= 0).sum()), len(key_M), used, key_M.count(None), repeated, originals)


def _refuse_low_rate(
    file: Path, match: Match, on: str, least: float, key_M: list[str | None], key_N: list[str | None]
) -> None:
    if match.pool and match.rate >= least:
        return
    examples = [next((shown(key) for key in keys if key), "none") for keys in (key_M, key_N)]
    raise UsageError(
        f"{file}: {match}, fewer than the {least:.0%} asked for. Joined on {on}: the file's first is {examples[0]!r}, "
        f"the pool's {examples[1]!r}. Join on another column, or ask for a lower share (its groups stay unknown)"
    )


def _column(
    file: Path, labels: pa.ChunkedArray, name: str, row_N: NDArray[np.int64], match: Match, on: str,
    error: LabelError | None,
) -> Column:  # fmt: skip
    text = _as_text(file, labels, name)
    taken = text.take(pa.array(np.where(row_N < 0, 0, row_N), mask=row_N < 0)) if len(text) else pa.nulls(len(row_N))
    encoded = (taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken).dictionary_encode()
    values = [one or "" for one in encoded.dictionary.to_pylist()]
    order = sorted(range(len(values)), key=values.__getitem__)
    code_of = np.full(len(values) + 1, UNKNOWN, np.int32)  # the last for nulls
    code_of[order] = np.arange(len(values))
    codes_N = code_of[encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]
    provenance = f"labels of {shown(file.name)}, joined on {on}: {match}"
    names = distinct_names([values[one] for one in order])
    return Column(shown(name), "label", provenance, names, codes_N, label_error=error)


def _as_text(file: Path, labels: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Labels as text without outer white space, blank ones null."""
    kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    fine = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    if not any(test(kind) for test in fine):
        raise UsageError(f"{file}: {shown(name)!r} holds {kind}; labels are text, whole numbers or true and false")
    text = pc.utf8_trim_whitespace(labels.cast(pa.string()))
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    check_group_count(name, pc.count_distinct(text, mode="only_valid").as_py())
    return text
