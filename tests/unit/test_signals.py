"""Sharpness and difference hash."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from curate.images.decode import decode_rgb
from curate.images.signals import grey_copies, rate, signals
from tests.making import encode, make_pixels


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def detailed(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 60, (256, 256, 1), dtype=np.uint8)
    return (make_pixels(256, 256, seed) // 2 + noise).astype(np.uint8)


def test_one_colour() -> None:
    """A picture of one colour has no sharpness and an empty hash of 32 bytes."""
    found = signals(np.full((100, 80, 3), 77, np.uint8))
    assert found.sharpness == 0.0
    assert found.dhash == bytes(32)


def test_brute_force_sharpness() -> None:
    """At 64 pixels of height the sharpness is the variance of the Laplacian, pixel by pixel."""
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2)
    grey = rgb[:, :, 0].astype(int)
    values = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, 63)
        for x in range(1, 63)
    ]
    assert signals(rgb).sharpness == pytest.approx(np.var(values), rel=1e-6)


def test_blur_lowers_sharpness() -> None:
    """A blurred copy has less than half of the sharpness."""
    sharp = detailed(1)
    blurred = np.array(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(8)))
    assert signals(blurred).sharpness < signals(sharp).sharpness / 2


def test_near_duplicates_share_their_hash() -> None:
    """A recompressed, smaller copy is within 26 of 256 bits; another picture is not."""
    image = Image.fromarray(make_pixels(256, 256, 3))
    copy, _ = decode_rgb(encode(image.resize((180, 180)), "jpeg", quality=60))
    mine = signals(np.array(image)).dhash
    assert distance(mine, signals(copy).dhash) <= 26
    assert distance(mine, signals(make_pixels(256, 256, 4)).dhash) > 60


def test_hash_bits_are_brightness_to_the_right() -> None:
    """A picture that grows brighter to the right sets every bit."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (64, 256, 3))
    assert signals(np.ascontiguousarray(ramp)).dhash == b"\xff" * 32


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    """A single pixel and lines of pixels have signals too, without growing by their aspect."""
    assert len(signals(np.zeros((*shape, 3), np.uint8)).dhash) == 32


def test_many_pictures_are_rated_as_each_alone() -> None:
    """Side by side on one canvas, pictures of any widths have the signals they have alone, to the last bit."""
    shapes = [(64, 3), (64, 4), (80, 61), (1, 5000), (300, 1), (64, 64), (200, 317)] * 10
    pictures = [make_pixels(width, height, seed) for seed, (height, width) in enumerate(shapes)]
    assert rate([grey_copies(Image.fromarray(one)) for one in pictures]) == [signals(one) for one in pictures]
    assert rate([]) == []


@pytest.mark.parametrize("level", [0, 255])
def test_the_largest_laplacian_does_not_overflow(level: int) -> None:
    """A checkerboard of black and white single pixels, beside a plain picture, has the largest sharpness there is."""
    rows, columns = np.indices((64, 512))
    board = ((rows + columns) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    plain = np.full((64, 512, 3), level, np.uint8)
    found = rate([grey_copies(Image.fromarray(one)) for one in (board, plain, board)])
    assert [one.sharpness for one in found] == [1020.0**2, 0.0, 1020.0**2]
