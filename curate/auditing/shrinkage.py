"""Rates of small groups, pulled to what the column's groups are like: 1 of 2 stays visible, and is not news.

The groups' rates are taken for draws of a beta distribution, fitted by maximum likelihood (beta-binomial counts); a
group's rate is then the mean of its posterior, its interval the middle 95 %.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from curate.evaluation.interval import Share

# G groups

_STRONGEST: Final = 1e6  # rows that the prior is worth, at most: the groups' rates do not differ at all


def shrunken(k_G: NDArray[np.float64], n_G: NDArray[np.float64]) -> tuple[Share, ...] | None:
    """The shrunken rate of every group; None where fewer than three groups have rows: nothing to learn a prior from.

    Example: with 20 of 100 in each of nine groups, 2 of 2 in a tenth becomes 0.23 or so instead of 1.
    """
    there_G = n_G > 0
    if there_G.sum() < 3:
        return None
    k, n = np.round(k_G[there_G]), np.round(n_G[there_G])
    k, n = np.minimum(k, n), np.maximum(n, 1)
    mean = float((k.sum() + 0.5) / (n.sum() + 1))

    def unlikely(guess: NDArray[np.float64]) -> float:
        centre, strength = 1 / (1 + np.exp(-guess[0])), np.exp(guess[1])
        return -float(stats.betabinom.logpmf(k, n, centre * strength, (1 - centre) * strength).sum())

    limits = [(-14.0, 14.0), (np.log(0.1), np.log(_STRONGEST))]
    start = np.array([np.log(mean / (1 - mean)), np.log(50.0)])
    found = optimize.minimize(unlikely, start, method="L-BFGS-B", bounds=limits)
    centre, strength = 1 / (1 + np.exp(-found.x[0])), np.exp(found.x[1])
    return tuple(
        _posterior(centre * strength, (1 - centre) * strength, k_, n_) for k_, n_ in zip(k_G, n_G, strict=True)
    )


def _posterior(a: float, b: float, k: float, n: float) -> Share:
    low, high = stats.beta.ppf([0.025, 0.975], a + k, b + max(0.0, n - k))
    return Share(float((a + k) / (a + b + n)), float(low), float(high))
