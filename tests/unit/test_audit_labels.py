"""Labels joined to the pool, groups from metadata, and columns: what is refused, what is loud, what is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.auditing.columns import (
    Column,
    LabelError,
    column_of,
    distinct_names,
    intersection,
    shown,
    spreadsheet_cell,
)  # fmt: skip
from curate.auditing.labels import check_labels, join_labels
from curate.auditing.metadata import (
    country_column,
    country_of,
    field_column,
    ledger_column,
    quantile_column,
    shape_column,
    size_column,
)  # fmt: skip
from curate.errors import UsageError


def pool(keys: list[str]) -> pa.Table:
    """A pool with keys, uids and sample ids."""
    rows = range(len(keys))
    return pa.table(
        {
            "key": keys,
            "uid": [f"{n:032x}" for n in rows],
            "sample_id": pa.array([n.to_bytes(16, "big") for n in rows], pa.binary(16)),
        }
    )


def csv(path: Path, text: str) -> Path:
    """A label file."""
    path.write_bytes(text.encode())
    return path


def values(column: Column) -> list[str | None]:
    """The group of each sample, by name."""
    assert column.codes_N is not None
    return [None if code < 0 else column.names[code] for code in column.codes_N]


def test_labels_are_joined_by_key_as_text(tmp_path: Path) -> None:
    """007 stays a key and NA a label; blank labels and samples without a row are unknown; both rates are told."""
    file = csv(tmp_path / "a.csv", "key,tone,age\n007, dark ,old\n7,light,\n9,light,NA\n11,dark,old\n")
    labels = join_labels(file, pool(["7", "007", "8", "9"]))
    tone, age = labels.columns
    assert values(tone) == ["light", "dark", None, "light"]
    assert values(age) == [None, "old", None, "NA"]
    assert (labels.match.rate, labels.match.file_matched) == (0.75, 3)
    assert (
        tone.provenance == "labels of a.csv, joined on key: 3 of 4 samples matched (75.0%); 3 of the file's 4 rows used"
    )
    assert (tone.coverage, age.coverage, age.unknown_share) == (0.75, 0.5, 0.5)


@pytest.mark.parametrize("on", ["key", "uid", "sample_id"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_join_and_format_gives_the_same(on: str, kind: str, tmp_path: Path) -> None:
    """CSV and parquet, by key, uid and sample id (hexadecimal in any case, or bytes), in any order of rows."""
    table = pool(["a", "b", "c", "d"])
    keys = [one.hex().upper() if isinstance(one, bytes) else one for one in table[on].to_pylist()]
    order, tone = [2, 0, 3, 1], ["x", "y", "x", "z"]
    file = tmp_path / f"labels.{kind}"
    if kind == "csv":
        csv(file, "\ufefftone,%s\n" % on + "".join(f"{tone[n]},{keys[n]}\n" for n in order))  # noqa: UP031
    else:
        there = table[on].take(order)
        pq.write_table(pa.table({on: there, "tone": pa.array([tone[n] for n in order]).dictionary_encode()}), file)
    (column,) = join_labels(file, table, on=on).columns
    assert values(column) == tone


def test_whole_numbers_and_booleans_are_labels(tmp_path: Path) -> None:
    """Integers and booleans are groups; nulls are unknown; a stated label error goes along."""
    table = pa.table({"key": ["a", "b", "c"], "n": [1, 2, None], "flag": [True, None, False]})
    pq.write_table(table, tmp_path / "l.parquet")
    error = LabelError(0.9, 0.95)
    n, flag = join_labels(tmp_path / "l.parquet", pool(["a", "b", "c"]), label_errors={"flag": error}).columns
    assert (values(n), values(flag)) == (["1", "2", None], ["true", None, "false"])
    assert (n.label_error, flag.label_error) == (None, error)


@pytest.mark.parametrize(
    ("content", "message"),
    [("key,t\na,x\na,y\nb,x\nc,x\n", "1 rows repeat a key with other labels, first 'a' in rows 1 and 2"),
     ("key,t\nq,x\nr,y\n", "0 of 3 samples matched (0.0%); 0 of the file's 2 rows used, fewer than the 50%"),
     ("key,t\na,x\nz,y\n", "the file's first is 'a', the pool's 'a'"),
     ("id,t\na,x\n", "no column 'key'; there are: id, t"),
     ("key\na\n", "no column of labels beside 'key'"),
     ("key,t,t\na,x,y\n", "the column 't' is there twice"),
     ("key,t\na,x,y\n", "Expected 2 columns, got 3"),
     ("", "Empty CSV")],
)  # fmt: skip
def test_a_join_that_goes_wrong_is_refused(content: str, message: str, tmp_path: Path) -> None:
    """Conflicting repeats, too few matches, missing and repeated columns, ragged rows: an error that says which."""
    file = csv(tmp_path / "a.csv", content)
    with pytest.raises(UsageError, match=re.escape(message)):
        join_labels(file, pool(["a", "b", "c"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [("key,t\na,x\na,y\n", "1 rows repeat a key with other labels"),
     ("id,t\na,x\n", "no column 'key'; there are: id, t"),
     ("key\na\n", "no column of labels beside 'key'"),
     ("key,t,t\na,x,y\n", "the column 't' is there twice"),
     ("key,t\na,x,y\n", "Expected 2 columns, got 3"),
     ("key,t\n,x\n  ,y\n", "no row has a key"),
     ("key,t\n", "no row has a key"),
     ("key,t\n" + "".join(f"{n},{n}\n" for n in range(1001)), "'t' has 1,001 distinct values")],
)  # fmt: skip
def test_a_file_is_refused_without_a_pool(content: str, message: str, tmp_path: Path) -> None:
    """Whatever no pool could mend is found in the file alone."""
    with pytest.raises(UsageError, match=re.escape(message)):
        check_labels(csv(tmp_path / "a.csv", content))


def test_a_file_tells_its_groups_without_a_pool(tmp_path: Path) -> None:
    """The groups of the columns that are asked for, blank labels left out, as a join would name them."""
    file = csv(tmp_path / "a.csv", "key,t,u\na,y,1\nb, x ,2\nc,,3\n")
    assert check_labels(file, columns=["t"]) == {"t": ("x", "y")}
    assert set(check_labels(file)) == {"t", "u"}


def test_repeats_and_missing_keys_are_counted(tmp_path: Path) -> None:
    """The same row twice is one row, and rows without a key are none; both are named."""
    labels = join_labels(csv(tmp_path / "a.csv", "key,t\na,x\na,x\n,y\n  ,y\nb,z\n"), pool(["a", "b"]))
    assert "2 rows without a key; 1 rows repeated" in str(labels.match)
    assert values(labels.columns[0]) == ["x", "z"]


def test_a_key_of_several_samples_is_refused_and_a_uid_is_not(tmp_path: Path) -> None:
    """Keys that repeat between shards name no sample; a uid that stands twice is the same sample."""
    file = csv(tmp_path / "a.csv", "key,uid,t\na,%032x,x\nb,%032x,y\n" % (0, 1))  # noqa: UP031
    table = pool(["a", "b", "a"])
    with pytest.raises(
        UsageError, match=r"1 samples of the pool have a key that an earlier one has.*Join on sample_id"
    ):
        join_labels(file, table)
    twice = table.set_column(1, "uid", pa.array([f"{0:032x}", f"{1:032x}", f"{0:032x}"]))
    assert values(join_labels(file, twice, on="uid").columns[0]) == ["x", "y", "x"]


def test_a_lower_rate_may_be_asked_for(tmp_path: Path) -> None:
    """The rest stays unknown."""
    file = csv(tmp_path / "a.csv", "key,t\na,x\n")
    with pytest.raises(UsageError, match=r"1 of 4 samples matched \(25.0%\)"):
        join_labels(file, pool(list("abcd")))
    assert join_labels(file, pool(list("abcd")), least_match=0.2).columns[0].coverage == 0.25


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.xlsx", b"PK\3\4", "labels are a CSV"), ("a.csv", b"key,t\na,\xff\n", "UTF8"), ("b.csv", None, "No such file"),
     ("a.parquet", b"PAR1xxxxPAR1", "a.parquet")],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    """Another format, bytes that are not UTF-8, no file, a broken parquet: an error with the file's name."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        join_labels(file, pool(["a"]))


