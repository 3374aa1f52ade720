"""From a pool's rows, its captions' traits and what a user asks for to the columns of an audit, and what is held fixed.

Whatever is known of the pool becomes a column; what is not leaves a note. A name is looked up in the user's labels, in
the columns that every pool brings along, in the samples' json, in the pool's table; `field:NAME` is always the json's.
Where labels or zero-shot attributes have the name of a column of ours, ours takes a longer one.
"""

# N samples of the pool

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.auditing.clusters import Clusters, Copies
from curate.auditing.columns import Column, shown
from curate.auditing.crossing import quoting_hint
from curate.auditing.given_columns import json_column, strata_of, table_column
from curate.auditing.labels import Labels, Match, join_labels
from curate.auditing.own_columns import CLUSTERS, COPIES, clusters_of, copies_of, own_columns
from curate.auditing.request import AuditRequest
from curate.auditing.traits import FIELD, facts_of
from curate.auditing.zero_shot import predicted_columns
from curate.errors import UsageError, VerificationError


@dataclass(frozen=True, slots=True)
class Assembled:
    """The columns of an audit; `strata`: confounder -> a label per row [N]; `notes`: sentences without a full stop.

    `clusters` has the medoids (rows of the pool), `copies` the units of the test (`units_N` for `clusters_N` of
    `audit_columns`), `match` how labels met the pool; None where there is none.
    """

    columns: tuple[Column, ...]
    strata: Mapping[str, NDArray[np.object_]]
    notes: tuple[str, ...] = ()
    clusters: Clusters | None = None
    copies: Copies | None = None
    match: Match | None = None

    def named(self) -> dict[str, Column]:
        """The columns by name."""
        return {column.name: column for column in self.columns}


def assemble(
    rows: pa.Table,
    traits: pa.Table,
    request: AuditRequest,
    *,
    wanted: Collection[str] | None = None,
    predictions: pa.Table | None = None,
    joined: Labels | None = None,
) -> Assembled:
    """Every column that the pool `rows` and the `traits` of its samples allow, or only those `wanted` by name.

    `rows` has sample_id; key or uid for labels; width, height, image_digest and dhash, ref_image (fp16) as far as they
    are known; and any column that the request names. `predictions` has what a model made of the request's
    attributes (`curate.auditing.zero_shot`); `joined` is what `joined_labels` made of its labels. Errors: UsageError
    for names that are not there and labels that do not match, VerificationError for samples without traits.
    """
    if not len(rows):
        raise UsageError("the pool is empty: there is nothing to audit")
    traits = along(rows, traits)
    is_wanted = frozenset(wanted).__contains__ if wanted is not None else lambda _: True
    copies, copies_note = copies_of(rows) if is_wanted(COPIES) else (None, "")
    clusters, clusters_note = clusters_of(rows, request.clusters, request.seed) if is_wanted(CLUSTERS) else (None, "")
    own = own_columns(rows, traits) | {
        COPIES: lambda: None if copies is None else copies.column,
        CLUSTERS: lambda: None if clusters is None else clusters.column,
    }
    joined = joined or joined_labels(rows, request, wanted)
    labelled, match = (joined.columns, joined.match) if joined is not None else ((), None)
    guessed, guess_notes = _predicted(rows, predictions, request, wanted)
    columns = {column.name: column for column in (*labelled, *guessed)}
    columns |= _named(rows, traits, request, taken={*own, *map(_longer, own), *request.predicted}, wanted=wanted)
    notes = [note for note in (_said(request, match), *guess_notes, copies_note, clusters_note) if note]
    for name, make in own.items():
        mine, note = _free(shown(name), columns, mention=name in facts_of(traits).get("sets", {}))
        made = make() if is_wanted(mine) else None
        if made is not None:
            columns[mine] = dataclasses.replace(made, name=mine)
            notes += [note] if note else []
        elif name in request.named and mine == name and name not in (COPIES, CLUSTERS):
            notes.append(f"{name} could not be compared: nothing is known of it in this pool")
    columns = _with_errors(columns, request)
    strata, lost = strata_of(request.confounders, columns, traits, rows)
    return Assembled(tuple(columns.values()), strata, (*notes, *lost), clusters, copies, match)


