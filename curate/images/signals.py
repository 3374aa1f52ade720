"""Two quality signals of a picture, from one small grey copy: how sharp it is, and a hash that near-duplicates share.

Both are made from the picture at 64 pixels of height, so that they compare across sizes. About 0.1 ms for a 256-px
image: Pillow makes the small copies, numpy then rates many of them side by side on one canvas, since a picture of 64
pixels of height is too little work for a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# H, W height and width of a canvas of grey copies, n pictures on it, w the width of one

_HEIGHT: Final = 64
_NARROWEST: Final = 3  # so that every copy has pixels with four neighbours
_WIDEST: Final = 512  # a picture a million times wider than high would otherwise grow by its aspect
_HASH_SIDE: Final = 16
_SIDE_BY_SIDE: Final = 32  # copies of usual width on one canvas fit a core's second-level cache


@dataclass(frozen=True, slots=True)
class Signals:
    """`sharpness`: variance of the 4-neighbour Laplacian of the grey picture (0..255) at 64 px of height, in grey
    levels squared. `dhash`: 32 bytes, bit (row, column) set where a 17 x 16 grey copy grows brighter to the right."""

    sharpness: float
    dhash: bytes


@dataclass(frozen=True, slots=True)
class GreyCopies:
    """What remains of a picture until it is rated: it at 64 px of height, and at 17 x 16; a few kilobytes."""

    grey: Image.Image
    small: Image.Image


def signals(rgb_HWC: NDArray[np.uint8]) -> Signals:
    """Signals of one image [height, width, 3].

    Example: a picture of one colour has sharpness 0.0 and a dhash of 32 zero bytes; black and white stripes of a few
    pixels reach some thousand.

    Sources: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000 (variance of the
    Laplacian); N. Krawetz, "Kind of Like That", 2013 (difference hash).
    """
    return rate([grey_copies(Image.fromarray(rgb_HWC))])[0]


def grey_copies(picture: Image.Image) -> GreyCopies:
    """The small copies of an RGB picture that its signals are made from."""
    across = min(_WIDEST, max(_NARROWEST, round(_HEIGHT * picture.width / picture.height)))
    # reducing_gap 1: whole-number box averages first, which halves the time of the fractional rest
    grey = picture.convert("L").resize((across, _HEIGHT), Image.Resampling.BOX, reducing_gap=1.0)
    return GreyCopies(grey, grey.resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX))


def rate(copies: Sequence[GreyCopies]) -> list[Signals]:
    """Signals of many pictures, each the same as if it were rated alone."""
    rated: list[Signals] = []
    for start in range(0, len(copies), _SIDE_BY_SIDE):
        some = copies[start : start + _SIDE_BY_SIDE]
        sharpness, dhash = _sharpness([one.grey for one in some]), _dhash([one.small for one in some])
        rated += map(Signals, sharpness, dhash)
    return rated


def _sharpness(greys: Sequence[Image.Image]) -> list[float]:
    """From whole numbers, so exact up to the last division; each step is one pass over one line of all the pixels."""
    line, ends_n = _side_by_side(greys)
    W = int(ends_n[-1])
    flat = line.astype(np.int16)
    laplace = flat[W:-W] * np.int16(-4)
    laplace[1:] += flat[W:-W][:-1]
    laplace[:-1] += flat[W:-W][1:]
    laplace += flat[: -2 * W]
    laplace += flat[2 * W :]
    values_HW = laplace.reshape(_HEIGHT - 2, W).astype(np.int32)  # a column of 62 squares stays below 2**26
    inner_2n = np.stack([np.append(0, ends_n[:-1]) + 1, ends_n - 1], 1).reshape(-1)  # without columns at an edge
    total_n = _between(values_HW.sum(0, dtype=np.int32), inner_2n)
    squares_n = _between(np.square(values_HW, out=values_HW).sum(0, dtype=np.int32), inner_2n)
    count_n = (np.diff(ends_n, prepend=0) - 2) * (_HEIGHT - 2)
    return [
        (count * squares - total * total) / count**2
        for count, squares, total in zip(count_n.tolist(), squares_n, total_n, strict=True)
    ]


def _between(column_W: NDArray[np.int32], bounds_2n: NDArray[np.int64]) -> list[int]:
    """Sums of the columns from each even to the next odd bound."""
    sums: list[int] = np.add.reduceat(column_W, bounds_2n, dtype=np.int64)[::2].tolist()
    return sums


def _dhash(smalls: Sequence[Image.Image]) -> list[bytes]:
    line, _ = _side_by_side(smalls)
    small_HnW = line.reshape(_HASH_SIDE, len(smalls), _HASH_SIDE + 1)
    bits = np.packbits(small_HnW[:, :, 1:] > small_HnW[:, :, :-1], axis=2)
    return [row.tobytes() for row in bits.transpose(1, 0, 2)]


def _side_by_side(copies: Sequence[Image.Image]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Copies of one height on one canvas, as a line of pixels, and the column after each."""
    ends = np.cumsum([copy.width for copy in copies])
    canvas = Image.new("L", (int(ends[-1]), copies[0].height), None)
    for copy, end in zip(copies, ends.tolist(), strict=True):
        canvas.paste(copy, (end - copy.width, 0))
    return np.frombuffer(canvas.tobytes(), np.uint8), ends
