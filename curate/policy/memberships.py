"""Which rows are in the groups that a policy names, from the columns of an audit (or anything of their shape)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from curate.policy.schema import UNKNOWN, Column, Policy

# N rows, G groups of the policy, all columns together


class Grouped(Protocol):
    """A column of labels: group names, and per row in which of them it is and whether anything is known of it."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def members(self) -> NDArray[np.bool_]: ...
    @property
    def is_known(self) -> NDArray[np.bool_]: ...


def members_of(policy: Policy, found: Mapping[str, Grouped]) -> NDArray[np.bool_]:
    """bool [N, G], the groups in the order of `policy.bounds`.

    `found` are the columns by name; groups that the policy does not name are known, but in no group of it. Errors:
    UsageError for a column or group that is not there, and for rows in two groups of a column that is not declared
    `overlapping`.
    """
    policy.require({name: column.names for name, column in found.items()})
    for number, column in enumerate(policy.columns):
        _refuse_overlap(policy, number, found[column.name])
    return np.concatenate([_members(column, found[column.name]) for column in policy.columns], axis=1)


def _members(column: Column, found: Grouped) -> NDArray[np.bool_]:
    place = {name: number for number, name in enumerate(found.names)}
    unknown_N = ~found.is_known
    return np.stack(
        [
            unknown_N if group.name == UNKNOWN and group.name not in place else found.members[:, place[group.name]]
            for group in column.groups
        ],
        axis=1,
    )


def _refuse_overlap(policy: Policy, number: int, found: Grouped) -> None:
    column = policy.columns[number]
    twice = 0 if column.overlapping else int((_members(column, found).sum(axis=1) > 1).sum())
    if twice:
        message = f"{twice} rows are in several groups of {column.name}; say overlapping: true"
        raise policy.marked.error(("columns", number), message)
