"""Threads for batches: results in order, nothing left running, shared where asked, half of them reading at a time."""

from __future__ import annotations

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

    def work(_: int) -> None:
        nonlocal now, most
        with own.reading:
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= 1

    with borrowed(threads, shared=False) as own:
        list(own.map(work, range(20)))
    assert most == readers
