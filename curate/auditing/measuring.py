"""One column measured against a selection: counts in rows and in votes, tests, and after q is known its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.auditing.clusters_as_units import votes
from curate.auditing.composition import composition
from curate.auditing.disparity import cohens_h, level_of, p_values, ratios, small, whole
from curate.auditing.exposures import early_and_late, exposures
from curate.auditing.label_noise import corrected
from curate.auditing.losses import losses, quantiles
from curate.auditing.membership import Membership
from curate.auditing.outcome import ColumnAudit, GroupRow
from curate.auditing.pool import Pool
from curate.auditing.power import reaches
from curate.auditing.rates import Counts, count, rate
from curate.auditing.shrinkage import shrunken
from curate.auditing.strata import Conditional, Ratio, by_stratum, conditional

# N rows of the pool, M pairs of a row and a group, G groups


@dataclass(frozen=True, slots=True)
class Measured:
    """A column's counts in rows and in votes, and its p per group; `family` is where its q belongs."""

    members: Membership
    family: str
    weight_M: NDArray[np.float64] | None
    rows: Counts
    votes: Counts
    p_G: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rules:
    """When a q is a flag, which ratios are large, and how many tests share the family."""

    alpha: float
    screen: tuple[float, float]
    tests: int
    seed: int


def measure(members: Membership, family: str, pool: Pool) -> Measured:
    """Count and test a column's groups."""
    weight_M = None if pool.clusters is None else votes(pool.clusters, members, pool.selected_N)
    counts = count(members, pool.selected_N, pool.weight_N, weight_M)
    return Measured(members, family, weight_M, count(members, pool.selected_N), counts, p_values(counts))


def described(one: Measured, pool: Pool, q_G: NDArray[np.float64], rules: Rules) -> ColumnAudit:
    """The column with every statistic of its groups."""
    column = one.members.column
    mix = None if column.overlapping else composition(one.votes.n_G, one.votes.k_G, seed=rules.seed)
    parts = [_counted(one, pool), _compared(one, q_G, rules), _explained(one, pool), _drawn(one.members, pool)]
    rows = [GroupRow(**{name: values[g] for part in parts for name, values in part.items()}) for g in range(len(q_G))]
    return ColumnAudit(
        column.name, column.kind, column.provenance, one.family, column.coverage, column.unknown_share,
        column.overlapping, mix, tuple(rows), column.model,
    )  # fmt: skip


def _counted(one: Measured, pool: Pool) -> dict[str, list[Any]]:
    """How many, and which share: in rows, with intervals at the number of votes."""
    G, N, K = range(len(one.members.groups)), len(pool.selected_N), int(pool.selected_N.sum())
    n, k = one.rows.n_G.astype(int).tolist(), one.rows.k_G.astype(int).tolist()
    crossed = one.members.column.kind == "intersection"
    calmed = shrunken(one.votes.k_G, one.votes.n_G) if crossed else None
    return {
        "column": [one.members.column.name for _ in G],
        "group": list(one.members.groups),
        "is_unknown": [g == one.members.unknown for g in G],
        "pool": n,
        "selected": k,
        "never_selected": [n[g] - k[g] for g in G],
        "share_of_pool": [n[g] / N for g in G],
        "share_of_selected": [k[g] / K if K else None for g in G],
        "votes": one.votes.n_G.tolist(),
        "rate": [rate(k[g], n[g], float(one.votes.n_G[g])) for g in G],
        "shrunken": [None if calmed is None else calmed[g] for g in G],
    }


def _compared(one: Measured, q_G: NDArray[np.float64], rules: Rules) -> dict[str, list[Any]]:
    """The ratio to the rest, its test and level, and what could have been seen."""
    G, few_G = range(len(q_G)), small(one.votes)
    value_G, low_G, high_G = ratios(one.votes)
    found = _ratios(one)
    return {
        "ratio": found,
        "ratio_of_rows": [whole(value) for value in ratios(one.rows)[0]],
        "corrected": [_corrected(one, g, found[g]) for g in G],
        "cohens_h": [whole(h) for h in cohens_h(one.rows)],
        "test": [None if np.isnan(one.p_G[g]) else "Fisher" if few_G[g] else "G" for g in G],
        "p": [whole(p) for p in one.p_G],
        "q": [whole(q) for q in q_G],
        "level": [level_of(q_G[g], value_G[g], low_G[g], high_G[g], rules.alpha, rules.screen) for g in G],
        "untested": [_why_untested(one.rows, g) if np.isnan(one.p_G[g]) else None for g in G],
        "could_see": list(reaches(one.votes, level=rules.alpha / max(1, rules.tests))),
    }


def _explained(one: Measured, pool: Pool) -> dict[str, list[Any]]:
    """Per group, its ratio within the strata of each confounder."""
    found: list[list[Conditional]] = [[] for _ in one.members.groups]
    for name, stratum_N in pool.strata:
        strata = by_stratum(one.members, stratum_N, pool.selected_N, pool.weight_N, one.weight_M)
        for g, crude in enumerate(_ratios(one)):
            own = Counts(strata.k_G[:, g], strata.n_G[:, g], strata.rest_k_G[:, g], strata.rest_n_G[:, g])
            found[g].append(conditional(name, own, crude))
    return {"conditional": [tuple(each) for each in found]}


def _drawn(members: Membership, pool: Pool) -> dict[str, Any]:
    """What only a joint selection has."""
    nothing = [None] * len(members.groups)
    both = pool.learner_loss_N is not None and pool.reference_loss_N is not None
    late = pool.sub_batch_N is not None
    return {
        "exposures": nothing if pool.times_N is None else exposures(members, pool.times_N),
        "losses": losses(members, pool.learner_loss_N, pool.reference_loss_N) if both else nothing,  # type: ignore[arg-type]
        "score_quantiles": nothing if pool.score_N is None else quantiles(members, pool.score_N),
        "early_late": early_and_late(members, pool.sub_batch_N, pool.selected_N) if late else nothing,  # type: ignore[arg-type]
    }


def _ratios(one: Measured) -> list[Ratio | None]:
    three = np.stack(ratios(one.votes), axis=1).tolist()
    return [None if np.isnan(value) else Ratio(value, low, high) for value, low, high in three]


def _corrected(one: Measured, g: int, ratio: Ratio | None) -> Ratio | None:
    error, known = one.members.column.label_error, one.rows.n_G[g] + one.rows.rest_n_G[g]
    if error is None or ratio is None or g == one.members.unknown:
        return None
    return corrected(ratio, float(one.rows.n_G[g] / known), error)


def _why_untested(rows: Counts, g: int) -> str:
    if not rows.n_G[g]:
        return "no rows in the pool"
    if not rows.rest_n_G[g]:
        return "no other rows to compare with"
    return "every row was selected" if rows.k_G[g] + rows.rest_k_G[g] else "no row was selected"
