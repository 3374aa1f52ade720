"""What an audit could have seen: the minimum detectable ratio (MDR) of a group, so that silence is read with its reach.

Definition: the ratio below 1 (and above 1) nearest to 1 at which a disparity of this group *alone* is flagged with
80 % probability. Alone, because Benjamini-Hochberg then asks p <= alpha / m of it, m the tests of the family. The
probability is exact: given how many the sampler drew, the group's count follows Fisher's noncentral hypergeometric
distribution. In a family of 20 at rate 0.2 and a large pool a group of 100 has 0.32 and one of 1000 has 0.76; a group
so small that not even "none selected" is flagged has none. Cost: about a millisecond per group of 1000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from curate.auditing.disparity import p_values
from curate.auditing.rates import Counts

POWER: Final = 0.8
_LARGEST: Final = 1e6  # a ratio; beyond it the search ends


@dataclass(frozen=True, slots=True)
class Reach:
    """The ratios that could have been seen: at most `below`, at least `above`; None where no ratio could."""

    below: float | None
    above: float | None


def reach(n: float, rest_n: float, drawn: float, *, level: float, power: float = POWER) -> Reach:
    """The reach of a test of `n` rows (votes) against `rest_n` others of which `drawn` in all were selected.

    Votes are rounded down. `level` is the p that a lone disparity needs.
    Example: `reach(1000, 99_000, 20_000, level=0.05 / 20)` is below 0.763 and above 1.258.
    """
    n_1, rest_n_1, drawn_1 = (np.array([float(x)]) for x in (n, rest_n, drawn))
    return reaches(Counts(drawn_1, n_1, np.zeros(1), rest_n_1), level=level, power=power)[0]


def reaches(counts: Counts, *, level: float, power: float = POWER) -> tuple[Reach, ...]:
    """The reach of every group [G]; of the selected only the sum with the rest's matters."""
    n_G, rest_G = np.floor(counts.n_G), np.floor(counts.rest_n_G)
    drawn_G = np.minimum(np.round(counts.k_G + counts.rest_k_G), n_G + rest_G)
    middle_G = n_G * drawn_G / np.maximum(n_G + rest_G, 1)
    least_G, most_G = np.maximum(0.0, drawn_G - rest_G), np.minimum(n_G, drawn_G)
    margins = (n_G, rest_G, drawn_G)
    low_G = _critical(least_G, np.floor(middle_G), margins, level)
    high_G = _critical(most_G, np.ceil(middle_G), margins, level)
    ends = np.stack([*margins, least_G, low_G, high_G, most_G], axis=1).tolist()
    return tuple(
        Reach(_solve(at, least, low, below=True, power=power), _solve(at, high, most, below=False, power=power))
        for *at, least, low, high, most in ends
    )


def _critical(
    extreme_G: NDArray[np.float64],
    middle_G: NDArray[np.float64],
    margins: tuple[NDArray[np.float64], ...],
    level: float,
) -> NDArray[np.float64]:
    """The count nearest to the middle that is flagged, searched by halving; NaN if not even the extreme one is."""
    n_G, rest_G, drawn_G = margins

    def flagged(k_G: NDArray[np.float64]) -> NDArray[np.bool_]:
        hit_G: NDArray[np.bool_] = p_values(Counts(k_G, n_G, drawn_G - k_G, rest_G)) <= level
        return hit_G

    seen_G, yes_G, no_G = flagged(extreme_G), extreme_G, middle_G
    while (open_G := seen_G & (np.abs(yes_G - no_G) > 1)).any():
        half_G = np.floor((yes_G + no_G) / 2)
        hit_G = flagged(half_G)
        yes_G, no_G = np.where(open_G & hit_G, half_G, yes_G), np.where(open_G & ~hit_G, half_G, no_G)
    return np.where(seen_G, yes_G, np.nan)


def _solve(margins: Sequence[float], first: float, last: float, *, below: bool, power: float) -> float | None:
    """The ratio at which the flagged counts, `first` to `last`, have that probability; None without any."""
    if math.isnan(first) or math.isnan(last):
        return None
    n, rest, drawn = margins
    k, base = _support(n, rest, drawn, first, below=below)
    inside = (k >= first) & (k <= last)

    def missing(log_ratio: float) -> float:
        logits = base + k * _log_odds_ratio(math.exp(log_ratio), n, rest, drawn)
        weight = np.exp(logits - logits.max())
        return float(weight[inside].sum() / weight.sum()) - power

    far = math.log(1 / _LARGEST) if below else math.log(_most_ratio(n, rest, drawn))
    if missing(far) < 0:
        return None
    return math.exp(optimize.brentq(missing, *sorted((far, 0.0)), xtol=1e-6)) if missing(0.0) < 0 else 1.0


def _support(
    n: float, rest: float, drawn: float, flagged: float, *, below: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The counts that matter, from the middle (and `flagged`, above it) outwards, and their log weights at ratio 1."""
    expected = n * drawn / (n + rest)
    margin = math.ceil(12 * math.sqrt(expected) + 12)
    least, most = max(0, drawn - rest), min(n, drawn)
    first = least if below else max(least, min(math.floor(expected) - margin, flagged))
    last = min(most, math.ceil(expected) + margin) if below else most
    k = np.arange(first, last + 1, dtype=np.float64)
    return k, _log_choose(n, k) + _log_choose(rest, drawn - k)


def _log_choose(n: float, k: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return found


def _most_ratio(n: float, rest: float, drawn: float) -> float:
    """The largest ratio at which the group's rate stays below 1 with that many drawn."""
    room = drawn - n
    return min(_LARGEST, rest / room * (1 - 1e-9)) if room > 0 else _LARGEST


def _log_odds_ratio(ratio: float, n: float, rest: float, drawn: float) -> float:
    other = drawn / (n * ratio + rest)  # the rest's rate, so that the expected number drawn is `drawn`
    other = min(other, 1 - 1e-12)
    own = min(other * ratio, 1 - 1e-12)
    return math.log(own) - math.log1p(-own) - math.log(other) + math.log1p(-other)
