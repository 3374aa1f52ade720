"""Did the selection tie a group and a concept together, or loosen them: the change of their odds ratio.

"doctor" and "she" may each be kept at the rate of the rest, and their pairs dropped. The odds ratio of (group, concept)
in the selection over that in the pool is r11 r00 / (r10 r01), r the four cells' selection rates: above 1 the two are
more associated after selection. Its logarithm is near normal with variance sum (1/k - 1/n) over the cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from curate.auditing.disparity import FEWEST_EXPECTED
from curate.auditing.families import adjust
from curate.auditing.membership import Membership
from curate.auditing.strata import Ratio
from curate.evaluation.interval import Z95

# N rows of the pool, M pairs of a row and a group, G groups


@dataclass(frozen=True, slots=True)
class Association:
    """How often a group and a concept occur together, and how the selection changed their odds ratio.

    `pool_odds_ratio` is None where a cell of the pool is empty. `q` is within the family of all pairs of the audit.
    """

    column: str
    group: str
    concept: str
    pool_together: int
    selected_together: int
    pool_odds_ratio: float | None
    change: Ratio | None
    p: float | None
    q: float | None


def associations(
    column: Membership,
    concepts: Mapping[str, NDArray[np.bool_]],
    selected_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64],
) -> list[Association]:
    """Each known group with each concept, q still None (`with_q` fills it in, over all columns).

    Two sums over the pairs of the column for each concept.
    """
    groups = len(column.groups) - (column.unknown is not None)
    return [
        one
        for name, concept_N in concepts.items()
        for one in _of_concept(column, groups, name, concept_N, selected_N, weight_N)
    ]


def with_q(found: list[Association]) -> tuple[Association, ...]:
    """The same with q over all of them, and in order of q."""
    q_T = adjust(np.array([np.nan if one.p is None else one.p for one in found], dtype=float))
    full = [
        Association(
            one.column, one.group, one.concept, one.pool_together, one.selected_together, one.pool_odds_ratio,
            one.change, one.p, None if np.isnan(q) else float(q),
        )
        for one, q in zip(found, q_T, strict=True)
    ]  # fmt: skip
    return tuple(sorted(full, key=lambda one: (one.q is None, one.q or 0.0, one.column, one.group, one.concept)))


def _of_concept(
    column: Membership,
    groups: int,
    concept: str,
    concept_N: NDArray[np.bool_],
    selected_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64],
) -> list[Association]:
    n_4G, k_4G = (_cells(column, concept_N, w)[:, :groups] for w in (weight_N, weight_N * selected_N))
    both_G, kept_G = (
        column.tally((concept_N & mask_N)[column.row_M])[:groups].astype(int)
        for mask_N in (np.ones(len(concept_N), bool), selected_N)
    )
    found = []
    for code in range(groups):
        n_4 = n_4G[:, code]
        change, p = _change(n_4, k_4G[:, code])
        odds = None if n_4.min() <= 0 else float(n_4[3] * n_4[0] / (n_4[1] * n_4[2]))
        counts = int(both_G[code]), int(kept_G[code])
        found.append(Association(column.column.name, column.groups[code], concept, *counts, odds, change, p, None))
    return found


def _cells(column: Membership, concept_N: NDArray[np.bool_], weight_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Summed weights [4, G] of the known rows: without both, the concept alone, the group alone, with both."""
    known_N = weight_N * column.known_N
    whole_G, both_G = (column.tally(w[column.row_M]) for w in (known_N, known_N * concept_N))
    concept, everything = float((known_N * concept_N).sum()), float(known_N.sum())
    cells_4G = np.stack([everything - concept - whole_G + both_G, concept - both_G, whole_G - both_G, both_G])
    return np.where(np.abs(cells_4G) < 1e-9 * everything, 0.0, cells_4G)  # what differences of sums leave of zero


def _change(n_4: NDArray[np.float64], k_4: NDArray[np.float64]) -> tuple[Ratio | None, float | None]:
    share = k_4.sum() / max(1.0, n_4.sum())
    if n_4.min() * min(share, 1 - share) < FEWEST_EXPECTED:  # the interval is one of large numbers
        return None, None
    if k_4.min() <= 0 or (k_4 >= n_4).any():  # half a row on each count of the selection and of what was left
        k_4, n_4 = k_4 + 0.5, n_4 + 1
    log_4 = np.log(k_4 / n_4)
    change = log_4[3] + log_4[0] - log_4[1] - log_4[2]
    error = float(np.sqrt((1 / k_4 - 1 / n_4).sum()))
    if not error:
        return None, None
    low, high = np.exp(change - Z95 * error), np.exp(change + Z95 * error)
    return Ratio(float(np.exp(change)), float(low), float(high)), float(2 * stats.norm.sf(abs(change) / error))
