"""Composition, shrinkage, associations, exposures, losses, early against late and placebos, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from curate.auditing.association import associations, with_q
from curate.auditing.clusters_as_units import read_clusters
from curate.auditing.columns import Column
from curate.auditing.composition import composition
from curate.auditing.exposures import early_and_late, exposures
from curate.auditing.losses import losses, quantiles
from curate.auditing.membership import Membership, membership_of
from curate.auditing.placebo import placebo, random_selection
from curate.auditing.shrinkage import shrunken


def column(*codes: int, groups: int = 2) -> Membership:
    """A column of groups a, b, c, ... by code, -1 for unknown."""
    names = tuple("abcdefghij"[:groups])
    return membership_of(Column("c", "label", "made up", names, np.array(codes, np.int32)))


def test_composition_is_half_the_absolute_differences_and_jensen_and_shannons_bits() -> None:
    """(50, 50) to (30, 10): total variation 0.25, divergence as the two relative entropies to the mean."""
    found = composition(np.array([50.0, 50.0]), np.array([30.0, 10.0]), seed=1)
    assert found is not None
    p, q = (0.5, 0.5), (0.75, 0.25)
    bits = sum(
        x * math.log2(2 * x / (x + y)) / 2 + y * math.log2(2 * y / (x + y)) / 2 for x, y in zip(p, q, strict=True)
    )
    assert found.total_variation.value == pytest.approx(0.25)
    assert found.jensen_shannon.value == pytest.approx(bits)
    for shift in (found.total_variation, found.jensen_shannon):
        assert shift.low < shift.value < shift.high
        assert 0 < shift.by_chance < shift.low


def test_chance_alone_makes_the_shift_that_is_told() -> None:
    """By chance 40 of 100 in two halves differ by the mean absolute deviation of a hypergeometric count."""
    found = composition(np.array([50.0, 50.0]), np.array([20.0, 20.0]), seed=1)
    k = np.arange(41)
    expected = (stats.hypergeom.pmf(k, 100, 50, 40) * np.abs(k / 40 - 0.5)).sum()
    assert found is not None
    assert found.total_variation.value == 0
    assert found.total_variation.by_chance == pytest.approx(expected, rel=0.1)
    assert composition(np.array([50.0, 50.0]), np.zeros(2), seed=1) is None


def test_a_bootstrap_is_the_same_for_the_same_seed() -> None:
    """Another seed moves the interval a little, the same one not at all."""
    n, k = np.array([50.0, 80.0, 20.0]), np.array([30.0, 10.0, 3.0])
    assert composition(n, k, seed=1) == composition(n, k, seed=1)
    assert composition(n, k, seed=1) != composition(n, k, seed=2)


def test_shrinkage_moves_small_groups_to_the_others() -> None:
    """2 of 2 beside nine groups of 20 of 100 becomes about 0.2; where rates differ widely it stays larger."""
    alike = shrunken(np.array([20.0] * 9 + [2.0]), np.array([100.0] * 9 + [2.0]))
    apart = shrunken(np.array([5.0, 95, 20, 80, 50, 2]), np.array([100.0] * 5 + [2]))
    assert alike is not None
    assert apart is not None
    assert 0.2 < alike[-1].value < 0.25
    assert 0.6 < apart[-1].value < 1
    assert all(one.low <= one.value <= one.high for one in (*alike, *apart))
    assert shrunken(np.array([1.0, 2.0]), np.array([5.0, 5.0])) is None


def test_shrinkage_finds_the_prior_that_made_the_groups() -> None:
    """Of 300 groups drawn from beta(4, 16), an empty group's rate is 0.2 and its interval that of the prior."""
    random = np.random.default_rng(3)
    k = random.binomial(50, random.beta(4, 16, 300)).astype(float)
    found = shrunken(np.append(k, 0.0), np.append(np.full(300, 50.0), 0.0))
    assert found is not None
    assert found[-1].value == pytest.approx(0.2, abs=0.015)
    assert (found[-1].low, found[-1].high) == pytest.approx(stats.beta.ppf([0.025, 0.975], 4, 16), abs=0.03)


