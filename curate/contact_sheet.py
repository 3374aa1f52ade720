"""One PNG that shows what a run kept and what it left out: pictures, captions, scores and reasons.

The ledger is scanned once, file by file, keeping a handful of rows per strip; each original shard that a chosen row
names is opened once. Memory: one ledger file and the tiles.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from curate.errors import UsageError
from curate.ledger import ledger_files
from curate.lettering import fit, font, legible, lettered, width_of, wrap
from curate.originals import Place, by_chance, read_originals
from curate.storage import make_directory, replace_file

# N rows of one ledger file

COLUMNS: Final = (
    "sample_id", "shard", "ordinal", "key", "status", "reason", "reference_similarity", "score", "sub_batch", "rank",
)  # fmt: skip

PICTURE, GAP, MARGIN, TEXT, CHIP = 168, 16, 40, 74, 22  # pixels
INK, FAINT, RULE, PAPER, MOUNT = "#1f2328", "#6e7781", "#d8dee4", "#ffffff", "#f2f4f6"
ACCENT: Final = {"kept": "#2f7d4f", "dropped": "#b3423a", "quarantined": "#8a6d1f"}
WASH: Final = {"kept": "#e6f2ea", "dropped": "#f8e8e6", "quarantined": "#f7f0dc"}
LEGEND: Final = "below each picture: rank and sub-batch, or the reason; the score of the last draw; the caption"


@dataclass(frozen=True, slots=True)
class Tile:
    """What one tile shows. `image` is None where the picture cannot be decoded; `planted` is the json's "fault"."""

    row: dict[str, Any]
    image: Image.Image | None
    caption: str
    planted: str | None


@dataclass(slots=True)
class Strip:
    """Rows of one status in one order, the first `most` of them; `order` is smallest first."""

    status: str
    heading: str
    order: str
    most: int
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def offer(self, columns: dict[str, NDArray[Any]], order_N: NDArray[np.float64]) -> None:
        """Consider the rows of one ledger file."""
        mine = np.flatnonzero(columns["status"] == self.status)
        best = mine[np.argsort(order_N[mine], kind="stable")[: self.most]]
        offered = [(float(order_N[i]), {name: column[i] for name, column in columns.items()}) for i in best]
        self.rows = sorted([*self.rows, *offered], key=lambda item: item[0])[: self.most]


def contact_sheet(out_dir: Path | str, path: Path | str, *, columns: int = 8, rows: int = 2, seed: int = 0) -> Path:
    """Draw the contact sheet of a finished run into the PNG file `path` and return it.

    Kept samples: those drawn first and a random draw; dropped ones: the lowest scored and a random draw; then the
    quarantined. Each strip has `columns` tiles in at most `rows` rows. Pictures come from the original shards; one that
    is gone or cannot be decoded is shown as such. Equal ledgers and seeds give equal sheets.
    Raises UsageError where `out_dir` has no ledger, or a count is not positive.
    """
    if columns < 2 or rows < 1:
        raise UsageError(f"a contact sheet needs at least 2 columns and 1 row, not {columns} and {rows}")
    strips, counts = _choose(Path(out_dir), columns * rows, seed)
    shown = {_place(row): row for strip in strips for _, row in strip.rows}
    tiles = dict(_fetch(list(shown.values())))
    sheet = _compose(Path(out_dir).resolve().name, strips, counts, tiles, columns)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    make_directory(Path(path).parent)
    replace_file(Path(path), buffer.getvalue())
    return Path(path)


def _choose(out_dir: Path, most: int, seed: int) -> tuple[list[Strip], Counter[str]]:
    """Scan the ledger; return the strips with their rows, and the number of rows of each status."""
    strips = [
        Strip("kept", "drawn first in their sub-batch", "rank", most),
        Strip("kept", "drawn at random from all kept", "chance", 2 * most),
        Strip("dropped", "lowest score", "score", most),
        Strip("dropped", "drawn at random from all dropped", "chance", 2 * most),
        Strip("quarantined", "drawn at random", "chance", most),
    ]
    counts: Counter[str] = Counter()
    for file in ledger_files(out_dir):
        table = pq.read_table(file, columns=list(COLUMNS))
        cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in COLUMNS}
        counts.update(cells["status"])
        orders = _orders(cells, seed)
        for strip in strips:
            strip.offer(cells, orders[strip.order])
    for first, second in ((strips[0], strips[1]), (strips[2], strips[3])):
        seen = {_place(row) for _, row in first.rows}
        second.rows = [item for item in second.rows if _place(item[1]) not in seen][:most]
    return strips, counts


def _orders(cells: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[np.float64]]:
    """The three orders of rows: by rank, by score, by chance (a hash of sample id and seed)."""
    rank_N, batch_N, score_N = (_numbers(cells[name]) for name in ("rank", "sub_batch", "score"))
    chance_N = by_chance(b"".join(cells["sample_id"]), seed)
    return {"rank": rank_N * 1e7 + batch_N, "score": score_N, "chance": (chance_N >> np.uint64(11)).astype(np.float64)}


def _numbers(column: NDArray[Any]) -> NDArray[np.float64]:
    """A column with None or NaN last."""
    values = np.array([np.inf if value is None else value for value in column], dtype=np.float64)
    return np.where(np.isnan(values), np.inf, values)


def _place(row: dict[str, Any]) -> Place:
    return row["shard"], row["ordinal"]


def _fetch(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Place, Tile]]:
    """Read picture, caption and planted fault of `rows` from the original shards."""
    wanted = {_place(row): row for row in rows}
    for place, found in read_originals(wanted, min_side=PICTURE):
        yield place, Tile(wanted[place], found.image, found.caption, _planted(found.fields))


