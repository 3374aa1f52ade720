"""From rows, traits and a request to columns and strata: names, provenance, what is refused and what is only noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import scores
from curate.auditing.assembling import Assembled, along, assemble
from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, LabelError, crossed_names
from curate.auditing.request import AuditRequest
from curate.auditing.traits import FIELD, TraitSettings, caption_reader, with_facts
from curate.errors import UsageError, VerificationError
from curate.marked_yaml import parse_yaml
from curate.policy.columns import groups_of
from curate.policy.schema import check_policy

CAPTIONS = ["a woman and a dog", "a man", "une femme avec un chapeau", "東京", None, "two women in the park at night"]
OWN = ["gender", "age", "identity", "caption script", "caption language"]


def rows_of(count: int, **columns: Any) -> pa.Table:
    """A pool with keys, uids and sample ids."""
    made: dict[str, Any] = {
        "sample_id": pa.array([n.to_bytes(16, "big") for n in range(count)], pa.binary(16)),
        "key": [f"k{n}" for n in range(count)],
        "uid": [f"{n:032x}" for n in range(count)],
    }
    return pa.table(made | columns)


def traits_of(
    rows: pa.Table, captions: list[str | None], request: AuditRequest, json_fields: dict[str, list[Any]] | None = None,
    **columns: Any,
) -> pa.Table:  # fmt: skip
    """What the pass over the shards would have made of these captions."""
    reader = caption_reader(request.traits)
    read = reader.read(captions)
    fields = {
        FIELD + name: pa.array([None if one is None else json.dumps(one) for one in values], pa.string())
        for name, values in (json_fields or {}).items()
    }
    made = {"sample_id": rows["sample_id"], "caption": captions} | fields | columns
    made |= {name: read[name] for name in read.column_names}
    return with_facts(pa.table(made), reader.facts | {"json_fields": list(json_fields or {})})


def small(request: AuditRequest | None = None, **columns: Any) -> Assembled:
    """The six captions as a pool."""
    request = request or AuditRequest()
    rows = rows_of(len(CAPTIONS), **columns)
    return assemble(rows, traits_of(rows, CAPTIONS, request), request)


def values(column: Column) -> list[str | None]:
    """The group of each sample, by name."""
    assert column.codes_N is not None
    return [None if code < 0 else column.names[code] for code in column.codes_N]


def members(column: Column, group: str) -> list[int]:
    """The rows in a group."""
    return [int(row) for row in np.flatnonzero(column.members[:, column.names.index(group)])]


def csv(path: Path, text: str) -> Path:
    """A label file."""
    path.write_text(text, encoding="utf-8")
    return path


def test_captions_give_columns_of_mentions_script_and_language_under_short_names() -> None:
    """Sets of word lists in the order asked for; mentions are lists of groups, with their provenance and unknowns."""
    named = small().named()
    assert list(named) == OWN
    gender = named["gender"]
    assert gender.kind == "mention"
    assert "mentions, not people depicted" in gender.provenance
    assert (members(gender, "female"), members(gender, "male")) == ([0, 2, 5], [1])
    assert gender.is_known.tolist() == [True, True, True, True, False, True]
    assert values(named["caption script"]) == ["Latin", "Latin", "Latin", "Han", None, "Latin"]
    assert values(named["caption language"])[2] == "fr"


def test_what_is_negated_is_not_mentioned() -> None:
    """Each group once, however often it is named."""
    request = AuditRequest()
    captions: list[str | None] = ["not a woman", "a man, another man and no woman"]
    listed = traits_of(rows_of(2), captions, request)["mentions:gender"].to_pylist()
    assert listed == [[], ["male"]]


def test_only_the_sets_that_are_named_are_read() -> None:
    """A set by its name; none at all leaves out mentions, not script and language."""
    assert list(small(AuditRequest(lexicons=("age",))).named()) == ["age", "caption script", "caption language"]
    assert list(small(AuditRequest(lexicons=())).named()) == ["caption script", "caption language"]


def test_a_file_of_terms_is_added_to_the_sets_that_come_along(tmp_path: Path) -> None:
    """A user's list gives a set of its own, and its bytes count for the key under which captions are kept."""
    text = "language: en\nscript: Latin\nsets:\n  weather:\n    groups:\n      fair: {terms: [park]}\n"
    request = AuditRequest(lexicons=(str(csv(tmp_path / "w.yaml", text)),))
    assert request.traits.sets == ("gender", "age", "identity", "weather")
    assert members(small(request).named()["weather"], "fair") == [5]
    csv(tmp_path / "w.yaml", text.replace("park", "dog"))
    assert AuditRequest(lexicons=request.lexicons).traits.as_json() != request.traits.as_json()
    caption_reader.cache_clear()
    with pytest.raises(UsageError, match="changed since the run began"):
        caption_reader(request.traits)


