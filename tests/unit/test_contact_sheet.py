"""The contact sheet of any output, and the lettering under its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from curate.contact_sheet import ACCENT, contact_sheet
from curate.errors import UsageError
from curate.ledger import LEDGER_SCHEMA
from curate.lettering import fit, font, legible, lettered, width_of, wrap
from curate.shards.tarwriter import tar_end, tar_member
from tests.making import make_image

HOSTILE = "\u202egnp.exe \x00\x1b[31m \U0001f469\u200d\U0001f680 東京 " + "e" + "\u0301" * 500 + " word" * 2000


def make_output(directory: Path, statuses: list[str], captions: list[str] | None = None) -> Path:
    """A shard with one sample per status, and the ledger of a run on it."""
    shard, rows = bytearray(), []
    for i, status in enumerate(statuses):
        caption = captions[i] if captions else f"caption {i}"
        payload = b"not a picture" if status == "quarantined" else make_image(seed=i)
        facts = json.dumps({"fault": "blurred-image"} if i % 2 else {}).encode()
        for name, data in ((f"{i}.jpg", payload), (f"{i}.txt", caption.encode()), (f"{i}.json", facts)):
            shard += b"".join(tar_member(name, data))
        rows.append(make_row(directory, i, status))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "in.tar").write_bytes(bytes(shard) + tar_end(len(shard)))
    out = directory / "out"
    (out / "_curate" / "ledger").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, LEDGER_SCHEMA), out / "_curate" / "ledger" / "00000.parquet")
    return out


def make_row(directory: Path, i: int, status: str) -> dict[str, Any]:
    reason = {"kept": "selected", "dropped": "not-selected", "quarantined": "image-format"}[status]
    row = {"sample_id": i.to_bytes(16, "little"), "shard": str(directory / "in.tar"), "ordinal": i, "key": str(i)}
    row |= {"status": status, "reason": reason, "score": None if status == "quarantined" else 100.0 - i}
    return row | ({"rank": i, "sub_batch": 0} if status == "kept" else {})


def colours(path: Path) -> set[tuple[int, ...]]:
    counted = Image.open(path).convert("RGB").getcolors(1 << 24) or []
    return {colour for _, colour in counted if isinstance(colour, tuple)}


def rgb(name: str) -> tuple[int, int, int]:
    return (int(name[1:3], 16), int(name[3:5], 16), int(name[5:7], 16))


def test_all_three_blocks_are_drawn(tmp_path: Path) -> None:
    """A run with kept, dropped and quarantined samples gives a sheet with the accent colour of each."""
    out = make_output(tmp_path, ["kept"] * 6 + ["dropped"] * 9 + ["quarantined"])
    sheet = contact_sheet(out, tmp_path / "sheet.png", columns=4, rows=1)
    assert {rgb(colour) for colour in ACCENT.values()} <= colours(sheet)
    assert Image.open(sheet).format == "PNG"


def test_a_status_without_samples_has_no_block(tmp_path: Path) -> None:
    """Where nothing was quarantined, nothing is drawn in that colour and the sheet is shorter."""
    full = contact_sheet(make_output(tmp_path / "a", ["kept", "dropped", "quarantined"]), tmp_path / "a.png")
    less = contact_sheet(make_output(tmp_path / "b", ["kept", "dropped"]), tmp_path / "b.png")
    assert rgb(ACCENT["quarantined"]) not in colours(less)
    assert Image.open(less).height < Image.open(full).height


def test_equal_seeds_give_equal_sheets(tmp_path: Path) -> None:
    """The draw depends on the seed alone."""
    out = make_output(tmp_path, ["kept"] * 20 + ["dropped"] * 20)
    first, again, other = (
        contact_sheet(out, tmp_path / f"{i}.png", columns=2, rows=1, seed=seed).read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_a_missing_shard_is_shown_as_such(tmp_path: Path) -> None:
    """The sheet is drawn even where the original shard is gone."""
    out = make_output(tmp_path, ["kept", "dropped"])
    before = contact_sheet(out, tmp_path / "before.png").read_bytes()
    (tmp_path / "in.tar").unlink()
    assert contact_sheet(out, tmp_path / "after.png").read_bytes() != before


def test_hostile_captions_do_not_break_the_sheet(tmp_path: Path) -> None:
    """Bidi marks, control characters, emoji, CJK, stacked accents and endless captions leave the grid as it is."""
    plain = contact_sheet(make_output(tmp_path / "a", ["kept", "dropped"]), tmp_path / "a.png")
    hostile = make_output(tmp_path / "b", ["kept", "dropped"], [HOSTILE, "\u202e"])
    assert Image.open(contact_sheet(hostile, tmp_path / "b.png")).size == Image.open(plain).size


def test_no_ledger_is_a_usage_error(tmp_path: Path) -> None:
    """A directory without a ledger is refused, naming it."""
    with pytest.raises(UsageError, match="no ledger"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")


def test_counts_must_be_positive(tmp_path: Path) -> None:
    """A sheet of no rows is refused."""
    with pytest.raises(UsageError, match="at least"):
        contact_sheet(tmp_path, tmp_path / "sheet.png", rows=0)


def test_legible_text_is_one_line_without_invisible_characters() -> None:
    """Control, format and surplus combining characters go; white space becomes single spaces."""
    assert legible("a\u202e red\n\t fox\x00\u200b") == "a red fox"
    assert len(legible("e" + "\u0301" * 100)) <= 3
    assert len(legible(HOSTILE)) <= 400


@pytest.mark.parametrize("text", ["one two three four five six seven eight nine ten", "x" * 500, "short", ""])
def test_wrapped_lines_fit(text: str) -> None:
    """No line is wider than asked, there are at most three, and only a cut text ends in an ellipsis."""
    lines = wrap(text, font(13), 90, lines=3)
    assert len(lines) <= 3
    assert all(width_of(line, font(13)) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "").startswith(text.replace(" ", "")[:5])
    assert bool(lines and lines[-1].endswith(("…", "..."))) == (len("".join(lines)) < len(text) - len(lines))


def test_fit_leaves_what_fits() -> None:
    """A text within the width is unchanged."""
    assert fit("rank 3", font(12), 200) == "rank 3"


def test_characters_that_no_face_has_are_replaced() -> None:
    """Private and unassigned planes end as something that can be drawn; ASCII stays as it is."""
    assert lettered("a red fox", 13)[0] == "a red fox"
    text, face = lettered("fox \U0001f5fc", 13)
    ImageDraw.Draw(Image.new("RGB", (99, 20))).text((0, 0), text, font=face)
    assert text.startswith("fox ")
