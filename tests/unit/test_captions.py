"""Captions: strict text, each refusal with its reason."""

from __future__ import annotations

import json

import pytest

from curate.shards.captions import read_caption, read_json, strict_json
from curate.shards.samples import group_samples
from curate.shards.tarindex import index_tar
from tests.making import tar_bytes


def caption(max_bytes: int = 65536, **members: bytes) -> tuple[str | None, str | None]:
    data = memoryview(tar_bytes([("a.jpg", b"1"), *((f"a.{name}", body) for name, body in members.items())]))
    return read_caption(data, group_samples(index_tar(data), "")[0], max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a red cube", ("a red cube", None)),
        (b" two\nlines \n", ("two\nlines", None)),
        (b"\xef\xbb\xbfwith a mark", ("with a mark", None)),
        ("\U0001f468\u200d\U0001f680".encode(), ("\U0001f468\u200d\U0001f680", None)),
        (b"=cmd()", ("=cmd()", None)),
        (b"", (None, "caption-empty")),
        (b" \n\t ", (None, "caption-empty")),
        ("\u200b\u2060\ufeff".encode(), (None, "caption-empty")),
        (b"\xff\xfe", (None, "caption-encoding")),
        (b"\xed\xa0\x80", (None, "caption-encoding")),
        (b"a\0b", (None, "caption-encoding")),
        (b"x" * 65536, ("x" * 65536, None)),
        (b"x" * 65537, (None, "caption-too-long")),
        (b"x" * 1_000_000, (None, "caption-too-long")),
    ],
)
def test_txt(text: bytes, expected: tuple[str | None, str | None]) -> None:
    """A txt member is UTF-8 with something visible and within the limit, or has one reason."""
    assert caption(txt=text) == expected


def test_no_caption() -> None:
    """A sample without txt and json is caption-missing."""
    assert caption() == (None, "caption-missing")


def test_txt_decides_over_json() -> None:
    """Where there is a txt member the json is not asked, even if the txt is empty."""
    assert caption(txt=b"t", json=b'{"caption": "j"}') == ("t", None)
    assert caption(txt=b"", json=b'{"caption": "j"}') == (None, "caption-empty")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"caption": "c", "text": "t"}', ("c", None)),
        (b'{"text": "t"}', ("t", None)),
        (b'{"caption": null, "text": "t"}', ("t", None)),
        (b'{"caption": ""}', (None, "caption-empty")),
        (b'{"caption": "\\u0000"}', (None, "caption-encoding")),
        (b'{"caption": "\\ud800"}', (None, "caption-encoding")),
        (b'{"caption": 7}', (None, "caption-missing")),
        (b'["caption"]', (None, "caption-missing")),
        (b"not json", (None, "caption-missing")),
        (b"\xff", (None, "caption-missing")),
        (b'{"caption": "a", "score": NaN}', (None, "caption-missing")),
        (b'{"caption": "a", "caption": "b"}', (None, "caption-missing")),
        (b'{"caption": "a", "n": 1e999}', (None, "caption-missing")),
        (b'{"caption": "a", "n": ' + b"9" * 5000 + b"}", (None, "caption-missing")),
        (b'{"caption": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", (None, "caption-missing")),
        (b'{"caption": "a", "pad": "' + b"x" * 1_100_000 + b'"}', (None, "caption-missing")),
    ],
)
def test_json(body: bytes, expected: tuple[str | None, str | None]) -> None:
    """A json caption counts only if the whole member parses strictly."""
    assert caption(json=body) == expected


def test_json_caption_limit_counts_bytes() -> None:
    """The limit holds for json captions too, in UTF-8 bytes."""
    assert caption(max_bytes=3, json=json.dumps({"caption": "éé"}).encode()) == (None, "caption-too-long")
    assert caption(max_bytes=4, json=json.dumps({"caption": "éé"}).encode()) == ("éé", None)


@pytest.mark.parametrize("payload", [b"Infinity", b"-Infinity", b"{'a': 1}", b"", b"[" * 10**6, b"1" * 10**5])
def test_strict_json_raises_only_value_error(payload: bytes) -> None:
    """Whatever is wrong with the JSON, the error is a ValueError."""
    with pytest.raises(ValueError):
        strict_json(payload)


def test_read_json_gives_dictionaries_only() -> None:
    """A json member that is no object, or absent, reads as None."""
    data = memoryview(tar_bytes([("a.jpg", b""), ("a.json", b"[1]"), ("b.jpg", b""), ("b.json", b'{"uid": "7"}')]))
    entries = group_samples(index_tar(data), "")
    assert [read_json(data, one) for one in entries] == [None, {"uid": "7"}]
