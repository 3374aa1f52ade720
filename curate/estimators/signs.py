"""Random signs that are a function of a key and a position: rebuilt when needed, never stored, the same on any device.

SplitMix64's finalising hash (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) of
key + counter times the golden ratio, in torch's wrapping 64-bit integers: 64 signs per hash, 2 to 4 ns per sign on one
core. Few signs on a CPU come from numpy, whose calls cost less: the same bits in a quarter of the 80 microseconds.
(Philox, which `curate.selection.noise` uses for its numbers, takes ten rounds and 800 microseconds for however few.)
The key is a digest of (seed, step, tangent, name).
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import UsageError

# R rows, C columns, J blocks of 64 signs in a row
SIGNS_PER_BLOCK = 64
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FEW_BLOCKS = 1_024
_MOST_BLOCKS = 16_384  # at a time, so that the work stays in a core's cache


def key_of(seed: int, step: int, tangent: int, name: str) -> int:
    """64 bits for one tensor of one tangent. Errors: UsageError for a number outside 0 .. 2**64 - 1."""
    for what, value in (("seed", seed), ("step", step), ("tangent", tangent)):
        if not 0 <= value < 2**64:
            raise UsageError(f"{what} is {value}; give a whole number from 0 to 2**64 - 1")
    packed = struct.pack("<3Q", seed, step, tangent) + name.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=b"curate tangents").digest(), "little")


def signs(
    key: int, rows: int, columns: int, *, device: torch.device | str, dtype: torch.dtype, first_row: int = 0
) -> Tensor:
    """+1 or -1, [R, C]: element (r, c) depends on the key, on first_row + r and on c alone.

    Example: the first 3 columns of `signs(key, 2, 5, ...)` are `signs(key, 2, 3, ...)`, and its second row is
    `signs(key, 1, 5, first_row=1, ...)`.
    """
    blocks = -(-columns // SIGNS_PER_BLOCK)
    if rows * blocks <= _FEW_BLOCKS and torch.device(device).type == "cpu":
        return torch.from_numpy(_few(key, rows, blocks, first_row)[:, :columns]).to(dtype)
    made = torch.empty(rows, columns, device=device, dtype=dtype)
    table, shift = _table(dtype, str(device)), torch.arange(0, 64, 8, device=device)
    block_J, most = torch.arange(blocks, device=device), max(1, _MOST_BLOCKS // max(blocks, 1))
    for start in range(0, rows, most):
        row_R = torch.arange(first_row + start, first_row + min(start + most, rows), device=device)
        hash_RJ = _splitmix((row_R.unsqueeze(1) << 32) + block_J, key)
        byte_RJ8 = hash_RJ.unsqueeze(-1) >> shift & 0xFF
        # index_select: seven times faster than indexing on a CPU
        made[start : start + most] = table.index_select(0, byte_RJ8.flatten()).view(len(row_R), -1)[:, :columns]
    return made


def _few(key: int, rows: int, blocks: int, first_row: int) -> NDArray[np.int8]:
    """The same with numpy's unsigned integers, [R, 64 J]."""
    counter_RJ = (np.arange(first_row, first_row + rows, dtype=np.uint64) << np.uint64(32))[:, None]
    z: Any = (counter_RJ + np.arange(1, blocks + 1, dtype=np.uint64)) * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    byte_RX = (z ^ (z >> np.uint64(31))).astype("<u8", copy=False).view(np.uint8)
    bits_RX = np.unpackbits(byte_RX.reshape(rows, -1), axis=1, bitorder="little")
    return 1 - 2 * bits_RX.view(np.int8)


@lru_cache(maxsize=32)
def _table(dtype: torch.dtype, device: str) -> Tensor:
    """The eight signs of each byte, [256, 8]: bit i is sign i."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (1 - 2 * bits).to(dtype).to(device)


def _splitmix(counter: Tensor, key: int) -> Tensor:
    """SplitMix64's output number `counter` (from 0) of the stream that starts at `key`, as int64 with the same bits."""
    z = (counter + 1) * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _down(z, 30)) * _signed(_MIX_1)
    z = (z ^ _down(z, 27)) * _signed(_MIX_2)
    return z ^ _down(z, 31)


def _down(z: Tensor, bits: int) -> Tensor:
    """The logical shift: torch's fills with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
