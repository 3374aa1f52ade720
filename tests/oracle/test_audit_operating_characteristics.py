"""What an audit does when it is repeated: false flags, detection, reach, duplicates and reversals, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from curate.auditing.audit import audit_columns
from curate.auditing.clusters_as_units import read_clusters, votes
from curate.auditing.columns import Column
from curate.auditing.disparity import p_values, ratios
from curate.auditing.families import adjust
from curate.auditing.membership import Membership, membership_of
from curate.auditing.placebo import all_tests, random_selection
from curate.auditing.power import reach
from curate.auditing.rates import Counts, count
from curate.auditing.sentences import findings

# R audits, G groups, N rows of the pool

G, ALPHA, MOST = 40, 0.05, 0.08


def flags(k_RG: NDArray[np.int64], n_G: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which groups each of R audits flags [R, G], from counts alone."""
    n_RG, K_R, N = np.broadcast_to(n_G, k_RG.shape).astype(float), k_RG.sum(1, keepdims=True), n_G.sum()
    counts = Counts(k_RG.astype(float), n_RG, K_R - k_RG.astype(float), N - n_RG)
    p_RG = p_values(counts)
    flagged: NDArray[np.bool_] = np.array([adjust(p_G) <= ALPHA for p_G in p_RG])
    return flagged


def surely_below(hits: int, of: int, limit: float) -> bool:
    """Whether the upper 99 % limit of a share (Clopper and Pearson) is below the limit."""
    return float(stats.beta.ppf(0.99, hits + 1, of - hits)) < limit


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("size", ["15 rows", "250 rows", "all sizes"])
def test_with_nothing_planted_few_audits_raise_any_flag(rate: float, size: str) -> None:
    """Of 2000 audits over 40 groups of a random selection surely fewer than 8 % raise a flag, small groups or large."""
    n_G = {"15 rows": np.full(G, 15), "250 rows": np.full(G, 250), "all sizes": np.geomspace(5, 4000, G).astype(int)}
    random, N = np.random.default_rng(5), int(n_G[size].sum())
    k_RG = random.multivariate_hypergeometric(n_G[size], int(rate * N), size=2000, method="marginals")
    assert surely_below(int(flags(k_RG, n_G[size]).any(1).sum()), 2000, MOST)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("n", [25, 50, 120, 400])
def test_one_group_alone_keeps_the_level_that_a_family_leaves_it(n: int, rate: float) -> None:
    """The exact probability of p <= 0.05 / 40 under chance is at most that, at every size; without Yates it is not."""
    N = 40_000
    K, k = int(rate * N), np.arange(0.0, n + 1)
    p = p_values(Counts(k, np.full_like(k, n), K - k, np.full_like(k, N - n)))
    assert stats.hypergeom.pmf(k, N, K, n)[p <= ALPHA / G].sum() <= ALPHA / G


def test_a_ratio_of_0_7_among_1000_rows_is_detected() -> None:
    """One of 40 groups of 1000 is kept at 0.14, the others at 0.2: nine audits of ten flag it."""
    random, n_G = np.random.default_rng(7), np.full(G, 1000)
    k_RG = random.binomial(n_G, np.where(np.arange(G) == 3, 0.14, 0.2), size=(500, G))
    assert flags(k_RG, n_G)[:, 3].mean() >= 0.9


@pytest.mark.parametrize(("n", "limit"), [(100, 0.33), (1000, 0.77)])
def test_the_minimum_detectable_ratio_is_seen_four_times_in_five(n: int, limit: float) -> None:
    """At rate 0.2 in a family of 20, 100 rows see only ratios below 0.33 and 1000 below 0.77: simulated, both sides."""
    random, rest, level = np.random.default_rng(11), 200_000, ALPHA / 20
    found = reach(n, rest, 0.2 * (n + rest), level=level)
    assert found.below is not None
    assert found.above is not None
    assert limit - 0.03 < found.below < limit
    for ratio in (found.below, found.above):
        k_R = random.binomial(n, 0.2 * ratio, size=20_000).astype(float)
        rest_R = random.binomial(rest, 0.2, size=20_000).astype(float)
        p_R = p_values(Counts(k_R, np.full_like(k_R, n), rest_R, np.full_like(k_R, rest)))
        assert (p_R <= level).mean() == pytest.approx(0.8, abs=0.02)


