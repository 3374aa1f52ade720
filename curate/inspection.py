"""Look at shards before anything is run on them: what is there, what would be refused and why, how captions read.

One pass, one shard in memory at a time: the index, the captions and the image headers are read, nothing is decoded
unless asked for. About 40 microseconds a sample. Memory is bounded: 16 bytes of hash for each of at most `MAX_KEYS`
keys and `MAX_CAPTIONS` distinct captions (about 90 bytes each with their place in a table); beyond that the counts
say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from curate.errors import ShardError
from curate.images.decode import ImageHeader, ImageRejected, decode_rgb, read_header
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry, extension, group_samples
from curate.shards.sources import Patterns, ShardSource, expand_shards, open_shard
from curate.shards.tarindex import Flaw, TarIndex, index_tar

if TYPE_CHECKING:
    from rich.console import Console

MAX_KEYS: Final = 20_000_000
MAX_CAPTIONS: Final = 1_000_000
_EXAMPLES: Final = 5
_SHOWN_CAPTION: Final = 120
_TOP: Final = 10


@dataclass(frozen=True, slots=True)
class Found:
    """How many samples, and the keys of the first few."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Lowest, middle, 95th percentile and highest of a set of whole numbers (each a number of the set)."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class CaptionFigures:
    """Captions of the samples with an image member. `ascii_share` is None where there is no readable caption."""

    count: int
    refused: dict[str, int]
    characters: Spread | None
    words: Spread | None
    ascii_share: float | None
    distinct: int
    distinct_complete: bool
    most_frequent: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ImageFigures:
    """Sizes in pixels as the headers store them; `decoded` says whether every image was also decoded."""

    count: int
    formats: dict[str, int]
    width: Spread | None
    height: Spread | None
    decoded: bool


