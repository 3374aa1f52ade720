"""Floors and ceilings of the next sub-batch, from what all sub-batches so far owe. O(groups), exact in fractions.

With n_g(t) members of group g among the candidates of draw t, N_g and C_g the sums of candidates and of drawn so far,
and rho the share drawn of all candidates so far (b / B, where all draws are of one size):

    F_g(t) = max(min_ratio rho N_g(t), min_share b t, min_count (share of the run done))           what is owed by now
    L_g(t) = floor(F_g(t)) - C_g(t-1), clipped to 0 .. n_g(t); rounded up on the last draw                    at least
    V_g(t) = min(n_g(t), ceil(max_ratio rho N_g(t)) - C_g(t-1)), at least L_g(t)                              at most

Where it is known who is still to come (`Ahead`: stored scores, all memberships), min_share and min_count are spread
over the group's own candidates instead, so that one which only a few draws have is served by those. With O_g owed by
the end and M_g members among later candidates F_g(t) = C_g(t-1) + (O_g - C_g(t-1)) n_g / (n_g + M_g); and L_g is
rounded up where M_g = 0.

What a draw could not serve stays in C and is asked of the next. For disjoint groups with a ratio only, sum L <= b is
certain where b (1 - min_ratio) >= the number of groups, if earlier floors were met; on the last draw, which rounds up,
twice that number is needed. b <= sum V is certain where b (max_ratio - 1) >= the number of groups and all rows are in
one. Where neither holds, `settling.py` says what conflicts and what is served.
Related: the deficit counters of fair queuing (Shreedhar and Varghese 1996, doi 10.1109/90.502236).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.policy.schema import Bounds

# G groups, B candidates, b drawn


@dataclass(frozen=True, slots=True)
class State:
    """What all draws so far had before them and took; whole numbers, so that it survives JSON exactly."""

    names: tuple[str, ...]
    pool_G: tuple[int, ...]
    chosen_G: tuple[int, ...]
    pool: int = 0
    chosen: int = 0
    draws: int = 0

    @classmethod
    def empty(cls, bounds: Sequence[Bounds]) -> State:
        zero = (0,) * len(bounds)
        return cls(tuple(bound.name for bound in bounds), zero, zero)

    def after(self, quota: Quota, chosen_G: NDArray[np.int64]) -> State:
        """With one more draw of `quota.size` members counted."""
        return State(
            self.names,
            tuple(a + int(b) for a, b in zip(self.pool_G, quota.present_G, strict=True)),
            tuple(a + int(b) for a, b in zip(self.chosen_G, chosen_G, strict=True)),
            self.pool + quota.candidates,
            self.chosen + quota.size,
            self.draws + 1,
        )

    def passing(self, present_G: NDArray[np.int64], candidates: int) -> State:
        """With candidates counted of which none was drawn."""
        pool_G = tuple(a + int(b) for a, b in zip(self.pool_G, present_G, strict=True))
        return replace(self, pool_G=pool_G, pool=self.pool + candidates)

    def as_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names), "pool_G": list(self.pool_G), "chosen_G": list(self.chosen_G),
            "pool": self.pool, "chosen": self.chosen, "draws": self.draws,
        }  # fmt: skip

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> State:
        """Errors: UsageError for what `as_json` did not write."""
        try:
            names, pool_G, chosen_G = (tuple(given[key]) for key in ("names", "pool_G", "chosen_G"))
            counts = [*pool_G, *chosen_G, *(given[key] for key in ("pool", "chosen", "draws"))]
            if not len(names) == len(pool_G) == len(chosen_G) or not all(type(n) is int and n >= 0 for n in counts):
                raise ValueError("counts do not fit")
            return cls(names, pool_G, chosen_G, given["pool"], given["chosen"], given["draws"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the state of the policy's quotas cannot be read ({error}); start the run afresh"
            ) from None


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is known of the rest of a run: samples that it draws in all, members among the candidates of later draws."""

    total: int
    present_G: tuple[int, ...]

    def as_json(self) -> list[Any]:
        return [self.total, list(self.present_G)]


@dataclass(frozen=True, slots=True)
class Quota:
    """The bounds of one draw of `size` out of `candidates`; all arrays int64 [G] but `floor_G` and `debt_G` (fp64)."""

    names: tuple[str, ...]
    candidates: int
    size: int
    present_G: NDArray[np.int64]  # n
    floor_G: NDArray[np.float64]  # F, cumulative
    debt_G: NDArray[np.float64]  # F less what earlier draws took
    least_G: NDArray[np.int64]  # L
    most_G: NDArray[np.int64]  # V


