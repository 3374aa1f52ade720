"""Conflicts that no selection escapes: found against brute force, blamed on the right line and field."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.policy.feasibility import find_conflict, refuse_conflict
from curate.policy.given import given_policy, pinned_policy
from curate.policy.schema import Policy, read_policy

HEAD = "schema: 1\nauthor: a\ndate: 2026-11-22\nrationale: r\ncolumns:\n"


def policy_of(path: Path, *columns: str) -> Policy:
    path.write_text(HEAD + "".join(f"  - column: c{n}\n    source: s\n{text}" for n, text in enumerate(columns)))
    return read_policy(path)


def possible(policy: Policy, member_NG: np.ndarray, size: int) -> bool:
    """Whether any selection of `size` keeps every bound, floors rounded down and ceilings up, by enumeration."""
    pool = len(member_NG)
    for rows in itertools.combinations(range(pool), size):
        count_G = member_NG[list(rows)].sum(axis=0)
        if all(within(bound, int(n), int(c), size, pool) for bound, n, c in zip(
            policy.bounds, member_NG.sum(axis=0), count_G, strict=True
        )):  # fmt: skip
            return True
    return False


def within(bound: object, n: int, count: int, size: int, pool: int) -> bool:
    even = Fraction(size * n, pool)
    low = max((bound.min_ratio or 0) * even, (bound.min_share or 0) * size, Fraction(bound.min_count or 0))  # type: ignore[attr-defined]
    high = bound.max_ratio  # type: ignore[attr-defined]
    return math.floor(low) <= count and (high is None or count <= math.ceil(high * even))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_conflict_is_found_exactly_where_no_selection_exists(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For small pools, overlapping groups and all kinds of bounds, as enumeration says."""
    pool, groups = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 3))
    cells = data.draw(st.lists(st.booleans(), min_size=pool * groups, max_size=pool * groups))
    member_NG = np.array(cells).reshape(pool, groups)
    asked = []
    for group in range(groups):
        kind = data.draw(st.sampled_from(["min_ratio: 0.9", "min_share: 0.5", "min_count: 2", "min_count: 1"]))
        most = data.draw(st.sampled_from(["", "    max_ratio: 1.1\n", "    max_ratio: 0.95\n"]))
        asked.append(f"    groups: [g{group}]\n    {kind}\n{most}")
    policy = policy_of(tmp_path_factory.mktemp("p") / "p.yaml", *asked)
    size = data.draw(st.integers(1, pool))
    assert (find_conflict(policy, member_NG, size) is None) == possible(policy, member_NG, size)


def test_the_bound_that_is_blamed_is_the_highest_floor(tmp_path: Path) -> None:
    """Of several floors the one that cannot be met is named by its own line, a column's by the column's."""
    member_NG = np.arange(10)[:, None] < 4
    own = policy_of(tmp_path / "p.yaml", "    min_ratio: 0.5\n    groups:\n      - name: g\n        min_count: 5\n")
    with pytest.raises(
        UsageError, match=r"p\.yaml:11: columns\.0\.groups\.0\.min_count: no selection can keep it: c0=g"
    ):
        refuse_conflict(own, member_NG, 6)
    column = policy_of(tmp_path / "p.yaml", "    groups: [g]\n    min_share: 0.9\n    min_count: 1\n")
    with pytest.raises(UsageError, match=r"p\.yaml:9: columns\.0\.min_share: .* Selected are 6 of 10"):
        refuse_conflict(column, member_NG, 6)
    refuse_conflict(column, member_NG, 4)


def test_columns_that_only_warn_are_no_conflict_and_shift_no_line(tmp_path: Path) -> None:
    """A warning before the error: the error's line is named, the warning's bound is not asked."""
    warns = "    severity: warning\n    groups: [g]\n    min_count: 99\n"
    member_NG = np.ones((10, 2), dtype=bool)
    policy = policy_of(tmp_path / "p.yaml", warns, "    groups: [h]\n    min_count: 50\n")
    with pytest.raises(
        UsageError, match=r"p\.yaml:14: columns\.1\.min_count: no selection can keep it: c1=h at least 50"
    ):
        refuse_conflict(policy, member_NG, 6)
    assert (
        find_conflict(policy_of(tmp_path / "p.yaml", warns, "    groups: [h]\n    min_count: 5\n"), member_NG, 6)
        is None
    )


def test_a_pinned_policy_is_the_one_that_was_given(tmp_path: Path) -> None:
    """Word for word, so that its lines can be named without the file."""
    policy_of(tmp_path / "p.yaml", "    groups: [g]\n    min_count: 5\n")
    (tmp_path / "l.csv").write_text("key,c0\n1,g\n")
    asked = given_policy(tmp_path / "p.yaml", tmp_path / "l.csv", "uid")
    assert asked is not None
    assert asked.settings.on == "uid"
    assert asked.settings.labels is not None
    assert len(asked.settings.labels) == 64
    again = pinned_policy(asked.settings, Path("RUN.json"))
    assert again.policy == asked.policy
    assert again.policy.marked.at("columns", 0, "min_count") == "the policy in RUN.json:9"
    assert again.labels is None


@pytest.mark.parametrize(
    ("policy", "labels", "on", "message"),
    [
        ("none.yaml", None, None, r"none\.yaml: No such file"),
        ("p.yaml", "none.csv", None, r"none\.csv: No such file"),
        ("p.yaml", None, "uid", "--on says how labels are joined; name them too"),
        (None, None, "uid", "--on: labels give groups to a policy"),
        (None, "l.csv", None, "--labels: labels give groups to a policy"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, policy: str | None, labels: str | None, on: str | None, message: str
) -> None:
    """Files that are not there, and options without the ones that they belong to."""
    policy_of(tmp_path / "p.yaml", "    groups: [g]\n    min_count: 5\n")
    (tmp_path / "l.csv").write_text("key,c0\n1,g\n")
    with pytest.raises(UsageError, match=message):
        given_policy(policy and tmp_path / policy, labels and tmp_path / labels, on)
    assert given_policy(None) is None
