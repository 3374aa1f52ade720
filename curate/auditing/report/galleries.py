"""What was kept and what was left out, to look at: pictures and captions of flagged groups, and a medoid per cluster.

Rows are drawn at random, by a hash of the sample's id and a seed, and nothing is picked for its looks. Pictures come
from the original shards, each opened once; they are decoded and encoded anew, so no EXIF, no profile and none of the
original's bytes reach the report. Cost: about 3 ms and 6 KB a tile.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curate.auditing.clusters import Clusters
from curate.auditing.columns import Column
from curate.auditing.crossing import crossings
from curate.auditing.membership import Membership, membership_of
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report.cells import times
from curate.auditing.report.tables import ordered
from curate.auditing.sentences import flagged, subject
from curate.errors import UsageError
from curate.originals import Original, Place, by_chance, read_originals

# N rows of the pool

SIDE: Final = 192  # pixels of a thumbnail's longer side
QUALITY: Final = 78
LONGEST_CAPTION: Final = 240


@dataclass(frozen=True, slots=True)
class Tile:
    """One sample. `row` is its row of the pool; `picture` a data: URI, "" where there is none."""

    row: int
    note: str = ""
    caption: str = ""
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """Tiles side by side under a heading."""

    heading: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The strips of one group, or of all clusters."""

    title: str
    text: str
    strips: tuple[Strip, ...]


def drawn(
    audit: Audit,
    columns: Sequence[Column],
    selected_N: NDArray[np.bool_],
    ids: bytes,
    *,
    intersections: Sequence[Sequence[str]] = (),
    seed: int = 0,
    groups: int = 8,
    each: int = 8,
) -> tuple[Gallery, ...]:
    """Galleries, without pictures yet, of the `groups` flagged groups furthest from 1: kept rows and rows left out.

    `columns` and `intersections` are what the audit was made of, `ids` the 16-byte sample ids one after another.
    Example: a group of which 3 rows were kept and 40 left out has strips of 3 and 8 tiles.
    Errors: UsageError for ids of another number of rows.
    """
    if len(ids) != 16 * len(selected_N):
        raise UsageError(
            f"{len(ids):,} bytes of ids do not fit {len(selected_N):,} rows of the pool; give 16 bytes a row"
        )
    chance_N, column_of = by_chance(ids, seed), {column.name: column for column in audit.columns}
    members = _Members(columns, intersections)
    return tuple(
        _of_group(row, column_of[row.column], members.rows(row), selected_N, chance_N, seed=seed, each=each)
        for row in flagged(audit)[:groups]
    )


def medoids(audit: Audit, found: Clusters) -> Gallery:
    """One gallery, without pictures yet: the sample nearest to each cluster's centre, flagged clusters first."""
    medoid_of = dict(zip(found.column.names, found.medoids_K.tolist(), strict=True))
    tight_of = dict(zip(found.column.names, found.similarity_K.tolist(), strict=True))
    [column] = [column for column in audit.columns if column.name == found.column.name]
    tiles = tuple(
        Tile(medoid_of[row.group], f"{_told(row)}; mean cosine {tight_of[row.group]:.2f}")
        for row in ordered(column)
        if row.group in medoid_of and not row.is_unknown
    )
    text = "Nobody named these groups. Of each cluster the sample nearest to its centre stands for the others."
    return Gallery(f"Medoids: {column.name}", text, (Strip(f"{len(tiles)} clusters", tiles),))


def fetch(
    galleries: Sequence[Gallery],
    place_of: Callable[[int], Place | None],
    caption_of: Callable[[int], str] | None = None,
) -> tuple[Gallery, ...]:
    """The same galleries with pictures and captions.

    `place_of` tells a row's shard and ordinal, None where no shard has it; `caption_of` its caption, for pools without
    shards (else the caption is read from the shard). A shard that is gone leaves tiles without a picture.
    """
    rows = {tile.row for gallery in galleries for strip in gallery.strips for tile in strip.tiles}
    places = {row: place for row in sorted(rows) if (place := place_of(row)) is not None}
    found = {place: _shown(one) for place, one in read_originals(places.values(), min_side=SIDE)}

    def filled(tile: Tile) -> Tile:
        place = places.get(tile.row)
        caption, picture = ("", "") if place is None else found[place]
        caption = caption if caption_of is None else caption_of(tile.row)
        return Tile(tile.row, tile.note, _cut(caption), picture)

    return tuple(
        Gallery(one.title, one.text, tuple(Strip(s.heading, tuple(map(filled, s.tiles))) for s in one.strips))
        for one in galleries
    )


def thumbnail(image: Image.Image) -> str:
    """A data: URI with a JPEG of at most `SIDE` pixels a side, made from the pixels alone."""
    scale = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    bare = Image.new("RGB", size)
    bare.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    out = io.BytesIO()
    bare.save(out, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


class _Members:
    """Which rows are in a group, of the columns and their intersections, each looked up once."""

    def __init__(self, columns: Sequence[Column], intersections: Sequence[Sequence[str]]) -> None:
        named = {column.name: column for column in columns}
        crossed = crossings(named, intersections)
        self._columns = named | {column.name: column for column in crossed}
        self._found: dict[str, Membership] = {}

    def rows(self, row: GroupRow) -> NDArray[np.intp]:
        if row.column not in self._columns:
            raise UsageError(
                f"the audit's column {row.column!r} is none of the columns given: {', '.join(self._columns)}"
            )
        if row.column not in self._found:
            self._found[row.column] = membership_of(self._columns[row.column])
        members = self._found[row.column]
        rows: NDArray[np.intp] = members.row_M[members.code_M == members.groups.index(row.group)]
        return rows


def _of_group(
    row: GroupRow,
    column: ColumnAudit,
    rows: NDArray[np.intp],
    selected_N: NDArray[np.bool_],
    chance_N: NDArray[np.uint64],
    *,
    seed: int,
    each: int,
) -> Gallery:
    by_lot = rows[np.argsort(chance_N[rows], kind="stable")]
    kept, left = by_lot[selected_N[by_lot]], by_lot[~selected_N[by_lot]]
    who = subject(row, column.kind, column.model)
    text = f"{_told(row)}. Drawn at random (by a hash of the sample's id, seed {seed}), none chosen for its looks."
    strips = tuple(_strip(name, some, each) for name, some in (("Kept", kept), ("Left out", left)) if len(some))
    return Gallery(f"{who[0].upper()}{who[1:]}", text, strips)


def _strip(name: str, rows: NDArray[np.intp], each: int) -> Strip:
    shown = rows[:each].tolist()
    return Strip(f"{name}: {len(shown)} of {len(rows):,}", tuple(Tile(row) for row in shown))


def _told(row: GroupRow) -> str:
    size = f"{row.group}: {row.selected:,} of {row.pool:,} kept"
    if row.ratio is None or not np.isfinite(row.ratio.value):
        return f"{size}, {row.level}"
    return f"{size}, {times(row.ratio.value)} times as often as the rest, {row.level}"


def _shown(found: Original) -> tuple[str, str]:
    return found.caption, "" if found.image is None else thumbnail(found.image)


def _cut(caption: str) -> str:
    return caption if len(caption) <= LONGEST_CAPTION else caption[: LONGEST_CAPTION - 1] + "…"
