"""Which pairs come next: one permutation per epoch, from the seed and the number of the epoch alone.

The position in the stream is one integer, so a run is resumed by remembering it. O(N) once per epoch.
"""

# N pairs

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError


@dataclass(frozen=True, slots=True)
class Order:
    """An endless stream of the numbers 0..N-1, each once in an epoch."""

    samples: int
    seed: int

    def take(self, position: int, count: int) -> tuple[NDArray[np.int64], int]:
        """`count` different numbers from `position` on, and the position after them.

        What is left of an epoch and does not fill `count` is passed over, so that no number comes twice in one take.
        Errors: UsageError for a count above N.
        """
        if count > self.samples:
            raise UsageError(f"{count} pairs are asked for at a time, and there are {self.samples}")
        epoch, offset = divmod(position, self.samples)
        if offset + count > self.samples:
            epoch, offset = epoch + 1, 0
        return _permutation(self.samples, self.seed, epoch)[offset : offset + count], (
            epoch * self.samples + offset + count
        )


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    dice = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    order_N = dice.permutation(samples)
    order_N.flags.writeable = False
    return order_N
