"""The conditional ratio, its test and its homogeneity against loops in fractions; clusters as votes; label noise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from curate.auditing.clusters_as_units import read_clusters, votes
from curate.auditing.columns import Column, LabelError
from curate.auditing.label_noise import corrected
from curate.auditing.membership import membership_of
from curate.auditing.rates import Counts
from curate.auditing.strata import Ratio, by_stratum, conditional
from curate.errors import UsageError

# Charig et al. 1986: kidney stones treated, small and large; successes and cases of open surgery, then of the other
STONES = ((81, 87, 234, 270), (192, 263, 55, 80))


def strata(*tables: tuple[float, float, float, float]) -> Counts:
    """Counts of one group in several strata."""
    return Counts(*np.array(tables, dtype=float).T)


def test_the_kidney_stones_reverse() -> None:
    """Open surgery succeeds 0.94 times as often in all and 1.07 times within sizes: as exact fractions have it."""
    above = sum(Fraction(k * m, n + m) for k, n, _, m in STONES)
    below = sum(Fraction(c * n, n + m) for _, n, c, m in STONES)
    crude = Ratio(273 / 350 / (289 / 350), 0.87, 0.99)
    found = conditional("size", strata(*STONES), crude)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(float(above / below), rel=1e-12)
    assert crude.value < 1 < found.ratio.value
    assert (found.strata, found.covered) == (2, 1.0)
    assert found.explains == "yes"  # its interval holds 1: the crude ratio is explained, and nothing more is shown


def test_the_interval_is_that_of_greenland_and_robins() -> None:
    """Their variance, summed in a loop, gives the limits."""
    found = conditional("size", strata(*STONES), None)
    assert found.ratio is not None
    top = sum(Fraction(n * m * (k + c) - k * c * (n + m), (n + m) ** 2) for k, n, c, m in STONES)
    above = sum(Fraction(k * m, n + m) for k, n, _, m in STONES)
    below = sum(Fraction(c * n, n + m) for _, n, c, m in STONES)
    half = stats.norm.ppf(0.975) * math.sqrt(top / (above * below))
    assert math.log(found.ratio.high / found.ratio.value) == pytest.approx(half)
    assert math.log(found.ratio.value / found.ratio.low) == pytest.approx(half)


def test_one_stratum_is_the_crude_table() -> None:
    """Ratio and interval are scipy's relative risk; the test is Yates's chi-square times (N - 1) / N."""
    k, n, c, m = 30, 100, 80, 200
    found = conditional("one", strata((k, n, c, m)), None)
    plain = stats.contingency.relative_risk(k, n, c, m)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(plain.relative_risk)
    assert found.ratio.low == pytest.approx(plain.confidence_interval().low)
    square = stats.chi2_contingency([[k, n - k], [c, m - c]]).statistic * (n + m - 1) / (n + m)
    assert found.p == pytest.approx(stats.chi2.sf(square, 1))
    assert found.homogeneity_p is None


def test_homogeneity_is_woolfs() -> None:
    """Weighted squares of the log ratios about their weighted mean, in a loop; equal strata have p 1."""
    logs = [math.log(k / n / (c / m)) for k, n, c, m in STONES]
    weights = [1 / (1 / k - 1 / n + 1 / c - 1 / m) for k, n, c, m in STONES]
    mean = sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
    spread = sum(w * (x - mean) ** 2 for w, x in zip(weights, logs, strict=True))
    found = conditional("size", strata(*STONES), None)
    assert found.homogeneity_p == pytest.approx(stats.chi2.sf(spread, 1))
    same = conditional("size", strata((10, 50, 20, 50), (10, 50, 20, 50)), None)
    assert same.homogeneity_p == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("crude", "tables", "answer"),
    [
        (Ratio(0.5, 0.4, 0.6), [(100, 1000, 200, 1000)] * 2, "no"),
        (Ratio(0.5, 0.4, 0.6), [(200, 1000, 202, 1000)] * 2, "yes"),
        (Ratio(0.5, 0.4, 0.6), [(1600, 10_000, 2000, 10_000)] * 2, "in part"),
        (Ratio(0.5, 0.4, 0.6), [(3000, 10_000, 2000, 10_000)] * 2, "reversed"),
        (Ratio(0.5, 0.4, 0.6), [(2, 20, 4, 20)], "undecided"),
        (Ratio(0.5, 0.4, 0.6), [(0, 0, 4, 20), (5, 20, 0, 0)], "undecided"),
        (None, [(100, 1000, 200, 1000)], "undecided"),
        (Ratio(0.0, 0.0, 0.1), [(0, 80, 60, 80), (0, 70, 90, 100)], "no"),
        (Ratio(0.0, 0.0, 3.0), [(0, 2, 10, 80), (0, 3, 15, 100)], "undecided"),
        (Ratio(math.inf, 9.0, math.inf), [(60, 80, 0, 80), (90, 100, 0, 70)], "no"),
        (Ratio(0.5, 0.4, 0.6), [(0, 80, 60, 80)], "undecided"),
    ],
)
def test_what_a_confounder_explains(
    crude: Ratio | None, tables: list[tuple[float, float, float, float]], answer: str
) -> None:
    """No, yes, in part or reversed, by the conditional interval and how much of the crude ratio is left."""
    assert conditional("x", strata(*tables), crude).explains == answer


def test_strata_that_say_nothing_are_left_out() -> None:
    """Of three strata the one with an empty rest and the one with all selected count only against the covered share."""
    found = conditional("x", strata((10, 50, 20, 90), (5, 30, 0, 0), (20, 20, 9, 9)), None)
    assert (found.strata, found.covered) == (1, 0.5)
    assert conditional("x", strata((5, 30, 0, 0)), None).ratio is None


def test_strata_are_counted_as_a_loop_would() -> None:
    """Each stratum's counts are those of its rows alone."""
    random = np.random.default_rng(2)
    codes_N, selected_N = random.integers(0, 2, 100).astype(np.int32), random.random(100) < 0.4
    stratum_N = random.integers(0, 3, 100)
    found = by_stratum(membership_of(Column("c", "label", "x", ("a", "b"), codes_N)), stratum_N, selected_N)
    for s in range(3):
        own = (stratum_N == s) & (codes_N == 0)
        rest = (stratum_N == s) & (codes_N == 1)
        slow = [(own & selected_N).sum(), own.sum(), (rest & selected_N).sum(), rest.sum()]
        assert [found.k_G[s, 0], found.n_G[s, 0], found.rest_k_G[s, 0], found.rest_n_G[s, 0]] == slow