def test_a_million_distinct_labels_are_refused(tmp_path: Path) -> None:
    """What is no class (a caption, an id) is named with its count, before anything is made of it."""
    many = 1_000_000
    keys = [f"{n}" for n in range(many)]
    pq.write_table(pa.table({"key": keys, "caption": keys}), tmp_path / "l.parquet")
    with pytest.raises(UsageError, match=r"'caption' has 1,000,000 distinct values; an audit compares at most 1,000"):
        join_labels(tmp_path / "l.parquet", pool(keys[:10]))


def test_real_numbers_are_no_classes(tmp_path: Path) -> None:
    """They are binned by whoever knows what they mean."""
    pq.write_table(pa.table({"key": ["a"], "x": [0.5]}), tmp_path / "l.parquet")
    with pytest.raises(UsageError, match="'x' holds double"):
        join_labels(tmp_path / "l.parquet", pool(["a"]))


def test_hostile_labels_are_shown_and_harmless(tmp_path: Path) -> None:
    """Direction marks and control characters become escapes, markup stays text, look-alikes stay apart."""
    raw = ["a\u202eb", "a\\u202eb", "<script>alert(1)</script>", "x\x1b[31m", "=cmd|'/c calc'!A1", "ab\u200b"]
    table = pa.table({"key": [str(n) for n in range(6)], "t": raw})
    pq.write_table(table, tmp_path / "l.parquet")
    (column,) = join_labels(tmp_path / "l.parquet", pool([str(n) for n in range(6)])).columns
    names = values(column)
    assert names[2] == "<script>alert(1)</script>"
    assert names[3] == "x\\x1b[31m"
    assert names[5] == "ab\\u200b"
    assert sorted(names[:2]) == ["a\\u202eb", "a\\u202eb (2)"]  # type: ignore[type-var]
    assert all(name is not None and name.isprintable() for name in names)
    assert spreadsheet_cell(str(names[4])) == "'=cmd|'/c calc'!A1"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1", "\ufeff=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    """Whatever a spreadsheet would compute begins with an apostrophe."""
    assert spreadsheet_cell(text) == "'" + text
    assert spreadsheet_cell("a" + text) == "a" + text


