"""Is a group kept at another rate than the rest, by how much, and is that much: test, ratio, interval and level.

The test conditions on what the sampler fixed, how many it drew. Fisher's is exact where an expected count is below 5;
else the G-test with Yates's correction: uncorrected tests are too eager by two or three times at the levels that a
family of 40 leaves to one group (0.00125), and G sees missing rows better than Pearson's sum does. 0.8 to 1.25 is a
*screening* range, not a legal test.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from curate.auditing.rates import Counts
from curate.evaluation.interval import Z95

# G groups, or any shape

SCREEN: Final = (0.8, 1.25)
FEWEST_EXPECTED: Final = 5.0

Level = Literal["untested", "not detected", "detected", "detected and large", "confidently large"]


def comparable(counts: Counts) -> NDArray[np.bool_]:
    """Where a test makes sense: rows on both sides, some selected and some not."""
    n_G, rest_n_G = np.broadcast_arrays(counts.n_G, counts.rest_n_G)
    K_G, N_G = counts.k_G + counts.rest_k_G, n_G + rest_n_G
    comparable_G: NDArray[np.bool_] = (n_G > 0) & (rest_n_G > 0) & (K_G > 0) & (K_G < N_G)
    return comparable_G


def small(counts: Counts) -> NDArray[np.bool_]:
    """Where an expected count is below 5, and Fisher's test is used."""
    small_G: NDArray[np.bool_] = _expected(counts).min(axis=0) < FEWEST_EXPECTED
    return small_G


def p_values(counts: Counts) -> NDArray[np.float64]:
    """Two-sided p per group, NaN where nothing can be compared. Votes that are not whole are rounded for Fisher's.

    Example: 10 of 100 against 90 of 300 gives G = 17.7 corrected for continuity, p = 0.000026.
    """
    table_4G = np.stack(np.broadcast_arrays(counts.k_G, counts.n_G, counts.rest_k_G, counts.rest_n_G)).astype(float)
    p_G = np.full(table_4G.shape[1:], np.nan)
    ask_G = comparable(Counts(*table_4G))
    few_G = ask_G & small(Counts(*table_4G))
    p_G[few_G] = [_fisher(*(round(float(x)) for x in column)) for column in table_4G[:, few_G].T]
    many_G = ask_G & ~few_G
    if many_G.any():
        p_G[many_G] = _g_test(Counts(*table_4G[:, many_G]))
    return p_G


def _expected(counts: Counts) -> NDArray[np.float64]:
    K_G, N_G = counts.k_G + counts.rest_k_G, counts.n_G + counts.rest_n_G
    with np.errstate(divide="ignore", invalid="ignore"):
        share_G = K_G / N_G
    shares = (counts.n_G * share_G, counts.n_G * (1 - share_G))
    return np.stack([*shares, counts.rest_n_G * share_G, counts.rest_n_G * (1 - share_G)])


def _g_test(counts: Counts) -> NDArray[np.float64]:
    observed_4G = np.stack([counts.k_G, counts.n_G - counts.k_G, counts.rest_k_G, counts.rest_n_G - counts.rest_k_G])
    expected_4G = _expected(counts)
    gap_4G = expected_4G - observed_4G
    observed_4G = observed_4G + np.sign(gap_4G) * np.minimum(0.5, np.abs(gap_4G))  # Yates, as scipy's tables do
    found = stats.power_divergence(observed_4G, expected_4G, ddof=2, axis=0, lambda_="log-likelihood")
    p_G: NDArray[np.float64] = found.pvalue
    return p_G


@lru_cache(maxsize=65536)
def _fisher(k: int, n: int, rest_k: int, rest_n: int) -> float:
    k, rest_k = min(k, n), min(rest_k, rest_n)
    return float(stats.fisher_exact([[k, n - k], [rest_k, rest_n - rest_k]]).pvalue)


def ratios(counts: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The rate over the rest's rate and its 95 % limits on the log scale; infinite where the rest has none selected.

    Where a side has none selected both sides get half a row more on each count, for the limits only; a side with all
    selected is half a row uncertain: one row of one says little. NaN where not comparable.
    Source: Katz et al. 1978, doi 10.2307/2530610. Example: 10 of 100 against 90 of 300 is 0.333 (0.181 to 0.615).
    """
    k, n, rest_k, rest_n = np.broadcast_arrays(counts.k_G, counts.n_G, counts.rest_k_G, counts.rest_n_G)
    none = (k <= 0) | (rest_k <= 0)
    a, b, c, d = (np.where(none, x + 0.5, x) for x in (k, n, rest_k, rest_n))
    sure_a, sure_c = (
        np.where(x >= y, np.maximum(z - 0.5, z / 2), w) for x, y, z, w in ((k, n, b, a), (rest_k, rest_n, d, c))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (k / n) / (rest_k / rest_n)
        centre = np.log((a / b) / (c / d))
        half = Z95 * np.sqrt(np.maximum(0.0, 1 / sure_a - 1 / b + 1 / sure_c - 1 / d))
        low, high = np.exp(centre - half), np.exp(centre + half)
    low, high = np.where(k <= 0, 0.0, low), np.where(rest_k <= 0, np.inf, high)
    return tuple(np.where(comparable(counts), x, np.nan) for x in (value, low, high))  # type: ignore[return-value]


def cohens_h(counts: Counts) -> NDArray[np.float64]:
    """The difference of the rates' arcsines: 0.2 is small, 0.5 medium, 0.8 large; NaN for an empty side.

    Source: Cohen 1988, chapter 6. Example: 0.1 against 0.3 is -0.516.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        own, rest = counts.k_G / counts.n_G, counts.rest_k_G / counts.rest_n_G
    turns = (np.arcsin(np.sqrt(np.clip(one, 0, 1))) for one in (own, rest))
    h_G: NDArray[np.float64] = 2 * (next(turns) - next(turns))
    return h_G


def level_of(q: float, ratio: float, low: float, high: float, alpha: float, screen: tuple[float, float]) -> Level:
    """Detected: q at most alpha. Large: and the ratio outside `screen`. Confidently large: and the interval as well."""
    if np.isnan(q):
        return "untested"
    if q > alpha:
        return "not detected"
    if high < screen[0] or low > screen[1]:
        return "confidently large"
    return "detected and large" if not screen[0] <= ratio <= screen[1] else "detected"


def whole(value: Any) -> float | None:
    """A number of an array as a float, None for NaN."""
    return None if np.isnan(value) else float(value)
