"""`audit_columns` as a whole: what it takes, what it refuses, and the words its findings are told in."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from curate.auditing.association import Association
from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, LabelError
from curate.auditing.membership import as_column, bins, membership_of
from curate.auditing.outcome import Audit
from curate.auditing.placebo import Placebo
from curate.auditing.power import reach
from curate.auditing.sentences import association, chance, finding, findings, flagged
from curate.auditing.strata import Ratio
from curate.errors import UsageError

FORBIDDEN = re.compile(r"\b(?:un)?(?:fair|biased|compliant|fine)\w*|no bias|unfair|discriminat|legal", re.IGNORECASE)


@pytest.fixture(scope="module")
def audit() -> Audit:
    """A group kept at 0.1 among others at 0.2, copies, two confounders, losses, draws and concepts."""
    random, N = np.random.default_rng(1), 8000
    tone_N = random.integers(0, 4, N)
    selected_N = random.random(N) < np.where(tone_N == 1, 0.1, 0.2)
    labels = np.array(["dark", "light", "medium", None], dtype=object)[tone_N]
    mention = {"women": random.random(N) < 0.3, "men": random.random(N) < 0.3}
    masks_NG = np.stack(list(mention.values()), axis=1)
    captions = Column(
        "gender", "mention", "a lexicon", ("women", "men"), members_NG=masks_NG, known_N=np.ones(N, bool),
        label_error=LabelError(0.9, 0.95),
    )  # fmt: skip
    return audit_columns(
        [as_column("tone", labels, N), captions, as_column("age", random.integers(0, 3, N), N)],
        selected_N,
        selected_N * random.integers(1, 4, N),
        np.where(random.random(N) < 0.3, random.integers(0, 900, N), -1),
        {"caption length": bins(random.integers(5, 60, N), 4), "size": random.integers(0, 2, N)},
        intersections=[("tone", "age")],
        families={"age": "declared apart"},
        learner_loss_N=random.random(N),
        reference_loss_N=random.random(N),
        score_N=random.random(N),
        sub_batch_N=random.integers(0, 9, N),
        concepts={"doctor": random.random(N) < 0.2},
        placebos=4,
    )


def test_the_audit_is_plain_json(audit: Audit) -> None:
    """`as_json` survives strict JSON, and keeps every group with its numbers."""
    plain = json.loads(json.dumps(audit.as_json(), allow_nan=False))
    assert plain["flags"] == audit.flags
    assert [row["group"] for row in plain["columns"][0]["groups"]] == ["dark", "light", "medium", "unknown"]
    row = plain["columns"][0]["groups"][1]
    assert row["pool"] == row["selected"] + row["never_selected"]
    assert [held["confounder"] for held in row["conditional"]] == ["caption length", "size", "caption length and size"]
    assert row["exposures"]["exposures"] >= row["selected"]
    assert row["early_late"]["early"] + row["early_late"]["late"] == row["selected"]


def test_every_statistic_is_there(audit: Audit) -> None:
    """Families, duplicates, composition, shrinkage for intersections only, corrected ratios where errors are known."""
    tone, gender, age, crossed = audit.columns
    assert audit.tests == {"all": 4 + 2 + 10, "declared apart": 3}
    assert (tone.unknown_share, gender.overlapping, age.family) == (
        pytest.approx(0.25, abs=0.03),
        True,
        "declared apart",
    )
    assert tone.composition is not None
    assert gender.composition is None
    assert all(row.corrected for row in gender.groups)
    assert not any(row.corrected for row in tone.groups)
    assert all(row.shrunken for row in crossed.groups)
    assert not any(row.shrunken for row in tone.groups)
    assert audit.rho is not None
    assert audit.rho < 0.3
    assert len(audit.placebo.flags) == 4
    assert {one.concept for one in audit.associations} == {"doctor"}


def test_a_flag_is_told_with_ratio_interval_and_confounders(audit: Audit) -> None:
    """The planted group's finding comes first, in the words of the wording rules."""
    first = findings(audit)[0]
    pattern = r"Samples with tone.* were kept 0\.\d\d times as often as the rest \(0\.\d\d-0\.\d\d\); detected and "
    assert re.match(pattern, first)
    assert re.search(r"could be explained by caption length: no \(within equal caption length 0\.\d\d \(", first)


def test_no_sentence_gives_a_verdict(audit: Audit) -> None:
    """No finding of any row, pair or placebo says fair, unbiased, compliant, fine or no bias."""
    kinds = {column.name: column.kind for column in audit.columns}
    told = [*findings(audit), *(finding(row, kinds[row.column]) for row in audit.rows)]
    told += [association(one) for one in audit.associations]
    assert [line for line in told if FORBIDDEN.search(line)] == []
    assert FORBIDDEN.search("this is fair")