def copies(random: np.random.Generator, per_group: int, *, heavy: bool) -> tuple[NDArray[np.int64], Membership]:
    """Clusters [N] of 1 to 8 rows, or of up to 200, each within one of 40 groups; and the groups."""
    sizes, group = [], []
    for g in range(G):
        left = per_group
        while left:
            size = min(200, int(random.pareto(1.1) * 2) + 1) if heavy else int(random.integers(1, 9))
            sizes.append(min(size, left))
            group.append(g)
            left -= sizes[-1]
    codes_N = np.repeat(group, sizes).astype(np.int32)
    column = Column("group", "label", "made up", tuple(str(g) for g in range(G)), codes_N)
    return np.repeat(np.arange(len(sizes)), sizes), membership_of(column)


def chosen(
    random: np.random.Generator, cluster_N: NDArray[np.int64], alike_N: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """A fifth of the rows; with probability `alike` a row shares the fate of its cluster."""
    shared_N = random.random(int(cluster_N.max()) + 1)[cluster_N]
    own_N = random.random(len(cluster_N))
    fate_N: NDArray[np.bool_] = np.where(random.random(len(cluster_N)) < alike_N, shared_N, own_N) < 0.2
    return fate_N


@pytest.mark.parametrize("alike", ["always", "always, some clusters huge", "half of the time", "in every other group"])
def test_duplicates_do_not_inflate_the_flags(alike: str) -> None:
    """Copies that are kept or dropped together raise flags in most audits of rows, and in few audits of votes."""
    random, audits = np.random.default_rng(13), 500
    cluster_N, members = copies(random, 200, heavy="huge" in alike)
    share = {"half of the time": 0.5}.get(alike, 1.0)
    alike_N = (members.code_M % 2 == 0).astype(float) if "every other" in alike else np.full(len(cluster_N), share)
    drawn = [chosen(random, cluster_N, alike_N) for _ in range(audits)]
    assert surely_below(sum(_any(members, selected_N, cluster_N) for selected_N in drawn), audits, MOST)
    naive = sum(_any(members, selected_N, None) for selected_N in drawn[:100])
    assert naive > 30


def test_groups_that_share_clusters_are_weighed_alike() -> None:
    """Where large clusters are kept more often, labels drawn by lot within them are flagged no more than by chance."""
    random, flagged, ratio = np.random.default_rng(29), 0, []
    size_C = np.repeat([1, 5, 25], [2000, 200, 100])
    cluster_N = np.repeat(np.arange(len(size_C)), size_C)
    for _ in range(100):
        kept_C = np.where(size_C == 1, 0.1, np.where(random.random(len(size_C)) < 0.4, 0.8, 0.05))
        chance_N = np.repeat(kept_C, size_C)
        codes_N = random.integers(0, 12, len(cluster_N)).astype(np.int32)
        members = membership_of(Column("locale", "label", "by lot", tuple(map(str, range(12))), codes_N))
        selected_N = random.random(len(cluster_N)) < chance_N
        flagged += _any(members, selected_N, cluster_N)
        clusters = read_clusters(cluster_N, selected_N)
        counts = count(members, selected_N, clusters.weight_N, votes(clusters, members, selected_N))
        ratio.append(ratios(counts)[0].mean())
    assert flagged <= 12
    assert np.mean(ratio) == pytest.approx(1, abs=0.02)


def test_copies_that_fare_like_strangers_cost_little_power() -> None:
    """Where the selection looks at each copy by itself, votes find a planted ratio of 0.7 about as often as rows do."""
    random, found = np.random.default_rng(17), np.zeros(2)
    for _ in range(100):
        cluster_N, members = copies(random, 600, heavy=False)
        rate_N = np.where(members.code_M == 3, 0.14, 0.2)
        selected_N = random.random(len(rate_N)) < rate_N
        found += [_q(members, selected_N, given)[3] <= ALPHA for given in (cluster_N, None)]
    assert found[1] > 50
    assert found[0] >= 0.75 * found[1]  # 0.8: what the upper limit of rho costs


def _q(members: Membership, selected_N: NDArray[np.bool_], cluster_N: NDArray[np.int64] | None) -> NDArray[np.float64]:
    clusters = None if cluster_N is None else read_clusters(cluster_N, selected_N)
    return adjust(all_tests([members], ["all"], selected_N, clusters)[0])


def _any(members: Membership, selected_N: NDArray[np.bool_], cluster_N: NDArray[np.int64] | None) -> bool:
    return bool((_q(members, selected_N, cluster_N) <= ALPHA).any())


def test_intervals_on_votes_hold_their_level_among_copies() -> None:
    """With a planted ratio of 0.7 and copies that fare alike, 95 % intervals hold it in 92 % of audits or more."""
    random, held = np.random.default_rng(31), []
    cluster_N, members = copies(random, 600, heavy=False)
    rate_N = np.where(members.code_M == 3, 0.14, 0.2)
    for _ in range(300):
        selected_N = random.random(int(cluster_N.max()) + 1)[cluster_N] < rate_N
        clusters = read_clusters(cluster_N, selected_N)
        counts = count(members, selected_N, clusters.weight_N, votes(clusters, members, selected_N))
        _, low_G, high_G = ratios(counts)
        held.append(low_G[3] <= 0.7 <= high_G[3])
    assert np.mean(held) >= 0.92


def test_placebos_raise_flags_as_rarely_as_chance_and_keep_copies_together() -> None:
    """Random selections over clustered rows flag few audits of votes, while an audit of their rows flags most."""
    random = np.random.default_rng(19)
    cluster_N, members = copies(random, 200, heavy=False)
    real_N = chosen(random, cluster_N, np.ones(len(cluster_N)))
    clusters = read_clusters(cluster_N, real_N)
    drawn = [random_selection(len(real_N), int(real_N.sum()), clusters, seed=3, draw=draw) for draw in range(60)]
    by_votes = sum((adjust(all_tests([members], ["all"], one_N, clusters)[0]) <= ALPHA).any() for one_N in drawn)
    by_rows = sum((adjust(all_tests([members], ["all"], one_N, None)[0]) <= ALPHA).any() for one_N in drawn)
    assert by_votes <= 6
    assert by_rows > 40


def test_simpsons_reversal_shows_both_sides() -> None:
    """A group kept more often in each stratum and less often in all is shown with both ratios, as a reversal."""
    random, N = np.random.default_rng(23), 40_000
    group_N, long_N = random.random(N) < 0.5, np.empty(N, bool)
    long_N = random.random(N) < np.where(group_N, 0.85, 0.25)  # this group's captions are long, and those are kept less
    rate_N = np.where(long_N, 0.1, 0.4) * np.where(group_N, 1.15, 1.0)
    selected_N = random.random(N) < rate_N
    labels = np.where(group_N, "a", "b")
    audit = audit_columns({"group": labels}, selected_N, strata={"caption length": np.where(long_N, "long", "short")})
    row, held = audit.rows[0], audit.rows[0].conditional[0]
    assert row.ratio is not None
    assert held.ratio is not None
    assert row.ratio.high < 1 < held.ratio.low
    assert held.ratio.value == pytest.approx(1.15, abs=0.05)
    assert held.explains == "reversed"
    assert any("the direction reverses within equal caption length" in line for line in findings(audit))


def test_the_one_group_that_was_planted_is_confidently_large() -> None:
    """Of 12 groups one is kept half as often: it alone is confidently large, and no placebo comes near its flags."""
    random, N = np.random.default_rng(29), 24_000
    code_N = random.integers(0, 12, N)
    selected_N = random.random(N) < np.where(code_N == 5, 0.1, 0.2)
    audit = audit_columns({"group": [f"g{code:02}" for code in code_N]}, selected_N, seed=2)
    assert [row.group for row in audit.rows if row.level == "confidently large"] == ["g05"]
    assert audit.placebo.with_any <= 3
    assert len(audit.placebo.flags) == 20
