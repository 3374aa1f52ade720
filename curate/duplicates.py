"""Duplicates among candidates: the sampler is drawn to copies, so they leave before the draw.

Exact: same image bytes and same caption. Near: 256-bit difference hashes within a Hamming distance, searched with
faiss's exact binary index; cost N^2 / 64 word operations, a second at N = 20,000.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# N candidates, in an order that does not depend on how the input was listed

NEAR_BITS: Final = 10


def exact_originals(image_digest_N: NDArray[np.uint8], caption_digest_N: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each row the first row with the same image and caption digests; its own number where it is the first."""
    return first_rows(np.concatenate([image_digest_N, caption_digest_N], axis=1))


def near_originals(dhash_N: NDArray[np.uint8], bits: int = NEAR_BITS) -> NDArray[np.int64]:
    """For each row an earlier kept row whose hash [N, 32] is within `bits`, else its own number.

    Greedy in row order, so that a chain of small changes does not collapse to one: a copy's original is always kept.
    """
    import faiss

    if len(dhash_N) == 0:
        return np.arange(0)
    first_N = first_rows(dhash_N)
    first_U = np.unique(first_N)  # equal hashes have the same neighbours: of 50,000 blank pictures one is searched for
    hash_U32 = np.ascontiguousarray(dhash_N[first_U])
    index = faiss.IndexBinaryFlat(hash_U32.shape[1] * 8)
    index.add(hash_U32)
    limits, _, neighbours = index.range_search(hash_U32, bits + 1)
    original = np.arange(len(first_U))
    for row in range(len(first_U)):
        earlier = neighbours[limits[row] : limits[row + 1]]
        kept = earlier[(earlier < row) & (original[earlier] == earlier)]
        if len(kept):
            original[row] = kept.min()
    near_N: NDArray[np.int64] = first_U[original[np.searchsorted(first_U, first_N)]]
    return near_N


def first_rows(hash_N: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each row the first row with the same bytes."""
    _, first, inverse = np.unique(
        np.ascontiguousarray(hash_N).view(f"V{hash_N.shape[1]}").ravel(), return_index=True, return_inverse=True
    )
    return first[inverse].astype(np.int64)