def test_silence_is_told_with_its_reach(audit: Audit) -> None:
    """Whatever was not detected could not have been seen above a ratio that is named."""
    quiet = [row for row in audit.rows if row.level == "not detected"]
    assert quiet
    for row in quiet:
        assert re.search(
            r"nothing detected.*could not have seen a(?:ny)? ratio (?:above 0\.\d\d|below 1)", finding(row)
        )
    mention = next(row for row in quiet if row.group == "men")
    assert finding(mention, "mention").startswith("captions that mention men: nothing detected at ")


def test_a_small_group_could_not_have_been_seen() -> None:
    """Of five rows none is selected: nothing is detected, and no ratio below 1 could have been."""
    labels = ["few"] * 5 + ["many"] * 495
    row = audit_columns({"c": labels}, np.arange(500) % 5 == 4, placebos=0).rows[0]
    assert row.could_see.below is None
    assert "could not have seen any ratio below 1" in finding(row)


def test_the_reach_is_that_of_the_family() -> None:
    """Among five groups of 200 a lone disparity needs p of 0.01, and that is the level of the reach that is told."""
    audit = audit_columns({"c": np.repeat(np.arange(5), 200)}, np.arange(1000) % 5 == 0, placebos=0)
    assert audit.rows[0].could_see == reach(200, 800, 200, level=0.05 / 5)


@pytest.mark.parametrize(("names", "told"), [("ab", ["b"]), ("abc", ["b", "a"])])
def test_two_sides_of_one_disparity_are_told_once(names: str, told: list[str]) -> None:
    """Of a column of two groups the one kept less often is named; of more groups, all that are flagged."""
    group_N = np.array(list(names * 1000))
    random = np.random.default_rng(0).random(len(group_N))
    rate_N = np.select([group_N == "a", group_N == "b"], [0.6, 0.2], 0.4)
    found = audit_columns({"group": group_N}, random < rate_N, placebos=0)
    assert [row.group for row in flagged(found)] == told
    assert all(row.flagged for row in found.rows[:2])


def test_what_cannot_be_compared_says_why() -> None:
    """All selected, none selected and a single group are answers with a reason, without p, ratio or flag."""
    labels = ["a", "b"] * 10
    for selected_N, given, why in [
        (np.ones(20, bool), labels, "every row was selected"),
        (np.zeros(20, bool), labels, "no row was selected"),
        (np.arange(20) % 2 == 0, ["a"] * 20, "no other rows to compare with"),
    ]:
        audit = audit_columns({"c": given}, selected_N)
        assert {row.untested for row in audit.rows} == {why}
        assert (audit.flags, audit.placebo.tests) == (0, 0)
        assert all(row.p is None and row.ratio is None and row.rate is not None for row in audit.rows)
        assert why in finding(audit.rows[0])
        json.dumps(audit.as_json(), allow_nan=False)


def test_a_group_without_rows_stays_a_row() -> None:
    """A declared group that the pool does not have is listed with zero rows and no rate."""
    column = Column("c", "label", "x", ("a", "b", "never"), np.array([0, 1] * 10, np.int32))
    row = audit_columns([column], np.arange(20) % 3 == 0).rows[2]
    assert (row.pool, row.rate, row.untested, row.cohens_h) == (0, None, "no rows in the pool", None)


def test_a_group_with_none_of_the_rest_selected_is_told() -> None:
    """An infinite ratio is told by its lower limit and is null in JSON."""
    labels = ["a"] * 50 + ["b"] * 50
    audit = audit_columns({"c": labels}, np.arange(100) < 30)
    row = audit.rows[0]
    assert row.ratio is not None
    assert math.isinf(row.ratio.value)
    assert re.search(r"kept while none of the rest was \(a ratio of \d+\.\d\d or more\)", finding(row))
    assert audit.as_json()["columns"][0]["groups"][0]["ratio"]["value"] is None


def test_no_columns_is_an_answer() -> None:
    """An audit of nothing has no rows and no flags."""
    audit = audit_columns({}, [True, False])
    assert (audit.rows, audit.flags, audit.tests) == ((), 0, {})


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([None, "a", "", "  ", "a"], ("a", "unknown")),
        ([math.nan, 1.0, 2.0, 1.5, 1.0], ("1", "1.5", "2", "unknown")),
        (np.array([3, 1, 1, 2, 2]), ("1", "2", "3")),
        ([True, False, True, None, pd.NA], ("False", "True", "unknown")),
        (pa.array(["x", None, "y", "x", "y"]), ("x", "y", "unknown")),
        (["1", 1, 1.0, None, "unknown"], ("1", "unknown", "unknown (no label)")),
        ([None] * 5, ("unknown",)),
    ],
)
def test_labels_of_every_kind_become_groups(labels: Any, names: tuple[str, ...]) -> None:
    """Missing and blank labels are unknown, whole floats read as integers, the same text is the same group."""
    assert membership_of(as_column("c", labels, 5)).groups == names


