"""The columns that a user names: fields of the samples' json, columns of the pool's table, and what is held fixed.

Text, true and false are groups as they are; of numbers with more than 20 values quantiles are. Where a json field or a
column of the pool's table holds lists, a sample is in the group of each of its values: groups overlap, and there may be
200 of them. Confounders may be any column whose groups exclude each other, any number, and the length of the caption.
"""

# N samples of the pool

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.auditing.columns import UNKNOWN, Column, check_group_count, distinct_names, shown
from curate.auditing.membership import bins
from curate.auditing.metadata import field_column, label_of, ledger_column, quantile_column
from curate.auditing.request import CAPTION_LENGTH
from curate.auditing.traits import FIELD, MOST_LISTED
from curate.errors import UsageError

MOST_NUMBERS: Final = 20  # more different numbers than these are put into quantiles
STRATA: Final = 5

Labels = NDArray[np.object_]


def json_column(texts_N: pa.ChunkedArray, name: str) -> Column:
    """A json field, each value as JSON text; with lists in it, overlapping. Errors: UsageError for too many groups."""
    encoded = texts_N.combine_chunks().dictionary_encode()
    code_N = encoded.indices.fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
    values = [json.loads(text) for text in encoded.dictionary.to_pylist()]
    provenance = f"{shown(name.removeprefix(FIELD))!r} in the samples' json"
    if any(isinstance(value, list) for value in values):
        return _listed(values, code_N, name=name, provenance=provenance)
    if len(values) > MOST_NUMBERS and all(_is_number(value) for value in values):
        number_N = np.array([*map(_as_float, values), np.nan])[code_N]
        return quantile_column(number_N, name=name, provenance=provenance)
    check_group_count(name, len(values))
    return field_column(np.array([*values, None], object)[code_N].tolist(), name=name, provenance=provenance)


def _listed(values: Sequence[Any], code_N: NDArray[np.int32], *, name: str, provenance: str) -> Column:
    """Overlapping groups of lists, a value by itself being a list of one; `code_N` is -1 where there is none.

    A list of nothing is known to be in no group; one whose values name no group (blank text) is not known.
    """
    lists = [value if isinstance(value, list) else [value] for value in values]
    named = [{label for one in given if (label := label_of(one)) is not None} for given in lists]
    groups = sorted(set().union(*named))
    if len(groups) > MOST_LISTED:
        raise UsageError(
            f"column {shown(name)!r} holds lists of more than {MOST_LISTED} distinct values; name a field with fewer, "
            "or put them into classes first"
        )
    place = {group: number for number, group in enumerate(groups)}
    member_VG = np.zeros((len(values) + 1, len(groups)), np.bool_)  # the last for those without
    for row, labels in enumerate(named):
        member_VG[row, [place[label] for label in labels]] = True
    known_V = np.array([*(bool(labels) or not given for labels, given in zip(named, lists, strict=True)), False])
    return Column(
        shown(name), "metadata", f"{provenance}, of which a sample may have several", distinct_names(groups),
        members_NG=member_VG[code_N], known_N=known_V[code_N],
    )  # fmt: skip


def table_column(rows: pa.Table, name: str, table: str) -> Column:
    """A column of the pool's table, which is called `table`. Errors: as `metadata.ledger_column`."""
    kind = rows[name].type
    if is_list(kind):
        return _list_column(rows[name], name, f"{shown(name)!r} in {table}")
    if pa.types.is_dictionary(kind) or pa.types.is_large_string(kind):
        rows = rows.select([name]).set_column(0, name, rows[name].cast(pa.string()))
    return dataclasses.replace(ledger_column(rows, name), provenance=f"{shown(name)!r} in {table}")


def is_list(kind: pa.DataType) -> bool:
    """Does a column of this type hold a list in each row?"""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _list_column(lists_N: pa.ChunkedArray, name: str, provenance: str) -> Column:
    code_of: dict[tuple[Any, ...], int] = {}
    keys_N = (None if one is None else tuple(one) for one in lists_N.to_pylist())
    codes = (UNKNOWN if key is None else code_of.setdefault(key, len(code_of)) for key in keys_N)
    code_N = np.fromiter(codes, np.int32, len(lists_N))
    return _listed([list(key) for key in code_of], code_N, name=name, provenance=provenance)


def strata_of(
    confounders: Sequence[str], columns: Mapping[str, Column], traits: pa.Table, rows: pa.Table
) -> tuple[dict[str, Labels], list[str]]:
    """Confounder -> a label per row, None where it is not known; and notes on those that the pool knows nothing of.

    A name may be written with "_" for " ". Errors: UsageError for one that is nowhere, or whose groups overlap.
    """
    strata: dict[str, Labels] = {}
    notes: list[str] = []
    for asked in confounders:
        spaced = asked.replace("_", " ")
        name = asked if asked in columns else spaced if spaced in (*columns, CAPTION_LENGTH) else asked
        labels_N = _stratum(name, columns, traits, rows)
        if labels_N is None:
            notes.append(f"{shown(name)} could not be held fixed: nothing is known of it in this pool")
        else:
            strata[shown(name)] = labels_N
    return strata, notes


def _stratum(name: str, columns: Mapping[str, Column], traits: pa.Table, rows: pa.Table) -> Labels | None:
    if shown(name) in columns:
        return _labels(columns[shown(name)])
    if name == CAPTION_LENGTH:
        return _binned(traits["words"])
    field = FIELD + name.removeprefix(FIELD)
    if field in traits.column_names and traits[field].null_count < len(traits):
        return _labels(json_column(traits[field], name))
    if name not in rows.column_names:
        there = ", ".join([*columns, CAPTION_LENGTH])
        raise UsageError(f"--confounder {shown(name)!r}: no column of that name; there are: {there}")
    kind = rows[name].type
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return _binned(rows[name]) if numbers else _labels(table_column(rows, name, "the pool"))


def _binned(column: pa.ChunkedArray) -> Labels | None:
    if column.null_count == len(column):
        return None
    return bins(column.cast(pa.float64()).to_numpy(zero_copy_only=False), STRATA)


def _labels(column: Column) -> Labels | None:
    if column.codes_N is None:
        raise UsageError(
            f"--confounder {column.name!r}: its groups overlap, and strata exclude each other; name a column of labels"
        )
    if not column.is_known.any():
        return None
    return np.array([*column.names, None], object)[column.codes_N]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("nan")