def test_names_are_short_and_keep_their_scripts() -> None:
    """Long names end in an ellipsis, joiners of Indic and Persian words stay, lone surrogates are escaped."""
    assert len(shown("x" * 10_000)) == 80
    for word in ("क्\u200dष", "می\u200cخواهم"):  # noqa: RUF001
        assert shown(word) == word
    assert shown("\ud800") == "\\xed\\xa0\\x80"
    assert len(set(distinct_names(["x" * 100 + str(n) for n in range(5)]))) == 5


def test_intersections_are_the_groups_that_occur() -> None:
    """Disjoint columns give disjoint atoms, unknown where either is; with an overlapping one the atoms overlap."""
    one = column_of(["f", "f", "m", None], name="gender", kind="label", provenance="p")
    other = column_of(["old", "young", "old", "old"], name="age", kind="label", provenance="q")
    both = intersection([one, other])
    assert values(both) == ["f & old", "f & young", "m & old", None]
    many = Column(
        "mentions", "mention", "r", ("a", "b"), members_NG=np.array([[1, 1], [0, 1], [0, 0], [0, 0]], bool),
        known_N=np.array([1, 1, 1, 0], bool),
    )  # fmt: skip
    cross = intersection([one, many])
    assert cross.names == ("f & a", "f & b")
    assert cross.members.tolist() == [[True, True], [False, True], [False, False], [False, False]]
    assert cross.is_known.tolist() == [True, True, True, False]


def test_combinations_of_one_name_are_refused() -> None:
    """x with "y & z" and "x & y" with z would both be called "x & y & z": neither could be named in a policy."""
    one = column_of(["x", "x & y"], name="a", kind="label", provenance="p")
    other = column_of(["y & z", "z"], name="b", kind="label", provenance="q")
    with pytest.raises(UsageError, match="column 'a & b': two of its groups would be called 'x & y & z'; rename"):
        intersection([one, other])


