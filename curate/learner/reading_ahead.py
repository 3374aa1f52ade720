"""Read super-batches ahead in a thread, so that images are decoded while the model trains on earlier ones.

What is read depends on the position in the order alone; a request that differs from what was read ahead (the number of
candidates has changed) throws that away and reads what was asked for. Memory: `depth` super-batches of uint8 images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curate.learner.dataset import PairSource
from curate.learner.order import Order

# B candidates, C channels, H, W height and width, T tokens


@dataclass(frozen=True, slots=True)
class SuperBatch:
    """Candidates as read: rows of the pair source [B], uint8 images, token ids; `position` is the one after them."""

    row_B: NDArray[np.int64]
    image_BCHW: Tensor
    token_BT: Tensor
    position: int

    def __len__(self) -> int:
        return len(self.row_B)


class Ahead:
    """Made by `read_ahead`."""

    def __init__(
        self, pairs: PairSource, rows_N: NDArray[np.int64], order: Order, pool: ThreadPoolExecutor, depth: int
    ) -> None:
        self._pairs, self._rows, self._order, self._pool, self._depth = pairs, rows_N, order, pool, depth
        self._queue: deque[tuple[int, int, Future[SuperBatch]]] = deque()

    def get(self, position: int, count: int) -> SuperBatch:
        """`count` candidates from `position` on, fewer where images are bad; the next ones are begun."""
        if self._queue and self._queue[0][:2] != (position, count):
            while self._queue:
                self._queue.popleft()[2].cancel()
        if not self._queue:
            self._begin(position, count)
        _, _, future = self._queue.popleft()
        while len(self._queue) < self._depth:
            following = self._order.take(position, count)[1] if not self._queue else self._after(self._queue[-1])
            self._begin(following, count)
        return future.result()

    def _after(self, queued: tuple[int, int, Future[SuperBatch]]) -> int:
        return self._order.take(queued[0], queued[1])[1]

    def _begin(self, position: int, count: int) -> None:
        self._queue.append((position, count, self._pool.submit(self._read, position, count)))

    def _read(self, position: int, count: int) -> SuperBatch:
        index_B, after = self._order.take(position, count)
        return SuperBatch(*self._pairs.read(self._rows[index_B]), after)


@contextmanager
def read_ahead(pairs: PairSource, rows_N: NDArray[np.int64], order: Order, *, depth: int = 2) -> Iterator[Ahead]:
    """Serve the rows `rows_N` of `pairs` in `order` while the context lasts."""
    with ThreadPoolExecutor(1, thread_name_prefix="curate-ahead") as pool:
        try:
            yield Ahead(pairs, rows_N, order, pool, depth)
        finally:
            pool.shutdown(cancel_futures=True)