def test_sizes_come_from_the_rows_and_else_from_the_headers() -> None:
    """A null is unknown; a pool without any size has no such column."""
    size = small(width=[100, 300, None, 600, 2000, 700], height=[100, 300, 5, 600, 2000, 700]).named()["image size"]
    assert values(size)[:3] == ["below 256", "256 to 511", None]
    rows, request = rows_of(6), AuditRequest()
    sized = traits_of(rows, CAPTIONS, request, width=[300] * 6, height=[100] * 6)
    assert values(assemble(rows, sized, request).named()["image shape"]) == ["wide"] * 6
    assert "image size" not in small(width=[None] * 6, height=[None] * 6).named()


def test_a_country_column_needs_a_url() -> None:
    """URLs that name no host are no knowledge, and then there is no column."""
    rows, request = rows_of(6), AuditRequest()
    urls = ["https://a.de/1.jpg", None, "http://b.fr/", "http://c.com", "x", None]
    made = assemble(rows, traits_of(rows, CAPTIONS, request, url=urls), request)
    assert values(made.named()["url country"]) == ["de", None, "fr", "no country (generic domain)", None, None]
    assert "url country" not in assemble(rows, traits_of(rows, CAPTIONS, request, url=["x"] * 6), request).named()


def test_near_duplicates_are_units_of_the_test_and_a_column() -> None:
    """Rows with an equal hash share a unit; a row without one is alone and unknown."""
    bits = np.random.default_rng(0).integers(0, 256, (6, 32), dtype=np.uint8)
    bits[3] = bits[1]
    hashes = [None if n == 4 else bytes(row) for n, row in enumerate(bits)]
    digests = [bytes([n]) * 32 for n in range(6)]
    made = small(image_digest=pa.array(digests, pa.binary(32)), dhash=pa.array(hashes, pa.binary(32)))
    assert made.copies is not None
    assert made.copies.units_N.tolist() == [0, 1, 2, 1, 3, 4]
    copies = values(made.named()["near-duplicates"])
    assert copies == ["no copy", "2 copies", "no copy", "2 copies", None, "no copy"]
    assert not [note for note in made.notes if "image hashes" in note]
    assert [note for note in small().notes if "image hashes" in note]


def test_a_large_pool_is_searched_for_equal_hashes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pairs would take minutes copies are those with the same bytes or hash, and a note says so."""
    monkeypatch.setattr("curate.auditing.own_columns.MOST_COMPARED", 5)
    near = bytearray(bytes(32))
    near[0] = 1
    hashes = [bytes(32), bytes(near), bytes(32), *(bytes([n]) * 32 for n in (7, 8, 9))]
    digests = [bytes([n]) * 32 for n in range(6)]
    made = small(image_digest=pa.array(digests, pa.binary(32)), dhash=pa.array(hashes, pa.binary(32)))
    assert made.copies is not None
    assert made.copies.units_N.tolist() == [0, 1, 0, 2, 3, 4]
    assert any("same hash" in note for note in made.notes)


def test_clusters_are_made_of_the_embeddings_that_are_there() -> None:
    """Medoids are rows of the pool, rows without an embedding unknown; 0 clusters and no embeddings give none."""
    embedding = np.repeat(np.eye(3, 8, dtype=np.float16), 2, axis=0)
    column = scores.pack(embedding)
    halves = pa.array([None if n == 1 else column[n].as_py() for n in range(6)], column.type)
    request = AuditRequest(clusters=3)
    made = small(request, ref_image=halves)
    assert made.clusters is not None
    found = values(made.named()["embedding cluster"])
    assert found[1] is None
    assert found[2] == found[3] != found[4] == found[5] != found[0]
    assert sorted(made.clusters.medoids_K.tolist()) == [0, 2, 4]
    assert "embedding cluster" not in small(AuditRequest(clusters=0), ref_image=halves).named()
    assert any("no embeddings" in note for note in small().notes)
    assert "embedding cluster" not in small(ref_image=pa.nulls(6)).named()


def test_a_label_takes_its_name_from_a_column_of_ours(tmp_path: Path) -> None:
    """Labels keep their name, ours gets a longer one, and a note says so."""
    file = csv(tmp_path / "l.csv", "key,gender,image size\nk0,f,s\nk1,m,s\nk2,f,l\nk3,m,l\n")
    made = small(AuditRequest(labels=file), width=[9] * 6, height=[9] * 6)
    named = made.named()
    assert values(named["gender"]) == ["f", "m", "f", "m", None, None]
    assert named["caption mentions: gender"].kind == "mention"
    asked = AuditRequest(labels=file, columns=("gender", "caption mentions: gender"))
    assert small(asked).named()["caption mentions: gender"].kind == "mention"
    assert named["image size (by curate)"].kind == "metadata"
    assert sum("column of yours" in note for note in made.notes) == 2
    assert any("4 of 6 samples matched (66.7%)" in note for note in made.notes)
    assert made.match is not None


def test_naming_a_column_of_the_labels_leaves_the_others_out(tmp_path: Path) -> None:
    """So that free text beside the labels is no column of a thousand groups; names elsewhere leave all labels in."""
    file = csv(tmp_path / "l.csv", "key,tone,note\n" + "".join(f"k{n},{'ab'[n % 2]},text {n}\n" for n in range(6)))
    assert "note" not in small(AuditRequest(labels=file, columns=("tone",))).named()
    assert {"tone", "note"} <= set(small(AuditRequest(labels=file, columns=("caption script",))).named())


def test_fields_and_columns_of_the_pool_are_found_by_name() -> None:
    """Text as it is, many numbers in quantiles; a json field with the name of a column of ours needs its prefix."""
    rows = rows_of(30, licence=["a", "b", None] * 10, shard_url=pa.array(["s"] * 30).dictionary_encode())
    request = AuditRequest(columns=("views", "licence", "shard_url", "gender", "field:gender"))
    fields = {"views": list(range(30)), "gender": ["x", True] * 15}
    made = assemble(rows, traits_of(rows, ["a dog"] * 30, request, fields), request).named()
    assert made["views"].names == ("0 to 7", "8 to 14", "15 to 22", "23 to 29")
    assert values(made["licence"])[:3] == ["a", "b", None]
    assert made["shard_url"].names == ("s",)
    assert made["gender"].kind == "mention"
    assert values(made["field:gender"])[:2] == ["x", "true"]
    assert made["field:gender"].provenance == "'gender' in the samples' json"


def test_lists_of_the_json_are_overlapping_groups() -> None:
    """A sample is in the group of each value; a value alone is a list of one, nothing listed is known to be none."""
    tags: list[Any] = [["cat", "dog"], "cat", [], None, [" "], [True, 2, " dog "]]
    request = AuditRequest(columns=("tags",))
    rows = rows_of(len(CAPTIONS))
    column = assemble(rows, traits_of(rows, CAPTIONS, request, {"tags": tags}), request).named()["tags"]
    assert column.overlapping
    assert column.names == ("2", "cat", "dog", "true")
    assert [members(column, name) for name in column.names] == [[5], [0, 1], [0, 5], [5]]
    assert column.is_known.tolist() == [True, True, True, False, False, True]
    assert column.provenance == "'tags' in the samples' json, of which a sample may have several"


def test_lists_have_so_many_groups_and_no_more() -> None:
    """200 different values are a column, 201 are refused, whatever number of samples they are spread over."""
    for count in (200, 201):
        tags = [list(range(150)), list(range(100, count)), *[None] * 4]
        request = AuditRequest(columns=("tags",))
        rows = rows_of(len(CAPTIONS))
        traits = traits_of(rows, CAPTIONS, request, {"tags": tags})
        if count == 200:
            assert len(assemble(rows, traits, request).named()["tags"].names) == 200
        else:
            with pytest.raises(UsageError, match="'tags' holds lists of more than 200 distinct values"):
                assemble(rows, traits, request)


def test_an_intersection_of_a_policy_is_made_of_its_columns() -> None:
    """Of the columns that it crosses, also where the pool has a column of that name; of lists the groups overlap."""
    fields: dict[str, list[Any]] = {"a": [*"xxyy", None, "x"], "b": [["p"], ["p", "q"], [], "q", "p", None]}
    request = AuditRequest(columns=("a", "b", "a & b"))
    rows = rows_of(len(CAPTIONS))
    made = assemble(rows, traits_of(rows, CAPTIONS, request, fields | {"a & b": ["other"] * 6}), request)
    column = "{intersect: [a, b], source: a test, groups: [x & p], min_count: 1}"
    text = f"schema: 1\nauthor: A\ndate: 2026-11-22\nrationale: a test\ncolumns: [{column}]\n"
    policy = check_policy(parse_yaml(text, "p.yaml"))
    found = groups_of(made, policy)["a & b"]
    assert found.names == ("x & p", "x & q", "y & q")
    assert found.is_known.tolist() == [True] * 4 + [False] * 2
    by_hand = [[n for n in range(4) if fields["a"][n] == a and b in fields["b"][n]] for a, b in ("xp", "xq", "yq")]
    assert [np.flatnonzero(member_N).tolist() for member_N in found.members.T] == by_hand


def test_lists_are_no_strata() -> None:
    """Strata exclude each other, so a field of lists cannot be held fixed."""
    request = AuditRequest(confounders=("tags",))
    rows = rows_of(len(CAPTIONS))
    with pytest.raises(UsageError, match="'tags': its groups overlap"):
        assemble(rows, traits_of(rows, CAPTIONS, request, {"tags": [["a"]] * 6}), request)


@pytest.mark.parametrize(
    ("text", "names"),
    [("gender,age", ("gender", "age")), (" gender , age ", ("gender", "age")), ("gender", ("gender",)),
     ('gender,"height, in cm"', ("gender", "height, in cm")), ('"height, in cm",gender', ("height, in cm", "gender")),
     ('"a ""b"", c", d', ('a "b", c', "d")), ("a,,b", ("a", "", "b")), ("", ())],
)  # fmt: skip
def test_names_to_cross_are_quoted_as_in_a_csv(text: str, names: tuple[str, ...]) -> None:
    """A comma parts names unless it is quoted; a quote inside quotes is doubled."""
    assert crossed_names(text) == names


@pytest.mark.parametrize("text", ['a,"b', '"a"b,c', '"a" ,b', "a\nb,c"])
def test_quotes_that_do_not_fit_are_refused(text: str) -> None:
    """With what was given and how names are written."""
    with pytest.raises(UsageError, match="write names as a CSV does"):
        crossed_names(text)


def test_a_field_of_strange_values_has_names_that_can_be_shown() -> None:
    """Lone surrogates, direction characters and numbers beyond any float are groups, or no number."""
    strange = ["\ud800", "\u202e", " ", "<b>", 10**400, 1.5]
    rows, request = rows_of(6), AuditRequest(columns=("x",))
    made = assemble(rows, traits_of(rows, CAPTIONS, request, {"x": strange}), request).named()["x"]
    assert values(made)[:4] == ["\\xed\\xa0\\x80", "\\u202e", None, "<b>"]
    assert values(made)[5] == "1.5"
    many = rows_of(30)
    numbers = [*range(29), 10**400]
    made = assemble(many, traits_of(many, ["a"] * 30, request, {"x": numbers}), request).named()["x"]
    assert values(made)[29] is None


def test_a_name_that_is_nowhere_is_refused_with_what_there_is() -> None:
    """The message lists labels, fields and columns."""
    rows, request = rows_of(6), AuditRequest(columns=("licnce",))
    with pytest.raises(UsageError, match="no column 'licnce': the samples' json has licence; the ledger has sample_id"):
        assemble(rows, traits_of(rows, CAPTIONS, request, {"licence": ["a"] * 6}), request)


def test_caption_length_is_held_fixed_in_words() -> None:
    """The default confounder: five classes of equal size at most, letters where a script has no spaces."""
    strata = small().strata
    assert list(strata) == ["caption length"]
    assert strata["caption length"][4] is None
    assert len({one for one in strata["caption length"] if one is not None}) > 1


def test_any_column_with_disjoint_groups_can_be_held_fixed(tmp_path: Path) -> None:
    """By its name, with "_" for " "; numbers are binned, overlapping groups and unknown names refused."""
    file = csv(tmp_path / "l.csv", "key,tone\nk0,a\nk1,b\nk2,a\nk3,b\n")
    request = AuditRequest(labels=file, confounders=("tone", "caption_length", "caption_script", "sharp"))
    strata = small(request, sharp=[1.0, 2, 3, 4, 5, 6]).strata
    assert list(strata) == ["tone", "caption length", "caption script", "sharp"]
    assert strata["tone"].tolist() == ["a", "b", "a", "b", None, None]
    assert strata["caption script"][3] == "Han"
    assert len(set(strata["sharp"])) == 5
    with pytest.raises(UsageError, match="its groups overlap"):
        small(AuditRequest(confounders=("gender",)))
    with pytest.raises(UsageError, match="no column of that name"):
        small(AuditRequest(confounders=("tonne",)))


def test_what_nothing_is_known_of_is_not_held_fixed_and_said() -> None:
    """A pool without captions has no strata of their length."""
    rows, request = rows_of(3), AuditRequest()
    made = assemble(rows, traits_of(rows, [None] * 3, request), request)
    assert made.strata == {}
    assert "caption length could not be held fixed: nothing is known of it in this pool" in made.notes
    blank = small(AuditRequest(confounders=("blank",)), blank=pa.nulls(6, pa.string()))
    assert blank.strata == {}
    assert "blank could not be held fixed: nothing is known of it in this pool" in blank.notes


def test_columns_to_be_crossed_come_along(tmp_path: Path) -> None:
    """Of the pool's table and of the labels, whether or not others are named."""
    file = csv(tmp_path / "l.csv", "key,tone,age group,other\nk0,a,x,1\nk1,b,y,1\nk2,a,y,1\n")
    crossed = AuditRequest(labels=file, intersect=(("tone", "wide"),))
    assert {"tone", "age group", "other", "wide"} <= set(small(crossed, wide=[1, 2] * 3).named())
    narrow = AuditRequest(labels=file, columns=("tone",), intersect=(("tone", "age group"),))
    assert narrow.label_columns == ("tone", "age group")


