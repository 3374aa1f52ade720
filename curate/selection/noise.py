"""Gumbel noise that depends on (seed, step, chunk, sample id) and on nothing else: not on row order, workers or device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as a counter-based hash: the
counter is the 16 bytes of the sample id, the key a digest of (seed, step, chunk). About 50 ns per sample, always on
the CPU, always fp64.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError

# B samples; a word is 32 bits, kept in uint64 so that a product of two is exact
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter_B4: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10: four 32-bit words of counter [B, 4] and a key of two to four random 32-bit words [B, 4]."""
    c0, c1, c2, c3 = (np.ascontiguousarray(word_B) for word_B in counter_B4.T)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(sample_ids: NDArray[np.uint8], *, seed: int, step: int, chunk: int) -> NDArray[np.float64]:
    """One number strictly inside (0, 1) per sample id [B, 16]: an odd multiple of 2**-53, so neither end can be hit.

    Raises `UsageError` for a seed, step or chunk outside 0 .. 2**64 - 1.
    """
    for name, value in (("seed", seed), ("step", step), ("chunk", chunk)):
        if not 0 <= value < 2**64:
            raise UsageError(f"{name} is {value}; give a whole number from 0 to 2**64 - 1")
    key = hashlib.blake2b(struct.pack("<3Q", seed, step, chunk), digest_size=8, person=b"curate gumbel").digest()
    counter_B4 = np.ascontiguousarray(sample_ids).view("<u4").astype(np.uint64)
    word_B4 = philox(counter_B4, struct.unpack("<2I", key))
    bits_B = (word_B4[:, 0] << _SHIFT | word_B4[:, 1]) >> np.uint64(12)
    return (bits_B.astype(np.float64) + 0.5) * 2.0**-52


def gumbel(sample_ids: NDArray[np.uint8], *, seed: int, step: int, chunk: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [B], fp64, for uint8 sample ids [B, 16].

    >>> ids = np.arange(32, dtype=np.uint8).reshape(2, 16)
    >>> np.array_equal(gumbel(ids, seed=1, step=0, chunk=0)[::-1], gumbel(ids[::-1], seed=1, step=0, chunk=0))
    True
    """
    noise_B: NDArray[np.float64] = -np.log(-np.log(uniform(sample_ids, seed=seed, step=step, chunk=chunk)))
    return noise_B
