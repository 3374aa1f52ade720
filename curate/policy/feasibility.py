"""Can any selection of a given size keep to a policy? Asked before anything is drawn, and of finished selections.

The whole pool is taken for one draw: if its bounds conflict, no way of cutting it into super-batches helps. Columns of
`severity: warning` are left out: what they ask is served as far as it goes. Cost: as one `settle`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curate.marked_yaml import Place
from curate.policy.atoms import atoms_of
from curate.policy.quotas import State, owed, quota
from curate.policy.schema import Bounds, Policy
from curate.policy.settling import Side, settle

# N rows of the pool, G groups of the policy
_FLOORS: Final = ("min_ratio", "min_share", "min_count")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Bounds that no selection of `size` could keep, in words; each group (of all columns) with the bound that is."""

    text: str
    blamed: tuple[tuple[int, Side], ...]
    size: int
    pool: int


def find_conflict(policy: Policy, member_NG: NDArray[np.bool_], size: int) -> Conflict | None:
    """Why no `size` of these rows could keep to the columns that are errors; None if some could.

    Example: min_count 50 of a group with 20 rows: "gender=woman at least 50 of 20 in the pool: more than there are".
    """
    group_E = np.flatnonzero([column.severity == "error" for column in policy.columns for _ in column.groups])
    bounds, atoms = [policy.bounds[group] for group in group_E], atoms_of(member_NG[:, group_E])
    pool = len(member_NG)
    floors, ceilings = owed(bounds, atoms.per_group.tolist(), pool=pool, chosen=size)
    least = [math.floor(one) for one in floors]
    short = [one for one in range(len(bounds)) if least[one] > atoms.per_group[one]]
    if short:
        said = ", ".join(f"{bounds[one].name} at least {least[one]} of {atoms.per_group[one]}" for one in short)
        return Conflict(
            f"{said} in the pool: more than there are", tuple((int(group_E[one]), "floor") for one in short), size, pool
        )
    for one, ceiling in enumerate(ceilings):
        if ceiling is not None and least[one] > math.ceil(ceiling):
            said = f"{bounds[one].name} at least {least[one]} and at most {math.ceil(ceiling)}"
            return Conflict(said, ((int(group_E[one]), "floor"), (int(group_E[one]), "ceiling")), size, pool)
    settled = settle(quota(bounds, State.empty(bounds), atoms.per_group, candidates=pool, size=size), atoms)
    blamed: tuple[tuple[int, Side], ...] = tuple((int(group_E[one]), side) for one, side in settled.blamed)
    return Conflict(settled.conflict, blamed, size, pool) if settled.conflict else None


def refuse_conflict(policy: Policy, member_NG: NDArray[np.bool_], size: int) -> None:
    """Errors: UsageError with line and field of the first bound of a conflict, and all of them in words."""
    found = find_conflict(policy, member_NG, size)
    if found is not None:
        group, side = found.blamed[0]
        asked = _asked(policy.bounds[group], side, int(member_NG[:, group].sum()), size=size, pool=found.pool)
        more = f" Selected are {size:,} of {found.pool:,}: ask for less, or select more"
        raise policy.marked.error(_place(policy, group, asked), f"no selection can keep it: {found.text}.{more}")


def _asked(bound: Bounds, side: Side, n: int, *, size: int, pool: int) -> str:
    """The field that a floor or ceiling comes from: of several floors the highest."""
    if side == "ceiling":
        return "max_ratio"
    none: dict[str, Any] = dict.fromkeys(_FLOORS)
    alone = [replace(bound, **none | {name: getattr(bound, name)}) for name in _FLOORS]
    floors, _ = owed(alone, [n] * len(alone), pool=pool, chosen=size)
    return _FLOORS[max(range(len(_FLOORS)), key=floors.__getitem__)]


def _place(policy: Policy, group: int, field: str) -> Place:
    """Where a bound of a group (counted over all columns) is written: at the group, else at its column."""
    column, position = _positions(policy)[group]
    own: Place = ("columns", column, "groups", position, field)
    return own if own in policy.marked.where else ("columns", column, field)


def _positions(policy: Policy) -> Sequence[tuple[int, int]]:
    return [(n, position) for n, column in enumerate(policy.columns) for position in range(len(column.groups))]
