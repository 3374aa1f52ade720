"""Rates, ratios, tests, levels and q-values of an audit, against scipy's and against sums by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from curate.auditing.columns import Column
from curate.auditing.disparity import SCREEN, cohens_h, comparable, level_of, p_values, ratios, small
from curate.auditing.families import adjust, sizes
from curate.auditing.membership import membership_of
from curate.auditing.power import reach
from curate.auditing.rates import Counts, count, rate
from curate.evaluation.interval import wilson

TABLES = [(10, 100, 90, 300), (3, 12, 20, 50), (0, 40, 30, 100), (7, 7, 5, 30), (400, 1000, 3900, 10000), (1, 3, 1, 9)]


def counts(*tables: tuple[float, float, float, float]) -> Counts:
    """Counts of several tables (k, n, k of the rest, n of the rest)."""
    return Counts(*np.array(tables, dtype=float).T)


@pytest.mark.parametrize("table", TABLES)
def test_p_is_scipys(table: tuple[int, int, int, int]) -> None:
    """Fisher's exact p where an expected count is below 5, else that of scipy's corrected G-test."""
    k, n, c, m = table
    cells = [[k, n - k], [c, m - c]]
    few = stats.contingency.expected_freq(cells).min() < 5
    expected = stats.fisher_exact(cells) if few else stats.chi2_contingency(cells, lambda_="log-likelihood")
    assert small(counts(table))[0] == few
    assert p_values(counts(table))[0] == pytest.approx(expected.pvalue, rel=1e-10)


def test_nothing_is_tested_where_nothing_can_be_compared() -> None:
    """An empty group, no rest, none selected and all selected have neither p nor ratio."""
    table = counts((0, 0, 5, 10), (5, 10, 0, 0), (0, 10, 0, 10), (10, 10, 10, 10), (5, 10, 5, 10))
    assert comparable(table).tolist() == [False, False, False, False, True]
    assert np.isnan(p_values(table)).tolist() == [True, True, True, True, False]
    assert np.isnan(ratios(table)[0]).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("table", [table for table in TABLES if 0 < table[0] < table[1]])
def test_ratio_and_interval_are_scipys(table: tuple[int, int, int, int]) -> None:
    """The ratio and its log interval are those of `scipy.stats.contingency.relative_risk`."""
    value, low, high = (float(x[0]) for x in ratios(counts(table)))
    expected = stats.contingency.relative_risk(*table)
    interval = expected.confidence_interval(0.95)
    assert (value, low, high) == pytest.approx((expected.relative_risk, interval.low, interval.high), rel=1e-10)


def test_a_group_of_one_that_was_selected_says_little() -> None:
    """With all of a side selected the interval is wider than Katz's, which would take one row of one for certain."""
    for k, rest in ((1, (40, 100)), (7, (5, 30)), (500, (200, 1000))):
        value, low, high = (float(x[0]) for x in ratios(counts((k, k, *rest))))
        plain = stats.contingency.relative_risk(k, k, *rest).confidence_interval(0.95)
        assert low < plain.low < value < plain.high < high
    assert float(ratios(counts((1, 1, 40, 100)))[1][0]) < 1


def test_a_side_with_none_selected_has_a_limit_on_one_side() -> None:
    """0 of 40 against 30 of 100 is 0, up to the limit with half a row more; the mirrored table is infinite."""
    value, low, high = ratios(counts((0, 40, 30, 100), (30, 100, 0, 40)))
    spread = stats.norm.ppf(0.975) * math.sqrt(1 / 0.5 - 1 / 40.5 + 1 / 30.5 - 1 / 100.5)
    limit = (0.5 / 40.5) / (30.5 / 100.5) * math.exp(spread)
    assert (value[0], low[0], high[0]) == pytest.approx((0, 0, limit))
    assert (value[1], high[1]) == (math.inf, math.inf)
    assert low[1] == pytest.approx(1 / limit)


def test_cohens_h_is_a_difference_of_arcsines() -> None:
    """0.1 against 0.3 is -0.516, 0 against 1 is minus pi, equal rates are 0."""
    h = cohens_h(counts((10, 100, 90, 300), (0, 5, 5, 5), (2, 10, 4, 20)))
    assert h.tolist() == pytest.approx([2 * math.asin(math.sqrt(0.1)) - 2 * math.asin(math.sqrt(0.3)), -math.pi, 0])


@pytest.mark.parametrize(
    ("q", "three", "level"),
    [
        (math.nan, (math.nan, math.nan, math.nan), "untested"),
        (0.06, (0.5, 0.4, 0.6), "not detected"),
        (0.01, (0.9, 0.85, 0.95), "detected"),
        (0.01, (0.75, 0.7, 0.85), "detected and large"),
        (0.01, (0.6, 0.5, 0.79), "confidently large"),
        (0.01, (1.5, 1.26, 1.7), "confidently large"),
        (0.01, (1.3, 1.2, 1.4), "detected and large"),
    ],
)
def test_the_three_levels(q: float, three: tuple[float, float, float], level: str) -> None:
    """Detected by q, large by the ratio, confidently large by the whole interval."""
    assert level_of(q, *three, 0.05, SCREEN) == level


