"""How wide text is, roughly, without a font: enough to cut a long name and to keep labels apart.

Estimated for the letters of a phone (14 of the drawing's units) and a wide sans serif: a name that fits here fits where
letters are smaller. Wrong by a tenth or so; nothing may depend on more.
"""

from __future__ import annotations

import unicodedata
from itertools import accumulate
from typing import Final

from curate.reporting.markup import visible

LETTER: Final = 14.0  # the size of letters on a phone, in units of the drawing
_NARROW: Final = frozenset("iljtfr.,:;'|!()[]- ")
_WIDE: Final = frozenset("mwMW@%&+=<>_")


def width(text: str, size: float = LETTER) -> float:
    """About how many units a line of text takes. Example: `width("women")` is about 43."""
    return size * sum(map(_em, text))


def fitted(text: object, room: float, size: float = LETTER) -> str:
    """The text as it is shown, cut with an ellipsis where it is wider than `room`.

    Example: `fitted("captions of unknown origin", 100)` is "captions of …".
    """
    whole = visible(text)
    if width(whole, size) <= room:
        return whole
    left = room - width("…", size)
    ends = accumulate(size * _em(character) for character in whole)
    return whole[: sum(end <= left for end in ends)].rstrip() + "…"


def _em(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    if character in _NARROW:
        return 0.37
    return 0.9 if character in _WIDE else 0.7 if character.isupper() else 0.61
