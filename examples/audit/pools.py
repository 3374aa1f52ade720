"""The shards of the study: emoji with captions of twelve locales or of English alone, and textbook figures; labels.

    python examples/audit/pools.py DATA POOLS --seeds 0 1 2

DATA holds the emoji corpora, their annotations and openstax as WebDataset shards. A caption's locale is drawn by a hash
of seed, style and emoji, each as likely as any other; nothing of an image is changed. Every pool has `labels.csv`
beside its shards, joined by key: what the corpora's json says, and no more. Seconds; some 40 MB a seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

STYLES: Final = ("blob", "noto", "openmoji", "twemoji")
TONELESS: Final = ("blob", "openmoji")  # styles whose shards have no skin tone but the default yellow
LOCALES: Final = ("en", "es", "fr", "de", "vi", "ru", "hi", "bn", "th", "zh", "ja", "ko")
HELD: Final = ("val", "test")  # splits by base emoji: no emoji of the pool, in any style, tone or gender, is in them
PEOPLE: Final = "people-body"
SAMPLES: Final = 1_000  # of a shard


@dataclass(frozen=True, slots=True)
class Item:
    """A sample of a corpus: image with its extension, caption, and the json that came with it."""

    key: str
    extension: str
    image: bytes
    caption: str
    facts: dict[str, Any]


def read_items(data: Path, corpus: str, splits: Sequence[str]) -> Iterator[Item]:
    """The samples of a corpus, keyed by corpus, split and their own key."""
    for split in splits:
        for path in sorted((data / corpus / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                parts: dict[str, dict[str, bytes]] = {}
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    parts.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
            for key, part in parts.items():
                image = "png" if "png" in part else "jpg"
                name = f"{corpus}-{split}-{path.stem}-{key}"
                yield Item(name, image, part[image], part["txt"].decode(), json.loads(part["json"]))


def write_pool(folder: Path, items: Iterable[Item], samples: int | None = None) -> Path:
    """Shards of `items`, or of so many of them, and `labels.csv`. A folder that is there is left alone."""
    if (folder / "labels.csv").exists():
        return folder
    # by hash, so that styles are mixed
    every = sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest())[:samples]
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(every), SAMPLES):
        with tarfile.open(folder / f"{start // SAMPLES:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for item in every[start : start + SAMPLES]:
                said = json.dumps(item.facts | {"key": item.key}, ensure_ascii=False)
                _add(tar, f"{item.key}.{item.extension}", item.image)
                _add(tar, f"{item.key}.txt", item.caption.encode())
                _add(tar, f"{item.key}.json", said.encode())
    with open(folder / "labels.partial", "w", newline="") as file:
        rows = [{"key": item.key} | labels_of(item.facts) for item in every]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "labels.partial").rename(folder / "labels.csv")
    return folder


def labels_of(facts: dict[str, Any]) -> dict[str, str | None]:
    """The labels of a sample; None where the corpus says nothing. Gender and tone are those of people alone."""
    if facts["corpus"] == "openstax":
        return {
            "book": facts["repo"].partition("osbooks-")[2].removeprefix("introduction-"),
            "kind": facts["kind_guess"],
        }
    people = facts["group"] == PEOPLE
    tones = facts["tone"] or []
    tone = "default" if not tones else tones[0] if len(tones) == 1 else "two tones"
    return {
        "locale": facts["locale"],
        "english": "English" if facts["locale"] == "en" else "another language",
        "style": facts["style"],
        "subject": facts["group"],
        "tone": tone if people else None,
        "gender": (facts["gender"] or "not said") if people else None,
        "default": facts.get("default"),
    }


def with_defaults(items: Iterable[Item]) -> Iterator[Item]:
    """The items; where one picture serves a name with a gender and one without, json says which this is, and drawn how.

    Blob's "police officer" is its "man police officer" byte for byte: the vendor's default, not a label of the corpus.
    """
    every = list(items)
    named: dict[tuple[str, bytes], set[str]] = {}
    for item in every:
        named.setdefault(_picture(item), set()).add(gender_of(item.caption))
    for item in every:
        drawn = named[_picture(item)] - {""} if item.facts["group"] == PEOPLE else set()
        own = gender_of(item.caption)
        if len(named[_picture(item)]) == 2 and len(drawn) == 1:
            default = f"named {own}" if own else f"drawn as {min(drawn)}, not named so"
            yield replace(item, facts=item.facts | {"default": default})
        else:
            yield item


def gender_of(caption: str) -> str:
    """man, woman, or nothing where an English name mentions none or both."""
    said = {word for word in ("man", "woman") if re.search(rf"\b{word[:-2]}(a|e)n\b", caption, re.IGNORECASE)}
    return min(said) if len(said) == 1 else ""


def _picture(item: Item) -> tuple[str, bytes]:
    return item.facts["corpus"], hashlib.sha256(item.image).digest()


def read_names(data: Path) -> dict[str, dict[str, str]]:
    """Code points in hex -> locale -> name."""
    with gzip.open(data / "emoji-annotations" / "annotations.jsonl.gz", "rt", encoding="utf-8") as file:
        return {row["hex"]: row["names"] for row in map(json.loads, file)}


def emoji(
    data: Path,
    splits: Sequence[str],
    *,
    styles: Sequence[str] = STYLES,
    locales: Sequence[str] = ("en",),
    seed: int = 0,
) -> Iterator[Item]:
    """Emoji of these styles, each with its name in a locale drawn by hash."""
    names = read_names(data)
    for style in styles:
        for item in read_items(data, f"emoji-{style}", splits):
            digest = hashlib.sha256(f"{seed} {style} {item.facts['hex']}".encode()).digest()
            locale = locales[int.from_bytes(digest[:8]) % len(locales)]
            caption = item.caption if locale == "en" else names[item.facts["hex"]][locale]
            yield Item(
                item.key, item.extension, item.image, caption, item.facts | {"locale": locale, "caption": caption}
            )


def build(data: Path, pools: Path, seed: int, samples: int | None = None) -> None:
    """All shards of one seed, or so many samples of each pool; only the multilingual pool depends on the seed."""
    made = {
        f"multilingual-{seed}": lambda: emoji(data, ("train",), locales=LOCALES, seed=seed),
        "english": lambda: with_defaults(emoji(data, ("train",))),
        "held-english": lambda: emoji(data, HELD),
        "held-toneless": lambda: emoji(data, HELD, styles=TONELESS),
        "openstax": lambda: read_items(data, "openstax", ("train",)),
        "held-openstax": lambda: read_items(data, "openstax", HELD),
    }
    for name, items in made.items():
        write_pool(pools / name, items(), samples)


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(payload)
    tar.addfile(entry, io.BytesIO(payload))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pools", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for seed in args.seeds:
        build(args.data, args.pools, seed)


if __name__ == "__main__":
    main()