def test_a_column_of_ours_that_is_asked_for_in_vain_is_noted() -> None:
    """A pool without URLs says nothing of countries, and says so."""
    assert any(
        "url country could not be compared" in note for note in small(AuditRequest(columns=("url country",))).notes
    )
    assert not any("could not be compared" in note for note in small().notes)


def test_only_wanted_columns_are_made(tmp_path: Path) -> None:
    """Nothing else is read: not the labels, not the clusters, not the hashes."""
    rows = rows_of(6, width=[9] * 6, height=[9] * 6)
    request = AuditRequest(labels=csv(tmp_path / "l.csv", "key,tone\nother,a\n"), confounders=())
    traits = traits_of(rows, CAPTIONS, request)
    assert list(assemble(rows, traits, request, wanted={"gender", "image size"}).named()) == ["gender", "image size"]
    with pytest.raises(UsageError, match="0 of 6 samples matched"):
        assemble(rows, traits, request, wanted={"tone"})


def test_rows_meet_their_traits_by_sample_id() -> None:
    """In any order, some left out, twins of a shard given twice alike; a sample without traits is refused."""
    rows, request = rows_of(6), AuditRequest()
    traits = traits_of(rows, CAPTIONS, request)
    some = rows.take([5, 1, 1, 0])
    assert along(some, pa.concat_tables([traits, traits]))["caption"].to_pylist() == [CAPTIONS[n] for n in (5, 1, 1, 0)]
    assert list(assemble(some, traits, request).named()) == OWN
    with pytest.raises(VerificationError, match=r"2 of the pool's 6 samples are in none of its input shards"):
        along(rows, traits.slice(2))


