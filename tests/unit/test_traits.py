"""The pass that reads every sample's caption, and the table that it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curate.auditing.traits import TraitSettings, caption_reader, facts_of, shipped_lists, word_count
from curate.errors import ShardError, VerificationError
from curate.pipelines import finishing, traits
from curate.pipelines.engine import Inline, open_engine
from curate.pipelines.traits import read_traits, traits_pass
from curate.receipts import Store
from curate.shards.samples import group_samples
from curate.shards.sources import ShardSource, expand_shards, open_shard, shard_digest
from curate.shards.tarindex import index_tar
from tests.making import Sample, make_image, make_tar

SETTINGS = TraitSettings(shipped_lists(), ("gender",), ("licence",))
IMAGE = make_image("jpeg", 40, 30)


@dataclass(frozen=True)
class Running:
    """An engine without a progress bar."""

    engine: Any
    quiet: bool = True


INLINE = Running(Inline(1))


def sample(key: str, caption: bytes | None = b"a woman", record: Any = None, image: bytes | None = IMAGE) -> Sample:
    """A sample; None leaves a member out, and a record that is bytes stays as it is."""
    parts = {"jpg": image, "txt": caption}
    parts["json"] = record if record is None or isinstance(record, bytes) else json.dumps(record).encode()
    return key, {name: data for name, data in parts.items() if data is not None}


def shard(path: Path, *samples: Sample) -> ShardSource:
    """A shard of these samples."""
    return expand_shards(make_tar(path, samples))[0]


def rows(out: Path, *sources: ShardSource, settings: TraitSettings = SETTINGS) -> list[dict[str, Any]]:
    """The traits of these shards."""
    table = read_traits(out, traits_pass(INLINE, out, sources, settings))
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def test_a_row_per_sample_with_what_its_caption_says(tmp_path: Path) -> None:
    """Caption, script, language, words, mentions, url, size and the fields asked for; nothing of the pixels."""
    uid = "0" * 31 + "a"
    record = {"url": "https://x.de/1.jpg", "licence": "cc-by", "uid": uid, "more": 1}
    source = shard(tmp_path / "a.tar", sample("k", b" a woman and her dog\n", record))
    [row] = rows(tmp_path / "out", source)
    sample_id = row.pop("sample_id")
    assert row == {
        "ordinal": 0, "key": "k", "uid": uid, "width": 40, "height": 30, "caption": "a woman and her dog",
        "url": "https://x.de/1.jpg", "field:licence": '"cc-by"', "script": "Latin", "language": "en", "words": 5,
        "mentions:gender": ["female"], "shard": 0,
    }  # fmt: skip
    with open_shard(source) as data:
        [entry] = group_samples(index_tar(data), shard_digest(data))
    assert sample_id == entry.sample_id


def test_captions_in_six_languages_and_one_without_a_list(tmp_path: Path) -> None:
    """A list of groups is empty where none is mentioned, null where no list is for the language."""
    captions = ["ein Mann mit Hut", "两个女孩", "собака", "the red ball", "12 !"]
    source = shard(tmp_path / "a.tar", *(sample(str(n), text.encode()) for n, text in enumerate(captions)))
    found = rows(tmp_path / "out", source)
    assert [row["mentions:gender"] for row in found] == [["male"], ["female"], None, [], []]
    assert [row["script"] for row in found] == ["Latin", "Han", "Cyrillic", "Latin", "undetermined"]
    assert [row["words"] for row in found] == [4, 4, 1, 3, 1]


def test_rejects_are_rows_too(tmp_path: Path) -> None:
    """A sample that no run would use has a row; a caption that is refused is null, and so is all that follows."""
    source = shard(
        tmp_path / "a.tar",
        sample("no-image", image=None),
        sample("no-caption", None),
        sample("empty", b" \n"),
        sample("latin1", b"caf\xe9"),
        sample("long", b"a" * 65_537),
        sample("longest", b"a" * 65_536),
        sample("broken-image", b"a man", image=b"\xff\xd8nothing"),
        sample("twice", b"a woman"),
        sample("twice", b"a man"),
    )
    found = {row["ordinal"]: row for row in rows(tmp_path / "out", source)}
    assert [found[n]["caption"] is None for n in range(9)] == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert [found[n]["mentions:gender"] for n in (1, 6, 7, 8)] == [None, ["male"], ["female"], ["male"]]
    assert [found[n]["width"] for n in (0, 6, 7)] == [None, None, 40]
    assert all(found[1][name] is None for name in ("script", "language", "words"))


def test_json_counts_only_if_it_is_strict_and_text(tmp_path: Path) -> None:
    """Broken json, a url that is no text, a lone surrogate, a field that is a record: null. Scalars keep their type."""
    records: list[Any] = [
        b'{"url": NaN}', b'{"url": "a", "url": "b"}', {"url": 7}, b'{"url": "\\ud800"}', ["url"],
        {"licence": {"a": 1}}, {"licence": 7}, {"licence": True}, {"licence": None},
        b'{"licence": "\\ud800", "\\udc80": 1}', b"\xff",
        {"url": "javascript:alert(1)", "licence": "</script>\u202e"},
    ]  # fmt: skip
    source = shard(tmp_path / "a.tar", *(sample(f"{n:02}", record=one) for n, one in enumerate(records)))
    found = rows(tmp_path / "out", source)
    assert [row["url"] for row in found] == [None] * 11 + ["javascript:alert(1)"]
    assert [row["field:licence"] for row in found[5:10]] == [None, "7", "true", None, '"\\ud800"']
    assert json.loads(found[11]["field:licence"]) == "</script>\u202e"


def test_lists_keep_what_could_be_a_group(tmp_path: Path) -> None:
    """Each value once, records and null left out; a list of nothing stays one, and of too many enough are kept."""
    lists: list[Any] = [["a", "b", "a"], [1, True, 1.0], [], [None, {"a": 1}], ["a", ["b"]], list(range(1000))]
    source = shard(tmp_path / "a.tar", *(sample(f"{n}", record={"licence": one}) for n, one in enumerate(lists)))
    table = read_traits(tmp_path / "out", traits_pass(INLINE, tmp_path / "out", [source], SETTINGS))
    found = [None if one is None else json.loads(one) for one in table["field:licence"].to_pylist()]
    assert found[:5] == [["a", "b"], [1, True, 1.0], [], None, ["a"]]
    assert found[5] == list(range(201))
    assert facts_of(table)["json_fields"] == ["licence"]


def test_a_caption_of_the_json_is_read_as_the_scoring_reads_it(tmp_path: Path) -> None:
    """`caption`, then `text`, where there is no txt member."""
    source = shard(
        tmp_path / "a.tar", sample("a", None, {"text": "t", "caption": "c"}), sample("b", None, {"text": "t"})
    )
    assert [row["caption"] for row in rows(tmp_path / "out", source)] == ["c", "t"]


def test_tables_are_joined_in_the_order_of_the_shards_with_what_they_say(tmp_path: Path) -> None:
    """`shard` numbers the sources; groups and names of json fields go along; columns may be left out."""
    one = shard(tmp_path / "b.tar", sample("1", record={"a": 1}), sample("2"))
    two = shard(tmp_path / "a.tar", sample("3", record={"b": 1, "a": "x", "deep": {}}))
    receipts = traits_pass(INLINE, tmp_path / "out", [one, two], SETTINGS)
    table = read_traits(tmp_path / "out", receipts)
    assert [(row["shard"], row["key"]) for row in table.to_pylist()] == [(0, "1"), (0, "2"), (1, "3")]
    facts = facts_of(table)
    assert facts["json_fields"] == ["a", "b"]
    assert facts["sets"]["gender"]["groups"] == ["female", "male", "nonbinary"]
    assert [receipt.facts["rows"] for receipt in receipts] == [2, 1]
    assert read_traits(tmp_path / "out", receipts, ["key"]).column_names == ["key", "shard"]


def test_an_empty_shard_is_an_empty_table(tmp_path: Path) -> None:
    """With all its columns, so that it joins the others."""
    empty, full = shard(tmp_path / "a.tar"), shard(tmp_path / "b.tar", sample("1"))
    assert [row["shard"] for row in rows(tmp_path / "out", empty, full)] == [1]


def test_a_shard_is_read_once_for_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second audit opens nothing; other fields or sets are another unit; a table that is gone is made again."""
    source, out = shard(tmp_path / "a.tar", sample("1")), tmp_path / "out"
    first = traits_pass(INLINE, out, [source], SETTINGS)
    opened: list[ShardSource] = []
    monkeypatch.setattr(traits, "open_shard", lambda one: (opened.append(one), open_shard(one))[1])
    assert traits_pass(INLINE, out, [source], SETTINGS) == first
    assert opened == []
    assert traits_pass(INLINE, out, [source], TraitSettings(SETTINGS.lists, ("age",)))[0].unit != first[0].unit
    assert len(opened) == 1
    (Store.of(out).root / first[0].outputs[0].path).unlink()
    with pytest.raises(VerificationError, match="is gone; run the same command again"):
        read_traits(out, first)
    assert traits_pass(INLINE, out, [source], SETTINGS) == first
    assert len(opened) == 2


