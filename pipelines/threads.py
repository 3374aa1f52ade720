"""Threads that compute batches: a unit's own, or those that all units of a process share.

Each computes with one torch thread, so that there are as many batches as cores. Shared ones take one unit's batches
where another has none: while it indexes its shard, waits for its last batch, or writes.

Half of them may read at a time, while the others are at their models. Reading a picture asks for the interpreter's lock
some ten times, a model hardly ever: two threads that read wait for each other, one that reads and one that computes do
not. With a small model on two cores that is a tenth of the time. A thread that may not read takes later work that needs
no reading, such as captions, rather than wait: 2 % there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Final, TypeVar

import torch

_LARGEST_KEPT: Final = (32 << 20) - (64 << 10)  # glibc learns from blocks of up to 32 MB, its own header included

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A pool, and what was asked of it."""

    pool: Pool
    asked: list[Future[Any]] = field(default_factory=list)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; work begins at once."""
        return self._ask([_Task(functools.partial(work, item)) for item in items])

    def read(
        self, read: Callable[[Item], Read], then: Callable[[Read], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """The same for `then(read(item))`, while half of the threads read at most; one thread does both."""
        return self._ask([_Task(then, functools.partial(read, item)) for item in items])

    def _ask(self, tasks: list[_Task]) -> Iterator[Any]:
        self.asked.extend(task.future for task in tasks)
        for task in tasks:
            self.pool.submit(task)
        return (task.future.result() for task in tasks)


@contextlib.contextmanager
def borrowed(threads: int, *, shared: bool) -> Iterator[Borrowed]:
    """`threads` threads; when the block is left, nothing that was asked in it runs any more, whatever happened."""
    pool = _shared(threads) if shared else Pool(threads)
    own = Borrowed(pool)
    try:
        yield own
    finally:
        for future in own.asked:
            future.cancel()
        wait(own.asked)
        if not shared:
            pool.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """`compute()`, or `compute(read())` where there is something to read."""

    compute: Callable[..., Any]
    read: Callable[[], Any] | None = None
    future: Future[Any] = field(default_factory=Future)


class Pool:
    """The first task that may begin, on the first thread that is free."""

    def __init__(self, threads: int) -> None:
        _let_memory_be_kept()
        self._threads = ThreadPoolExecutor(threads, "batches", torch.set_num_threads, (1,))
        self._leave = (threads + 1) // 2  # how many more may read
        self._waiting: list[_Task] = []
        self._changed = Condition()

    def submit(self, task: _Task) -> None:
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()
        self._threads.submit(self._turn)

    def close(self) -> None:
        self._threads.shutdown()

    def _turn(self) -> None:
        """Run one task: there are as many turns as tasks, and each takes what may begin when it comes."""
        with self._changed:
            while (task := self._eligible()) is None:
                self._changed.wait()
            self._waiting.remove(task)
            self._leave -= task.read is not None
        begins = task.future.set_running_or_notify_cancel()
        read: tuple[Any, ...] = ()
        try:
            if task.read is not None:
                try:
                    read = (task.read(),) if begins else ()
                finally:
                    self._give_back_leave()
            if begins:
                task.future.set_result(task.compute(*read))
        except BaseException as error:
            task.future.set_exception(error)

    def _eligible(self) -> _Task | None:
        return next((task for task in self._waiting if self._leave or task.read is None), None)

    def _give_back_leave(self) -> None:
        with self._changed:
            self._leave += 1
            self._changed.notify()


@functools.cache
def _let_memory_be_kept() -> None:
    """Free a block of 32 MB once. Whatever is smaller, glibc then keeps for the next batch.

    It gives large blocks back to the system when they are freed, until one of that size has been; which sizes those are
    depends on what this process loaded before. Each batch of curate-tiny then had its activations zeroed anew by the
    kernel, in three of five processes: 3 % of the time. Other allocators do nothing of the kind, and this costs
    microseconds: nobody writes to the block.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


_shared = functools.lru_cache(maxsize=None)(Pool)
