"""Text on pictures: fonts, captions made legible, lines that fit. A caption comes from the web, so nothing in it may
break the page: control, direction and stacked combining characters go, and long words are cut.

Pillow's bundled face has little more than ASCII. A text that needs more is set in the first of the usual system faces
that has all of it; where none has, letters lose their accents and what is left over becomes a box.
"""

from __future__ import annotations

import contextlib
import unicodedata
from functools import lru_cache
from typing import Final

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MOST_CHARACTERS: Final = 400
_INVISIBLE: Final = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
)  # control, format with all bidi marks, surrogate, private, unassigned
_MOST_MARKS: Final = 2

_SYSTEM_FACES: Final = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "Hiragino Sans GB.ttc",
)  # fmt: skip
_PLAIN: Final = str.maketrans(
    {"ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "œ": "oe", "ł": "l", "đ": "d", "\u2019": "'", "\u2013": "-"}
)
_BOX: Final = "\ufffd"  # the bundled face draws its sign for the unknown


@lru_cache(maxsize=32)
def font(size: int) -> Font:
    """Pillow's bundled face at `size` pixels, or its bitmap font where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):
        return ImageFont.load_default()


def legible(text: str) -> str:
    """`text` as one line of visible characters: control, format and excess combining characters removed, spaces single.

    >>> legible("a\\u202e red\\n  fox\\x00")
    'a red fox'
    """
    kept: list[str] = []
    marks = 0
    for character in unicodedata.normalize("NFC", text[: 4 * MOST_CHARACTERS]):
        category = unicodedata.category(character)
        if character.isspace():
            character = " "
        elif category in _INVISIBLE:
            continue
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return " ".join("".join(kept).split())[:MOST_CHARACTERS]


def lettered(text: str, size: int) -> tuple[str, Font]:
    """`text` and a face of `size` pixels that can show it; characters that no face here has are replaced."""
    for face in (font(size), *_system_fonts(size)):
        if all(_has(face, character) for character in set(text)):
            return text, face
    return "".join(_shown(font(size), character) for character in text), font(size)


def width_of(text: str, face: Font) -> float:
    """Width of `text` in pixels; 0 for what the font cannot measure."""
    try:
        return face.getlength(text)
    except (UnicodeEncodeError, OSError):  # the bitmap font knows Latin-1 only
        return face.getlength(text.encode("latin-1", "replace").decode("latin-1"))


def fit(text: str, face: Font, width: float) -> str:
    """`text`, cut and ended with an ellipsis where it is wider than `width` pixels."""
    if width_of(text, face) <= width:
        return text
    ellipsis = "…" if isinstance(face, ImageFont.FreeTypeFont) else "..."
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(text[:middle] + ellipsis, face) <= width else (low, middle - 1)
    return text[:low].rstrip() + ellipsis


def wrap(text: str, face: Font, width: float, *, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; the last ends in an ellipsis where something is left over."""
    out: list[str] = []
    rest = text
    while rest and len(out) < lines - 1 and width_of(rest, face) > width:
        cut = _break(rest, face, width)
        out.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*out, fit(rest, face, width)] if rest else out


@lru_cache(maxsize=8)
def _system_fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    found = []
    for name in _SYSTEM_FACES:
        with contextlib.suppress(OSError, ImportError):
            found.append(ImageFont.truetype(name, size))
    return tuple(found)


@lru_cache(maxsize=8192)
def _has(face: Font, character: str) -> bool:
    """Whether `face` draws `character` as something else than its sign for what it lacks."""
    if character == " " or not isinstance(face, ImageFont.FreeTypeFont):
        return character.isascii()
    return bytes(face.getmask(character)) != bytes(face.getmask("\U0010fffe"))


def _shown(face: Font, character: str) -> str:
    """The nearest to `character` that `face` has: itself, its plain letters, or a box."""
    if _has(face, character):
        return character
    bare = unicodedata.normalize("NFKD", character.translate(_PLAIN))
    letters = "".join(letter for letter in bare if not unicodedata.combining(letter) and _has(face, letter))
    if letters or unicodedata.combining(character):
        return letters
    return _BOX if isinstance(face, ImageFont.FreeTypeFont) else "?"


def _break(text: str, face: Font, width: float) -> int:
    """Where the first line of `text` ends: after the last word that fits, or inside a word that is too long."""
    fits = 1
    for end in range(2, len(text) + 1):
        if width_of(text[:end], face) > width:
            break
        fits = end
    space = text.rfind(" ", 0, fits + 1)
    return space if space > 0 else fits
