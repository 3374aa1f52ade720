"""What only a joint selection has: rows drawn several times, and early sub-batches against late ones.

Exposures (times selected) and unique examples answer different questions: a group may keep its rows and still be seen
half as often. Early against late compares the group's share of the sub-batches before and after the middle one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curate.auditing.disparity import p_values, ratios, whole
from curate.auditing.families import adjust
from curate.auditing.membership import Membership
from curate.auditing.rates import count
from curate.auditing.strata import Ratio

# N rows of the pool, G groups


@dataclass(frozen=True, slots=True)
class Exposures:
    """How often a group's rows were drawn: in all, as a share of all draws, and per unique example selected."""

    exposures: int
    share: float
    per_selected: float | None


@dataclass(frozen=True, slots=True)
class EarlyLate:
    """Of the selected rows of a group, how many came before and after the middle; the ratio is late to early.

    Above 1: the group is chosen more as training goes on. `q` is within the column.
    """

    early: int
    late: int
    ratio: Ratio | None
    p: float | None
    q: float | None


def exposures(column: Membership, times_N: NDArray[np.int64]) -> tuple[Exposures, ...]:
    """Per group. Example: a group whose two selected rows were drawn 1 and 3 times, of 8 draws: 4, 0.5 and 2.0."""
    drawn_G = column.tally(times_N[column.row_M])
    unique_G = column.tally(times_N[column.row_M] > 0)
    total = int(times_N.sum())
    return tuple(
        Exposures(int(drawn), float(drawn / total) if total else 0.0, float(drawn / unique) if unique else None)
        for drawn, unique in zip(drawn_G, unique_G, strict=True)
    )


def early_and_late(
    column: Membership, sub_batch_N: NDArray[np.int64], chosen_N: NDArray[np.bool_]
) -> tuple[EarlyLate, ...]:
    """Per group; `sub_batch_N` is the number of the sub-batch that first drew a row, read where it was chosen.

    Early sub-batches are those with a number below the middle of the first and the last. Rows of one sub-batch count as
    independent: the joint draw makes them somewhat alike, so read p near 0.05 with care.
    """
    numbers = sub_batch_N[chosen_N]
    middle = (int(numbers.min()) + int(numbers.max()) + 1) / 2 if len(numbers) else 0.0
    late_N = chosen_N & (sub_batch_N >= middle)
    one_N = chosen_N.astype(np.float64)
    counts = count(column, late_N, one_N, one_N[column.row_M])
    p_G = p_values(counts)
    three_G3, q_G = np.stack(ratios(counts), axis=1), adjust(p_G)
    return tuple(
        EarlyLate(int(n - k), int(k), None if np.isnan(p) else Ratio(*three.tolist()), whole(p), whole(q))
        for n, k, three, p, q in zip(counts.n_G, counts.k_G, three_G3, p_G, q_G, strict=True)
    )
