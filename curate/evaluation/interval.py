"""Shares with the interval that their number of cases allows: Wilson's for one, MOVER for a mean of several; Student's
for a mean of a few numbers.

Wilson's interval holds its level at shares near 0 and 1, where the usual "plus or minus" leaves [0, 1]. Cases count as
independent: captions of one image are not, so with several of them the interval of text to image is somewhat narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Final

from curate.errors import UsageError

Z95: Final = 1.959963984540054  # 97.5 % of a normal variable lies below


@dataclass(frozen=True, slots=True)
class Share:
    """A share between 0 and 1 and the limits of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, of: int) -> Share:
    """The share `hits / of`. Errors: ValueError unless 0 <= hits <= of and of > 0.

    Source: Wilson 1927, doi 10.1080/01621459.1927.10502953.
    Example: 8 of 10 is 0.8, between 0.490 and 0.943; 0 of 10 is 0, between 0 and 0.278.
    """
    if not 0 <= hits <= of or not of:
        raise ValueError(f"{hits} hits of {of} cases is no share")
    square, share = Z95**2 / of, hits / of
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return Share(share, max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < of else 1.0)


def mean_share(shares: Sequence[Share]) -> Share:
    """The unweighted mean of independent shares; its limits combine theirs.

    Source: Zou and Donner 2008, doi 10.1002/sim.3095 (MOVER): distances to the limits add up as squares.
    Errors: ValueError without a share. Example: of wilson(8, 10) and wilson(2, 10) it is 0.5, between 0.329 and 0.671.
    """
    if not shares:
        raise ValueError("the mean of no shares")
    mean = math.fsum(one.value for one in shares) / len(shares)
    below = math.sqrt(math.fsum((one.value - one.low) ** 2 for one in shares)) / len(shares)
    above = math.sqrt(math.fsum((one.high - one.value) ** 2 for one in shares)) / len(shares)
    return Share(mean, max(0.0, mean - below), min(1.0, mean + above))


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half the interval of a mean by Student's t. Errors: UsageError for fewer than two values.

    Example: [1.0, 2.0, 3.0] has the mean 2 plus or minus 2.484.
    """
    return student_quantile((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def student_quantile(probability: float, freedom: int) -> float:
    """The upper quantile of Student's t. Example: (0.975, 2) gives 4.303. Errors: UsageError."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise UsageError(f"no quantile for {probability} with {freedom} degrees of freedom")
    from scipy.stats import t  # half a second, and few come here

    return float(t.ppf(probability, freedom))
