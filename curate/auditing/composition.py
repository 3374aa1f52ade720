"""How far the selection's mix of groups is from the pool's: total variation and Jensen-Shannon, with intervals.

Both are above 0 even for a random selection, the more so the smaller it is, so that value stands beside them:
`by_chance`, the mean over seeded random selections of the same size. Intervals are percentiles of a seeded bootstrap of
votes, less its bias (a draw of many small groups is farther from the pool than the selection it is drawn from, which
would leave the value outside): 1000 multinomial draws of the table (group, selected), a few milliseconds per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon

# G groups, R draws

DRAWS: Final = 1000


@dataclass(frozen=True, slots=True)
class Shift:
    """A distance from 0 (the same mix) to 1 (no group in common), its 95 % interval, and what chance alone makes."""

    value: float
    low: float
    high: float
    by_chance: float


@dataclass(frozen=True, slots=True)
class Composition:
    """Total variation: the share of the selection that would have to change groups. Jensen-Shannon divergence: bits."""

    total_variation: Shift
    jensen_shannon: Shift


def composition(n_G: NDArray[np.float64], k_G: NDArray[np.float64], *, seed: int) -> Composition | None:
    """The shift from pool counts n to selected counts k (votes) of groups that exclude each other; None without any.

    Example: (50, 50) to (30, 10) has total variation 0.25 and Jensen-Shannon divergence 0.049.
    """
    if k_G.sum() < 1 or n_G.sum() < 1:
        return None
    random = np.random.Generator(np.random.Philox(key=seed))
    rows = round(float(n_G.sum()))
    cell = np.concatenate([k_G, np.maximum(0.0, n_G - k_G)])
    drawn = random.multinomial(rows, cell / cell.sum(), size=DRAWS)
    k_RG, left_RG = drawn[:, : len(n_G)].astype(float), drawn[:, len(n_G) :]
    pool_G = np.round(n_G).astype(np.int64)
    chosen = min(round(float(k_G.sum())), int(pool_G.sum()))
    chance_RG = random.multivariate_hypergeometric(pool_G, chosen, size=DRAWS, method="marginals").astype(float)
    real_R = k_RG.sum(1) > 0
    pairs = [(n_G[None], k_G[None]), ((k_RG + left_RG)[real_R], k_RG[real_R]), (n_G[None], chance_RG)]
    return Composition(*(_shift(*(distance(n, k) for n, k in pairs)) for distance in (_variation, _divergence)))


def _shift(value: NDArray[np.float64], spread_R: NDArray[np.float64], chance_R: NDArray[np.float64]) -> Shift:
    bias = float(spread_R.mean()) - float(value[0])
    low, high = np.clip(np.quantile(spread_R, [0.025, 0.975]) - bias, 0.0, 1.0)
    return Shift(float(value[0]), float(low), float(high), float(np.nanmean(chance_R)))


def _variation(n_RG: NDArray[np.float64], k_RG: NDArray[np.float64]) -> NDArray[np.float64]:
    gap_RG = n_RG / n_RG.sum(1, keepdims=True) - k_RG / np.maximum(k_RG.sum(1, keepdims=True), 1)
    variation_R: NDArray[np.float64] = np.abs(gap_RG).sum(1) / 2
    return variation_R


def _divergence(n_RG: NDArray[np.float64], k_RG: NDArray[np.float64]) -> NDArray[np.float64]:
    n_RG = np.broadcast_to(n_RG, k_RG.shape)
    distance_R = np.asarray(jensenshannon(n_RG, k_RG, base=2, axis=1), dtype=np.float64)
    divergence_R: NDArray[np.float64] = np.nan_to_num(distance_R) ** 2
    return divergence_R
