"""What a policy asks of the pool: the audit's request for the columns that it names, and their groups' members.

A name that the label file has is that column; else one that every pool brings along (caption mentions, script, image
size, ...) is that; else it is a field of the samples' json or a column of the pool's table.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.auditing.assembling import Assembled, assemble
from curate.auditing.clusters import COPIES
from curate.auditing.columns import Column, crossed_name, intersection
from curate.auditing.labels import check_labels
from curate.auditing.lexicons import SETS
from curate.auditing.request import CAPTION_LENGTH, AuditRequest
from curate.auditing.traits import FIELD, caption_reader, facts_of
from curate.errors import UsageError
from curate.marked_yaml import suggestion
from curate.policy.given import GivenPolicy
from curate.policy.memberships import Grouped, members_of
from curate.policy.schema import Policy

# N rows of the pool, G groups of the policy

OURS: Final = (
    *SETS, "caption script", "caption language", "url country", "image size", "image shape", "near-duplicates",
    "embedding cluster", CAPTION_LENGTH,
)  # fmt: skip
_TOLD: Final = 12
_WRITTEN_OUT: Final = 100_000  # crossings of groups, to look for a misspelt one before any work


@dataclass(frozen=True, slots=True)
class PolicyColumns:
    """The members of the policy's groups, bool [N, G], and for each of its columns where it comes from."""

    member_NG: NDArray[np.bool_]
    facts: tuple[Mapping[str, Any], ...]


def request_of(given: GivenPolicy) -> AuditRequest:
    """What must be read of the pool. Errors: UsageError for a label file that is none."""
    labels = given.labels
    request = AuditRequest(labels=labels, on=given.settings.on, lexicons=(), confounders=(), clusters=0)
    names, held = names_of(given)
    beside = [name for name in names if name not in OURS or name in request.label_columns]
    sets = tuple(name for name in SETS if {name, f"caption mentions: {name}"} & {*names, *held})
    clusters = None if "embedding cluster" in {*names, *held} else 0
    return AuditRequest(
        labels=labels, on=given.settings.on, lexicons=sets, columns=tuple(beside), confounders=held, clusters=clusters
    )


def check_names(given: GivenPolicy) -> None:
    """Look for the policy's groups where that needs no pool: in its label file, among those of word lists and copies.

    Errors: UsageError for a label file that could be joined to no pool; with line and field for a group in neither.
    """
    request = request_of(given)
    names, held = names_of(given)
    known: dict[str, Sequence[str]] = {"near-duplicates": COPIES}
    mentioned = sorted({*names} & set(request.traits.sets))
    if mentioned:
        sets = caption_reader(request.traits).facts["sets"]
        known |= {name: sets[name]["groups"] for name in mentioned}
    labelled = sorted({*names, *held} & set(request.label_columns))
    if given.labels is not None and labelled:
        known |= check_labels(given.labels, on=request.on, columns=labelled)
    given.policy.require(with_crossed(given.policy, known), all_known=False)


def with_crossed(policy: Policy, known: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """What could be the groups of the policy's intersections, too, where they are not too many to write out."""
    crossed: dict[str, Sequence[str]] = {}
    for column in policy.columns:
        groups = [known[name] for name in column.crossed if name in known]
        if column.crossed and len(groups) == len(column.crossed) and math.prod(map(len, groups)) <= _WRITTEN_OUT:
            crossed[column.name] = [crossed_name(names) for names in itertools.product(*groups)]
    return {**known, **crossed}


def policy_columns(given: GivenPolicy, rows: pa.Table, traits: pa.Table) -> PolicyColumns:
    """Who of the pool's `rows` is in which group; `traits` are those of `request_of`.

    Errors: UsageError with line and field for columns or groups that are not there, or rows in two groups of a column
    that is not declared overlapping; as `assemble` for labels that do not match.
    """
    (names, held), request = names_of(given), request_of(given)
    refuse_missing(given, request, rows.column_names, traits)
    made = assemble(rows, traits, request, wanted={*names, *held})
    member_NG = members_of(given.policy, groups_of(made, given.policy))
    found = _named(made, given.policy)
    facts: list[dict[str, Any]] = [
        {"column": one.name, "provenance": found[one.name].provenance, "coverage": found[one.name].coverage}
        for one in given.policy.columns
    ]
    return PolicyColumns(member_NG, tuple(facts))


def coverage_notes(policy: Policy, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the columns in `facts` those of which fewer samples are known than the policy asks for, in words."""
    return [
        f"{column.name}: {one['coverage']:.1%} of the samples are known, below min_coverage {column.min_coverage:.1%}; "
        "a check of it stays indeterminate"
        for column, one in zip(policy.columns, facts, strict=True)
        if one["coverage"] < column.min_coverage
    ]


def groups_of(made: Assembled, policy: Policy) -> dict[str, Grouped]:
    """Columns by name as a policy is held against them, its intersections among them; what is only held fixed is known
    by name, without groups. Errors: UsageError with line and field for an intersection of too many groups.
    """
    return {name: _NoGroups() for name in made.strata} | dict(_named(made, policy))


def _named(made: Assembled, policy: Policy) -> dict[str, Column]:
    found = made.named()
    for number, column in enumerate(policy.columns):
        if column.crossed and found.keys() >= {*column.crossed}:
            try:
                found[column.name] = intersection([found[name] for name in column.crossed])
            except UsageError as error:
                raise policy.marked.error(("columns", number, "intersect"), str(error)) from None
    return found


def refuse_missing(given: GivenPolicy, request: AuditRequest, beside: Collection[str], traits: pa.Table) -> None:
    """A column that is nowhere, by its line; one of ours that this pool has nothing for is found missing later.

    `beside` are the columns of the pool's own table.
    """
    fields = [name for name in traits.column_names if name.startswith(FIELD) and traits[name].null_count < len(traits)]
    there = {*request.label_columns, *OURS, *(f"caption mentions: {name}" for name in SETS), *beside}
    there |= {*fields, *(name.removeprefix(FIELD) for name in fields)}
    held = facts_of(traits).get("json_fields", ())
    for number, column in enumerate(given.policy.columns):
        key = "intersect" if column.crossed else "column"
        wanted = [(name, key) for name in column.parts] + [(name, "confounders") for name in column.confounders]
        for name, key in wanted:
            if name not in there:
                message = suggestion(f"no column is called {name!r}", name, sorted(there | set(held)))
                raise given.policy.marked.error(("columns", number, key), f"{message}{_told(name, held)}")


def _told(name: str, fields: Sequence[str]) -> str:
    """The fields of the samples' json, as far as they are told, those spelt like `name` first."""
    if not fields:
        return " (no sample has fields in a json)"
    alike = sorted(fields, key=lambda one: (-difflib.SequenceMatcher(None, name, one).ratio(), one))
    return f" (the samples' json has {', '.join(alike[:_TOLD])}{' and others' if len(alike) > _TOLD else ''})"


def names_of(given: GivenPolicy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that a policy's groups are made of, and what it holds fixed when it is checked."""
    columns = given.policy.columns
    named = dict.fromkeys(name for column in columns for name in column.parts)
    held = dict.fromkeys(name for column in columns for name in column.confounders)
    return tuple(named), tuple(held)


@dataclass(frozen=True, slots=True)
class _NoGroups:
    """Strata: known by name, bounded by nothing."""

    names: Sequence[str] = ()
    members: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    is_known: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
