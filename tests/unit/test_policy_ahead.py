"""What a policy is refused for before anything is scored, and what it must not be refused for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curate.auditing.traits import FIELD, TEXT, caption_reader, with_facts
from curate.errors import UsageError
from curate.policy.ahead import check_clusters, check_pool, reads_pool, refuse_without_reference, scored_names
from curate.policy.columns import check_names, request_of
from curate.policy.given import GivenPolicy, given_policy

HEAD = "schema: 1\nauthor: A. Expert\ndate: 2026-11-22\nrationale: a test\ncolumns:\n"


def given(folder: Path, *columns: str, labels: Path | None = None) -> GivenPolicy:
    """A policy of these columns, each as the lines that stand after `- `."""
    path = folder / "p.yaml"
    path.write_text(HEAD + "".join(f"  - {one}\n    source: a test\n" for one in columns))
    found = given_policy(path, labels)
    assert found is not None
    return found


def asking(name: str, group: str) -> str:
    return f"column: {name}\n    groups: [{group}]\n    min_ratio: 0.5"


def traits_of(asked: GivenPolicy, captions: Sequence[str], records: Sequence[dict[str, Any]]) -> pa.Table:
    """As the traits pass makes them, of samples with these captions and json."""
    settings = request_of(asked).traits
    reader = caption_reader(settings)
    read = reader.read(captions)
    table = pa.table({"url": pa.array([one.get("url") for one in records], TEXT)})
    for name in read.column_names:
        table = table.append_column(name, read[name])
    for name in settings.fields:
        values = [json.dumps(one[name]) if name in one else None for one in records]
        table = table.append_column(FIELD + name, pa.array(values, pa.string()))
    return with_facts(table, reader.facts | {"json_fields": sorted({name for one in records for name in one})})


def checked(asked: GivenPolicy, records: Sequence[dict[str, Any]], captions: Sequence[str] = ()) -> None:
    check_pool(asked, traits_of(asked, captions or ["a red cube on a table"] * len(records), records), ("width",))


def test_a_field_that_no_sample_has_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    """File, line, the nearest spelling, and all the fields, the likest first."""
    with pytest.raises(UsageError, match=r"p\.yaml:6: columns\.0\.column: no column is called 'genere'; did you mean "
                       r"'genre'\? \(the samples' json has genre, general, author\)"):  # fmt: skip
        checked(given(tmp_path, asking("genere", "manga")), [{"genre": "manga", "author": "x", "general": 1}] * 3)
    with pytest.raises(UsageError, match=r"no column is called 'genre'.*\(no sample has fields in a json\)"):
        checked(given(tmp_path, asking("genre", "manga")), [{}])


def test_crossed_columns_and_confounders_are_looked_for_too(tmp_path: Path) -> None:
    """A slip in any of the names that a policy has is told by the key that it stands under."""
    records = [{"genre": "manga", "tone": "dark"}]
    crossing = "intersect: genre,tune\n    groups: [manga & dark]\n    min_ratio: 0.5"
    with pytest.raises(UsageError, match=r"columns\.0\.intersect: no column is called 'tune'; did you mean 'tone'"):
        checked(given(tmp_path, crossing), records)
    holding = asking("genre", "manga") + "\n    confounders: [tune]"
    with pytest.raises(UsageError, match=r"columns\.0\.confounders: no column is called 'tune'"):
        checked(given(tmp_path, holding), records)
    crossing = "intersect: genre,tone\n    groups: [manga & drak]\n    min_ratio: 0.5"
    with pytest.raises(UsageError, match=r"no group of genre & tone is called 'manga & drak'; did you mean 'manga & d"):
        checked(given(tmp_path, crossing), records)


def test_what_one_sample_has_is_there(tmp_path: Path) -> None:
    """A field, a value, an element of a list that only the last of many samples has; a column of the pool's table."""
    records: list[dict[str, Any]] = [{"tags": ["a"]} for _ in range(300)]
    records += [{"genre": "manga", "tags": ["a", "rare"]}]
    checked(given(tmp_path, asking("genre", "manga"), asking("tags", "rare"), asking("width", "100 to 200")), records)


