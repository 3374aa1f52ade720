"""How many of each group the pool has and the selection kept, beside the rest: the counts that all tests start from.

The rest of a group is every *labelled* row outside it, so an unknown share shifts no comparison between known groups.
Rates carry Wilson's interval at the number of votes (`clusters_as_units`): the number of rows where none are copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.auditing.membership import Membership
from curate.evaluation.interval import Share, wilson

# N rows of the pool, M pairs of a row and a group, G groups; counts are float64, as votes need not be whole


@dataclass(frozen=True, slots=True)
class Counts:
    """Of n_G in the pool k_G were selected; of the rest_n_G others, rest_k_G. Any shape that broadcasts."""

    k_G: NDArray[np.float64]
    n_G: NDArray[np.float64]
    rest_k_G: NDArray[np.float64]
    rest_n_G: NDArray[np.float64]


def count(
    column: Membership,
    selected_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64] | None = None,
    weight_M: NDArray[np.float64] | None = None,
) -> Counts:
    """Counts per group; the group's rows weigh weight_M, the rest's weight_N, both 1 if None."""
    known_N = column.known_N.astype(np.float64) if weight_N is None else weight_N * column.known_N
    chosen_N = known_N * selected_N
    own_M = np.ones(len(column.row_M)) if weight_M is None else weight_M
    return Counts(
        k_G=column.tally(own_M * selected_N[column.row_M]),
        n_G=column.tally(own_M),
        rest_k_G=_clean(chosen_N.sum() - column.tally(chosen_N[column.row_M])),
        rest_n_G=_clean(known_N.sum() - column.tally(known_N[column.row_M])),
    )


def _clean(count_G: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(np.abs(count_G) < 1e-6, 0.0, count_G)  # differences of sums of votes end near 0, not on it


def rate(selected: int, pool: int, votes: float) -> Share | None:
    """The share of a group that was selected, its limits those of Wilson at that many votes; None for an empty group.

    Example: `rate(20, 100, 100)` is 0.2, between 0.133 and 0.289; at 25 votes, between 0.089 and 0.391.
    """
    if not pool:
        return None
    of = max(1, round(votes))
    limits = wilson(min(of, round(of * selected / pool)), of)
    value = selected / pool
    return Share(value, min(value, limits.low), max(value, limits.high))