def test_a_million_distinct_values_are_refused() -> None:
    """A column of names is no column of groups: the error says how many there are and how many may be."""
    with pytest.raises(UsageError, match=r"column 'name' has 1,000,000 distinct values; .* at most 1,000 groups"):
        as_column("name", np.arange(1_000_000), 1_000_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected_N": []}, "the pool is empty"),
        ({"selected_N": [1, 0, 1, 0]}, "selected_N: give true or false for each of the 4 rows"),
        ({"columns": {"c": ["a"]}}, "column 'c' has 1 values for 4 rows"),
        ({"columns": {"c": [["a"], ["b"], ["a"], ["b"]]}}, "column 'c': its values are no labels"),
        ({"columns": {"c": {"g": [1, 2, 0, 0]}}}, "column 'c', group 'g': a mask holds true and false only"),
        ({"times_N": [1, 0, 1]}, "times_N: give how often each of the 4 rows"),
        ({"times_N": [1, 0, 2, -1]}, "times_N: give how often each of the 4 rows"),
        ({"times_N": [1, 1, 1, 0]}, "row 1 was drawn 1 times, but selected is False"),
        ({"clusters_N": [1, 2]}, "clusters are one whole number per row: 4 of them"),
        ({"strata": {"length": [1, 2]}}, "column 'length' has 2 values for 4 rows"),
        ({"strata": {"m": {"g": [True] * 4}}}, "confounder 'm': its groups overlap"),
        ({"intersections": [("c", "d")]}, "intersection of c, d: name two columns or more of: c"),
        ({"families": {"d": "x"}}, "families names d, which is none of the columns: c"),
        ({"learner_loss_N": ["x"] * 4}, "learner_loss_N: "),
        ({"score_N": [1.0]}, "score_N has 1 values for 4 rows"),
        ({"sub_batch_N": [0, None, None, 1]}, "sub_batch_N: every selected row needs"),
        ({"concepts": {"d": [True]}}, "concept 'd': give true or false for each of the 4 rows"),
        ({"alpha": 5}, "alpha is 5"),
        ({"screen": (1.2, 2)}, r"screen is \(1.2, 2\)"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_audited_is_refused(change: dict[str, Any], message: str) -> None:
    """Each wrong argument is named with what to give instead."""
    given = {"columns": {"c": ["a", "b", "a", "b"]}, "selected_N": [True, False, True, False]} | change
    with pytest.raises(UsageError, match=message):
        audit_columns(given.pop("columns"), given.pop("selected_N"), **given)


def test_bins_are_about_equally_filled() -> None:
    """Ranges that name their ends; a missing number has none; equal numbers share a bin."""
    assert bins([1, 2, 30, 40, None], 2).tolist() == ["1 to 2", "1 to 2", "30 to 40", "30 to 40", None]
    assert set(bins([7] * 9, 3).tolist()) == {"7"}
    assert bins([None, math.nan, math.inf], 3).tolist() == [None, None, None]
    with pytest.raises(UsageError, match="bins are of numbers"):
        bins(["a", "b"])
    with pytest.raises(UsageError, match="1 bins separate nothing"):
        bins([1, 2], 1)


def test_hostile_names_are_shown_as_text() -> None:
    """Direction marks and line breaks in a group's name come out escaped in a sentence."""
    labels = ["a\u202eb\n"] * 50 + ["c"] * 50
    told = finding(audit_columns({"c": labels}, np.arange(100) % 2 == 0).rows[0])
    assert told.isprintable()
    assert "a\\u202eb\\n" in told


def test_pairs_and_placebos_in_words() -> None:
    """A loosened pair is "less associated"; placebos give their span."""
    pair = Association("gender", "she", "doctor", 90, 9, 1.0, Ratio(0.5, 0.4, 0.6), 0.001, 0.002)
    assert (
        association(pair)
        == "'doctor' with gender she: less associated than in the pool, odds ratio times 0.50 (0.40-0.60)"
    )
    assert (
        chance(Placebo(0, 40, (0, 2, 0)), 5) == "5 flags of 40 tests; 3 random selections of equal size raised 0 to 2"
    )
    assert chance(Placebo(0, 40, ()), 1) == "1 flag; no random selections were audited"


def test_groups_that_could_not_be_compared_are_counted_with_the_reason() -> None:
    """All selected, or a group without a rest: no silence; groups that the pool does not have are left out."""
    whole = audit_columns({"tone": ["a", "b", "b"], "all": ["x"] * 3}, [True] * 3, placebos=0)
    assert "Tone: 2 of 2 groups could not be compared: every row was selected." in findings(whole)
    assert "All: 1 of 1 groups could not be compared: no other rows to compare with." in findings(whole)
    masks = {"tone": {"a": [True, False, False], "never": [False] * 3}}
    part = audit_columns(masks, [True, False, False], placebos=0)
    assert not any("no rows in the pool" in line for line in findings(part))


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_any_seed_gives_placebos(seed: int) -> None:
    """Also those above a signed number's largest; no warning comes of it."""
    found = audit_columns({"tone": ["a", "b"] * 50}, [True, False, False, True] * 25, seed=seed, placebos=3)
    assert len(found.placebo.flags) == 3
