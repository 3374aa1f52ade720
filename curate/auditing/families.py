"""Benjamini-Hochberg within a family: the tests whose flags are read together, by default all of an audit.

With no disparity anywhere, a flag then appears in at most 5 % of audits (Simes), whatever their number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def adjust(p_T: NDArray[np.float64], family_T: Sequence[str] | None = None) -> NDArray[np.float64]:
    """q per test: the smallest false discovery rate at which it is flagged. A NaN is no test and stays NaN.

    Example: p of 0.01, 0.02 and 0.03 in one family give 0.03 each.
    """
    q_T = np.full(len(p_T), np.nan)
    families = np.asarray(["all"] * len(p_T) if family_T is None else family_T, dtype=object)
    for family in set(families):
        inside = (families == family) & ~np.isnan(p_T)
        if inside.any():
            q_T[inside] = stats.false_discovery_control(p_T[inside], method="bh")
    return q_T


def sizes(p_T: NDArray[np.float64], family_T: Sequence[str]) -> dict[str, int]:
    """How many tests each family has; NaN is none."""
    found = dict.fromkeys(family_T, 0)
    for p, family in zip(p_T, family_T, strict=True):
        found[family] += not np.isnan(p)
    return found
