"""Pools and selections of other tools: DataComp's files, lists of keys, and what is refused or said of odd ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.auditing.assembling import assemble
from curate.auditing.audit import audit_columns
from curate.auditing.concepts import concepts_of, terms_of
from curate.auditing.foreign import Foreign, read_foreign
from curate.auditing.given_columns import json_column
from curate.auditing.lexicons import shipped_lexicons
from curate.auditing.request import AuditRequest
from curate.auditing.traits import TraitSettings
from curate.errors import UsageError
from curate.formats.datacomp import to_npy, uid_array

KEYS = ["a", "b", "c", "d"]
UIDS = [f"{n:032x}" for n in range(4)]
TEXTS = ["a woman", "a man with a dog", None, "東京"]
SETTINGS = TraitSettings.default()


def pool(path: Path, **columns: Any) -> Path:
    """A pool of four; None leaves a column out."""
    made = {"key": KEYS, "uid": UIDS, "text": TEXTS, "url": ["https://x.de/1.jpg"] * 4} | columns
    pq.write_table(pa.table({name: one for name, one in made.items() if one is not None}), path / "pool.parquet")
    return path / "pool.parquet"


def chosen(path: Path, text: str, name: str = "selected.txt") -> Path:
    """A list of ids."""
    (path / name).write_text(text, encoding="utf-8")
    return path / name


def read(path: Path, lines: str, /, on: str | None = None, least: float = 0.95, **columns: Any) -> Foreign:
    """The pool with these columns, and a selection of these lines."""
    return read_foreign(pool(path, **columns), chosen(path, lines), SETTINGS, on=on, least_found=least)


def test_a_list_of_keys_selects_rows(tmp_path: Path) -> None:
    """Blank lines and outer white space are nothing; the count is in the notes."""
    found = read(tmp_path, "\ufeffa\r\n\n  c \n")
    assert (found.times_N.tolist(), found.on) == ([1, 0, 1, 0], "key")
    assert found.notes == ("2 of 2 selected keys are in pool.parquet, which has 4 rows (100.0%)",)


def test_a_datacomp_subset_selects_by_uid(tmp_path: Path) -> None:
    """The .npy of pairs; a uid that is there twice was selected twice."""
    file = tmp_path / "subset.npy"
    file.write_bytes(to_npy(uid_array([UIDS[3], UIDS[1], UIDS[3]])))
    found = read_foreign(pool(tmp_path, key=None), file, SETTINGS)
    assert (found.times_N.tolist(), found.on, found.selected, found.found) == ([0, 1, 0, 2], "uid", 3, 3)
    assert "1 uids were selected several times; each counts as often" in found.notes


def test_a_list_of_uids_is_known_by_its_looks(tmp_path: Path) -> None:
    """In either case and with hyphens; `on` decides where keys look like uids."""
    dashed = f"{UIDS[1][:8]}-{UIDS[1][8:]}".upper()
    found = read(tmp_path, f"{dashed}\n{UIDS[2]}\n")
    assert (found.on, found.times_N.tolist()) == ("uid", [0, 1, 1, 0])
    assert read(tmp_path, f"{UIDS[0]}\n", on="key", key=UIDS, uid=UIDS[::-1]).times_N.tolist() == [1, 0, 0, 0]


def test_a_parquet_of_the_selected_is_joined_on_what_both_have(tmp_path: Path) -> None:
    """uid before key, whole numbers as text."""
    pq.write_table(pa.table({"key": [7, 9], "other": [1, 2]}), tmp_path / "s.parquet")
    found = read_foreign(pool(tmp_path, key=[7, 8, 9, 10], uid=None), tmp_path / "s.parquet", SETTINGS)
    assert found.times_N.tolist() == [1, 0, 1, 0]
    pq.write_table(pa.table({"key": KEYS[:1], "uid": UIDS[1:2]}), tmp_path / "s.parquet")
    assert read_foreign(pool(tmp_path), tmp_path / "s.parquet", SETTINGS).times_N.tolist() == [0, 1, 0, 0]


def test_a_directory_of_parquets_is_one_pool(tmp_path: Path) -> None:
    """In the order of their names, with columns that some lack."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    pq.write_table(pa.table({"uid": UIDS[:2], "text": TEXTS[:2]}), folder / "0.parquet")
    pq.write_table(pa.table({"uid": UIDS[2:], "text": TEXTS[2:], "licence": ["x", "y"]}), folder / "1.parquet")
    found = read_foreign(folder, chosen(tmp_path, UIDS[2]), SETTINGS)
    assert found.times_N.tolist() == [0, 0, 1, 0]
    assert found.rows["licence"].to_pylist() == [None, None, "x", "y"]