@dataclass(frozen=True, slots=True)
class ShardFigures:
    """One shard. `flaw` is where its tar stops being readable; `error` why it could not be opened at all."""

    url: str
    bytes: int
    samples: int
    readable: int
    quarantined: dict[str, Found]
    extensions: dict[str, int]
    skipped: dict[str, int]
    outside: int
    flaw: Flaw | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect_shards` found, per shard and in total."""

    shards: tuple[ShardFigures, ...]
    bytes: int
    samples: int
    readable: int
    quarantined: dict[str, Found]
    extensions: dict[str, int]
    keys_in_several_shards: Found
    keys_complete: bool
    captions: CaptionFigures
    images: ImageFigures

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers: `json.dumps(..., allow_nan=False)` always takes it."""
        plain: dict[str, Any] = asdict(self)
        return plain


def inspect_shards(patterns: Patterns, *, decode: bool = False) -> Inspection:
    """Inspect the shards that `patterns` name (see `expand_shards`); `decode=True` also decodes every image.

    A shard that cannot be opened is a row with an `error`, not an exception; patterns that name nothing raise as in
    `expand_shards`.

    Example: three shards of 1,000, 1,000 and 287 samples give `samples == 2287` and three rows.
    """
    tally = _Tally(decode)
    shards = tuple(_inspect(source, tally) for source in expand_shards(patterns))
    return Inspection(
        shards=shards,
        bytes=sum(one.bytes for one in shards),
        samples=sum(one.samples for one in shards),
        readable=sum(one.readable for one in shards),
        quarantined=_merged(one.quarantined for one in shards),
        extensions=dict(sum((Counter(one.extensions) for one in shards), Counter()).most_common()),
        keys_in_several_shards=Found(tally.repeated_keys, tuple(tally.repeated_examples)),
        keys_complete=len(tally.keys) < MAX_KEYS,
        captions=tally.caption_figures(),
        images=tally.image_figures(),
    )


@dataclass(slots=True)
class _Tally:
    """What is counted across shards."""

    decode: bool
    keys: set[bytes] = field(default_factory=set)
    repeated_keys: int = 0
    repeated_examples: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    ascii: int = 0
    captions: dict[bytes, int] = field(default_factory=dict)
    texts: dict[bytes, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)

    def add_keys(self, keys: set[str]) -> None:
        for key in sorted(keys):
            mark = _mark(key)
            if mark in self.keys:
                self.repeated_keys += 1
                if len(self.repeated_examples) < _EXAMPLES:
                    self.repeated_examples.append(printable(key))
            elif len(self.keys) < MAX_KEYS:
                self.keys.add(mark)

    def add_caption(self, text: str) -> None:
        self.characters[len(text)] += 1
        self.words[len(text.split())] += 1
        self.ascii += text.isascii()
        mark = _mark(text)
        if mark in self.captions:
            self.captions[mark] += 1
            self.texts.setdefault(mark, printable(text[:_SHOWN_CAPTION]))
        elif len(self.captions) < MAX_CAPTIONS:
            self.captions[mark] = 1

    def add_image(self, header: ImageHeader) -> None:
        self.formats[header.format] += 1
        self.widths[header.width] += 1
        self.heights[header.height] += 1

    def caption_figures(self) -> CaptionFigures:
        count = self.characters.total()
        frequent = sorted(self.texts, key=lambda mark: (-self.captions[mark], self.texts[mark]))[:_TOP]
        return CaptionFigures(
            count=count,
            refused=dict(sorted(self.refused.items())),
            characters=spread(self.characters),
            words=spread(self.words),
            ascii_share=self.ascii / count if count else None,
            distinct=len(self.captions),
            distinct_complete=len(self.captions) < MAX_CAPTIONS,
            most_frequent=tuple((self.texts[mark], self.captions[mark]) for mark in frequent),
        )

    def image_figures(self) -> ImageFigures:
        formats = dict(self.formats.most_common())
        return ImageFigures(self.formats.total(), formats, spread(self.widths), spread(self.heights), self.decode)


def spread(counts: Counter[int]) -> Spread | None:
    """Order statistics from counts of values: the smallest value that at least the given share does not exceed.

    >>> spread(Counter({1: 1, 2: 2, 9: 1}))
    Spread(min=1, median=2, p95=9, max=9)
    """
    if not counts:
        return None
    values = sorted(counts)
    running = list(accumulate(counts[value] for value in values))
    at = [next(v for v, n in zip(values, running, strict=True) if n * 100 >= running[-1] * part) for part in (50, 95)]
    return Spread(values[0], at[0], at[1], values[-1])


def printable(text: str) -> str:
    """Text for reports: bytes that were no UTF-8, control and invisible characters are written as escapes."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    if safe.isprintable():
        return safe
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in safe)


def _mark(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _inspect(source: ShardSource, tally: _Tally) -> ShardFigures:
    try:
        with open_shard(source) as data:
            index = index_tar(data)
            return _figures(source, data, index, group_samples(index, ""), tally)
    except ShardError as error:
        return ShardFigures(source.url, source.size, 0, 0, {}, {}, {}, 0, None, str(error))


def _figures(
    source: ShardSource, data: memoryview, index: TarIndex, entries: list[SampleEntry], tally: _Tally
) -> ShardFigures:
    bad: dict[str, list[str]] = {}
    for entry in entries:
        reason = entry.reason or _read(data, entry, tally)
        if reason is not None:
            bad.setdefault(reason, []).append(entry.key)
    tally.add_keys({entry.key for entry in entries if entry.key})
    return ShardFigures(
        url=source.url,
        bytes=source.size,
        samples=len(entries),
        readable=len(entries) - sum(map(len, bad.values())),
        quarantined={reason: Found(len(keys), tuple(map(printable, keys[:_EXAMPLES]))) for reason, keys in bad.items()},
        extensions=dict(Counter(printable(extension(one.name)) for one in index.members).most_common()),
        skipped=dict(Counter(why for _, why in index.skipped)),
        outside=len(index.members) - sum(len(one.members) for one in entries),
        flaw=index.flaw and replace(index.flaw, detail=printable(index.flaw.detail), name=printable(index.flaw.name)),
        error=None,
    )


def _read(data: memoryview, entry: SampleEntry, tally: _Tally) -> str | None:
    """The reason why the sample would be quarantined, or None; image before caption, as when scoring."""
    image = _read_image(data, entry, tally)
    text, reason = read_caption(data, entry)
    if text is not None:
        tally.add_caption(text)
    elif reason is not None:
        tally.refused[reason] += 1
    return image or reason


def _read_image(data: memoryview, entry: SampleEntry, tally: _Tally) -> str | None:
    member = entry.image()
    if member is None:
        return "image-missing"
    payload = data[member.offset : member.offset + member.size]
    try:
        tally.add_image(decode_rgb(payload)[1] if tally.decode else read_header(payload))
    except ImageRejected as rejected:
        return rejected.reason
    return None


def _merged(parts: Iterable[dict[str, Found]]) -> dict[str, Found]:
    total: dict[str, Found] = {}
    for part in parts:
        for reason, found in part.items():
            sofar = total.get(reason, Found(0, ()))
            total[reason] = Found(sofar.count + found.count, (sofar.examples + found.examples)[:_EXAMPLES])
    return dict(sorted(total.items()))


def render_inspection(inspection: Inspection, console: Console) -> None:
    """Print an inspection as tables. Keys, captions and paths are printed as text, whatever markup they hold."""
    from curate.inspection_table import tables

    for table in tables(inspection):
        console.print(table)