def joined_labels(rows: pa.Table, request: AuditRequest, wanted: Collection[str] | None = None) -> Labels | None:
    """The request's labels along the pool; None without any. Needs no trait, so ask before they are read.

    Errors: as `join_labels`.
    """
    names = [name for name in request.label_columns if wanted is None or shown(name) in wanted]
    if request.labels is None or (request.label_columns and not names):
        return None
    if request.on not in rows.column_names:
        raise UsageError(f"labels cannot be joined on {request.on}: the pool has {', '.join(rows.column_names)}")
    return join_labels(request.labels, rows, on=request.on, columns=names, least_match=request.least_match)


def along(rows: pa.Table, traits: pa.Table) -> pa.Table:
    """The traits of each row, in the order of the rows.

    By sample id, which stands for the bytes: samples with the same one have the same traits. Errors: VerificationError
    for rows whose sample has none.
    """
    wanted, there = rows["sample_id"].cast(pa.binary()), traits["sample_id"].cast(pa.binary())
    if wanted.equals(there):
        return traits
    place_N = pc.index_in(wanted.combine_chunks(), value_set=there.combine_chunks())
    if place_N.null_count:
        raise VerificationError(
            f"{place_N.null_count:,} of the pool's {len(rows):,} samples are in none of its input shards: these "
            "changed since it was scored. Restore them, or score anew"
        )
    return traits.take(place_N)


def _predicted(
    rows: pa.Table, predictions: pa.Table | None, request: AuditRequest, wanted: Collection[str] | None
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    if request.zero_shot is None or predictions is None:
        return (), ()
    return predicted_columns(request.zero_shot, along(rows, predictions), wanted)


def _said(request: AuditRequest, match: Match | None) -> str:
    if match is None or request.labels is None:
        return ""
    return f"labels of {shown(request.labels.name)}, joined on {request.on}: {match}"


def _named(
    rows: pa.Table, traits: pa.Table, request: AuditRequest, *, taken: Collection[str], wanted: Collection[str] | None
) -> dict[str, Column]:
    """The columns that the request names beside its labels and ours: json fields, then columns of the pool's table."""
    found: dict[str, Column] = {}
    for name in request.named:
        if {name, shown(name)} & {*taken, *request.label_columns} or (wanted is not None and shown(name) not in wanted):
            continue
        field = FIELD + name.removeprefix(FIELD)
        if field in traits.column_names and traits[field].null_count < len(traits):
            found[shown(name)] = json_column(traits[field], name)
        elif name in rows.column_names:
            found[shown(name)] = table_column(rows, name, facts_of(traits).get("table", "the ledger"))
        else:
            raise UsageError(_not_there(name, request, rows, traits, taken))
    return found


def _not_there(name: str, request: AuditRequest, rows: pa.Table, traits: pa.Table, taken: Collection[str]) -> str:
    facts = facts_of(traits)
    places: dict[str, Collection[str]] = {
        "the labels": request.label_columns,
        "the samples' json": facts.get("json_fields", ()),
        facts.get("table", "the ledger"): rows.column_names,
    }
    told = "; ".join(f"{place} has {', '.join(map(shown, names))}" for place, names in places.items() if names)
    return f"no column {shown(name)!r}: {told}{_hint(name, request, {*taken, *chain(*places.values())})}"


def _hint(name: str, request: AuditRequest, known: Collection[str]) -> str:
    """How to write columns to be crossed that were cut at the commas of their names; "" where it is not that."""
    hints = (quoting_hint(names, known) for names in request.intersect if name in names)
    typed = next((hint for hint in hints if hint), "")
    return f"; a name with a comma is quoted as in a CSV: {typed}" if typed else ""


def _free(name: str, columns: Collection[str], *, mention: bool) -> tuple[str, str]:
    """A name that no column of the user's has, and a note where it is another than usual."""
    free = _longer(name) if mention and name in columns else name
    while free in columns:
        free += " (by curate)"
    return free, "" if free == name else f"{name!r} is a column of yours; the audit's own is called {free!r}"


def _longer(name: str) -> str:
    """What the mentions of a set are called where a column of the user's has its name."""
    return f"caption mentions: {name}"


def _with_errors(columns: Mapping[str, Column], request: AuditRequest) -> dict[str, Column]:
    """The columns with the errors that the request states for their labels."""
    errors = {shown(name): error for name, error in request.label_errors.items()}
    lost = [name for name in errors if name not in columns]
    if lost:
        raise UsageError(
            f"label errors are stated for {lost[0]!r}, which is no column; there are: {', '.join(columns)}"
        )
    return {
        name: dataclasses.replace(column, label_error=errors[name]) if name in errors else column
        for name, column in columns.items()
    }