def test_copies_that_fare_alike_have_one_vote_in_all() -> None:
    """40 pairs kept or dropped together have rho 1 and a vote a pair; single rows keep theirs."""
    cluster_N = np.array([*np.repeat(np.arange(40), 2), -1, -1])
    selected_N = np.array([*np.repeat(np.arange(40) % 4 == 0, 2), True, False])
    clusters = read_clusters(cluster_N, selected_N)
    members = membership_of(Column("c", "label", "x", ("a",), np.zeros(82, np.int32)))
    assert (clusters.rho, clusters.repeated) == (1.0, 40)
    assert votes(clusters, members, selected_N).sum() == pytest.approx(42)
    assert clusters.weight_N[-1] == 1


def test_rho_is_the_share_of_agreement_beyond_chance() -> None:
    """Pairs of which a, b and c have two, one and no row selected: (a/C - p^2) / (p - p^2), below its upper limit."""
    both, one, none = 30, 40, 130
    selected_N = np.array([True, True] * both + [True, False] * one + [False, False] * none)
    C = both + one + none
    p = (both + one / 2) / C
    rho = (both / C - p**2) / (p - p**2)
    found = read_clusters(np.repeat(np.arange(C), 2), selected_N).rho
    assert rho < found < rho + 0.2


def test_few_clusters_count_as_if_they_always_fared_alike() -> None:
    """29 clusters whose copies differ are too few to be believed: rho is 1."""
    selected_N = np.tile([True, False], 29)
    assert read_clusters(np.repeat(np.arange(29), 2), selected_N).rho == 1.0


def test_a_group_whose_copies_fare_alike_has_its_own_rho() -> None:
    """Between 200 pairs that differ and 60 that agree, only the group of the latter counts a vote a pair."""
    cluster_N, codes_N = np.repeat(np.arange(260), 2), np.repeat([0, 1], [400, 120]).astype(np.int32)
    selected_N = np.concatenate([np.tile([True, False], 200), np.repeat(np.arange(60) % 2 == 0, 2)])
    members = membership_of(Column("c", "label", "x", ("differ", "agree"), codes_N))
    clusters = read_clusters(cluster_N, selected_N)
    votes_G = members.tally(votes(clusters, members, selected_N))
    assert clusters.rho < 0.5
    assert votes_G[1] == pytest.approx(60)
    assert votes_G[0] > 250


@pytest.mark.parametrize("given", [[1, 2], [0.5, 1, 2], ["a", "b", "c"]])
def test_clusters_are_a_whole_number_per_row(given: list[object]) -> None:
    """Another length or kind is refused."""
    with pytest.raises(UsageError, match="one whole number per row"):
        read_clusters(given, np.zeros(3, bool))  # type: ignore[arg-type]


def test_noisy_labels_pull_a_ratio_to_1_and_the_correction_undoes_it() -> None:
    """From true shares 0.1 and 0.06 through known errors to labelled shares, and back to the true ratio."""
    error, share, true = LabelError(0.8, 0.95), 0.1, 0.6
    chosen = share * true / (share * true + 1 - share)
    pool, selected = (s * 0.8 + (1 - s) * 0.05 for s in (share, chosen))
    observed = selected / pool / ((1 - selected) / (1 - pool))
    assert true < observed < 1
    found = corrected(Ratio(observed, observed, 1.0), pool, error)
    assert found is not None
    assert (found.value, found.high) == pytest.approx((true, 1.0))


def test_labels_that_errors_alone_would_make_say_nothing() -> None:
    """At specificity 0.98 a labelled share of 0.02 may hold no true row at all."""
    assert corrected(Ratio(0.7, 0.6, 0.8), 0.02, LabelError(0.9, 0.98)) is None
    perfect = corrected(Ratio(0.7, 0.6, math.inf), 0.02, LabelError(1.0, 1.0))
    assert perfect is not None
    assert (perfect.value, perfect.high) == (pytest.approx(0.7), math.inf)
