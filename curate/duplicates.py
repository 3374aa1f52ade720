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
    keys = np.ascontiguousarray(np.concatenate([image_digest_N, caption_digest_N], axis=1))
    _, first, inverse = np.unique(keys.view(f"V{keys.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def near_originals(dhash_N: NDArray[np.uint8], bits: int = NEAR_BITS) -> NDArray[np.int64]:
    """For each row an earlier kept row whose hash [N, 32] is within `bits`, else its own number.

    Greedy in row order, so that a chain of small changes does not collapse to one: a copy's original is always kept.
    """
    import faiss

    rows = len(dhash_N)
    original = np.arange(rows)
    if rows == 0:
        return original
    index = faiss.IndexBinaryFlat(dhash_N.shape[1] * 8)
    index.add(np.ascontiguousarray(dhash_N))
    limits, _, neighbours = index.range_search(np.ascontiguousarray(dhash_N), bits + 1)
    for row in range(rows):
        earlier = neighbours[limits[row] : limits[row + 1]]
        kept = earlier[(earlier < row) & (original[earlier] == earlier)]
        if len(kept):
            original[row] = kept.min()
    return original
