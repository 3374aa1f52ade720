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

from curate.audit.disparity import FEWEST_EXPECTED
from curate.audit.families import adjust
from curate.audit.membership import Membership
from curate.audit.strata import Ratio
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
    """Each known group with each concept, q still None (`with_q` fills it in, over all columns)."""
    known = range(len(column.groups) - (column.unknown is not None))
    return [
        _pair(column, code, name, concept_N, selected_N, weight_N)
        for name, concept_N in concepts.items()
        for code in known
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


def _pair(
    column: Membership,
    code: int,
    concept: str,
    concept_N: NDArray[np.bool_],
    selected_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64],
) -> Association:
    member_N = np.zeros(len(selected_N), bool)
    member_N[column.row_M[column.code_M == code]] = True
    cell_N = (2 * member_N + concept_N)[column.known_N]
    weight, chosen = weight_N[column.known_N], selected_N[column.known_N]
    n_4, k_4 = (np.bincount(cell_N, w, minlength=4).astype(np.float64) for w in (weight, weight * chosen))
    together_N = member_N & concept_N
    change, p = _change(n_4, k_4)
    odds = None if n_4.min() <= 0 else float(n_4[3] * n_4[0] / (n_4[1] * n_4[2]))
    counts = int(together_N.sum()), int((together_N & selected_N).sum())
    return Association(column.column.name, column.groups[code], concept, *counts, odds, change, p, None)


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