def test_a_shard_that_changed_is_refused(tmp_path: Path) -> None:
    """Its size tells, as everywhere; nothing is left behind."""
    source = shard(tmp_path / "a.tar", sample("1"))
    shard(tmp_path / "a.tar", *(sample(str(n)) for n in range(9)))
    with pytest.raises(ShardError, match="changed since it was planned"):
        traits_pass(INLINE, tmp_path / "out", [source], SETTINGS)
    assert list((tmp_path / "out" / "_curate" / "attempts").iterdir()) == []


def test_any_engine_gives_the_same_receipts(tmp_path: Path) -> None:
    """Inline and on threads of a Dask: content-addressed, to the byte."""
    sources = [shard(tmp_path / f"{n}.tar", sample(str(n)), sample("x", b"a man")) for n in range(3)]
    inline = traits_pass(INLINE, tmp_path / "inline", sources, SETTINGS)
    with open_engine(workers=2, mode="threads") as engine:
        assert traits_pass(Running(engine), tmp_path / "threads", sources, SETTINGS) == inline


def test_traits_outlive_a_selection_made_anew(tmp_path: Path) -> None:
    """`curate select` takes back what was drawn, not what captions say."""
    out = tmp_path / "out"
    first = traits_pass(INLINE, out, [shard(tmp_path / "a.tar", sample("1"))], SETTINGS)
    store = Store.of(out)
    store.prepare()
    finishing.reopen(out)
    assert store.read(traits.TraitSpec(store, expand_shards(tmp_path / "a.tar")[0], SETTINGS).unit) == first[0]
    finishing.collect(store, finishing.Receipts((), (), (), ()))
    assert len(read_traits(out, first)) == 1


def test_words_are_counted_without_marks_and_letters_where_there_are_no_spaces() -> None:
    """So that a Chinese caption is not one word long."""
    reader = caption_reader(TraitSettings())
    captions = ["a dog, a cat - and: me!", "l'homme", "一只狗和 2 cats", "หมา", "हिन्दी में", "…", ""]
    assert reader.read(captions)["words"].to_pylist() == [6, 2, 6, 3, 2, 0, 0]
    assert word_count("x", ["x"]) == 1