@pytest.mark.parametrize(
    ("name", "group", "there"),
    [
        ("genre", "mnaga", "manga"),
        ("tags", "rear", "rare"),
        ("caption script", "Lattin", "Latin"),
        ("url country", "bee", "be"),
    ],
)
def test_a_group_that_no_sample_has_is_told(tmp_path: Path, name: str, group: str, there: str) -> None:
    """Values of a field, of lists, of what is read off captions and URLs."""
    records = [{"genre": "manga", "tags": ["rare"], "url": "https://a.be/1.jpg"}]
    with pytest.raises(UsageError, match=f"no group of {name} is called '{group}'; did you mean '{there}'"):
        checked(given(tmp_path, asking(name, group)), records)


def test_numbers_that_may_be_put_into_classes_are_not_judged(tmp_path: Path) -> None:
    """Their classes are of the samples that can be scored; a few numbers are groups as they are."""
    asked = given(tmp_path, asking("year", "1990 to 1999"))
    checked(asked, [{"year": 1990 + n} for n in range(21)])
    with pytest.raises(UsageError, match="no group of year is called '1990 to 1999'"):
        checked(asked, [{"year": 1990 + n} for n in range(20)])


def test_only_what_captions_and_json_tell_is_read_ahead(tmp_path: Path) -> None:
    """Labels, mentions, sizes, copies and clusters are checked without them, or after."""
    fixed = ("gender", "image size", "near-duplicates", "embedding cluster")
    assert not reads_pool(given(tmp_path, *(asking(name, "x") for name in fixed)))
    for name in ("genre", "field:genre", "caption script", "url country"):
        assert reads_pool(given(tmp_path, asking(name, "x")))
    labels = tmp_path / "l.csv"
    labels.write_text("key,genre\n0,x\n")
    assert not reads_pool(given(tmp_path, asking("genre", "x"), labels=labels))


def test_copies_and_clusters_have_known_names(tmp_path: Path) -> None:
    """A slip in the name of a group is told without any image; where labels have such a column, theirs count."""
    with pytest.raises(UsageError, match="no group of near-duplicates is called '2 copie'; did you mean '2 copies'"):
        check_names(given(tmp_path, asking("near-duplicates", "2 copie")))
    asked = given(tmp_path, asking("embedding cluster", "cluster 4"))
    check_clusters(asked, 200)  # 200 // 39 are 5
    with pytest.raises(UsageError, match=r"p\.yaml:7: .*no group of embedding cluster is called 'cluster 4'"):
        check_clusters(asked, 194)
    labels = tmp_path / "l.csv"
    labels.write_text("key,near-duplicates,embedding cluster\n0,many,north\n")
    own = given(tmp_path, asking("near-duplicates", "many"), asking("embedding cluster", "north"), labels=labels)
    check_names(own)
    check_clusters(own, 1)
    refuse_without_reference(own)
    assert scored_names(own) == scored_names(None) == ()


def test_without_a_reference_there_are_no_copies_and_clusters(tmp_path: Path) -> None:
    """Whoever names one is told its place, what it is made of, and two ways out."""
    asked = given(tmp_path, asking("gender", "female"), asking("near-duplicates", "no copy"))
    made = "'near-duplicates' is made of hashes of the images, which the pass of a reference leaves"
    with pytest.raises(UsageError, match=rf"p\.yaml:10: columns\.1\.column: {made}: .*--reference .*assignments\.parq"):
        refuse_without_reference(asked)
    held = given(tmp_path, asking("gender", "female") + "\n    confounders: [embedding cluster]")
    with pytest.raises(UsageError, match=r"columns\.0\.confounders: 'embedding cluster' is made of embeddings of a"):
        refuse_without_reference(held)
    assert scored_names(asked) == ("near-duplicates",)
    refuse_without_reference(given(tmp_path, asking("gender", "female")))
