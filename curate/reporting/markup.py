"""Elements of HTML and SVG as values that are safe to place: every text and attribute is escaped, once, here.

A name or a caption comes from the web. Besides markup it may hold characters that no one sees: control characters, lone
surrogates that UTF-8 cannot write, and marks of direction that turn the rest of a line around. Those go.
"""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape

_UNSEEN = ("Cc", "Cs", "Co", "Cn")
_JOINERS = "\u200c\u200d"  # the two format characters that scripts and emoji are written with
_SPACES = "\u00a0\u2009\u202f"  # that hold a number and its unit together


def visible(text: object) -> str:
    """`text` without control, unassigned and direction characters; line breaks and tabs become spaces.

    >>> visible("a\\u202eb\\n<i>")
    'ab <i>'
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():  # nearly every cell of a table
        return whole
    return "".join(_seen(character) for character in whole)


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element with its children. Text is escaped; Markup, as this function returns it, is placed as it is.

    Attributes are named as in HTML with `_` for `-` ("class_" is class); None leaves one out.
    >>> str(element("text", "<b>", x=1.50, class_="tick"))
    '<text x="1.5" class="tick">&lt;b&gt;</text>'
    """
    given = (_attribute(key, value) for key, value in attributes.items() if value is not None)
    inside = joined(*children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(given), inside)


def joined(*children: object) -> Markup:
    """Children side by side, escaped unless they are Markup."""
    return Markup("").join(child if isinstance(child, Markup) else escape(visible(child)) for child in children)


def figure(value: float, digits: int = 1) -> str:
    """A coordinate: at most `digits` digits after the point, no trailing zeros. `figure(12.04)` is "12"."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def _attribute(key: str, value: object) -> Markup:
    shown = figure(value) if isinstance(value, float) else visible(value)
    return Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), shown)


def _seen(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    if character.isspace():
        return character if character in _SPACES else " "
    category = unicodedata.category(character)
    return "" if category in _UNSEEN or (category == "Cf" and character not in _JOINERS) else character
