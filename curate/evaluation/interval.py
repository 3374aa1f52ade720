"""Shares with the interval that their number of cases allows: Wilson's for one, MOVER for a mean of several.

Wilson's interval holds its level at shares near 0 and 1, where the usual "plus or minus" leaves [0, 1]. Cases count as
independent: captions of one image are not, so with several of them the interval of text to image is somewhat narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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
