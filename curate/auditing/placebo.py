"""The same audit where nothing can be found: random selections of equal size, and how many flags they raise.

If the real selection raises no more than these, it shows nothing. Duplicates fare as alike in a placebo as they did in
the real selection (their scores are correlated normals), or a placebo would be an easier test than the real one.
Cost: one normal number per row and one `bincount` per column, for each draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from curate.auditing.clusters_as_units import Clusters, votes
from curate.auditing.disparity import p_values
from curate.auditing.families import adjust
from curate.auditing.membership import Membership
from curate.auditing.rates import count

# N rows of the pool, T tests

DRAWS: Final = 20


@dataclass(frozen=True, slots=True)
class Placebo:
    """The flags of each random selection, of how many tests."""

    seed: int
    tests: int
    flags: tuple[int, ...]

    @property
    def with_any(self) -> int:
        """How many of the random selections raised a flag at all."""
        return sum(flags > 0 for flags in self.flags)


def placebo(
    columns: Sequence[Membership],
    families: Sequence[str],
    size: int,
    clusters: Clusters | None,
    *,
    rows: int,
    alpha: float,
    seed: int,
    draws: int = DRAWS,
) -> Placebo:
    """Audit `draws` random selections of `size` rows; `families` names the family of each column's tests."""
    flags, tests = [], 0
    for draw in range(draws):
        selected_N = random_selection(rows, size, clusters, seed=seed, draw=draw)
        p_T, family_T = all_tests(columns, families, selected_N, clusters)
        tests = int((~np.isnan(p_T)).sum())
        flags.append(int((adjust(p_T, family_T) <= alpha).sum()))
    return Placebo(seed, tests, tuple(flags))


def random_selection(rows: int, size: int, clusters: Clusters | None, *, seed: int, draw: int) -> NDArray[np.bool_]:
    """`size` rows by chance [N]; the rows of a cluster with about its correlation rho."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))
    score_N = random.standard_normal(rows)
    if clusters is not None:
        shared = math.sin(math.pi / 2 * clusters.rho)  # the normals' correlation for signs correlated by rho
        score_C = random.standard_normal(int(clusters.cluster_N.max()) + 1)
        score_N = math.sqrt(shared) * score_C[clusters.cluster_N] + math.sqrt(1 - shared) * score_N
    selected_N = np.zeros(rows, bool)
    selected_N[np.argsort(score_N, kind="stable")[rows - size :]] = True
    return selected_N


def all_tests(
    columns: Sequence[Membership], families: Sequence[str], selected_N: NDArray[np.bool_], clusters: Clusters | None
) -> tuple[NDArray[np.float64], list[str]]:
    """The p-value of every group of every column, and its family."""
    p, family = [np.empty(0)], []
    weight_N = None if clusters is None else clusters.weight_N
    for column, name in zip(columns, families, strict=True):
        weight_M = None if clusters is None else votes(clusters, column, selected_N)
        p.append(p_values(count(column, selected_N, weight_N, weight_M)))
        family += [name] * len(column.groups)
    return np.concatenate(p), family