def test_a_change_of_association_is_a_ratio_of_odds_ratios() -> None:
    """Pool cells 100 each, of which 10, 30, 40 and 40 are selected: 10 x 40 / (30 x 40) = 1/3, interval by hand."""
    group_N = np.repeat([0, 0, 1, 1], 100)
    concept_N = np.tile(np.repeat([True, False], 100), 2)
    selected_N = np.concatenate([np.arange(100) < k for k in (10, 30, 40, 40)])
    found = with_q(associations(column(*group_N), {"doctor": concept_N}, selected_N, np.ones(400)))
    one = next(each for each in found if each.group == "a")
    error = math.sqrt(sum(1 / k - 1 / 100 for k in (10, 30, 40, 40)))
    assert one.change is not None
    assert one.pool_odds_ratio == pytest.approx(1)
    assert (one.change.value, one.change.high) == pytest.approx((1 / 3, math.exp(math.log(1 / 3) + 1.959964 * error)))
    assert one.p == pytest.approx(2 * stats.norm.sf(math.log(3) / error))
    assert (one.pool_together, one.selected_together) == (100, 10)
    assert {each.group: each.change.value for each in found if each.change}["b"] == pytest.approx(3)


@pytest.mark.parametrize("seed", range(3))
def test_associations_are_those_of_four_cells_counted_one_by_one(seed: int) -> None:
    """With overlapping groups, unknown rows and votes: each cell is the sum over its rows, as a loop has it."""
    random = np.random.default_rng(seed)
    N = 400
    known_N = random.random(N) < 0.9
    members_NG = (random.random((N, 3)) < 0.5) & known_N[:, None]
    given = Column("c", "label", "by hand", ("a", "b", "c"), members_NG=members_NG, known_N=known_N)
    concept_N, selected_N = random.random(N) < 0.4, random.random(N) < 0.5
    weight_N = random.choice([0.25, 0.5, 1.0], N)
    for one in associations(membership_of(given), {"x": concept_N}, selected_N, weight_N):
        member_N = members_NG[:, "abc".index(one.group)]
        rate = {}
        for cell in (0, 1, 2, 3):
            rows = [r for r in range(N) if known_N[r] and 2 * member_N[r] + concept_N[r] == cell]
            rate[cell] = sum(weight_N[r] for r in rows if selected_N[r]) / sum(weight_N[r] for r in rows)
        assert one.change is not None
        assert one.change.value == pytest.approx(rate[3] * rate[0] / (rate[1] * rate[2]))
        assert one.pool_together == sum(member_N & concept_N)
        assert one.selected_together == sum(member_N & concept_N & selected_N)


def test_a_concept_that_is_never_there_has_no_association() -> None:
    """Empty or tiny cells of the pool give no ratio; an empty cell of the selection gives a finite one."""
    selected_N = np.arange(40) % 2 == 0
    never = associations(column(*[0, 1] * 20), {"x": np.zeros(40, bool)}, selected_N, np.ones(40))[0]
    assert (never.change, never.pool_odds_ratio) == (None, None)
    few = associations(column(*[0, 0, 1, 1] * 10), {"x": np.arange(40) < 1}, np.arange(40) < 1, np.ones(40))[0]
    assert (few.pool_together, few.selected_together, few.change, few.p) == (1, 1, None, None)
    some = associations(column(*[0, 0, 1, 1] * 20), {"x": np.arange(80) < 40}, np.arange(80) >= 38, np.ones(80))[0]
    assert some.change is not None
    assert math.isfinite(some.change.low)


def test_exposures_are_apart_from_unique_examples() -> None:
    """Two rows drawn 1 and 3 times of 8 draws: 4 exposures, half of all, 2 per row; a group never drawn has none."""
    a, b, c = exposures(column(0, 0, 1, 1, 2, groups=3), np.array([1, 3, 4, 0, 0]))
    assert (a.exposures, a.share, a.per_selected) == (4, 0.5, 2.0)
    assert (b.exposures, b.per_selected) == (4, 4.0)
    assert (c.exposures, c.share, c.per_selected) == (0, 0.0, None)