def test_the_pool_gives_columns_like_any_other(tmp_path: Path) -> None:
    """Mentions, script, country, size under DataComp's names, and any column that is named."""
    found = read(
        tmp_path, "a", original_width=[300, 100, None, 9], original_height=[300.0, 100, 5, None], licence=list("xxyy")
    )
    made = assemble(found.rows, found.traits, AuditRequest(columns=("licence",))).named()
    assert made["gender"].members[:, made["gender"].names.index("female")].tolist() == [True, False, False, False]
    assert made["caption script"].is_known.tolist() == [True, True, False, True]
    assert made["image size"].codes_N is not None
    assert made["image size"].codes_N.tolist() == [1, 0, -1, -1]
    assert made["url country"].provenance.startswith("top-level domain of url in pool.parquet")
    assert made["licence"].provenance == "'licence' in pool.parquet"
    with pytest.raises(UsageError, match=r"no column 'nothing': pool\.parquet has sample_id, key"):
        assemble(found.rows, found.traits, AuditRequest(columns=("nothing",)))


def test_labels_are_joined_on_what_the_pool_has(tmp_path: Path) -> None:
    """A pool of uids takes labels by uid, and says so where they are to be joined by key."""
    found = read(tmp_path, UIDS[0], key=None)
    labels = chosen(tmp_path, f"uid,key,tone\n{UIDS[0]},a,x\n{UIDS[1]},b,y\n", "labels.csv")
    tone = assemble(found.rows, found.traits, AuditRequest(labels=labels, on="uid")).named()["tone"]
    assert tone.codes_N is not None
    assert tone.codes_N.tolist() == [0, 1, -1, -1]
    with pytest.raises(UsageError, match="labels cannot be joined on key: the pool has sample_id, uid"):
        assemble(found.rows, found.traits, AuditRequest(labels=labels))


def test_a_pool_without_captions_says_so(tmp_path: Path) -> None:
    """And is audited by what else it has; another column may hold the captions."""
    found = read(tmp_path, "a", text=None, alt=TEXTS)
    assert found.notes[-1].startswith("pool.parquet has no column of captions (caption or text)")
    assert "caption script" not in assemble(found.rows, found.traits, AuditRequest()).named()
    found = read_foreign(tmp_path / "pool.parquet", tmp_path / "selected.txt", SETTINGS, caption="alt")
    assert found.traits["language"].null_count == 1


def test_too_few_of_the_selected_in_the_pool_are_refused(tmp_path: Path) -> None:
    """With the rate, both sides' first, and what to do; a lower share may be asked for, none at all may not."""
    with pytest.raises(UsageError, match=r"1 of the 2 selected keys are in pool\.parquet \(50\.0%\), fewer than the"):
        read(tmp_path, "a\nzz\n")
    with pytest.raises(UsageError, match="first that is not is 'zz', the pool's first is 'a'"):
        read(tmp_path, "a\nzz\n")
    found = read(tmp_path, "a\nzz\n", least=0.5)
    assert (found.found, found.selected) == (1, 2)
    with pytest.raises(UsageError, match="0 of the 1 selected"):
        read(tmp_path, "zz\n", least=0.0)


