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
import os
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
    asked: list[_Task] = field(default_factory=list)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; work begins at once."""
        return self._ask([_Task(functools.partial(work, item)) for item in items])

    def read(
        self, read: Callable[[Item], Read], then: Callable[[Read], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """The same for `then(read(item))`, while half of the threads read at most; one thread does both."""
        return self._ask([_Task(then, functools.partial(read, item)) for item in items])

    def _ask(self, tasks: list[_Task]) -> Iterator[Any]:
        self.asked.extend(tasks)
        for task in tasks:
            self.pool.submit(task)
        return (task.future.result() for task in tasks)


@contextlib.contextmanager
def borrowed(threads: int, *, shared: bool) -> Iterator[Borrowed]:
    """`threads` threads; when the block is left, nothing that was asked in it runs any more, whatever happened."""
    pool = _shared(threads, os.getpid()) if shared else Pool(threads)
    own = Borrowed(pool)
    try:
        yield own
    finally:
        pool.withdraw(own.asked)
        wait([task.future for task in own.asked])
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
            self._threads.submit(self._turn)  # first: where no thread can be had, no task waits for one
            self._waiting.append(task)
            self._changed.notify()

    def withdraw(self, tasks: Iterable[_Task]) -> None:
        """Cancel those that have not begun, whether they were submitted or not."""
        with self._changed:
            for task in tasks:
                if task.future.cancel():
                    task.future.set_running_or_notify_cancel()  # whoever waits for it is told
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(task)
            self._changed.notify_all()

    def close(self) -> None:
        self._threads.shutdown()

    def _turn(self) -> None:
        """Run one task: there is a turn for each at least, and it takes what may begin when it comes."""
        task = self._next()
        if task is None:
            return
        read: tuple[Any, ...] = ()
        try:
            if task.read is not None:
                try:
                    read = (task.read(),)
                finally:
                    self._give_back_leave()
            task.future.set_result(task.compute(*read))
        except BaseException as error:
            task.future.set_exception(error)
        finally:
            del task, read  # an error knows this frame, and would keep a batch's pixels

    def _next(self) -> _Task | None:
        """The first task that may begin, now begun; None where none waits any more."""
        with self._changed:
            while self._waiting:
                task = next((one for one in self._waiting if self._leave or one.read is None), None)
                if task is not None:
                    self._waiting.remove(task)
                    self._leave -= task.read is not None
                    task.future.set_running_or_notify_cancel()
                    return task
                self._changed.wait()
        return None

    def _give_back_leave(self) -> None:
        with self._changed:
            self._leave += 1
            self._changed.notify()


@functools.cache
def _shared(threads: int, process: int) -> Pool:  # noqa: ARG001 - a forked process has none of its parent's threads
    return Pool(threads)


@functools.cache
def _let_memory_be_kept() -> None:
    """Free a block of 32 MB once. Whatever is smaller, glibc then keeps for the next batch.

    It gives large blocks back to the system when they are freed, until one of that size has been; which sizes those are
    depends on what this process loaded before. Each batch of curate-tiny then had its activations zeroed anew by the
    kernel, in three of five processes: 3 % of the time. Other allocators do nothing of the kind, and this costs
    microseconds: nobody writes to the block.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)
