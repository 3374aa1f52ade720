"""The two losses behind a learnability score, per group: the same low score can need opposite remedies.

Learner low, reference low: already learned. Learner high, reference low: worth learning. Both high: the reference never
saw this group, or its captions are noise; another reference is needed, no other threshold. Low and high are against the
medians of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from curate.auditing.membership import Membership

# N rows of the pool, G groups, Q quantiles

Quadrant = Literal[
    "already learned", "worth learning", "hard for the reference too", "learned beyond the reference", "in the middle"
]
QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
FEWEST_ROWS: Final = 10
_NEAR: Final = 0.2  # Cohen's d: what is nearer to the median than a small effect has no side


@dataclass(frozen=True, slots=True)
class Losses:
    """The mean losses of a group's rows that have both, and on which side of the pool's medians they are.

    `learner_d` and `reference_d`: the median's distance from the pool's, in standard deviations of the pool.
    """

    rows: int
    learner: float | None
    reference: float | None
    learner_d: float | None
    reference_d: float | None
    quadrant: Quadrant | None


def losses(
    column: Membership, learner_N: NDArray[np.floating], reference_N: NDArray[np.floating]
) -> tuple[Losses, ...]:
    """Per group; rows without a finite loss of both are left out, groups of fewer than 10 rows have no quadrant."""
    there_N = np.isfinite(learner_N) & np.isfinite(reference_N)
    found = []
    for code in range(len(column.groups)):
        rows = column.row_M[column.code_M == code]
        rows = rows[there_N[rows]]
        found.append(_of_rows(learner_N[there_N], reference_N[there_N], learner_N[rows], reference_N[rows]))
    return tuple(found)


def _of_rows(
    pool_learner: NDArray[np.floating],
    pool_reference: NDArray[np.floating],
    learner: NDArray[np.floating],
    reference: NDArray[np.floating],
) -> Losses:
    if not len(learner):
        return Losses(0, None, None, None, None, None)
    d = _distance(learner, pool_learner), _distance(reference, pool_reference)
    side = _quadrant(*d) if len(learner) >= FEWEST_ROWS else None
    return Losses(len(learner), float(learner.mean()), float(reference.mean()), *d, side)


def _distance(group: NDArray[np.floating], pool: NDArray[np.floating]) -> float:
    spread = float(pool.std())
    return float(np.median(group) - np.median(pool)) / spread if spread else 0.0


def _quadrant(learner_d: float, reference_d: float) -> Quadrant:
    if max(abs(learner_d), abs(reference_d)) < _NEAR:
        return "in the middle"
    if reference_d > 0:
        return "hard for the reference too" if learner_d > 0 else "learned beyond the reference"
    return "worth learning" if learner_d > 0 else "already learned"


def quantiles(column: Membership, value_N: NDArray[np.floating]) -> tuple[tuple[float, ...] | None, ...]:
    """`QUANTILES` of a score per group, of its finite values; None for a group without any."""
    found: list[tuple[float, ...] | None] = []
    for code in range(len(column.groups)):
        value = value_N[column.row_M[column.code_M == code]]
        value = value[np.isfinite(value)]
        found.append(tuple(float(x) for x in np.quantile(value, QUANTILES)) if len(value) else None)
    return tuple(found)
