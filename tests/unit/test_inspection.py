"""What `inspect` reports about shards."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

import curate.inspection as inspection_module
from curate.inspection import Found, Inspection, Spread, inspect_shards, printable, render_inspection, spread
from tests.making import data_root, make_image, make_samples, make_tar, tar_bytes, write_tar


def rendered(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    render_inspection(inspection, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One sound shard, one with bad samples that is cut, one that is no tar, one that is empty."""
    make_tar(tmp_path / "00000.tar", make_samples(4))
    image = make_image("png", 20, 10)
    bad = [
        ("000000001.png", image), ("000000001.txt", b"a second one with this key"),
        ("empty.png", b""), ("empty.txt", b"x"),
        ("blank.png", image), ("blank.txt", b" "),
        ("none.txt", b"no picture"),
        ("[red]k[/red].png", image), ("[red]k[/red].txt", b"[bold]shared[/bold]"),
        ("half.png", image[:60]), ("half.txt", b"[bold]shared[/bold]"),
        ("README", b"not a sample"),
        ("last.png", image * 30),
    ]  # fmt: skip
    data = tar_bytes(bad)
    (tmp_path / "00001.tar").write_bytes(data[: data.rindex(b"IEND")])
    (tmp_path / "00002.tar").write_bytes(b"<html>busy</html>")
    (tmp_path / "00003.tar").write_bytes(b"")
    return tmp_path


def test_counts_and_reasons(mixed: Path) -> None:
    """Samples are readable or have one reason with example keys, and the sums agree."""
    found = inspect_shards([mixed])
    assert {reason: one.count for reason, one in found.quarantined.items()} == {
        "image-empty": 1,
        "caption-empty": 1,
        "image-missing": 1,
        "tar-truncated": 1,
        "tar-damaged": 1,
    }
    assert found.quarantined["image-empty"].examples == ("empty",)
    assert (found.samples, found.readable) == (12, 7)
    assert found.samples == found.readable + sum(one.count for one in found.quarantined.values())
    assert found.shards[1].outside == 1
    assert [one.samples for one in found.shards] == [4, 7, 1, 0]


def test_flaws_have_their_offset(mixed: Path) -> None:
    """A cut shard and a web page say where reading stopped."""
    cut, page = inspect_shards([mixed]).shards[1:3]
    assert cut.flaw is not None
    assert (cut.flaw.reason, cut.flaw.name) == ("tar-truncated", "last.png")
    assert cut.flaw.offset > 0
    assert page.flaw is not None
    assert (page.flaw.reason, page.flaw.offset) == ("tar-damaged", 0)
    assert "web page" in page.flaw.detail


def test_decoding_finds_what_headers_hide(mixed: Path) -> None:
    """A cut image has a good header; only decode=True finds it."""
    assert "image-undecodable" not in inspect_shards([mixed]).quarantined
    found = inspect_shards([mixed], decode=True)
    assert found.quarantined["image-undecodable"] == Found(1, ("half",))
    assert found.images.decoded


def test_keys_in_several_shards(mixed: Path) -> None:
    """A key that two shards share is counted once, with the key as an example."""
    assert inspect_shards([mixed]).keys_in_several_shards == Found(1, ("000000001",))


def test_figures_of_captions_and_images(tmp_path: Path) -> None:
    """Lengths, sizes, ASCII share and frequent captions are those of the data."""
    texts = [b"one two three", b"one two three", "é".encode(), b"a bb ccc dddd"]
    sizes = [(10, 20), (30, 20), (50, 20), (70, 21)]
    samples = [(f"k{n}", {"png": make_image("png", *sizes[n]), "txt": texts[n]}) for n in range(4)]
    found = inspect_shards([make_tar(tmp_path / "a.tar", samples)])
    assert found.captions.characters == Spread(1, 13, 13, 13)
    assert found.captions.words == Spread(1, 3, 4, 4)
    assert found.captions.ascii_share == 0.75
    assert found.captions.most_frequent == (("one two three", 2),)
    assert (found.captions.count, found.captions.distinct) == (4, 3)
    assert found.images.width == Spread(10, 30, 70, 70)
    assert found.images.height == Spread(20, 20, 21, 21)
    assert found.extensions == {"png": 4, "txt": 4}
    assert found.bytes == os.path.getsize(tmp_path / "a.tar")