def test_stated_label_errors_reach_their_column() -> None:
    """Of labels and of mentions; an error for a column that is not there is refused."""
    error = LabelError(0.9, 0.98)
    assert small(AuditRequest(label_errors={"gender": error})).named()["gender"].label_error == error
    with pytest.raises(UsageError, match="label errors are stated for 'tone'"):
        small(AuditRequest(label_errors={"tone": error}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on": "name"}, "labels are joined on key, uid, sample_id"),
        ({"least_match": 1.5}, "a share of the pool between 0 and 1"),
        ({"clusters": -1}, "0 for none"),
        ({"clusters": 1001}, "up to 1,000"),
        ({"columns": ("a", "a")}, "'a' is named twice"),
        ({"columns": (" ",)}, "a name is blank"),
        ({"columns": "tone"}, "give a list of names"),
        ({"columns": ("score",)}, "is what the selection did"),
        ({"confounders": ("status",)}, "is what the selection did"),
        ({"intersect": (("gender",),)}, "name two columns or more"),
        ({"intersect": (("gender", "age"), ("age", "gender"))}, "crossed twice"),
        ({"intersect": (("gender", "score"),)}, "is what the selection did"),
        ({"seed": -1}, "a whole number from 0"),
        ({"seed": 2**64}, "below 2\\*\\*64"),
        ({"lexicons": ("genders",)}, "name a set \\(gender, age, identity\\) or a file"),
        ({"labels": Path("nowhere.csv")}, "nowhere.csv: No such file"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_when_it_is_made(wrong: dict[str, Any], message: str) -> None:
    """Before any shard is opened, saying what and what next."""
    with pytest.raises(UsageError, match=message):
        AuditRequest(**wrong)


def test_a_request_is_named_by_what_it_depends_on(tmp_path: Path) -> None:
    """The bytes of its files, wherever they lie, and every option."""
    one, other = (csv(tmp_path / name, "key,tone\nk0,a\n") for name in ("a.csv", "b.csv"))
    assert AuditRequest(labels=one).digest == AuditRequest(labels=other).digest
    digests = {AuditRequest(labels=one, **more).digest for more in ({}, {"seed": 1}, {"on": "uid"}, {"clusters": 2})}
    assert len(digests) == 4
    before = AuditRequest(labels=one).digest
    csv(one, "key,tone\nk0,b\n")
    assert AuditRequest(labels=one).digest != before


def test_labels_with_markup_and_turned_text_stay_text_that_can_be_told_apart(tmp_path: Path) -> None:
    """Direction characters are spelled out, and two labels that would then look alike get a number."""
    labels = ["<script>alert(1)</script>", "a\u202eb", "a\\u202eb", "=1+1", "a\u202eb", "a"]
    table = pa.table({"key": [f"k{n}" for n in range(6)], "tone\u202e": labels})
    pq.write_table(table, tmp_path / "l.parquet")
    named = small(AuditRequest(labels=tmp_path / "l.parquet")).named()
    assert values(named["tone\\u202e"]) == [
        "<script>alert(1)</script>", "a\\u202eb (2)", "a\\u202eb", "=1+1", "a\\u202eb (2)", "a",
    ]  # fmt: skip


def test_empty_groups_are_audited_without_a_number_that_is_wrong() -> None:
    """A group of a word list that no caption mentions is there, untested."""
    made = small(AuditRequest(lexicons=("gender",)))
    audit = audit_columns(made.columns, [True, False, True, False, True, False], strata=made.strata, placebos=0)
    empty = next(row for row in audit.rows if row.group == "nonbinary")
    assert (empty.pool, empty.level) == (0, "untested")


def test_an_empty_pool_is_refused() -> None:
    """Nothing is made of nothing."""
    rows, request = rows_of(0), AuditRequest()
    with pytest.raises(UsageError, match="the pool is empty"):
        assemble(rows, traits_of(rows, [], request), request)


@pytest.mark.parametrize("kind", ["labels", "json", "pool"])
def test_labels_as_many_as_samples_are_refused_and_counted(tmp_path: Path, kind: str) -> None:
    """In labels, in a json field and in a column of the pool; the message names the column and its number."""
    count = 200_000
    texts = [f"v{n}" for n in range(count)]
    rows = rows_of(count, free=texts)
    request = AuditRequest(columns=("free",), confounders=())
    if kind == "labels":
        pq.write_table(pa.table({"key": rows["key"], "free": texts}), tmp_path / "l.parquet")
        request = AuditRequest(labels=tmp_path / "l.parquet", confounders=())
    empty = traits_of(rows, [None] * count, request, {"free": texts} if kind == "json" else None)
    with pytest.raises(UsageError, match=r"'free' has 200,000 distinct values"):
        assemble(rows, empty, request)


def test_default_settings_are_all_lists_and_sets() -> None:
    """What a request asks for when it says nothing."""
    assert AuditRequest().traits == TraitSettings.default()