def test_repeated_ids_of_the_pool_are_loud(tmp_path: Path) -> None:
    """Refused where one was selected, since nobody knows which row; counted where none was."""
    with pytest.raises(UsageError, match="1 selected keys stand in several rows, first 'a'"):
        read(tmp_path, "a\n", key=["a", "a", "c", "d"])
    notes = read(tmp_path, "c\n", key=["a", "a", "c", None]).notes
    assert "1 rows of pool.parquet repeat a key that was not selected: each is a row of the pool" in notes
    assert "1 rows of pool.parquet have no key: they are in the pool and cannot be selected" in notes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.npy", b"\x93NUMPY\x01\x00garbage", "not a DataComp subset file"),
        ("s.parquet", b"PAR1garbagePAR1", "s.parquet: "),
        ("s.txt", b"\xff\xfe", "not UTF-8 text at byte 0"),
        ("s.txt", b"\n\n", "it lists no key; nothing was selected"),
        ("s.jpg", b"\xff\xd8", "a .npy of DataComp uids, a .txt of ids line by line, or a parquet"),
    ],
)
def test_a_selection_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each kind of file with what is wrong with it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_foreign(pool(tmp_path, uid=None), tmp_path / name, SETTINGS)


def test_a_selection_of_ids_that_the_pool_lacks_is_refused(tmp_path: Path) -> None:
    """uids for a pool of keys, a parquet without either, rows without an id, a file that is not there."""
    (tmp_path / "s.npy").write_bytes(to_npy(uid_array(UIDS[:1])))
    with pytest.raises(UsageError, match="lists uids, and the pool has no column 'uid'; it has key"):
        read_foreign(pool(tmp_path, uid=None), tmp_path / "s.npy", SETTINGS)
    with pytest.raises(UsageError, match="it holds uids; leave --on key out"):
        read_foreign(pool(tmp_path), tmp_path / "s.npy", SETTINGS, on="key")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "s.parquet")
    with pytest.raises(UsageError, match="no column uid or key; there are: name"):
        read_foreign(pool(tmp_path), tmp_path / "s.parquet", SETTINGS)
    pq.write_table(pa.table({"key": ["a", None]}), tmp_path / "s.parquet")
    with pytest.raises(UsageError, match="1 rows have no key; leave them out"):
        read_foreign(pool(tmp_path), tmp_path / "s.parquet", SETTINGS)
    with pytest.raises(UsageError, match="No such file"):
        read_foreign(pool(tmp_path), tmp_path / "gone.txt", SETTINGS)