def test_a_column_that_contradicts_itself_is_refused() -> None:
    """Codes beyond the groups, members of what is not known, names twice, label errors that say nothing."""
    bad: list[dict[str, Any]] = [
        {"names": ("a",), "codes_N": np.array([1], np.int32)},
        {"names": ("a", "a"), "codes_N": np.array([0], np.int32)},
        {"names": ("a",)},
        {"names": ("a",), "members_NG": np.ones((1, 1), bool), "known_N": np.zeros(1, bool)},
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match="column x"):
            Column("x", "label", "p", **arguments)
    with pytest.raises(UsageError, match="or the label says nothing"):
        LabelError(0.5, 0.5)


@pytest.mark.parametrize(
    ("url", "country"),
    [("https://a.co.uk/x.jpg", "gb"), ("http://b.com:80/x", "no country (generic domain)"), ("http://x.io/", None),
     ("http://1.2.3.4/x", "address"), ("http://[2001:db8::1]/x", "address"), ("https://пример.рф/x", "ru"),
     ("https://xn--e1afmkfd.xn--p1ai/", "ru"), ("http://user@evil.com@a.de./x", "de"), ("A.DE/x", None),
     ("http://localhost/x", None), ("http://[bad", None), ("", None), (None, None), ("http://a..de/x", "de")],
)  # fmt: skip
def test_the_country_of_a_url_is_where_it_was_hosted(url: str | None, country: str | None) -> None:
    """ccTLDs, their forms in other scripts, addresses, and what is sold for its spelling; broken URLs are unknown."""
    assert country_of(url) == ("no country (sold for its spelling)" if url == "http://x.io/" else country)


def test_countries_are_a_column() -> None:
    """Unknown without a URL; the provenance says what it is not."""
    column = country_column(["http://a.de/", None, "http://b.de/", "http://c.fr/"])
    assert values(column) == ["de", None, "de", "fr"]
    assert "not what it shows" in column.provenance


def test_sizes_and_shapes() -> None:
    """Edges belong to the class above; a size of zero is unknown."""
    width_N, height_N = np.array([255, 256, 2000, 0, 100, 512]), np.array([900, 256, 1024, 5, 401, 256])
    assert values(size_column(width_N, height_N)) == [
        "below 256", "256 to 511", "1024 and above", None, "below 256", "256 to 511",
    ]  # fmt: skip
    assert values(shape_column(width_N, height_N)) == ["tall", "square", "landscape", None, "tall", "wide"]


def test_any_column_of_the_ledger_but_what_the_selection_did() -> None:
    """Numbers in quantiles, text and true or false as they are; a score or a status is refused."""
    table = pa.table({"caption_bytes": list(range(100)), "shard": ["a", "b"] * 50, "status": ["kept"] * 100})
    assert ledger_column(table, "caption_bytes").names == ("0 to 24", "25 to 49", "50 to 74", "75 to 99")
    assert ledger_column(table, "shard").counts.tolist() == [50, 50]
    with pytest.raises(UsageError, match="is what the selection did"):
        ledger_column(table, "status")
    with pytest.raises(UsageError, match="no column 'nothing' in the ledger"):
        ledger_column(table, "nothing")


def test_quantiles_keep_equal_numbers_together() -> None:
    """Half zeros make one class; NaN and infinity are unknown; no number, no class."""
    column = quantile_column(np.array([0.0] * 6 + [1, 2, 3, 4, np.nan, np.inf]), name="x", provenance="p")
    assert values(column)[:6] == ["0 to 0"] * 6
    assert values(column)[-2:] == [None, None]
    assert quantile_column(np.array([np.nan]), name="x", provenance="p").coverage == 0


def test_fields_of_the_json_are_text() -> None:
    """Numbers and true or false are written out; lists, NaN, blank and missing are unknown."""
    column = field_column(["a", 1, True, 1.0, [1], float("nan"), " ", None], name="f", provenance="p")
    assert values(column) == ["a", "1", "true", "1", None, None, None, None]
    with pytest.raises(UsageError, match="1,001 distinct values"):
        field_column(range(1001), name="f", provenance="p")
