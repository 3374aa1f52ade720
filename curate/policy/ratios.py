"""A group's rate over the rate of the whole pool, with its interval and what could have been seen at all.

The audit compares a group with the rest: R with a log-interval, and its minimum detectable ratio. A policy's bounds are
to the whole pool, because that is what a sampler can hold: with p the group's share of the pool, Q = R / (p R + 1 - p)
grows with R, so the limits of R become those of Q. Bounds count whole samples, as the sampler does: floors are rounded
down, ceilings up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from curate.auditing.disparity import ratios
from curate.auditing.power import reach
from curate.auditing.rates import Counts
from curate.evaluation.interval import wilson

LEVEL: Final = 0.05  # of the test whose reach is asked; a policy's criteria are declared, so each stands alone


@dataclass(frozen=True, slots=True)
class PoolRatio:
    """Q and its 95 % limits; `seen_below` and `seen_above` are the ratios nearest 1 that 80 % of audits would flag.

    NaN where nothing can be compared; None where no ratio could be seen.
    """

    value: float
    low: float
    high: float
    seen_below: float | None
    seen_above: float | None

    def moved_to(self, value: float) -> PoolRatio:
        """The ratio of draws instead of different samples: as sure of it, on the log scale, as of these."""
        factor = value / self.value if self.value else 1.0
        return replace(self, value=value, low=self.low * factor, high=self.high * factor)


def pool_ratio(chosen: int, n: int, all_chosen: int, pool: int, *, units: float | None = None) -> PoolRatio:
    """Of `n` in the group `chosen` were selected, of the whole pool `all_chosen`.

    `units` is how many independent ones the group's n count for (clusters of near-duplicates), n if None.
    Example: 100 of 1000 where the pool of 10,000 gave 2,000: ratio 0.5, limits 0.417 to 0.598.
    """
    weight = 1.0 if units is None or not n else min(1.0, units / n)
    counts = Counts(
        np.array([chosen * weight]), np.array([n * weight]),
        np.array([float(all_chosen - chosen)]), np.array([float(pool - n)]),
    )  # fmt: skip
    to_rest = [float(one[0]) for one in ratios(counts)]
    if not chosen and all_chosen and 0 < n < pool:
        to_rest[2] = min(to_rest[2], _most_of_none(n * weight, all_chosen, pool - n))
    value, low, high = (_of_pool(one, n / pool) for one in to_rest)
    if math.isnan(value):
        return PoolRatio(value, low, high, None, None)
    seen = reach(n * weight, pool - n, all_chosen - chosen * (1 - weight), level=LEVEL)
    below, above = (None if one is None else _of_pool(one, n / pool) for one in (seen.below, seen.above))
    return PoolRatio(value, low, high, below, above)


def _most_of_none(n: float, rest_chosen: int, rest: int) -> float:
    """Upper limit of the ratio to the rest where none of n was selected.

    The log-interval's half a row more is far too wide there: none of 40 at a rate of 0.2 would be "up to 0.97". Limits
    of both rates, Wilson's, are taken at their worst, so the level is kept.
    """
    return wilson(0, max(1, round(n))).high / wilson(rest_chosen, rest).low


def _of_pool(ratio: float, share: float) -> float:
    return 1 / share if math.isinf(ratio) else ratio / (share * ratio + 1 - share)
