"""Policy files: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import datetime
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from curate.auditing.columns import Column, column_of
from curate.errors import UsageError
from curate.marked_yaml import parse_yaml
from curate.policy.memberships import members_of
from curate.policy.schema import Policy, check_policy, read_policy

HEAD = "schema: 1\nauthor: A. Expert\ndate: 2026-11-20\nrationale: Because.\ncolumns:\n"  # five lines
WHOLE = """  - column: gender
    source: lexicon gender-en
    groups: [woman, {name: non-binary, min-ratio: 0.9, min_count: 50}]
    min_ratio: 0.8
    max_ratio: 1.25
    overlapping: true
    unknowns: group
    min_coverage: 0.3
    confounders: caption_length
  - column: tone
    source: labels tone.csv
    severity: warning
    groups: [dark, light]
    min_share: 0.5
"""


def policy(text: str) -> Policy:
    return check_policy(parse_yaml(HEAD + text, "p.yaml"))


def refusal(text: str, head: str = HEAD) -> str:
    with pytest.raises(UsageError) as caught:
        check_policy(parse_yaml(head + text, "p.yaml"))
    return str(caught.value)


def column(text: str) -> str:
    """A column that is fine, whose keys may be given again."""
    given = dict(line.split(":", 1) for line in text.split("\n"))
    lines = {"column": " c", "source": " s", "groups": " [a, b]", "min_ratio": " 0.8"} | given
    return "  - " + "\n    ".join(f"{key}:{value}" for key, value in lines.items())


def crossed(names: str) -> str:
    """An entry that crosses columns and is else fine."""
    return f"  - intersect: {names}\n    source: s\n    groups: [a & b]\n    min_ratio: 0.8"


def test_an_intersection_is_a_column_of_the_policy() -> None:
    """A list of names, or one text as `--intersect` takes it; it is called as an audit calls it, and so is its json."""
    for names in ("gender,tone", "[gender, tone]", "'gender, tone'"):
        [found] = policy(crossed(names)).columns
        assert (found.name, found.crossed, found.parts) == ("gender & tone", ("gender", "tone"), ("gender", "tone"))
        assert found.as_json()["intersect"] == ["gender", "tone"]
    [found] = policy(crossed("""'gender,"height, in cm"'""")).columns
    assert found.crossed == ("gender", "height, in cm")
    whole = policy(WHOLE + crossed("gender,tone"))
    assert [bound.name for bound in whole.bounds][-1] == "gender & tone=a & b"
    assert "intersect" not in whole.columns[0].as_json()
    known = {"gender": ["woman", "non-binary"], "tone": ["dark", "light"], "caption_length": []}
    whole.require(known | {"gender & tone": ["a & b"]})
    for change, message in (
        ({"gender & tone": ["a & c"]}, "p.yaml:22: columns.2.groups.0: no group of gender & tone is called 'a & b'"),
        ({}, "p.yaml:20: columns.2.intersect: no column is called 'gender & tone'"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            whole.require(known | change)
        assert message in str(caught.value)


def test_a_policy_is_read_with_bounds_inherited_and_exact(tmp_path: Path) -> None:
    """A group has its column's bounds unless it has its own; unknowns become the last group; 0.8 is 4/5."""
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + WHOLE)
    found = read_policy(path)
    assert (found.author, found.date, found.rationale) == ("A. Expert", datetime.date(2026, 11, 20), "Because.")
    gender, tone = found.columns
    assert [(one.name, one.min_ratio, one.max_ratio, one.min_count) for one in gender.groups] == [
        ("woman", Fraction(4, 5), Fraction(5, 4), None),
        ("non-binary", Fraction(9, 10), Fraction(5, 4), 50),
        ("unknown", Fraction(4, 5), Fraction(5, 4), None),
    ]
    assert (gender.source, gender.min_coverage, gender.confounders) == ("lexicon gender-en", 0.3, ("caption_length",))
    assert (tone.severity, tone.unknowns, tone.overlapping, tone.groups[1].min_share) == ("warning", "free", False, 0.5)
    assert [bound.name for bound in found.bounds][2:4] == ["gender=unknown", "tone=dark"]
    said = found.as_json()
    assert json.loads(json.dumps(said)) == said
    assert said["columns"][0]["groups"][1] == {
        "name": "non-binary", "min_ratio": 0.9, "max_ratio": 1.25, "min_count": 50
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (column("min_ration: 0.8"), "p.yaml:10: columns.0.min_ration: unknown; did you mean 'min_ratio'?"),
        (column("groups: [a, {name: b, min_cuont: 3}]"), "p.yaml:8: columns.0.groups.1.min_cuont: unknown; did"),
        (column("min_ratio: '0.8'"), "p.yaml:9: columns.0.min_ratio: '0.8': Input should be a valid number"),
        (column("min_ratio: -1"), "p.yaml:9: columns.0.min_ratio: -1: Input should be greater than or equal to 0"),
        (column("min_ratio: .nan"), "p.yaml:9: columns.0.min_ratio: nan: Input should be a finite number"),
        (column("min_count: 0.5"), "p.yaml:10: columns.0.min_count: 0.5: Input should be a valid integer"),
        (column("min_share: 1.5"), "p.yaml:10: columns.0.min_share: 1.5: Input should be less than or equal to 1"),
        (column("unknowns: drop"), "p.yaml:10: columns.0.unknowns: 'drop': Input should be 'free' or 'group'"),
        (column("severity: fatal"), "p.yaml:10: columns.0.severity: 'fatal': Input should be 'error' or 'warning'"),
        (column("groups: []"), "p.yaml:8: columns.0.groups: []: Value should have at least 1 item"),
        (column("groups: {a: 1}"), "p.yaml:8: columns.0.groups: a list expected here"),
        (column("groups: [1, a]"), "p.yaml:8: columns.0.groups.0.name: 1: write it in quotes: '1'"),
        (column('groups: ["a\\e[2J"]'), r"p.yaml:8: columns.0.groups.0.name: 'a\x1b[2J': U+001B in it cannot be seen"),
        (column('groups: [{name: "a\\u202eb"}]'), "p.yaml:8: columns.0.groups.0.name: 'a\\u202eb': U+202E in it"),
        (column("groups: [a, a]"), "p.yaml:8: columns.0.groups: 'a' is named twice"),
        (column("groups: [a, unknown]\nunknowns: group"), "'unknown' is named twice, and unknowns are a group"),
        (column("source: ''"), "p.yaml:7: columns.0.source: ''"),
        (column("max_ratio: 0.5"), "p.yaml:10: columns.0.max_ratio: min_ratio 0.8 of 'a' is above its max_ratio 0.5"),
        (
            column("max_ratio: 1.2\ngroups: [a, {name: b, min_ratio: 1.3}]"),
            "p.yaml:8: columns.0.groups.1.min_ratio: min_ratio 1.3 of 'b' is above its max_ratio 1.2",
        ),
        (column("min_ratio:"), "p.yaml:8: columns.0.groups.0: nothing is asked of 'a'; give it one of min_ratio"),
        (
            column("groups: [{name: a, min_share: 0.7}, {name: b, min_share: 0.4}]"),
            "p.yaml:8: columns.0.groups: min_share adds up to 1.1 (a 0.7, b 0.4); lower them, or say overlapping",
        ),
        (column("min_share: 0.6"), "min_share adds up to 1.2"),
        (column("confounders: [d, c]"), "p.yaml:10: columns.0.confounders: 'c' would be compared within itself"),
        (column("severity: warning"), "p.yaml:5: columns: every column only warns"),
        (column("min_ratio: 1") + "\n" + column("min_ratio: 1"), "p.yaml:5: columns: column 'c' is given twice"),
        ("  - column: c\n    groups: [a]", "p.yaml:6: columns.0.source: is missing"),
        ("  - source: s\n    groups: [a]\n    min_ratio: 1", "p.yaml:6: columns.0.column: is missing; name a column"),
        (column("intersect: a,b"), "p.yaml:10: columns.0.intersect: its column is 'c'; give one of the two"),
        (crossed("a"), "p.yaml:6: columns.0.intersect: 'a': name two columns or more"),
        (crossed("[a]"), "p.yaml:6: columns.0.intersect: ['a']: name two columns or more"),
        (crossed("a,b,a"), "p.yaml:6: columns.0.intersect: 'a,b,a': 'a' is named twice"),
        (crossed("'a,\"b'"), "write names as a CSV does"),
        (crossed("'a,,b'"), "p.yaml:6: columns.0.intersect.1: ''"),
        (crossed("[a, 7]"), "p.yaml:6: columns.0.intersect.1: 7: write it in quotes: '7'"),
        (crossed("{a: b}"), "p.yaml:6: columns.0.intersect: "),
        (crossed("a,b") + "\n" + crossed("[a, b]"), "p.yaml:5: columns: column 'a & b' is given twice"),
        (crossed("a,b\n    intersekt: 1"), "p.yaml:7: columns.0.intersekt: unknown; did you mean 'intersect'?"),
        ("  - c", "p.yaml:6: columns.0: keys and values expected here"),
        ("  ~", "p.yaml:5: columns: a list expected here"),
    ],
)  # fmt: skip
def test_a_refusal_names_file_line_and_field(text: str, message: str) -> None:
    """Unknown keys, wrong types, and bounds that contradict each other: line and field are named."""
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("", "p.yaml: a policy has keys and values"),
        ("- 1", "p.yaml:1: a policy has keys and values"),
        (HEAD.replace("author", "auther"), "p.yaml:2: auther: unknown; did you mean 'author'?; p.yaml:1: author: is"),
        (HEAD.replace("2026-11-20", "last week"), "p.yaml:3: date: 'last week': Invalid isoformat string"),
        (HEAD.replace("2026-11-20", "20"), "p.yaml:3: date: 20: "),
        (HEAD.replace("schema: 1", "schema: 2"), "p.yaml:1: schema: 2: Input should be 1"),
        (HEAD.replace("Because.", "' '"), "p.yaml:4: rationale: ' '"),
    ],
)  # fmt: skip
def test_the_head_of_a_policy_is_owed(head: str, message: str) -> None:
    """Author, date and rationale are no decoration: without them there is no policy."""
    assert message in refusal(WHOLE if head.startswith("schema") else "", head)


