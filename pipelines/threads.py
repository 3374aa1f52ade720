"""Threads that compute batches: a unit's own, or those that all units of a process share.

Each computes with one torch thread, so that there are as many batches as cores. Shared ones take one unit's batches
where another has none: while it indexes its shard, waits for its last batch, or writes.

Half of them may read at a time, while the others are at their models. Reading a picture asks for the interpreter's lock
some ten times, a model hardly ever: two threads that read wait for each other, one that reads and one that computes do
not. With a small model on two cores that is a tenth of the time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A pool, leave to read (`with borrowed.reading:`), and what was asked of the pool."""

    pool: ThreadPoolExecutor
    reading: Semaphore
    asked: list[Future[Any]] = field(default_factory=list)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; work begins at once."""
        begun = [self.pool.submit(work, item) for item in items]
        self.asked.extend(begun)
        return (future.result() for future in begun)


@contextlib.contextmanager
def borrowed(threads: int, *, shared: bool) -> Iterator[Borrowed]:
    """`threads` threads; when the block is left, nothing that was asked in it runs any more, whatever happened."""
    pool, reading = _shared(threads) if shared else _pool(threads)
    own = Borrowed(pool, reading)
    try:
        yield own
    finally:
        for future in own.asked:
            future.cancel()
        wait(own.asked)
        if not shared:
            pool.shutdown()


def _pool(threads: int) -> tuple[ThreadPoolExecutor, Semaphore]:
    return ThreadPoolExecutor(threads, "batches", torch.set_num_threads, (1,)), Semaphore((threads + 1) // 2)


_shared = functools.lru_cache(maxsize=None)(_pool)
