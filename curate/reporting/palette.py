"""Colours and dashes of series, told apart with any colour vision: neighbours differ in hue, lightness and dash.

Each colour has at least 3 : 1 against the page, light and dark (WCAG 2.2, 1.4.11); a test computes it.
"""

from __future__ import annotations

from typing import Final

LIGHT: Final = ("#0063a6", "#c2410c", "#00735c", "#a03a84", "#7a5c00", "#51565e")
DARK: Final = ("#63b3f0", "#fb9a4b", "#2fc7a1", "#ea9ad2", "#e3c34f", "#b6bcc6")
DASHES: Final = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "1.5 4")
PAGE: Final = ("#ffffff", "#15181d")  # behind them, light and dark


def dash(slot: int) -> str | None:
    """The dash pattern of a series by its slot; the first is a full line."""
    return DASHES[slot % len(DASHES)] or None


def colour_class(slot: int) -> str:
    """The class that carries a series' colour."""
    return f"c{slot % len(LIGHT)}"


def variables(dark: bool) -> str:
    """CSS variables --c0, --c1, ... of one of the two schemes."""
    return " ".join(f"--c{n}: {colour};" for n, colour in enumerate(DARK if dark else LIGHT))