def test_shares_of_overlapping_groups_may_sum_above_one() -> None:
    """One row can count for several groups where the column says so."""
    assert policy(column("min_share: 0.6\noverlapping: true")).columns[0].groups[0].min_share == Fraction(3, 5)


def test_columns_and_groups_that_no_row_has_are_named_with_their_line() -> None:
    """What the data do not have is refused with the nearest name that they do."""
    found = policy(WHOLE)
    known = {"gender": ["woman", "man", "non-binary"], "tone": ["dark", "light"], "caption_length": ["long"]}
    found.require(known)
    for change, message in (
        ({"gender": ["women", "non-binary"]}, "p.yaml:8: columns.0.groups.0: no group of gender is called 'woman'"),
        ({"gender": ["woman", "man"]}, "p.yaml:8: columns.0.groups.1: no group of gender is called 'non-binary'"),
        ({"tone": [f"t{n}" for n in range(20)]}, "no group of tone is called 'dark'; there are t0, t1"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            found.require(known | change)
        assert message in str(caught.value)
    for missing, message in (
        ("tone", "p.yaml:15: columns.1.column: no column is called 'tone'"),
        ("caption_length", "p.yaml:14: columns.0.confounders: no column is called 'caption_length'"),
    ):
        with pytest.raises(UsageError) as caught:
            found.require({name: groups for name, groups in known.items() if name != missing})
        assert message in str(caught.value)


def test_memberships_follow_the_order_of_the_policy() -> None:
    """Each group of each column is one column of the matrix; unknown rows are the group that the policy makes them."""
    woman_NG = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], dtype=bool)
    gender = Column("gender", "mention", "test", ("non-binary", "woman"), members_NG=woman_NG,
                    known_N=np.array([True, True, True, False]))  # fmt: skip
    tone = column_of(["light", None, "dark", "mid"], name="tone", kind="label", provenance="test")
    length = column_of(["x"] * 4, name="caption_length", kind="label", provenance="test")
    found = members_of(policy(WHOLE), {"gender": gender, "tone": tone, "caption_length": length})
    assert found.astype(int).tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    disjoint = WHOLE.replace("    overlapping: true\n", "")
    with pytest.raises(UsageError, match=r"p\.yaml:6: columns\.0: 1 rows are in several groups of gender"):
        members_of(policy(disjoint), {"gender": gender, "tone": tone, "caption_length": length})
