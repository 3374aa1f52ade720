"""What a policy asks of one super-batch, and the draw that keeps to it.

The debt of a group passes from each super-batch to the next, so they are drawn one after the other: the state before a
draw is part of its unit's inputs, the state after it a fact of its receipt, and a resumed run finds the same chain.
Counted are the candidates that may be drawn: readable, and no duplicate of another in their super-batch.
Memory: 16 bytes and one per group for each candidate of the shards behind a super-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.errors import VerificationError
from curate.policy.drawing import ConstrainedDraw
from curate.policy.price import Price
from curate.policy.quotas import Ahead, Quota, State, quota
from curate.policy.schema import Bounds
from curate.selection.joint import Draw

# N rows of the file, U candidates that may be drawn, G groups of the policy

Draws = Callable[[NDArray[np.bool_], Quota], tuple[ConstrainedDraw, Price]]


@dataclass(frozen=True, slots=True)
class Memberships:
    """The file that says which groups each sample of the pool is in, and its digest."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy over a whole run: its bounds, who is in which group, what is ahead of each super-batch and the last."""

    bounds: tuple[Bounds, ...]
    memberships: Memberships
    ahead_T: tuple[Ahead, ...]
    last: int

    @classmethod
    def over(
        cls, bounds: tuple[Bounds, ...], memberships: Memberships, present_TG: NDArray[np.int64], sizes: Sequence[int]
    ) -> Rule:
        """Of super-batches that give `sizes` samples, with these members among what may be drawn."""
        later_TG = present_TG.sum(axis=0) - present_TG.cumsum(axis=0)
        ahead = tuple(Ahead(sum(sizes), tuple(later_G)) for later_G in later_TG.tolist())
        return cls(bounds, memberships, ahead, max((t for t, size in enumerate(sizes) if size), default=0))

    def within(self, output: Path) -> Rule:
        """The same rule where the run's files have moved to another output directory."""
        name = self.memberships.path.relative_to(self.memberships.path.parents[2])
        return replace(self, memberships=replace(self.memberships, path=output / name))

    def begin(self) -> State:
        return State.empty(self.bounds)

    def on(self, state: State, number: int) -> Ruled:
        """What super-batch `number` has to keep to."""
        return Ruled(self.bounds, self.memberships, state, self.ahead_T[number], last=number >= self.last)


@dataclass(frozen=True, slots=True)
class Ruled:
    """One super-batch under a policy: its bounds, who is in which group, what draws before it left and later ones have.

    After the `last` one nothing is drawn.
    """

    bounds: tuple[Bounds, ...]
    memberships: Memberships
    state: State
    ahead: Ahead
    last: bool

    def as_json(self) -> dict[str, Any]:
        """All that the draw depends on."""
        return {
            "bounds": [bound.as_json() for bound in self.bounds],
            "memberships": self.memberships.sha256,
            "state": self.state.as_json(),
            "ahead": self.ahead.as_json(),
            "last": self.last,
        }

    def draw(self, candidates: pa.Table, size: int, draws: Draws) -> tuple[Draw | None, dict[str, Any]]:
        """The draw of `size` of these candidates, and the facts of it that the next one and the certificate need.

        `candidates` have sample_id, shard and row.
        """
        member_UG = read_members(self.memberships.path, candidates, len(self.bounds))
        present_G = member_UG.sum(axis=0).astype(np.int64)
        if not size:
            return None, self._facts(self.state.passing(present_G, len(member_UG)), "", None)
        asked = quota(
            self.bounds, self.state, present_G,
            candidates=len(member_UG), size=size, last=self.last, ahead=self.ahead,
        )  # fmt: skip
        drawn, price = draws(member_UG, asked)
        return drawn.draw, self._facts(self.state.after(asked, drawn.count_G), drawn.conflict, price)

    def _facts(self, state: State, conflict: str, price: Price | None) -> dict[str, Any]:
        paid = None if price is None else [price.constrained, price.plain, price.members]
        made_of = self.memberships.sha256
        return {"state": state.as_json(), "conflict": conflict, "price": paid, "memberships": made_of}


def membership_schema(groups: int) -> pa.Schema:
    """One row per readable sample of the pool: its input shard, its row in that table, and a column per group."""
    fixed = [("sample_id", pa.binary(16)), ("shard", pa.int32()), ("row", pa.int32())]
    return pa.schema([*fixed, *((str(group), pa.bool_()) for group in range(groups))])


def as_members(table: pa.Table, groups: int) -> NDArray[np.bool_]:
    """bool [N, G] of a table of `membership_schema`."""
    member_NG = np.zeros((len(table), groups), dtype=np.bool_)
    for group in range(groups):
        member_NG[:, group] = table[str(group)].to_numpy(zero_copy_only=False)
    return member_NG


def read_members(path: Path, candidates: pa.Table, groups: int) -> NDArray[np.bool_]:
    """bool [U, G] in the order of the candidates. Errors: VerificationError if the file has other samples there."""
    if not len(candidates):
        return np.zeros((0, groups), dtype=np.bool_)
    table = pq.read_table(path, filters=[("shard", "in", np.unique(candidates["shard"].to_numpy()).tolist())])
    place_N, place_U = _places(table), _places(candidates)
    order = np.argsort(place_N)
    found_U = order[np.searchsorted(place_N, place_U, sorter=order).clip(max=len(order) - 1)] if len(order) else order
    taken = table.take(found_U)
    if len(taken) != len(candidates) or not taken["sample_id"].equals(candidates["sample_id"]):
        raise VerificationError(f"{path} has other samples than the score tables; remove it, and score again")
    return as_members(taken, groups)


def _places(table: pa.Table) -> NDArray[np.int64]:
    shard, row = (table[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
    place: NDArray[np.int64] = (shard << 32) + row
    return place
