"""Threads for batches: results in order, nothing left running, shared where asked, half of them reading at a time."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from queue import Queue

import pytest
import torch

from curate.pipelines.threads import borrowed


@pytest.mark.parametrize("shared", [False, True])
def test_results_come_in_order_from_threads_of_one_torch_thread(shared: bool) -> None:
    """Each item is computed with one torch thread, and the first result is the first item's."""
    with borrowed(3, shared=shared) as threads:
        assert list(threads.map(lambda n: (n, torch.get_num_threads()), range(9))) == [(n, 1) for n in range(9)]


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_runs_on_after_a_failure(shared: bool) -> None:
    """What was asked and not begun is cancelled, what runs is waited for: its memory may be gone afterwards."""
    begun, ended = [], []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.02)
        ended.append(number)

    def interrupted() -> None:
        with borrowed(2, shared=shared) as threads:
            threads.map(work, range(50))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(begun) < 50
    at_the_end = sorted(ended)
    assert at_the_end == sorted(begun)
    time.sleep(0.06)
    assert sorted(begun) == at_the_end


def test_units_share_one_pool() -> None:
    """Two borrowers at once compute on two threads together where they share, on four where they do not."""

    def names(shared: bool) -> int:
        used: set[int] = set()

        def work(_: int) -> None:
            used.add(threading.get_ident())
            time.sleep(0.01)

        with borrowed(2, shared=shared) as one, borrowed(2, shared=shared) as other:
            for found in (one.map(work, range(6)), other.map(work, range(6))):
                list(found)
        return len(used)

    assert (names(shared=True), names(shared=False)) == (2, 4)


@pytest.mark.parametrize(("threads", "readers"), [(1, 1), (2, 1), (4, 2), (5, 3)])
def test_half_of_the_threads_read_at_a_time(threads: int, readers: int) -> None:
    """More than that wait for each other; fewer would leave cores without work."""
    now, most, lock = 0, 0, threading.Lock()

    def read(number: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1
        return number

    with borrowed(threads, shared=False) as own:
        assert list(own.read(read, lambda number: -number, range(20))) == [-number for number in range(20)]
    assert most == readers


def test_a_thread_that_may_not_read_takes_later_work() -> None:
    """One of two threads reads, and goes on only when the other has done what was asked for last."""
    done = threading.Event()

    def read(_: int) -> bool:
        return done.wait(timeout=20)

    with borrowed(2, shared=False) as own:
        reading = own.read(read, bool, range(3))
        own.map(lambda _: done.set(), range(1))
        assert all(reading)


def test_a_failed_reading_lets_the_next_one_read() -> None:
    """Its error comes where its result would, nothing is computed from it, and the one thread reads on."""
    computed = []

    def read(number: int) -> int:
        if number == 1:
            raise OSError("cannot be read")
        return number

    with borrowed(1, shared=False) as own:
        own.read(read, computed.append, range(3))
        first, failed, last = (task.future for task in own.asked)
        wait([last], timeout=20)
        assert isinstance(failed.exception(timeout=0), OSError)
        assert first.done()
        assert last.done()
    assert computed == [0, 2]


@pytest.mark.parametrize("shared", [False, True])
def test_an_interrupted_asking_ends(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Where no further thread can be had, or the user stops it, tasks without a turn are cancelled, not waited for."""
    submit, asked = ThreadPoolExecutor.submit, []

    def fails(pool: ThreadPoolExecutor, work: Callable[[], None]) -> object:
        asked.append(work)
        if len(asked) == 3:
            raise RuntimeError("can't start new thread")
        return submit(pool, work)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", fails)

    def ask() -> None:
        with borrowed(2, shared=shared) as own:
            own.read(lambda _: time.sleep(0.01), lambda _: None, range(8))

    outcome: Queue[BaseException | None] = Queue()

    def told() -> None:
        try:
            ask()
        except RuntimeError as error:
            outcome.put(error)

    threading.Thread(target=told, daemon=True).start()
    assert "new thread" in str(outcome.get(timeout=20))
    with borrowed(2, shared=shared) as own:
        assert list(own.map(str, range(3))) == ["0", "1", "2"]


def test_cancelled_readings_let_others_go_on() -> None:
    """Turns whose tasks were withdrawn end, or take what another has asked; none is lost, and the leave comes back."""
    began, goes_on = threading.Event(), threading.Event()

    def read(number: int) -> int:
        began.set()
        goes_on.wait(timeout=20)
        return number

    with borrowed(2, shared=True) as other:
        with contextlib.suppress(KeyboardInterrupt), borrowed(2, shared=True) as own:
            own.read(read, str, range(20))
            began.wait(timeout=20)
            threading.Timer(0.05, goes_on.set).start()
            raise KeyboardInterrupt
        assert sum(not task.future.cancelled() for task in own.asked) <= 2
        assert list(other.read(str, len, range(5))) == [1] * 5


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of its parent are not there after a fork, and it does not wait for them."""
    with borrowed(2, shared=True) as own:
        list(own.map(str, range(2)))
    there, here = os.pipe()
    child = os.fork()
    if not child:
        threading.Timer(20, os._exit, (1,)).start()
        with borrowed(2, shared=True) as own:
            os.write(here, ",".join(own.map(str, range(3))).encode())
        os._exit(0)
    os.close(here)
    with os.fdopen(there, "rb") as told:
        assert told.read() == b"0,1,2"
    os.waitpid(child, 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do not learn from what is freed")
def test_memory_of_a_batch_is_kept_for_the_next() -> None:
    """Five tensors of 4 MB, made and dropped ten times: without a pool each mostly touches a thousand new pages."""
    program = """if True:
        import resource, torch
        from curate.pipelines.threads import Pool

        def batches(count):
            for _ in range(count):
                _ = [torch.ones(1 << 20) for _ in range(5)]

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        Pool(1).close()
        batches(3)
        before = faults()
        batches(10)
        print(faults() - before)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # Dask's
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    assert int(done.stdout) < 5000, "of 51,200 pages"