def quota(
    bounds: Sequence[Bounds],
    state: State,
    present_G: Sequence[int] | NDArray[np.int64],
    *,
    candidates: int,
    size: int,
    last: bool = False,
    done: Fraction | None = None,
    ahead: Ahead | None = None,
) -> Quota:
    """The bounds of the next draw, `present_G` members of each group among its candidates.

    `done` is the share of the run that this draw completes; it paces min_count, which without it is owed at once. With
    `ahead` the group's own candidates pace both min_count and min_share.
    Errors: UsageError for a state of other groups, or sizes that cannot be.

    >>> women = Bounds("gender=woman", min_ratio=Fraction("0.8"), max_ratio=Fraction("1.2"))
    >>> one = quota([women], State.empty([women]), [60], candidates=100, size=20)
    >>> float(one.floor_G[0]), int(one.least_G[0]), int(one.most_G[0])  # 9.6 of the 12 that their share would be
    (9.6, 9, 15)
    """
    _check_sizes(bounds, state, present_G, candidates, size)
    part = Fraction(1) if last else done
    total = state.chosen + size
    pool_G = [before + int(n) for before, n in zip(state.pool_G, present_G, strict=True)]
    floors, ceilings = owed(bounds, pool_G, pool=state.pool + candidates, chosen=total, done=part)
    if ahead is not None:
        by_ratio = [replace(bound, min_share=None, min_count=None) for bound in bounds]
        floors, _ = owed(by_ratio, pool_G, pool=state.pool + candidates, chosen=total)
        spread = _spread(bounds, state, present_G, ahead)
        floors = [max(pair) for pair in zip(floors, spread, strict=True)]
    least, most = [], []
    for number, present in enumerate(int(n) for n in present_G):
        before, ceiling = state.chosen_G[number], ceilings[number]
        final = last or (ahead is not None and not ahead.present_G[number])
        floor = math.ceil(floors[number]) if final else math.floor(floors[number])
        least.append(min(max(floor - before, 0), present))
        most.append(max(present if ceiling is None else min(present, math.ceil(ceiling) - before), least[-1]))
    return Quota(
        state.names, candidates, size, np.array(present_G, dtype=np.int64),
        np.array([float(owed) for owed in floors]),
        np.array([float(owed - before) for owed, before in zip(floors, state.chosen_G, strict=True)]),
        np.array(least, dtype=np.int64), np.array(most, dtype=np.int64),
    )  # fmt: skip


def _spread(
    bounds: Sequence[Bounds], state: State, present_G: Sequence[int] | NDArray[np.int64], ahead: Ahead
) -> list[Fraction]:
    """What shares and counts owe by now: of what is missing to their end, the part of the candidates here."""
    floors = []
    for bound, before, here, later in zip(bounds, state.chosen_G, present_G, ahead.present_G, strict=True):
        end = max((bound.min_share or Fraction(0)) * ahead.total, Fraction(bound.min_count or 0))
        part = Fraction(int(here), int(here) + later) if later else Fraction(1)
        floors.append(end if end <= before else before + (end - before) * part)
    return floors


def owed(
    bounds: Sequence[Bounds], pool_G: Sequence[int], *, pool: int, chosen: int, done: Fraction | None = None
) -> tuple[list[Fraction], list[Fraction | None]]:
    """What `chosen` of `pool` owe each group, F, and their ceilings (None: without one), before any rounding."""
    even_G = [Fraction(chosen * int(n), pool) for n in pool_G]  # at the rate of the whole pool
    floors = []
    for bound, even in zip(bounds, even_G, strict=True):
        ratio = (bound.min_ratio or Fraction(0)) * even
        share = (bound.min_share or Fraction(0)) * chosen
        count = (bound.min_count or 0) * (Fraction(1) if done is None else done)
        floors.append(max(ratio, share, count))
    ceilings = [
        None if bound.max_ratio is None else bound.max_ratio * even for bound, even in zip(bounds, even_G, strict=True)
    ]
    return floors, ceilings


def _check_sizes(
    bounds: Sequence[Bounds], state: State, present_G: Sequence[int] | NDArray[np.int64], candidates: int, size: int
) -> None:
    names = tuple(bound.name for bound in bounds)
    if names != state.names or len(present_G) != len(names):
        raise UsageError(f"the quotas count {', '.join(state.names)}, but the policy has {', '.join(names)}")
    if not 0 < size <= candidates:
        raise UsageError(f"cannot draw {size} of {candidates} candidates")
    if any(not 0 <= int(n) <= candidates for n in present_G):
        raise UsageError(f"a group has between 0 and {candidates} members among {candidates} candidates")