def test_early_and_late_sub_batches_are_told_apart() -> None:
    """Group a in sub-batches 0 and 1 of 4, b in 2 and 3: a's late rows are none of its 40, b's all."""
    codes = np.repeat([0, 1], 40)
    sub_batch_N = np.concatenate([np.arange(40) % 2, 2 + np.arange(40) % 2])
    a, b = early_and_late(column(*codes), sub_batch_N, np.ones(80, bool))
    assert (a.early, a.late, b.early, b.late) == (40, 0, 0, 40)
    assert a.ratio is not None
    assert a.p is not None
    assert a.ratio.high < 0.2
    assert a.p < 1e-9
    assert a.q == a.p  # both groups have the same p
    nobody = early_and_late(column(*codes), sub_batch_N, np.zeros(80, bool))
    assert (nobody[0].early, nobody[0].ratio) == (0, None)


@pytest.mark.parametrize(
    ("learner", "reference", "quadrant"),
    [
        (-2.0, -2.0, "already learned"),
        (2.0, -2.0, "worth learning"),
        (2.0, 2.0, "hard for the reference too"),
        (-2.0, 2.0, "learned beyond the reference"),
        (0.0, 0.0, "in the middle"),
    ],
)
def test_the_two_losses_tell_remedies_apart(learner: float, reference: float, quadrant: str) -> None:
    """A group's medians against the pool's decide its quadrant; its means are those of its finite rows."""
    random = np.random.default_rng(4)
    codes, x, y = np.repeat([0, 1], [50, 950]), random.standard_normal(1000), random.standard_normal(1000)
    x[:50], y[:50] = learner + x[:50] * 0.01, reference + y[:50] * 0.01
    x[0] = math.nan
    found = losses(column(*codes), x, y)[0]
    assert found.quadrant == quadrant
    assert found.rows == 49
    assert found.learner == pytest.approx(x[1:50].mean())
    assert found.reference == pytest.approx(y[1:50].mean())


def test_a_few_losses_have_no_quadrant() -> None:
    """Nine rows have means and no quadrant, none have neither."""
    few, none = losses(column(*[0] * 9, groups=2), np.arange(9.0), np.arange(9.0))
    assert (few.rows, few.learner, few.quadrant) == (9, 4.0, None)
    assert (none.rows, none.learner) == (0, None)


def test_quantiles_are_those_of_finite_scores() -> None:
    """0 to 10 with a NaN: the median is 5, the tenth 1."""
    found = quantiles(column(*[0] * 12, groups=2), np.array([*range(11), math.nan]))
    assert found == ((1.0, 2.5, 5.0, 7.5, 9.0), None)


def test_a_random_selection_has_the_size_the_seed_and_the_copies() -> None:
    """Equal size, the same rows for the same seed and draw; copies with rho 1 go together, but for the last one."""
    cluster_N = np.repeat(np.arange(100), 3)
    clusters = read_clusters(cluster_N, np.repeat(np.arange(100) % 2 == 0, 3))
    one = random_selection(300, 90, clusters, seed=1, draw=0)
    assert one.sum() == 90
    assert np.array_equal(one, random_selection(300, 90, clusters, seed=1, draw=0))
    assert not np.array_equal(one, random_selection(300, 90, clusters, seed=1, draw=1))
    assert set(np.bincount(cluster_N, one).tolist()) == {0.0, 3.0}
    assert random_selection(300, 0, None, seed=1, draw=0).sum() == 0


def test_a_placebo_counts_its_flags_per_draw() -> None:
    """So many draws, the number of tests, and no tests where all rows are selected."""
    members = column(*[0, 1] * 50)
    found = placebo([members], ["all"], 30, None, rows=100, alpha=0.05, seed=0, draws=5)
    assert (len(found.flags), found.tests) == (5, 2)
    assert found.with_any == sum(flags > 0 for flags in found.flags)
    assert placebo([members], ["all"], 100, None, rows=100, alpha=0.05, seed=0, draws=2).tests == 0
    sure = placebo([members], ["all"], 30, None, rows=100, alpha=0.999999, seed=0, draws=20)
    assert sure.with_any > 0


def test_the_interval_of_a_shift_holds_its_value() -> None:
    """Of many small groups a redrawn table is further apart than its source; the interval has the value in it."""
    n_G = np.full(1000, 50.0)
    k_G = np.random.default_rng(0).binomial(50, 0.2, 1000).astype(float)
    found = composition(n_G, k_G, seed=0)
    assert found is not None
    for shift in (found.total_variation, found.jensen_shannon):
        assert 0 < shift.low < shift.value < shift.high < 1
    assert found.total_variation.value == pytest.approx(found.total_variation.by_chance, rel=0.05)
