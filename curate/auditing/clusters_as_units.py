"""Near-duplicates are not independent: a cluster of them votes as often as its rows were treated apart.

Copies are kept or dropped together, so a test that counts rows believes in more evidence than there is (it flags 14 of
40 groups that nothing happened to). Here a cluster of c rows has c / (1 + (c - 1) rho) votes, shared among its rows:
one if its rows always fare alike (rho = 1), c if they fare like strangers (rho = 0). Votes are scaled so that the
variance of a group's rate under chance is the binomial one, also where groups share clusters: every test and interval
takes votes as it would take rows, and where nothing is correlated nothing is lost. rho is the correlation of
"selected" within clusters, every cluster counting once, at its upper 95 % limit; at least 30 clusters say it for a
group, else the pool's is taken, and below 30 in the pool rho is 1. Cost: a sort of the rows that have duplicates.
Source of the design effect: Rao and Scott 1992, doi 10.2307/2532311; Donner and Klar 2000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.auditing.membership import Membership
from curate.errors import UsageError

# N rows of the pool, M pairs of a row and a group, G groups

FEWEST_CLUSTERS: Final = 30
_Z_UPPER: Final = 1.6448536269514722  # 95 % of a normal variable lies below


@dataclass(frozen=True, slots=True)
class Clusters:
    """The duplicate clusters of a pool: a number per row, its cluster's size, its votes, and how alike copies fared.

    `repeated` counts the clusters of two rows or more.
    """

    cluster_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    weight_N: NDArray[np.float64]
    rho: float
    repeated: int


def read_clusters(given_N: ArrayLike, selected_N: NDArray[np.bool_]) -> Clusters:
    """The clusters of a pool: rows with the same number are duplicates, a negative number is a row on its own.

    Errors: UsageError unless there is one whole number per row.
    Example: clusters 7, 7, -1 with the first two selected have sizes 2, 2, 1, rho 1 and weights 0.5, 0.5, 1.
    """
    number_N = np.asarray(given_N)
    if number_N.shape != selected_N.shape or number_N.dtype.kind not in "iu":
        raise UsageError(f"clusters are one whole number per row: {len(selected_N):,} of them, negative for no cluster")
    alone_N = number_N < 0
    _, cluster_N = np.unique(np.where(alone_N, -1 - np.arange(len(number_N)), number_N), return_inverse=True)
    size_N = np.bincount(cluster_N)[cluster_N]
    twin = np.flatnonzero(size_N > 1)
    upper, repeated = _alike(selected_N[twin], cluster_N[twin], np.zeros(len(twin), np.int64), 1)
    rho = float(upper[0]) if repeated[0] >= FEWEST_CLUSTERS else 1.0
    return Clusters(cluster_N, size_N, 1 / (1 + (size_N - 1) * rho), rho, int(repeated[0]))


def votes(clusters: Clusters, column: Membership, selected_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Votes per pair [M] of a column: a row's own in the pool, scaled to what the group's rows are worth together.

    Two groups may share clusters, so a group's rate weighs its rows as the rest's does: else a label that has nothing
    to do with the selection would be flagged wherever large clusters fare otherwise than small ones. How much such a
    rate tells follows from its variance, sum w^2 m (1 + (m - 1) rho) over the group's m rows in each cluster.
    A group whose own clusters were treated more alike than the pool's, as 30 of them show, is given its own rho.
    """
    twin_M = clusters.size_N[column.row_M] > 1
    row, code, G = column.row_M[twin_M], column.code_M[twin_M], len(column.groups)
    upper_G, repeated_G = _alike(selected_N[row], clusters.cluster_N[row], code, G)
    own_G = np.where(repeated_G >= FEWEST_CLUSTERS, np.maximum(upper_G, clusters.rho), clusters.rho)
    _, cell, size = np.unique(clusters.cluster_N[row] * G + code, return_inverse=True, return_counts=True)
    spread_M = np.ones(len(twin_M))
    spread_M[twin_M] = 1 + (size[cell] - 1) * own_G[code]
    weight_M = clusters.weight_N[column.row_M]
    variance_G = column.tally(weight_M**2 * spread_M)
    worth_G = np.divide(column.tally(weight_M), variance_G, out=np.ones(G), where=variance_G > 0)
    return np.asarray(weight_M * worth_G[column.code_M], np.float64)


def _alike(
    chosen_M: NDArray[np.bool_], cluster_M: NDArray[np.int64], code_M: NDArray[Any], G: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The upper limit of rho per group [G], and of how many clusters: (P(two rows selected) - p^2) / (p - p^2)."""
    found, cell, size = np.unique(cluster_M * G + code_M, return_inverse=True, return_counts=True)
    kept = np.bincount(cell, chosen_M, minlength=len(found))
    kept, size, code = kept[size > 1], size[size > 1], (found % G)[size > 1]
    C_G = np.bincount(code, minlength=G)
    both, own = kept * (kept - 1) / (size * (size - 1)), kept / size
    with np.errstate(divide="ignore", invalid="ignore"):
        both_G, p_G = (np.bincount(code, x, minlength=G) / C_G for x in (both, own))
        spread_G = p_G - p_G**2
        rho_G = (both_G - p_G**2) / spread_G
        slope_G = -2 * p_G - rho_G * (1 - 2 * p_G)
        pull = (both - both_G[code]) + slope_G[code] * (own - p_G[code])  # linearised, Taylor
        error_G = np.sqrt(np.bincount(code, pull**2, minlength=G)) / (C_G * spread_G)
        upper_G = np.clip(rho_G + _Z_UPPER * error_G, 0, 1)
    return np.where(np.isnan(upper_G), 1.0, upper_G), C_G  # all or none selected: nothing says that they differ