def _planted(fields: dict[str, Any]) -> str | None:
    fault = fields.get("fault")
    return legible(fault) if isinstance(fault, str) else None


def _compose(
    name: str, strips: Sequence[Strip], counts: Counter[str], tiles: dict[tuple[str, int], Tile], columns: int
) -> Image.Image:
    """Lay the strips out below each other."""
    width = 2 * MARGIN + columns * PICTURE + (columns - 1) * GAP
    pages = [_header(name, counts, width)]
    for status in ("kept", "dropped", "quarantined"):
        mine = [strip for strip in strips if strip.status == status and strip.rows]
        if mine:
            pages.append(_block_heading(status, counts, width))
        pages += [_strip(strip, [tiles[_place(row)] for _, row in strip.rows], columns, width) for strip in mine]
    sheet = Image.new("RGB", (width, sum(page.height for page in pages) + MARGIN // 2), PAPER)
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def _header(name: str, counts: Counter[str], width: int) -> Image.Image:
    page = Image.new("RGB", (width, 132), PAPER)
    pen = ImageDraw.Draw(page)
    total = counts.total()
    title, face = lettered(f"Kept and left out: {legible(name)}", 32)
    pen.text((MARGIN, 58), fit(title, face, width - 2 * MARGIN), INK, face, anchor="ls")
    parts = [f"{total:,} samples"]
    parts += [f"{counts[status]:,} {status} ({counts[status] / total:.1%})" for status in ACCENT if counts[status]]
    pen.text((MARGIN, 78), "   ·   ".join(parts), INK, font(17))
    pen.text((MARGIN, 104), fit(LEGEND, font(14), width - 2 * MARGIN), FAINT, font(14))
    return page


def _block_heading(status: str, counts: Counter[str], width: int) -> Image.Image:
    page = Image.new("RGB", (width, 62), PAPER)
    pen = ImageDraw.Draw(page)
    pen.line([(MARGIN, 12), (width - MARGIN, 12)], RULE, 1)
    pen.rectangle([MARGIN, 30, MARGIN + 5, 55], ACCENT[status])
    pen.text((MARGIN + 18, 43), status.capitalize(), ACCENT[status], font(26), anchor="lm")
    left = MARGIN + 18 + width_of(status.capitalize(), font(26)) + 14
    pen.text((left, 45), f"{counts[status]:,} of {counts.total():,}", FAINT, font(16), anchor="lm")
    return page


def _strip(strip: Strip, tiles: Sequence[Tile], columns: int, width: int) -> Image.Image:
    lines = -(-len(tiles) // columns)
    head = 36
    pitch = PICTURE + TEXT + GAP + (CHIP if any(tile.planted for tile in tiles) else 0)
    page = Image.new("RGB", (width, head + lines * pitch), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 10), strip.heading[0].upper() + strip.heading[1:], INK, font(16))
    for i, tile in enumerate(tiles):
        x, y = MARGIN + (i % columns) * (PICTURE + GAP), head + (i // columns) * pitch
        _draw_picture(page, pen, x, y, tile)
        _draw_text(pen, x, y + PICTURE, strip.status, tile)
    return page


def _draw_picture(page: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, tile: Tile) -> None:
    corner = (x + PICTURE - 1, y + PICTURE - 1)
    pen.rectangle([(x, y), corner], MOUNT)
    if tile.image is None:
        middle, half = PICTURE // 2, 13
        for sign in (1, -1):
            start = (x + middle - half, y + middle - 8 - sign * half)
            pen.line([start, (x + middle + half, y + middle - 8 + sign * half)], FAINT, 2)
        pen.text((x + middle, y + middle + 26), "no picture", FAINT, font(13), anchor="mm")
    else:
        picture = _letterboxed(tile.image)
        page.paste(picture, (x + (PICTURE - picture.width) // 2, y + (PICTURE - picture.height) // 2))
    pen.rectangle([(x, y), corner], outline=RULE)


def _draw_text(pen: ImageDraw.ImageDraw, x: int, y: int, status: str, tile: Tile) -> None:
    left, right = _figures(status, tile.row)
    room = PICTURE - width_of(right, font(12)) - 8
    pen.text((x, y + 6), fit(left, font(12), room), ACCENT[status], font(12))
    pen.text((x + PICTURE, y + 6), right, FAINT, font(12), anchor="ra")
    caption = legible(tile.caption)
    shown, face = lettered(caption or "(no caption)", 13)
    for i, line in enumerate(wrap(shown, face, PICTURE, lines=3)):
        pen.text((x, y + 35 + 16 * i), line, INK if caption else FAINT, face, anchor="ls")
    if tile.planted is not None:
        _chip(pen, x, y + TEXT, f"planted: {tile.planted}", status)


def _letterboxed(image: Image.Image) -> Image.Image:
    scale = PICTURE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _figures(status: str, row: dict[str, Any]) -> tuple[str, str]:
    """What stands left and right below a picture."""
    left = f"rank {row['rank']} · batch {row['sub_batch']}" if status == "kept" else row["reason"]
    score = row["score"]
    if score is None or not np.isfinite(score):
        return left, ""
    digits = 2 if abs(score) < 10 else 1 if abs(score) < 1000 else 0
    return left, f"{score:+,.{digits}f}"


def _chip(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, status: str) -> None:
    text = fit(text, font(11), PICTURE - 12)
    pen.rounded_rectangle([x, y, x + width_of(text, font(11)) + 12, y + 18], 4, WASH[status])
    pen.text((x + 6, y + 9), text, ACCENT[status], font(11), anchor="lm")
