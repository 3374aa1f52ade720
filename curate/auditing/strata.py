"""The ratio with a confounder held fixed, beside the crude one: Mantel-Haenszel over declared strata.

"Explained by caption length" tells where a disparity comes from; it does not excuse it. A reversal (Simpson's) shows as
a crude and a conditional interval on opposite sides of 1. Strata with an empty side, or with all or none selected, say
nothing and are left out; `covered` tells the share of the group's rows that remain.
Sources: Greenland and Robins 1985 (doi 10.2307/2530643) for ratio and interval, Mantel and Haenszel 1959 for the test,
Woolf 1955 for homogeneity, all on votes (`clusters_as_units`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from curate.auditing.disparity import comparable
from curate.auditing.membership import Membership
from curate.auditing.rates import Counts, count
from curate.evaluation.interval import Z95

# S strata, G groups, N rows of the pool, M pairs of a row and a group

Explains = Literal["no", "yes", "in part", "reversed", "undecided"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two rates and the limits of its 95 % interval; infinite where the rest has none selected."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Conditional:
    """A group's ratio within the strata of one confounder.

    `p` tests whether it is 1, `homogeneity_p` whether it is the same in every stratum (None below two).
    `explains`, whether the confounder could explain the crude ratio, by the logarithms: "no" where more than half of it
    remains and the interval leaves out 1, "in part" where less does, "yes" where less does and the interval holds 1.
    Where none was selected, with the confounder held fixed as without, it is "no" if the interval leaves out 1.
    """

    confounder: str
    ratio: Ratio | None
    p: float | None
    homogeneity_p: float | None
    strata: int
    covered: float
    explains: Explains


def by_stratum(
    column: Membership,
    stratum_N: NDArray[np.intp],
    selected_N: NDArray[np.bool_],
    weight_N: NDArray[np.float64] | None = None,
    weight_M: NDArray[np.float64] | None = None,
) -> Counts:
    """The counts of `rates.count` within each stratum [S, G]; stratum_N numbers them from 0."""
    parts = []
    for stratum in range(int(stratum_N.max()) + 1):
        inside_N = stratum_N == stratum
        inside_M = inside_N[column.row_M]
        part = Membership(
            column.column, column.groups, column.row_M[inside_M], column.code_M[inside_M],
            column.known_N & inside_N, column.unknown,
        )  # fmt: skip
        own_M = None if weight_M is None else weight_M[inside_M]
        parts.append(count(part, selected_N, weight_N, own_M))
    return Counts(
        *(np.stack([getattr(part, name) for part in parts]) for name in ("k_G", "n_G", "rest_k_G", "rest_n_G"))
    )


def conditional(confounder: str, strata_S: Counts, crude: Ratio | None) -> Conditional:
    """What holding the strata of one group [S] fixed makes of its crude ratio.

    Example: 81 of 87 and 192 of 263 against 234 of 270 and 55 of 80 (kidney stones, small and large) have a crude ratio
    of 0.94 and a conditional one of 1.07.
    """
    say_S = comparable(strata_S)
    k, n, c, m = (x[say_S] for x in (strata_S.k_G, strata_S.n_G, strata_S.rest_k_G, strata_S.rest_n_G))
    covered = float(n.sum() / strata_S.n_G.sum()) if strata_S.n_G.sum() else 0.0
    ratio = _mantel_haenszel(k, n, c, m) if len(k) else None
    p = _cochran(k, n, c, m) if len(k) else None
    alike = _woolf(k, n, c, m) if len(k) > 1 else None
    return Conditional(confounder, ratio, p, alike, len(k), covered, _explains(crude, ratio))


def _mantel_haenszel(
    k: NDArray[np.float64], n: NDArray[np.float64], c: NDArray[np.float64], m: NDArray[np.float64]
) -> Ratio:
    total = n + m
    none, others_none = not k.any(), not c.any()
    if none:  # half a row of the side without any, spread over its strata, for the limits only: as in the crude ratio
        k = 0.5 * n / n.sum()
    if others_none:
        c = 0.5 * m / m.sum()
    above, below = float((k * m / total).sum()), float((c * n / total).sum())
    variance = float(((n * m * (k + c) - k * c * total) / total**2).sum()) / (above * below)
    half = Z95 * np.sqrt(max(0.0, variance))
    value, reach = above / below, float(np.exp(half))
    if none or others_none:
        return Ratio(0.0, 0.0, value * reach) if none else Ratio(np.inf, value / reach, np.inf)
    return Ratio(value, value / reach, value * reach)


def _cochran(
    k: NDArray[np.float64], n: NDArray[np.float64], c: NDArray[np.float64], m: NDArray[np.float64]
) -> float | None:
    total, drawn = n + m, k + c
    away = abs(float((k - n * drawn / total).sum()))
    variance = float((n * m * drawn * (total - drawn) / (total**2 * np.maximum(total - 1, 1))).sum())
    return float(stats.chi2.sf(max(0.0, away - 0.5) ** 2 / variance, 1)) if variance else None


def _woolf(k: NDArray[np.float64], n: NDArray[np.float64], c: NDArray[np.float64], m: NDArray[np.float64]) -> float:
    edge = (k <= 0) | (c <= 0) | ((k >= n) & (c >= m))
    k, n, c, m = (np.where(edge, x + half, x) for x, half in ((k, 0.5), (n, 1.0), (c, 0.5), (m, 1.0)))
    log_ratio = np.log(k / n) - np.log(c / m)
    weight = 1 / np.maximum(1 / k - 1 / n + 1 / c - 1 / m, 1e-12)
    spread = float((weight * (log_ratio - (weight * log_ratio).sum() / weight.sum()) ** 2).sum())
    return float(stats.chi2.sf(spread, len(k) - 1))


def _explains(crude: Ratio | None, held: Ratio | None) -> Explains:
    if crude is None or held is None:
        return "undecided"
    if not 0 < crude.value < np.inf or not 0 < held.value < np.inf:  # none selected, here or there
        return "no" if held.value == crude.value and (held.low > 1 or held.high < 1) else "undecided"
    was, still = np.log(crude.value), np.log(held.value)
    if held.low > 1 or held.high < 1:
        if was * still < 0:
            return "reversed" if crude.low > 1 or crude.high < 1 else "no"
        return "no" if abs(still) > abs(was) / 2 else "in part"
    return "yes" if was * still <= 0 or abs(still) <= abs(was) / 2 else "undecided"