def test_a_pool_that_is_none_is_refused(tmp_path: Path) -> None:
    """No parquet, an empty one, none in a directory, no id, captions that are no text."""
    listed = chosen(tmp_path, "a\n")
    with pytest.raises(UsageError, match="a pool is a parquet file, or a directory of them"):
        read_foreign(listed, listed, SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no parquet file in it"):
        read_foreign(tmp_path / "empty", listed, SETTINGS)
    with pytest.raises(UsageError, match="it has no rows"):
        read_foreign(pool(tmp_path, key=pa.array([], pa.string()), uid=None, text=None, url=None), listed, SETTINGS)
    with pytest.raises(UsageError, match="no column uid or key"):
        read_foreign(pool(tmp_path, key=None, uid=None), listed, SETTINGS)
    with pytest.raises(UsageError, match="captions are text"):
        read(tmp_path, "a\n", text=[1, 2, 3, 4])
    with pytest.raises(UsageError, match="holds double; ids are text or whole numbers"):
        read(tmp_path, "a\n", key=[1.0, 2, 3, 4], uid=None)


def test_columns_of_lists_and_what_the_selection_made_are_not_taken(tmp_path: Path) -> None:
    """Embeddings stay on the disk; a column called status is no group."""
    found = read(tmp_path, "a\n", boxes=[[1.0], [2.0], [], None], status=["kept"] * 4)
    assert found.rows.column_names == ["sample_id", "key", "uid", "text", "url"]


def test_concepts_are_frequent_words_of_content() -> None:
    """No function word, no term of a list, no number, nothing rare or in most captions; ties by the word."""
    captions: list[str | None] = ["the red cube with 100 images"] * 30 + ["a woman and the red ball"] * 25 + [None] * 5
    captions += ["a green ball on sand"] * 40 + ["rare words here"] * 19 + ["यह लाल गेंद है"] * 20
    found = concepts_of(captions)
    assert list(found) == ["ball", "red", "green", "sand", "cube", "गेंद", "लाल"]
    assert found["red"].sum() == 55
    assert np.flatnonzero(found["cube"]).tolist() == list(range(30))
    assert list(concepts_of(captions, most=1, taken=("ball",))) == ["red"]
    assert concepts_of(["a red cube"] * 19) == {}


def test_concepts_of_a_column_are_those_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is read in pieces, and where only some of its captions are counted."""
    captions = [("red", "green", "blue")[n % 3] + " ball number" for n in range(300)]
    plain = concepts_of(captions)
    monkeypatch.setattr("curate.auditing.concepts._BATCH", 7)
    monkeypatch.setattr("curate.auditing.concepts.COUNTED", 75)
    pieces = concepts_of(pa.chunked_array([captions[:50], captions[50:]]))
    assert list(plain) == list(pieces) == ["blue", "green", "red"]
    assert all(np.array_equal(plain[word], pieces[word]) for word in plain)


def test_terms_of_the_lists_are_no_concepts() -> None:
    """Single words of every set and language, folded."""
    terms = terms_of(shipped_lexicons())
    assert {"woman", "mujer", "muslim"} <= terms
    assert "red" not in terms


def test_images_with_the_same_digest_are_one_unit(tmp_path: Path) -> None:
    """DataComp's sha256; what is no digest is a sample of its own, and columns of that name that hold text are none."""
    digests = ["ab" * 32, "AB" * 32, "cd" * 32, "none"]
    request = AuditRequest(confounders=())
    for hashes, units in ((digests, [0, 0, 1, 2]), (None, None)):
        found = read(tmp_path, "a\nb", sha256=hashes, image_digest=["x"] * 4, dhash=["y"] * 4)
        made = assemble(found.rows, found.traits, request)
        assert (None if made.copies is None else made.copies.units_N.tolist()) == units
    assert any("near-duplicates are counted as samples of their own" in note for note in made.notes)


def test_copies_in_a_pool_of_another_tool_raise_no_flags(tmp_path: Path) -> None:
    """Eight copies of each image, kept or dropped together: 40 groups that nothing happened to."""
    random, N = np.random.default_rng(3), 4000
    unit_N, keys = np.repeat(np.arange(N // 8), 8), [f"k{row}" for row in range(N)]
    groups = [f"g{code}" for code in random.integers(0, 40, N // 8)[unit_N]]
    kept_N = (random.permutation(N // 8) < N // 40)[unit_N]
    lines = "\n".join(key for key, kept in zip(keys, kept_N, strict=True) if kept)
    flags = []
    for hashes in ([f"{unit:064x}" for unit in unit_N.tolist()], None):
        found = read(
            tmp_path, lines, key=keys, uid=None, text=["a cube"] * N, url=None, group=groups, sha256=hashes
        )  # fmt: skip
        made = assemble(found.rows, found.traits, AuditRequest(columns=("group",), confounders=()))
        units_N = None if made.copies is None else made.copies.units_N
        column = [made.named()["group"]]
        flags.append(audit_columns(column, found.times_N > 0, clusters_N=units_N, placebos=0).flags)
    assert flags[0] == 0
    assert flags[1] > 5


def test_a_npy_of_anything_else_is_refused_by_name(tmp_path: Path) -> None:
    """Not only what is wrong, but with which file."""
    np.save(tmp_path / "numbers.npy", np.arange(10))
    with pytest.raises(UsageError, match=r"numbers\.npy: not a DataComp subset file"):
        read_foreign(pool(tmp_path), tmp_path / "numbers.npy", SETTINGS)


LISTS = [["a", "b"], ["b"], [], None]


def tags_of(folder: Path, kind: Any, values: list[Any]) -> Any:
    """The column "tags" of a pool with these lists."""
    found = read_foreign(
        pool(folder, tags=pa.array(values, kind)), chosen(folder, "a\n"), SETTINGS, lists=["tags", "key"]
    )
    return assemble(found.rows, found.traits, AuditRequest(columns=("tags",)), wanted={"tags"}).columns[0]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.list_(pa.string()), LISTS),
        (pa.large_list(pa.large_string()), LISTS),
        (pa.list_(pa.dictionary(pa.int32(), pa.string())), LISTS),
        (pa.list_(pa.int64()), [[1, 20], [20], [], None]),
        (pa.list_(pa.int8(), 2), [[1, 20], [20, None], [None, None], None]),
        (pa.list_(pa.bool_()), [[True, False], [False], [], [None]]),
    ],
)
def test_lists_are_overlapping_groups_as_in_json(tmp_path: Path, kind: Any, values: list[Any]) -> None:
    """Each value a group, an empty list in none, null unknown: what the same lists give in the samples' json."""
    column = tags_of(tmp_path, kind, values)
    texts = pa.chunked_array([[None if v is None or (None in v and not any(v)) else json.dumps(v) for v in values]])
    same = json_column(texts, "tags")
    assert column.names == same.names
    assert column.members.tolist() == same.members.tolist()
    assert column.is_known.tolist() == same.is_known.tolist()
    assert column.provenance == "'tags' in pool.parquet, of which a sample may have several"
    assert [sorted(column.names[g] for g in np.flatnonzero(row)) for row in column.members[:2]] == [
        sorted(str(v).lower() for v in one if v is not None) for one in values[:2]
    ]


def test_lists_of_too_many_values_are_refused_as_in_json(tmp_path: Path) -> None:
    """200 values are groups and 201 are not, in the words of a json field."""
    for most in (200, 201):
        values = [[f"t{n}" for n in range(most)], ["t0"], None, []]
        texts = pa.chunked_array([[None if one is None else json.dumps(one) for one in values]])
        if most == 200:
            assert tags_of(tmp_path, pa.list_(pa.string()), values).counts.sum() == 201
            continue
        said = r"column 'tags' holds lists of more than 200 distinct values; name a field with fewer"
        with pytest.raises(UsageError, match=said) as theirs:
            json_column(texts, "tags")
        with pytest.raises(UsageError, match=said) as ours:
            tags_of(tmp_path, pa.list_(pa.string()), values)
        assert str(ours.value) == str(theirs.value)


def test_lists_that_are_no_groups_are_refused_only_where_named(tmp_path: Path) -> None:
    """Fractions, lists of lists and records: embeddings that nobody asks for are left where they are."""
    for kind, value in (
        (pa.list_(pa.float32(), 2), [0.1, 0.2]),
        (pa.list_(pa.list_(pa.string())), [["a"]]),
        (pa.list_(pa.struct({"a": pa.int8()})), [{"a": 1}]),
    ):
        with pytest.raises(UsageError, match=r"'tags' holds lists of .*; groups are lists of text, of whole numbers"):
            tags_of(tmp_path, kind, [value] * 4)
        assert "tags" not in read(tmp_path, "a\n", tags=pa.array([value] * 4, kind)).rows.column_names
    assert "tags" not in read(tmp_path, "a\n", tags=pa.array(LISTS)).rows.column_names


def test_lists_hold_nothing_fixed(tmp_path: Path) -> None:
    """As a confounder a column of lists is refused: strata exclude each other."""
    found = read_foreign(pool(tmp_path, tags=LISTS), chosen(tmp_path, "a\n"), SETTINGS, lists=["tags"])
    with pytest.raises(UsageError, match="--confounder 'tags': its groups overlap"):
        assemble(found.rows, found.traits, AuditRequest(confounders=("tags",)))
