"""Tables of an inspection, for a terminal. What came from the data is a `Text`, so that no markup in it counts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from curate.inspection import Inspection, ShardFigures, Spread
from curate.reasons import REASONS

_MOST_ROWS = 30


def tables(inspection: Inspection) -> Iterator[Table]:
    """Shards, totals, and where there is something to tell: refused samples and frequent captions."""
    yield _shards(inspection)
    yield _totals(inspection)
    if inspection.quarantined:
        yield _refused(inspection)
    if inspection.captions.most_frequent:
        yield _frequent(inspection)


def _shards(inspection: Inspection) -> Table:
    table = Table("shard", "size", "samples", "readable", "note", title="Shards")
    troubled = [one for one in inspection.shards if one.error or one.flaw]
    sound = [one for one in inspection.shards if not (one.error or one.flaw)]
    shown = (troubled + sound)[:_MOST_ROWS]
    for one in shown:
        table.add_row(
            Text(one.url, overflow="fold"), decimal(one.bytes), f"{one.samples:,}", f"{one.readable:,}", _note(one)
        )
    if len(shown) < len(inspection.shards):
        table.add_row(f"and {len(inspection.shards) - len(shown):,} more", "", "", "", "")
    return table


def _note(one: ShardFigures) -> Text:
    if one.error:
        return Text(one.error, "red")
    if one.flaw:
        return Text(f"{one.flaw.reason}: {one.flaw.detail}", "red")
    return Text(", ".join(f"{count} {why} skipped" for why, count in one.skipped.items()))


def _totals(inspection: Inspection) -> Table:
    table = Table("what", "figure", title="Totals", show_header=False)
    captions, images = inspection.captions, inspection.images
    table.add_row(
        "samples", f"{inspection.samples:,} in {len(inspection.shards):,} shards, {decimal(inspection.bytes)}"
    )
    table.add_row("readable", f"{inspection.readable:,}")
    table.add_row(
        "members", Text(", ".join(f"{name} {count:,}" for name, count in [*inspection.extensions.items()][:12]))
    )
    table.add_row("keys in several shards", Text(_several(inspection)))
    table.add_row("image formats", ", ".join(f"{name} {count:,}" for name, count in images.formats.items()) or "none")
    table.add_row("image width", _line(images.width, "px"))
    table.add_row("image height", _line(images.height, "px"))
    table.add_row("images decoded", "all" if images.decoded else "no, headers only (--decode decodes all)")
    table.add_row(
        "captions",
        f"{captions.count:,}, {'' if captions.distinct_complete else 'at least '}{captions.distinct:,} distinct",
    )
    table.add_row("caption characters", _line(captions.characters))
    table.add_row("caption words", _line(captions.words))
    if captions.ascii_share is not None:
        table.add_row("captions in ASCII", f"{captions.ascii_share:.1%}")
    return table


def _several(inspection: Inspection) -> str:
    found = inspection.keys_in_several_shards
    least = "" if inspection.keys_complete else "at least "
    return f"{least}{found.count:,}" + (f", as {', '.join(found.examples)}" if found.count else "")


def _line(found: Spread | None, unit: str = "") -> str:
    if found is None:
        return "none"
    return f"{found.min:,} to {found.max:,} {unit}".strip() + f" (median {found.median:,}, p95 {found.p95:,})"


def _refused(inspection: Inspection) -> Table:
    table = Table("reason", "samples", "meaning", "for example", title="Refused")
    for reason, found in sorted(inspection.quarantined.items(), key=lambda item: -item[1].count):
        examples = Text(", ".join(key or "(no name)" for key in found.examples), overflow="fold")
        table.add_row(reason, f"{found.count:,}", REASONS[reason], examples)
    return table


def _frequent(inspection: Inspection) -> Table:
    table = Table("caption", "times", title="Captions that several samples share")
    for caption, count in inspection.captions.most_frequent:
        table.add_row(Text(caption, overflow="fold"), f"{count:,}")
    return table
