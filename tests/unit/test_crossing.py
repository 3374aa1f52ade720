"""What crossings are called beside other columns, and what to type for names with commas."""

from __future__ import annotations

import itertools
import shlex

import numpy as np
import pytest

from curate.auditing.assembling import assemble
from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, column_of, crossed_names
from curate.auditing.crossing import crossings, quoting_hint
from curate.auditing.report.mixing import crossed
from curate.auditing.request import AuditRequest
from curate.errors import UsageError
from tests.unit.test_audit_foreign import pool, read

N = 60


def columns(*names: str) -> dict[str, Column]:
    """Columns of two groups each, all different."""
    values = {name: [f"{'xy'[n // (place + 1) % 2]}" for n in range(N)] for place, name in enumerate(names)}
    return {name: column_of(values[name], name=name, kind="label", provenance=f"of {name}") for name in names}


def names_of(given: tuple[str, ...], *asked: tuple[str, ...]) -> list[str]:
    return [one.name for one in crossings(columns(*given), asked)]


def test_a_crossing_has_a_name_of_its_own() -> None:
    """Plain where nothing else is called that; else with its columns in quotes, also where two crossings collide."""
    assert names_of(("a", "b", "c"), ("a", "b"), ("b", "c")) == ["a & b", "b & c"]
    assert names_of(("a", "b", "a & b"), ("a", "b")) == ['"a" & "b"']
    assert names_of(("a", "b", "c", "a & b", "b & c"), ("a & b", "c"), ("a", "b & c"), ("a", "c")) == [
        '"a & b" & "c"', '"a" & "b & c"', "a & c"
    ]  # fmt: skip
    assert names_of(("a", "b", "a & b", '"a" & "b"'), ("a", "b")) == ['"a" & "b" (crossed)']
    assert names_of(("a", 'b"', 'a & b"'), ("a", 'b"')) == ['"a" & "b"""']


def test_a_column_and_a_crossing_of_one_name_are_told_apart() -> None:
    """In the audit's columns, its JSON, its rows and its figures each stands for itself, with its own counts."""
    given = columns("a", "b", "a & b")
    selected_N = np.arange(N) % 3 > 0
    audited = audit_columns(list(given.values()), selected_N, intersections=[("a", "b")], placebos=2)
    assert [one.name for one in audited.columns] == ["a", "b", "a & b", '"a" & "b"']
    assert [one["name"] for one in audited.as_json()["columns"]] == ["a", "b", "a & b", '"a" & "b"']
    counts = {(row.column, row.group): row.pool for one in audited.columns for row in one.groups}
    assert counts["a & b", "x"] == sum(name == 0 for name in given["a & b"].members.argmax(1))
    both = given["a"].members[:, 0] & given["b"].members[:, 0]
    assert counts['"a" & "b"', "x & x"] == both.sum()
    [figure] = crossed(audited.columns[-1], audited)
    assert figure.chart.title == 'Ratios where "a" & "b" cross'
    assert not list(crossed(audited.columns[2], audited))


@pytest.mark.parametrize(
    ("asked", "known", "typed"),
    [
        ("gender,height, in cm", ["gender", "height, in cm"], "gender,\"height, in cm\""),
        ("height,in cm,gender", ["gender", "height, in cm"], "\"height, in cm\",gender"),
        ("a,b,c,d", ["a,b", "c,  d", "x"], '"a,b","c,  d"'),
        ("a,b,c", ["a", "b,c", "a,b", "c"], 'a,"b,c"'),  # either would do
        ("a,b", ["a,b"], '"a,b",ANOTHER'),
        ('a,"b"c",d', ["a", '"b"c",d'], None),
        ("a,it's,so", ["a", "it's,so"], "a,\"it's,so\""),
        ("a,b,c,nothing", ["a", "b,c"], 'a,"b,c",nothing'),
    ],
)  # fmt: skip
def test_names_cut_at_their_commas_are_put_together(asked: str, known: list[str], typed: str | None) -> None:
    """The hint is an option that a shell hands over as names that are all known, as far as there are any."""
    if typed is None:
        with pytest.raises(UsageError, match="write names as a CSV does"):
            crossed_names(asked)
        return
    hint = quoting_hint(crossed_names(asked), known)
    option, text = shlex.split(hint)
    assert (option, text) == ("--intersect", typed)
    again = [name for name in crossed_names(text) if name not in ("ANOTHER", "nothing")]
    assert {name.replace(" ", "") for name in again} <= {name.replace(" ", "") for name in known}


def test_nothing_is_hinted_where_nothing_would_help() -> None:
    """Known parts, and parts that no joining makes known, stay as they are."""
    for parts in (["a", "b"], ["a", "nothing"], ["nothing", "at all"]):
        assert quoting_hint(parts, ["a", "b", "c,d"]) == ""


def test_the_hint_is_the_best_of_all_ways_to_join() -> None:
    """Against every way to cut the list: fewest unknown names, then fewest commas put back."""
    parts = ("a", "b", "c", "d")
    every = [",".join(parts[i:j]) for i, j in itertools.combinations(range(5), 2)]
    for known in itertools.combinations(every, 3):
        ways = []
        for cuts in itertools.product((False, True), repeat=3):
            names = "".join(p + (";" if c else ",") for p, c in zip(parts, (*cuts, True), strict=True))[:-1].split(";")
            if all(name in known or "," not in name for name in names):
                ways.append((sum(name not in known for name in names), 4 - len(names), names))
        lost, glued, _ = min(ways)
        hint = quoting_hint(parts, known)
        found = crossed_names(shlex.split(hint)[1]) if hint else parts
        found = tuple(name for name in found if name != "ANOTHER")
        assert (sum(name not in known for name in found), 4 - len(found)) == (lost, glued)


def test_an_unknown_part_of_a_name_is_refused_with_what_to_type(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A column "height, in cm" of the pool, crossed without quotes: the error ends with the option, quoted."""
    folder = tmp_path_factory.mktemp("pool")
    assert pool(folder).is_file()
    found = read(folder, "a\n", **{"height, in cm": ["s", "t", "s", "t"], "tone": ["d", "d", "l", "l"]})
    request = AuditRequest(intersect=(("tone", "height", "in cm"),))
    with pytest.raises(UsageError, match="no column 'height'") as caught:
        assemble(found.rows, found.traits, request)
    hint = "; a name with a comma is quoted as in a CSV: --intersect 'tone,\"height, in cm\"'"
    assert str(caught.value).endswith(hint)
    with pytest.raises(UsageError) as caught:
        assemble(found.rows, found.traits, AuditRequest(intersect=(("tone", "hight"),)))
    assert "quoted" not in str(caught.value)