def test_q_is_benjamini_and_hochbergs_within_each_family() -> None:
    """q is min over larger p of p m / rank, worked out by hand per family; a NaN is no test and counts nowhere."""
    p, family = np.array([0.01, 0.04, math.nan, 0.03, 0.5]), ["a", "a", "a", "a", "b"]
    assert adjust(p, family).tolist() == pytest.approx([0.03, 0.04, math.nan, 0.04, 0.5], nan_ok=True)
    assert sizes(p, family) == {"a": 3, "b": 1}
    assert np.isnan(adjust(np.array([math.nan]))).all()


def test_counts_are_those_of_a_loop() -> None:
    """Per group and its rest, with weights, unknown rows in nobody's rest but their own: as counted row by row."""
    random = np.random.default_rng(1)
    codes_N, selected_N = random.integers(-1, 3, 200).astype(np.int32), random.random(200) < 0.3
    weight_N = random.random(200)
    members = membership_of(Column("c", "label", "x", ("a", "b", "c"), codes_N))
    found = count(members, selected_N, weight_N, weight_N[members.row_M])
    assert members.groups == ("a", "b", "c", "unknown")
    for g, code in enumerate([0, 1, 2, -1]):
        own, rest = codes_N == code, (codes_N != code) & (codes_N >= 0)
        slow = [weight_N[own & selected_N].sum(), weight_N[own].sum()]
        slow += [weight_N[rest & selected_N].sum(), weight_N[rest].sum()]
        assert [found.k_G[g], found.n_G[g], found.rest_k_G[g], found.rest_n_G[g]] == pytest.approx(slow)


def test_a_rate_has_wilsons_interval_at_its_votes() -> None:
    """Without copies it is Wilson's; fewer votes widen it around the same rate; an empty group has none."""
    plain, voted = rate(20, 100, 100.0), rate(20, 100, 25.0)
    assert plain is not None
    assert voted is not None
    assert plain == wilson(20, 100)
    assert (voted.value, voted.low, voted.high) == pytest.approx((0.2, wilson(5, 25).low, wilson(5, 25).high))
    assert rate(0, 0, 0.0) is None


@pytest.mark.parametrize(("n", "rest", "drawn"), [(100, 900, 200), (60, 60, 50), (400, 4000, 3900), (30, 5000, 60)])
def test_reach_is_that_of_scipys_noncentral_distribution(n: int, rest: int, drawn: int) -> None:
    """At the ratios given, counts that the test flags have probability 0.8 under scipy's nchypergeom_fisher."""
    level, found = 0.005, reach(n, rest, drawn, level=0.005)
    k = np.arange(max(0, drawn - rest), min(n, drawn) + 1.0)
    p = p_values(Counts(k, np.full_like(k, n), drawn - k, np.full_like(k, rest)))
    middle = n * drawn / (n + rest)
    for ratio, side in ((found.below, k < middle), (found.above, k > middle)):
        if ratio is None:
            assert not (p[side] <= level).any()
            continue
        other = drawn / (n * ratio + rest)
        odds = ratio * other / (1 - ratio * other) * (1 - other) / other
        seen = stats.nchypergeom_fisher.pmf(k, n + rest, n, drawn, odds)[side & (p <= level)].sum()
        assert seen == pytest.approx(0.8, abs=2e-4)


def test_reach_shrinks_with_the_group_until_there_is_none() -> None:
    """Larger groups see ratios nearer to 1; ten rows at a rate of 0.2 see none below 1."""
    below = [reach(n, 50_000, 10_000, level=0.001).below for n in (50, 100, 400, 1600, 6400)]
    assert all(one is not None for one in below)
    assert all(a < b < 1 for a, b in itertools.pairwise(below))  # type: ignore[operator]
    assert reach(10, 50_000, 10_000, level=0.001).below is None


def test_a_test_that_flags_everything_sees_every_ratio() -> None:
    """At level 1 even the likeliest count is flagged, so the ratio nearest to 1 is 1 itself."""
    assert reach(1, 9, 1, level=1.0).below == 1.0


@pytest.mark.parametrize("margins", [(0, 10, 5), (10, 0, 5), (10, 10, 0), (10, 10, 20)])
def test_where_nothing_can_be_compared_nothing_could_be_seen(margins: tuple[int, int, int]) -> None:
    """An empty side, none selected or all selected: no ratio either way."""
    found = reach(*margins, level=0.01)
    assert (found.below, found.above) == (None, None)
