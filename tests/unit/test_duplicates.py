"""Duplicate search against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from curate.duplicates import NEAR_BITS, exact_originals, near_originals


def brute_force_exact(image_ND: NDArray[np.uint8], text_ND: NDArray[np.uint8]) -> list[int]:
    keys = [(image.tobytes(), text.tobytes()) for image, text in zip(image_ND, text_ND, strict=True)]
    return [keys.index(key) for key in keys]


def brute_force_near(hash_ND: NDArray[np.uint8], bits: int) -> list[int]:
    originals: list[int] = []
    for row, hashed in enumerate(hash_ND):
        distances = [int(np.unpackbits(hashed ^ hash_ND[other]).sum()) for other in range(row)]
        kept = [other for other in range(row) if originals[other] == other and distances[other] <= bits]
        originals.append(kept[0] if kept else row)
    return originals


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_exact_copies_name_the_first_row(pairs: list[tuple[int, int]]) -> None:
    """A row is a copy of the first row with its image and its caption, both; the first is its own original."""
    image_ND = np.array([[image] * 32 for image, _ in pairs], np.uint8).reshape(-1, 32)
    text_ND = np.array([[text] * 16 for _, text in pairs], np.uint8).reshape(-1, 16)
    assert exact_originals(image_ND, text_ND).tolist() == brute_force_exact(image_ND, text_ND)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from([0, 3, NEAR_BITS, 40]))
def test_near_copies_name_the_first_kept_row(rows: int, seed: int, bits: int) -> None:
    """Greedy in row order, as a loop over all pairs finds them, at any distance."""
    rng = np.random.default_rng(seed)
    centre_CD = rng.integers(0, 256, (4, 32), np.uint8)
    flips_ND = np.packbits(rng.random((rows, 256)) < rng.choice([0.0, 0.02, 0.1]), axis=1).reshape(rows, 32)
    hash_ND = centre_CD[rng.integers(0, 4, rows)] ^ flips_ND
    assert near_originals(hash_ND, bits).tolist() == brute_force_near(hash_ND, bits)


@pytest.mark.parametrize(("distance", "copy"), [(NEAR_BITS, True), (NEAR_BITS + 1, False)])
def test_the_limit_is_inclusive(distance: int, copy: bool) -> None:
    """A hash at exactly the limit is a copy, one bit further is none."""
    bits = np.zeros((2, 256), np.uint8)
    bits[1, :distance] = 1
    assert near_originals(np.packbits(bits, axis=1)).tolist() == [0, 0 if copy else 1]


def test_a_chain_of_small_changes_does_not_collapse() -> None:
    """Each link is near the one before, but a copy's original is always kept: the third link stays."""
    bits = np.zeros((3, 256), np.uint8)
    bits[1, :8] = bits[2, :16] = 1
    assert near_originals(np.packbits(bits, axis=1)).tolist() == [0, 0, 2]


def test_equal_hashes_are_searched_for_once() -> None:
    """Thousands of equal pictures among near ones: as the brute force says, and not the square of them in memory."""
    random = np.random.default_rng(5)
    few_UD = random.integers(0, 256, (6, 32), dtype=np.uint8)
    few_UD[3:] = few_UD[:3]
    few_UD[3:, 0] ^= np.array([1, 3, 255], np.uint8)
    hash_ND = few_UD[random.integers(0, 6, 300)]
    assert near_originals(hash_ND).tolist() == brute_force_near(hash_ND, NEAR_BITS)
    blank_ND = np.zeros((100_000, 32), np.uint8)
    assert not near_originals(blank_ND).any()