def test_json_is_valid(tmp_path: Path) -> None:
    """The dictionary is strict JSON even with names that are no UTF-8 and with no sample at all."""
    name = b"\xff\xfe".decode("utf-8", "surrogateescape")
    write_tar(tmp_path / "a.tar", [(f"{name}.txt", b"x"), (f"{name}.{name}", b"")])
    text = json.dumps(inspect_shards([tmp_path / "a.tar"]).as_json(), allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")
    assert json.loads(text)["quarantined"]["image-missing"]["examples"] == ["\\udcff\\udcfe"]


def test_markup_and_control_characters_are_text(mixed: Path) -> None:
    """Markup in keys and captions is printed as it is; control characters are escaped."""
    text = rendered(inspect_shards([mixed]))
    assert "[bold]shared[/bold]" in text
    assert printable("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"
    (mixed / "00004.tar").write_bytes(tar_bytes([("[blink]z.txt", b"")]))
    assert "[blink]z" in rendered(inspect_shards([mixed / "00004.tar"]))


def test_tables_tell_the_essentials(mixed: Path) -> None:
    """The printed report names each reason with its meaning, and the flawed shard's offset."""
    text = rendered(inspect_shards([mixed]))
    for part in (
        "image-empty",
        "the image has no bytes",
        "tar-truncated",
        "web page",
        "12 in 4 shards",
        "headers only",
    ):
        assert part in text


def test_empty_input_renders(tmp_path: Path) -> None:
    """An empty shard gives a report with zeros and no division by zero."""
    (tmp_path / "a.tar").write_bytes(b"")
    found = inspect_shards([tmp_path / "a.tar"])
    assert (found.samples, found.captions.characters, found.captions.ascii_share) == (0, None, None)
    assert "none" in rendered(found)


def test_a_shard_that_cannot_be_opened_is_a_row(tmp_path: Path) -> None:
    """A compressed shard under a .tar name has its error in its row; the others are inspected."""
    make_tar(tmp_path / "a.tar", make_samples(2))
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    found = inspect_shards([tmp_path])
    assert found.samples == 2
    assert "gzip" in (found.shards[1].error or "")


def test_memory_bounds_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tables of keys or captions are full, the report says that the counts are lower bounds."""
    monkeypatch.setattr(inspection_module, "MAX_KEYS", 3)
    monkeypatch.setattr(inspection_module, "MAX_CAPTIONS", 3)
    found = inspect_shards([make_tar(tmp_path / "a.tar", make_samples(6))])
    assert (found.keys_complete, found.captions.distinct_complete, found.captions.distinct) == (False, False, 3)
    assert "at least 3 distinct" in rendered(found)


def test_spread_is_made_of_members() -> None:
    """Percentiles are the smallest values that the share does not exceed."""
    assert spread(Counter(range(1, 101))) == Spread(1, 50, 95, 100)
    assert spread(Counter()) is None


@pytest.mark.data
@pytest.mark.parametrize(
    ("corpus", "count", "form"),
    [("openstax/train", 2287, "jpeg"), ("openstax/val", 292, "jpeg"), ("emoji-blob/train", 1297, "png")],
)
def test_real_corpora(corpus: str, count: int, form: str) -> None:
    """Every sample of the real corpora is readable, and their counts are the documented ones."""
    found = inspect_shards([data_root() / corpus])
    assert (found.samples, found.readable, found.quarantined) == (count, count, {})
    assert found.images.formats == {form: count}
    assert found.extensions == {form.replace("e", ""): count, "txt": count, "json": count}
