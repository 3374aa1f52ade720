"""Threads for batches: results in order, nothing left running, shared where asked, half of them reading at a time."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time

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
    """Its error comes where its result would, and nothing is computed from it."""
    computed = []

    def read(number: int) -> int:
        if number == 1:
            raise OSError("cannot be read")
        return number

    with borrowed(1, shared=False) as own:
        results = own.read(read, computed.append, range(3))
        next(results)
        with pytest.raises(OSError, match="cannot be read"):
            next(results)
    with borrowed(1, shared=False) as own:
        assert list(own.read(read, str, [0, 2])) == ["0", "2"]
    assert 1 not in computed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do not learn from what is freed")
def test_memory_of_a_batch_is_kept_for_the_next() -> None:
    """Five tensors of 4 MB, made and dropped ten times: without a pool they touch new pages each time."""
    program = """if True:
        import resource, sys, torch
        from curate.pipelines.threads import Pool

        def batch():
            return [torch.ones(1 << 20) for _ in range(5)]

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        if sys.argv[1] == "pool":
            Pool(1).close()
        batch()
        before = faults()
        for _ in range(10):
            batch()
        print(faults() - before)
    """
    found = {
        how: int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, check=True).stdout)
        for how in ("pool", "no pool")
    }
    assert found["pool"] < 5000 < found["no pool"], "of 51,200 pages"
