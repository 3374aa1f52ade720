"""Where the names of classes and the prompts come from, and which class a sample has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from curate.errors import UsageError
from curate.evaluation.labels import DEFAULT_TEMPLATES, Labels, fill, find_labels, read_classes, read_templates
from curate.evaluation.streaming import Rejected
from curate.shards.samples import group_samples
from curate.shards.sources import expand_shards
from curate.shards.tarindex import index_tar
from tests.making import make_tar, tar_bytes

IMAGE = b"not decoded here"


def shard(path: Path, records: list[Mapping[str, Any] | None]) -> Path:
    """One shard with a json per sample, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{} if record is None else {"json": json.dumps(record).encode()} for record in records]
    return make_tar(path, [(f"{n:04d}", {"jpg": IMAGE, **row}) for n, row in enumerate(rows)])


def classes_of(path: Path, labels: Labels) -> list[int | str]:
    """What `Labels.read` makes of each sample of a shard: a number, or the reason."""
    data = memoryview(path.read_bytes())
    found = [labels.read(data, entry) for entry in group_samples(index_tar(data), "")]
    return [one.reason if isinstance(one, Rejected) else one for one in found]


@pytest.mark.parametrize("up", [False, True])
def test_the_layout_of_clip_benchmark_is_found(up: bool, tmp_path: Path) -> None:
    """classnames.txt and the templates are read beside the shards or one folder up; `cls` holds the number."""
    members = [(str(n), {"webp": IMAGE, "cls": text}) for n, text in enumerate([b"1", b"0\n", b"", b"-1", b"two"])]
    (tmp_path / "test").mkdir()
    path = make_tar(tmp_path / "test" / "0.tar", [*members, ("5", {"webp": IMAGE})])
    folder = tmp_path if up else tmp_path / "test"
    (folder / "classnames.txt").write_text("tench\nhammerhead shark\r\n\n", encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\nitap of the {}.\n")
    sources = expand_shards(path)
    labels = find_labels(sources)
    assert labels.names == ("tench", "hammerhead shark")
    assert read_templates(sources, None) == ("a {c}.", "itap of the {}.")
    assert classes_of(path, labels) == [1, 0, *["label-unreadable"] * 3, "label-missing"]


def test_files_that_are_given_come_first(tmp_path: Path) -> None:
    """--classes and --templates take the place of what lies beside the shards."""
    sources = expand_shards(shard(tmp_path / "0.tar", [None]))
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    (tmp_path / "mine.txt").write_text("\ufeffeins\nzwei\n", encoding="utf-8")
    assert read_classes(sources, tmp_path / "mine.txt") == ("eins", "zwei")
    (tmp_path / "prompts.txt").write_text("\n{c}!\n\n")
    assert read_templates(sources, tmp_path / "prompts.txt") == ("{c}!",)
    assert read_templates(sources, None) == DEFAULT_TEMPLATES


def test_files_beside_remote_shards_are_found() -> None:
    """Beside a URL the files are fetched as the shards are."""
    store = fsspec.filesystem("memory")
    store.pipe("/labels/test/0.tar", tar_bytes([("0.jpg", IMAGE), ("0.cls", b"0")]))
    store.pipe("/labels/classnames.txt", b"one\ntwo\n")
    sources = expand_shards("memory://labels/test/0.tar")
    assert read_classes(sources, None) == ("one", "two")
    assert read_templates(sources, None) == DEFAULT_TEMPLATES


def test_distinct_values_of_a_field_are_the_classes(tmp_path: Path) -> None:
    """Strings, numbers and truth values make classes, sorted as they are spelled; null, "" and lists make none."""
    path = shard(tmp_path / "0.tar", [{"g": "b"}, {"g": "a"}, {"g": 7}, {"g": None}, {"g": ["a"]}, {"g": ""}, None])
    labels = find_labels(expand_shards(path), field="g")
    assert labels.names == ("7", "a", "b")
    assert classes_of(path, labels) == [2, 1, 0, "label-missing", *["label-unreadable"] * 2, "label-missing"]


def test_a_field_may_refer_to_given_names(tmp_path: Path) -> None:
    """With --classes a string of the field is a name of the file, and an integer its line, counted from 0."""
    path = shard(tmp_path / "0.tar", [{"g": "cat"}, {"g": 0}, {"g": 1}])
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    labels = find_labels(expand_shards(path), classes=tmp_path / "names.txt", field="g")
    assert classes_of(path, labels) == [1, 0, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"g": "cow"}, r"sample '0000': g is 'cow', which is none of the 2 class names; give the --classes"),
        ({"g": 2}, r"sample '0000' has class 2, but there are 2 class names \(0 to 1\); give the --classes"),
        ({"g": -1}, r"sample '0000' has class -1"),
    ],
)
def test_a_class_without_a_name_is_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A label that the class file does not have means that the file belongs to other shards: the sample is named."""
    path = shard(tmp_path / "0.tar", [record])
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    with pytest.raises(UsageError, match=message):
        classes_of(path, find_labels(expand_shards(path), classes=tmp_path / "names.txt", field="g"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("nosuch", r"the samples have nothing there; their fields are g, h\\n"),
        ("g", "the samples have only the value 'a' there"),
    ],
)
def test_a_field_that_makes_no_classes_is_refused(field: str, message: str, tmp_path: Path) -> None:
    """An unknown field, or one with a single value, is an error that lists the fields there are."""
    path = shard(tmp_path / "0.tar", [{"g": "a", "h\n": 1}, {"g": "a"}])
    with pytest.raises(UsageError, match=message):
        find_labels(expand_shards(path), field=field)


def test_more_values_than_classes_can_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field such as a key or a URL has a value per sample and is no label."""
    monkeypatch.setattr("curate.evaluation.labels.MOST_CLASSES", 3)
    path = shard(tmp_path / "0.tar", [{"url": f"u{n}"} for n in range(4)])
    with pytest.raises(UsageError, match="more than 3 distinct values are no classes"):
        find_labels(expand_shards(path), field="url")


def test_missing_and_broken_files_are_said(tmp_path: Path) -> None:
    """No class file, a gap in it, a prompt without a place, bytes that are no text: each says what to do."""
    sources = expand_shards(shard(tmp_path / "0.tar", [None]))
    with pytest.raises(UsageError, match=r"no classnames\.txt beside .* give --classes FILE .* or --label FIELD"):
        find_labels(sources)
    for content, message in ((b"a\n\nb\n", "line 2 of it is empty"), (b"\n", "it is empty"), (b"\xff\n", "not UTF-8")):
        (tmp_path / "broken.txt").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_classes(sources, tmp_path / "broken.txt")
    for content, message in ((b"a {c}\na photo\n", "'a photo' has no place for the name"), (b"\n", "no prompt")):
        (tmp_path / "broken.txt").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_templates(sources, tmp_path / "broken.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_classes(sources, tmp_path)


def test_shards_with_different_class_files_are_refused(tmp_path: Path) -> None:
    """Numbers of two class files do not mix."""
    paths = [shard(tmp_path / name / "0.tar", [None]) for name in ("one", "two")]
    for path in paths:
        (path.parent / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=r"different classnames\.txt .*one by one"):
        find_labels(expand_shards(paths))


def test_a_prompt_is_not_a_format() -> None:
    """Only the place of the name is filled; what else looks like a format, in prompt or name, stays as it is."""
    assert fill("{0.__class__} of a {c}", "{x}") == "{0.__class__} of a {x}"
    assert fill("a {}.", "cat") == "a cat."
