"""Bounds that cannot all be met: which of them conflict, and what is served instead.

The conflict named is irreducible: without any one of its bounds the others could be met. Served are the floors before
the ceilings; of the floors the largest debt first, each as far as those before it allow (its shortfall is logged and
stays owed); then all ceilings rise by the smallest common proportion that leaves a sub-batch of the right size. Both
rules have one answer, so the same input is settled in the same way everywhere. At most 3 G + 1 small integer programs,
and none where the bounds can be met.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from curate.errors import UsageError
from curate.policy.atoms import Atoms, Frame, Ints, smallest_relaxation, solve
from curate.policy.quotas import Quota

Side = Literal["floor", "ceiling"]


@dataclass(frozen=True, slots=True)
class Settled:
    """Bounds that can be met, int64 [G], and what had to give: "" where nothing had."""

    least_G: Ints
    most_G: Ints
    conflict: str
    blamed: tuple[tuple[int, Side], ...] = ()  # the group and which of its bounds, of each that is named


def settle(quota: Quota, atoms: Atoms) -> Settled:
    """The quota's own bounds where they can be met. Errors: UsageError for a quota of other candidates.

    Example: floors of 7 and 6 with debts of 9.2 and 6.1 in a sub-batch of 10 become 7 and 3.
    """
    if int(atoms.count_A.sum()) != quota.candidates or not np.array_equal(atoms.per_group, quota.present_G):
        raise UsageError("the quota was made for other candidates than these; count the members of each group again")
    frame = Frame(atoms, quota.least_G, quota.most_G, quota.size)
    if frame.completable(np.zeros_like(atoms.count_A)):
        return Settled(quota.least_G, quota.most_G, "")
    least_G = _floors(quota, atoms)
    return Settled(least_G, _ceilings(quota, atoms, least_G), *_named(quota, frame))


def _floors(quota: Quota, atoms: Atoms) -> Ints:
    """Floors that can be met together without ceilings, the largest debt first (ties in the policy's order)."""
    least_G = np.zeros_like(quota.least_G)
    for group in np.argsort(-quota.debt_G, kind="stable").tolist():
        if quota.least_G[group]:
            best_A = solve(
                atoms.member_AG, atoms.count_A, quota.size, least_G, quota.present_G, prefer=group
            )  # possible: the floors so far were met
            assert best_A is not None
            least_G[group] = min(int(quota.least_G[group]), int(best_A @ atoms.member_AG[:, group]))
    return least_G


def _ceilings(quota: Quota, atoms: Atoms, least_G: Ints) -> Ints:
    """The quota's ceilings, all raised by the smallest proportion with which `least_G` and the size can be met."""
    weight = [float(max(1, most)) for most in quota.most_G]
    rise = smallest_relaxation(atoms.member_AG, atoms.count_A, quota.size, least_G, quota.most_G, weight)
    # 1e-6: the program's own tolerance; a ceiling may not lose its last whole sample to it
    raised = [most + math.floor(rise * one + 1e-6) for most, one in zip(quota.most_G.tolist(), weight, strict=True)]
    most_G: Ints = np.minimum(np.array(raised, dtype=np.int64), quota.present_G)
    return most_G


def _named(quota: Quota, frame: Frame) -> tuple[str, tuple[tuple[int, Side], ...]]:
    """An irreducible set of bounds that cannot be met together, by dropping one bound after the other."""
    nothing_A = np.zeros_like(frame.atoms.count_A)
    for group in np.argsort(quota.debt_G, kind="stable").tolist():
        for name, free in (("most_G", quota.present_G), ("least_G", np.zeros_like(quota.least_G))):
            bound_G = getattr(frame, name).copy()
            bound_G[group] = free[group]
            without = replace(frame, **{name: bound_G})
            if not without.completable(nothing_A):
                frame = without
    floors, ceilings = np.flatnonzero(frame.least_G), np.flatnonzero(frame.most_G < quota.present_G)
    said = [f"{quota.names[g]} at least {frame.least_G[g]}" for g in floors]
    said += [f"{quota.names[g]} at most {frame.most_G[g]}" for g in ceilings]
    blamed: list[tuple[int, Side]] = [(int(g), "floor") for g in floors]
    blamed += [(int(g), "ceiling") for g in ceilings]
    many = f"cannot be met together in {quota.size} of {quota.candidates} candidates"
    return f"{', '.join(said)} {many}", tuple(blamed)
