"""Captions of the demonstration: a scene said in varied English or German, and boilerplate that says nothing.

German nouns carry their gender, so that endings agree ("ein großes blaues Quadrat", "zwei rote gestreifte Kreise");
every group stands in the nominative, which keeps the grammar to two endings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from curate.demonstration.scenes import Scene, Shapes

COUNTS: Final = ("a", "two", "three", "four")
PLURALS: Final = {"cross": "crosses"}
INVERSES: Final = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
SAID: Final = {
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
PAIR_TEMPLATES: Final = (
    "{a} {r} {b} on {g}",
    "{a} {r} {b}, {g} background",
    "a drawing of {a} {r} {b} on {g}",
    "{a} {r} {b} on a {g} background",
    "{b} {i} {a} on {g}",
    "on {g}: {a} {r} {b}",
    "picture of {b} {i} {a}, {g} background",
    "{a} and {b} on a {g} background",
    "{b} and, {r} that, {a} on {g}",
)
LONE_TEMPLATES: Final = (
    "{a} {p} on {g}",
    "{a} {p}, {g} background",
    "a drawing of {a} {p} on {g}",
    "on {g}: {a} {p}",
    "picture of {a} on a {g} background",
    "{a} on {g}",
)

_DE_COUNTS: Final = ("ein", "zwei", "drei", "vier")
_DE_NOUNS: Final = {  # singular, plural, gender
    "circle": ("Kreis", "Kreise", "m"),
    "square": ("Quadrat", "Quadrate", "n"),
    "triangle": ("Dreieck", "Dreiecke", "n"),
    "star": ("Stern", "Sterne", "m"),
    "heart": ("Herz", "Herzen", "n"),
    "ring": ("Ring", "Ringe", "m"),
    "cross": ("Kreuz", "Kreuze", "n"),
    "diamond": ("Raute", "Rauten", "f"),
}
_DE_COLOURS: Final = {
    "red": "rot",
    "orange": "orange",
    "yellow": "gelb",
    "green": "grün",
    "blue": "blau",
    "purple": "violett",
    "pink": "rosa",
    "brown": "braun",
    "black": "schwarz",
    "white": "weiß",
}
_DE_UNBENT: Final = {"orange", "rosa"}
_DE_PATTERNS: Final = {"striped": "gestreift", "dotted": "gepunktet", "checkered": "kariert"}
_DE_SIZES: Final = {"small": "klein", "large": "groß"}
_DE_GROUNDS: Final = {
    "white": "weißem",
    "grey": "grauem",
    "black": "schwarzem",
    "beige": "beigem",
    "light blue": "hellblauem",
    "dark green": "dunkelgrünem",
    "navy": "dunkelblauem",
    "lavender": "blassviolettem",
}
_DE_RELATIONS: Final = {"above": "darunter", "below": "darüber", "left of": "rechts davon", "right of": "links davon"}
_DE_PLACES: Final = {
    "in the middle": "in der Mitte",
    "in the top left corner": "oben links",
    "in the top right corner": "oben rechts",
    "in the bottom left corner": "unten links",
    "in the bottom right corner": "unten rechts",
    "in a row": "nebeneinander",
    "in a column": "untereinander",
}

BOILERPLATE: Final = (
    "Click to enlarge",
    "Free shipping on all orders over $50",
    "IMG_{n}.JPG",
    "DSC0{n}",
    "Stock photo - royalty free",
    "Add to cart | Buy now",
    "image not available",
    "Subscribe to our newsletter for more",
    "Copyright 20{y} all rights reserved",
    "Product no. {n} - best price guaranteed",
    "photo",
    "untitled ({n})",
    "Share on facebook, pin it, tweet",
    "thumbnail {n} of 9999",
    "Home > Products > Item {n}",
)


def describe(scene: Scene, rng: np.random.Generator, *, language: str = "en") -> str:
    """Say what `scene` shows in `language` ("en" or "de"); the wording, not the content, is drawn from `rng`."""
    text = _english(scene, rng) if language == "en" else _german(scene, rng)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def boilerplate(rng: np.random.Generator) -> str:
    """A caption of the kind that web pages carry and that says nothing about the picture."""
    text = _pick(rng, BOILERPLATE)
    return text.format(n=int(rng.integers(1000, 9999)), y=int(rng.integers(10, 25)))


def _english(scene: Scene, rng: np.random.Generator) -> str:
    if scene.relation is None:
        return _pick(rng, LONE_TEMPLATES).format(a=_group(scene.groups[0], rng), p=scene.place, g=scene.ground)
    first, second = (_group(group, rng) for group in scene.groups)
    relation, inverse = (_pick(rng, SAID[name]) for name in (scene.relation, INVERSES[scene.relation]))
    return _pick(rng, PAIR_TEMPLATES).format(a=first, b=second, r=relation, i=inverse, g=scene.ground)


def _group(group: Shapes, rng: np.random.Generator) -> str:
    size = [] if group.size == "medium" else [group.size]
    pattern = [] if group.pattern == "plain" else [group.pattern]
    looks = [group.colour, *pattern] if rng.random() < 0.5 else [*pattern, group.colour]
    noun = group.shape if group.count == 1 else PLURALS.get(group.shape, group.shape + "s")
    words = [*size, *looks, noun]
    count = COUNTS[group.count - 1]
    return " ".join(["an" if count == "a" and words[0][0] in "aeiou" else count, *words])


def _german(scene: Scene, rng: np.random.Generator) -> str:
    ground = f"{_pick(rng, ('auf', 'vor'))} {_DE_GROUNDS[scene.ground]} Hintergrund"
    groups = [_german_group(group) for group in scene.groups]
    if scene.relation is None:
        return f"{groups[0]} {_DE_PLACES[scene.place or 'in the middle']} {ground}"
    return f"{groups[0]}, {_DE_RELATIONS[scene.relation]} {groups[1]}, {ground}"


def _german_group(group: Shapes) -> str:
    singular, plural, gender = _DE_NOUNS[group.shape]
    one = group.count == 1
    ending = {"m": "er", "n": "es", "f": "e"}[gender] if one else "e"
    looks = [_DE_SIZES.get(group.size), _DE_COLOURS[group.colour], _DE_PATTERNS.get(group.pattern)]
    bent = [look if look in _DE_UNBENT else look + ending for look in looks if look]
    count = "eine" if one and gender == "f" else _DE_COUNTS[group.count - 1]
    return " ".join([count, *bent, singular if one else plural])


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
