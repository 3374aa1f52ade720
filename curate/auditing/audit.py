"""`audit_columns`: every statistic of an audit, from the columns of a pool and what a selection kept of it.

Linear in rows times columns; most of the time goes to the placebos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from curate.auditing.association import Association, associations, with_q
from curate.auditing.columns import Column
from curate.auditing.crossing import crossings
from curate.auditing.disparity import SCREEN
from curate.auditing.families import adjust, sizes
from curate.auditing.measuring import Rules, described, measure
from curate.auditing.membership import Membership, as_column, membership_of
from curate.auditing.outcome import Audit
from curate.auditing.placebo import DRAWS, placebo
from curate.auditing.pool import Pool, read_mask, read_pool
from curate.errors import UsageError

# N rows of the pool, T tests

ONE_FAMILY = "all"
MOST_ASSOCIATED = 100  # groups of a column that is set against concepts; more pairs than anyone reads


def audit_columns(
    columns: Mapping[str, Any] | Sequence[Column],
    selected_N: ArrayLike,
    times_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
    strata: Mapping[str, Any] | None = None,
    *,
    intersections: Sequence[Sequence[str]] = (),
    families: Mapping[str, str] | None = None,
    learner_loss_N: ArrayLike | None = None,
    reference_loss_N: ArrayLike | None = None,
    score_N: ArrayLike | None = None,
    sub_batch_N: ArrayLike | None = None,
    concepts: Mapping[str, ArrayLike] | None = None,
    alpha: float = 0.05,
    screen: tuple[float, float] = SCREEN,
    placebos: int = DRAWS,
    seed: int = 0,
) -> Audit:
    """Compare every group of every column with its rest.

    `columns`: `Column`s, or {name: labels, one per row, or {group: mask}}. `selected_N`: true or false per row;
    `times_N`: how often each was drawn. `clusters_N`: the same number for duplicates, negative for none. `strata`:
    {confounder: a label per row} (`membership.bins` makes labels of numbers); several are crossed as well.
    `intersections`: names of columns to cross. `families`: {column: family} within which q is taken, else one for all.
    `sub_batch_N`: the sub-batch that drew a row. `concepts`: {name: mask} to associate up to 100 groups with.

    Errors: UsageError for an empty pool, lengths that differ, names that are unknown, too many groups.
    Example: `audit_columns({"tone": ["dark", "dark", "light", None]}, [True, False, True, True]).rows[0].rate.value`
    is 0.5.
    """
    _check(alpha, screen, placebos, seed)
    pool = read_pool(
        selected_N, times_N, clusters_N, strata, sub_batch_N=sub_batch_N, learner_loss_N=learner_loss_N,
        reference_loss_N=reference_loss_N, score_N=score_N,
    )  # fmt: skip
    members = [membership_of(column) for column in _all_columns(columns, intersections, len(pool.selected_N))]
    names = _families(members, families or {})
    measured = [measure(one, name, pool) for one, name in zip(members, names, strict=True)]
    p_T = np.concatenate([np.empty(0), *(one.p_G for one in measured)])
    family_T = [one.family for one in measured for _ in one.p_G]
    tests, q_T = sizes(p_T, family_T), adjust(p_T, family_T)
    q_of = np.split(q_T, np.cumsum([len(one.p_G) for one in measured], dtype=int))  # the last piece is empty
    found = [
        described(one, pool, q_G, Rules(alpha, screen, tests.get(one.family, 0), seed))
        for one, q_G in zip(measured, q_of, strict=False)
    ]
    K, N, clusters = int(pool.selected_N.sum()), len(pool.selected_N), pool.clusters
    return Audit(
        pool=N,
        selected=K,
        exposures=None if pool.times_N is None else int(pool.times_N.sum()),
        alpha=alpha,
        screen=screen,
        seed=seed,
        duplicate_clusters=None if clusters is None else clusters.repeated,
        rho=None if clusters is None else clusters.rho,
        tests=tests,
        columns=tuple(found),
        associations=_associated(members, concepts or {}, pool),
        placebo=placebo(members, names, K, clusters, rows=N, alpha=alpha, seed=seed, draws=placebos),
    )


def _all_columns(
    columns: Mapping[str, Any] | Sequence[Column], crossed: Sequence[Sequence[str]], N: int
) -> list[Column]:
    given = columns.items() if isinstance(columns, Mapping) else [(one.name, one) for one in columns]
    found = [as_column(str(name), values, N) for name, values in given]
    named = {one.name: one for one in found}
    if len(named) < len(found):
        raise UsageError("two columns have the same name; rename one")
    for names in crossed:
        _check_there(named, names)
    return found + crossings(named, crossed)


def _check_there(columns: Mapping[str, Column], names: Sequence[str]) -> None:
    lost = [name for name in names if name not in columns]
    if lost or len(set(names)) < 2:
        there = ", ".join(columns) or "none"
        raise UsageError(f"intersection of {', '.join(names) or 'nothing'}: name two columns or more of: {there}")


def _families(members: Sequence[Membership], families: Mapping[str, str]) -> list[str]:
    names = [one.column.name for one in members]
    lost = sorted(set(families) - set(names))
    if lost:
        raise UsageError(f"families names {', '.join(lost)}, which is none of the columns: {', '.join(names)}")
    return [families.get(name, ONE_FAMILY) for name in names]


def _associated(
    members: Sequence[Membership], concepts: Mapping[str, ArrayLike], pool: Pool
) -> tuple[Association, ...]:
    masks = {name: read_mask(f"concept {name!r}", given, len(pool.selected_N)) for name, given in concepts.items()}
    few = [one for one in members if len(one.groups) <= MOST_ASSOCIATED]
    return with_q([pair for one in few for pair in associations(one, masks, pool.selected_N, pool.weight_N)])


def _check(alpha: float, screen: tuple[float, float], placebos: int, seed: int) -> None:
    if not 0 < alpha < 1:
        raise UsageError(f"alpha is {alpha}; give a false discovery rate between 0 and 1, such as 0.05")
    if not 0 < screen[0] <= 1 <= screen[1]:
        raise UsageError(f"screen is {screen}; give a ratio up to 1 and one from 1, such as (0.8, 1.25)")
    if placebos < 0 or not 0 <= seed < 2**64:
        raise UsageError(f"placebos {placebos} and seed {seed} are whole numbers from 0, the seed below 2**64")
