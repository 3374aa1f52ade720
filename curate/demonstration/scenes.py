"""Scenes of the demonstration: a few coloured shapes on a ground, described by attributes and drawn with Pillow.

A scene is a value; `draw` turns it into pixels. Shape masks and pattern tiles are cached, so that one 64-pixel picture,
drawn at three times its size and reduced, costs about 0.3 ms on one core.
"""

# G patches of light on a side of the ground

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
PATTERNS: Final = ("plain", "striped", "dotted", "checkered")
SIZES: Final = {"small": 0.085, "medium": 0.115, "large": 0.19}  # radius as a share of the side
COLOURS: Final[dict[str, Colour]] = {
    "red": (212, 42, 46),
    "orange": (243, 134, 28),
    "yellow": (250, 212, 48),
    "green": (42, 158, 70),
    "blue": (36, 98, 220),
    "purple": (128, 58, 176),
    "pink": (247, 140, 188),
    "brown": (122, 76, 40),
    "black": (30, 30, 36),
    "white": (250, 250, 247),
}
GROUNDS: Final[dict[str, Colour]] = {
    "white": (236, 236, 233),
    "grey": (152, 154, 160),
    "black": (30, 31, 36),
    "beige": (234, 216, 182),
    "light blue": (176, 211, 241),
    "dark green": (24, 72, 56),
    "navy": (27, 40, 92),
    "lavender": (212, 200, 242),
}
TOO_CLOSE: Final = {  # shapes that would drown in their ground
    "white": {"white"},
    "black": {"black", "brown"},
    "dark green": {"black", "green", "brown"},
    "navy": {"black", "blue", "purple"},
    "lavender": {"pink"},
}
RELATIONS: Final = ("above", "below", "left of", "right of")
PLACES: Final[dict[str, tuple[float, float]]] = {
    "in the middle": (0.5, 0.5),
    "in the top left corner": (0.26, 0.26),
    "in the top right corner": (0.74, 0.26),
    "in the bottom left corner": (0.26, 0.74),
    "in the bottom right corner": (0.74, 0.74),
}
SUPERSAMPLING: Final = 3
GRID: Final = 6
_BOXES: Final = {  # relation -> (box of the first group, box of the second), as shares of the side: x0, y0, x1, y1
    "above": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)),
    "below": ((0.0, 0.5, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5)),
    "left of": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),
    "right of": ((0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)),
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """`count` equal shapes."""

    count: int
    shape: str
    colour: str
    pattern: str
    size: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two groups of shapes on a ground: `relation` places the first against the second, `place` a lone one."""

    ground: str
    groups: tuple[Shapes, ...]
    relation: str | None
    place: str | None

    def as_json(self) -> dict[str, Any]:
        """The attributes as plain JSON values."""
        return asdict(self)

    def tells_apart(self, other: Scene) -> bool:
        """Whether no (colour, shape) occurs in both, so that a caption of one is wrong for the other."""
        mine = {(group.colour, group.shape) for group in self.groups}
        return mine.isdisjoint((group.colour, group.shape) for group in other.groups)


def imagine(rng: np.random.Generator) -> Scene:
    """Draw the attributes of a scene. Two groups in 70 % of scenes, never of the same colour."""
    ground = _pick(rng, tuple(GROUNDS))
    free = [colour for colour in COLOURS if colour not in TOO_CLOSE.get(ground, ())]
    colours = [free[i] for i in rng.permutation(len(free))[:2]]
    if rng.random() < 0.7:
        return Scene(ground, tuple(_shapes(rng, colour, most=4) for colour in colours), _pick(rng, RELATIONS), None)
    group = _shapes(rng, colours[0], most=3)
    place = _pick(rng, tuple(PLACES)) if group.count == 1 else _pick(rng, ("in a row", "in a column"))
    return Scene(ground, (group,), None, place)


def _shapes(rng: np.random.Generator, colour: str, *, most: int) -> Shapes:
    size = _pick(rng, tuple(SIZES))
    count = 1 + int(rng.integers(2 if size == "large" else most))
    pattern = "plain" if rng.random() < 0.4 else _pick(rng, PATTERNS[1:])
    return Shapes(count, _pick(rng, SHAPES), colour, pattern, size)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def draw(scene: Scene, rng: np.random.Generator, *, side: int = 64) -> Image.Image:
    """Draw `scene` as an RGB picture of side x side pixels. `rng` moves and turns the shapes a little."""
    large = side * SUPERSAMPLING
    canvas = _ground(GROUNDS[scene.ground], large, rng)
    shadow = _mix(GROUNDS[scene.ground], (0, 0, 0), 0.22)
    for group, centres in zip(scene.groups, _centres(scene), strict=True):
        reach = max(4, round(SIZES[group.size] * large * rng.uniform(0.93, 1.07)))
        tile = _tile(COLOURS[group.colour], group.pattern, large)
        for x, y in centres:
            mask, rim = _mask(group.shape, reach, int(rng.integers(-3, 4)) * 4)
            jitter_x, jitter_y = rng.uniform(-0.018, 0.018, 2)
            left = round((x + jitter_x) * large) - mask.width // 2
            top = round((y + jitter_y) * large) - mask.height // 2
            canvas.paste(shadow, (left + large // 70, top + large // 55), mask)
            shift = int(rng.integers(12))
            canvas.paste(tile.crop((shift, shift, shift + mask.width, shift + mask.height)), (left, top), mask)
            if group.pattern != "plain":
                canvas.paste(COLOURS[group.colour], (left, top), rim)
    return canvas.reduce(SUPERSAMPLING)


def _centres(scene: Scene) -> Iterator[list[tuple[float, float]]]:
    """Centres of the shapes of each group, as shares of the side."""
    if scene.relation is None:
        count = scene.groups[0].count
        steps = [0.5 + (i - (count - 1) / 2) * (0.42 if count == 2 else 0.31) for i in range(count)]
        if scene.place in PLACES:
            yield [PLACES[scene.place]]
        else:
            yield [(step, 0.5) if scene.place == "in a row" else (0.5, step) for step in steps]
        return
    for group, (x0, y0, x1, y1) in zip(scene.groups, _BOXES[scene.relation], strict=True):
        pitch = {1: 0.0, 2: 0.42, 3: 0.29, 4: 0.235}[group.count]
        steps = [0.5 + (i - (group.count - 1) / 2) * pitch for i in range(group.count)]
        wide = x1 - x0 > y1 - y0
        yield [(step, (y0 + y1) / 2) if wide else ((x0 + x1) / 2, step) for step in steps]


def _ground(colour: Colour, size: int, rng: np.random.Generator) -> Image.Image:
    """A ground in soft, uneven light, which differs from picture to picture as it does in photographs."""
    light_GG1 = rng.uniform(-20.0, 20.0, (GRID, GRID, 1))
    coarse_GG3 = np.clip(np.asarray(colour) + light_GG1, 0, 255).astype(np.uint8)
    return Image.fromarray(coarse_GG3).resize((size, size), Image.Resampling.BICUBIC)


@lru_cache(maxsize=256)
def _tile(colour: Colour, pattern: str, size: int) -> Image.Image:
    """A patterned square that is large enough to cut any shape out of."""
    width = round(size * 0.45) + 16
    image = Image.new("RGB", (width, width), colour)
    bright = sum(colour) > 700
    second = _mix(colour, (70, 70, 84) if bright else (255, 255, 255), 0.62)
    pen = ImageDraw.Draw(image)
    pitch = max(4, round(size * 0.055))
    if pattern == "striped":
        for start in range(-width, 2 * width, 2 * pitch):
            pen.line([(start, width), (start + width, 0)], fill=second, width=round(pitch * 0.9))
    elif pattern == "dotted":
        for row, y in enumerate(range(0, width, round(pitch * 1.1))):
            for x in range(0 if row % 2 else pitch, width, 2 * pitch):
                pen.ellipse([x - pitch * 0.45, y - pitch * 0.45, x + pitch * 0.45, y + pitch * 0.45], fill=second)
    elif pattern == "checkered":
        for row, y in enumerate(range(0, width, pitch)):
            for x in range(pitch * (row % 2), width, 2 * pitch):
                pen.rectangle([x, y, x + pitch - 1, y + pitch - 1], fill=second)
    return image


@lru_cache(maxsize=4096)
def _mask(shape: str, reach: int, degrees: int) -> tuple[Image.Image, Image.Image]:
    """The shape in white on black, turned by `degrees`, and its rim, which holds a patterned shape together."""
    mask = _silhouette(shape, reach, degrees)
    return mask, ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5)))


def _silhouette(shape: str, reach: int, degrees: int) -> Image.Image:
    side = 2 * reach + 3
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    middle = side / 2

    def ellipse(share: float, fill: int) -> None:
        low, high = middle - reach * share, middle + reach * share
        pen.ellipse([low, low, high, high], fill=fill)

    if shape in ("circle", "ring"):
        ellipse(0.95, 255)
        if shape == "ring":
            ellipse(0.5, 0)
        return mask
    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    corners = [(x * cos - y * sin, x * sin + y * cos) for x, y in _outline(shape)]
    pen.polygon([(middle + reach * x, middle + reach * y) for x, y in corners], fill=255)
    return mask


@lru_cache(maxsize=16)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape inside the unit circle, y downwards."""
    if shape == "heart":
        curve = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        x = np.sin(curve) ** 3
        y = -(13 * np.cos(curve) - 5 * np.cos(2 * curve) - 2 * np.cos(3 * curve) - np.cos(4 * curve)) / 16
        return tuple((float(a), float(b)) for a, b in zip(x, y, strict=True))
    if shape == "cross":
        arm = 0.34
        quarter = ((-arm, -0.95), (arm, -0.95), (arm, -arm))
        return tuple(corner for turn in range(4) for corner in _turned(quarter, turn * math.pi / 2))
    spokes = {
        "square": [(1.08, 45 + 90 * i) for i in range(4)],
        "triangle": [(1.0, -90 + 120 * i) for i in range(3)],
        "diamond": [(1.0 if i % 2 else 0.66, 90 * i) for i in range(4)],
        "star": [(0.42 if i % 2 else 1.0, -90 + 36 * i) for i in range(10)],
    }[shape]
    return tuple((r * math.cos(math.radians(t)), r * math.sin(math.radians(t))) for r, t in spokes)


def _turned(corners: Sequence[tuple[float, float]], angle: float) -> Iterator[tuple[float, float]]:
    for x, y in corners:
        yield x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue
