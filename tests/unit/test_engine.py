"""Engines: the window, errors, addresses, and that nothing listens beyond loopback."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from curate.errors import CurateError, ShardError, UsageError
from curate.machine import Limits, cores
from curate.pipelines.engine import Inline, Mode, OnDask, open_engine


@pytest.fixture(scope="module")
def threads() -> Iterator[OnDask]:
    with open_engine(workers=2, mode="threads") as engine:
        assert isinstance(engine, OnDask)
        yield engine


def double(number: int) -> int:
    return 2 * number


BARRIER = threading.Barrier(2)  # found by name in the worker, which is a thread of this process


def meet(_: int) -> int:
    return BARRIER.wait(20)


LOCK, RUNNING, NOW = threading.Lock(), list[int](), [0]


def count_running(_: int) -> None:
    with LOCK:
        NOW[0] += 1
        RUNNING.append(NOW[0])
    time.sleep(0.03)
    with LOCK:
        NOW[0] -= 1


def refuse(number: int) -> int:
    if number == 3:
        raise ShardError("shard 3 cannot be opened")
    return number


def test_inline_runs_in_order() -> None:
    """Without Dask units run one by one, each with its position."""
    assert list(Inline(1).run(double, [5, 6, 7])) == [(0, 10), (1, 12), (2, 14)]


def test_inline_is_lazy() -> None:
    """The next spec is taken when the result before it has been consumed."""
    taken: list[int] = []
    results = Inline(1).run(double, (taken.append(number) or number for number in range(3)))
    next(results)
    assert taken == [0]


@pytest.mark.parametrize(("overlapping", "most"), [(False, 2), (True, 3)])
def test_one_more_unit_overlaps_where_units_share_threads(threads: OnDask, overlapping: bool, most: int) -> None:
    """Two at a time, as asked; three where they share the threads of the process, whose number stays."""
    RUNNING.clear()
    assert len(list(threads.run(count_running, range(12), overlapping=overlapping))) == 12
    assert max(RUNNING) == most
    assert threads.shared_threads == 2 * threads.threads_per_unit


def test_the_collector_passes_over_what_was_there() -> None:
    """While an engine runs in this process; and what the user has frozen stays frozen afterwards."""
    gc.unfreeze()  # the engine of the other tests may be open
    with open_engine(workers=1, mode="threads"):
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with open_engine(workers=1, mode="threads"):
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_results_come_with_their_position(threads: OnDask) -> None:
    """Whatever finishes first, a result carries the position of its spec."""
    assert dict(threads.run(double, range(20))) == {number: 2 * number for number in range(20)}


def test_no_specs_give_no_results(threads: OnDask) -> None:
    """An empty pass ends at once."""
    assert list(threads.run(double, [])) == []


def test_no_more_than_the_window_is_submitted(threads: OnDask) -> None:
    """At any moment no more specs have been taken and not been answered than units run: here as many as workers."""
    taken, answered, most = 0, 0, 0

    def specs() -> Iterator[int]:
        nonlocal taken, most
        for number in range(40):
            taken += 1
            most = max(most, taken - answered)
            yield number

    for _ in threads.run(double, specs()):
        answered += 1
    assert threads.window == 2
    assert answered == 40
    # the answer that has just been yielded is counted by the time its successor is taken
    assert most <= threads.window


def test_units_run_side_by_side(threads: OnDask) -> None:
    """Two workers run two units at the same time: each waits for the other."""
    assert sorted(position for position, _ in threads.run(meet, range(2))) == [0, 1]


@pytest.mark.parametrize("kind", ["inline", "threads"])
def test_an_error_in_a_unit_reaches_the_caller(threads: OnDask, kind: str) -> None:
    """The unit's own exception is raised, with its type and message, and what waits is cancelled."""
    engine: Any = Inline(1) if kind == "inline" else threads
    with pytest.raises(ShardError, match="shard 3 cannot be opened"):
        list(engine.run(refuse, range(100)))
    assert dict(engine.run(double, [1])) == {0: 2}


def test_a_worker_that_dies_over_a_unit_is_said() -> None:
    """Dask's report of a unit that killed three workers becomes an error that says what to do."""
    from distributed import KilledWorker

    from curate.pipelines.engine import _result

    class Dead:
        def result(self) -> None:
            raise KilledWorker("score-0", SimpleNamespace(address="tcp://127.0.0.1:1"), 3)

    with pytest.raises(CurateError, match=r"died three times.*run the same command again"):
        _result(Dead())


@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.7:8786", "cluster.example.org:8786", "tcp://[2001:db8::1]:8786", "ws://192.0.2.1:1"]
)
def test_an_open_scheduler_beyond_loopback_is_refused(address: str) -> None:
    """A plain address of another machine is refused before anything connects, naming both ways out."""
    with pytest.raises(UsageError, match="use tls://, or say --allow-remote-scheduler"), open_engine(scheduler=address):
        pass


@pytest.mark.parametrize(
    ("address", "allow"),
    [
        ("tcp://127.0.0.1:8786", False),
        ("localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tls://10.0.0.7:8786", False),
        ("tcp://10.0.0.7:8786", True),
    ],
)
def test_loopback_encrypted_and_accepted_addresses_pass(address: str, allow: bool) -> None:
    """Loopback, tls:// and an explicit permission are accepted."""
    from curate.pipelines.engine import _check_address

    _check_address(address, allow)


@pytest.mark.parametrize("address", ["tcp://127.evil.example.org:8786", "tcp://127.0.0.1.evil.example.org:1"])
def test_a_name_that_looks_like_loopback_is_refused(address: str) -> None:
    """A host name that begins like a loopback address is a name on the network."""
    from curate.pipelines.engine import _check_address

    with pytest.raises(UsageError):
        _check_address(address, False)


def listening() -> set[str]:
    """The addresses on which this process and its children listen."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [connection for process in processes for connection in process.net_connections("inet")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("mode", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_the_embedded_cluster_listens_on_loopback_only(mode: Mode) -> None:
    """No socket of the driver, the scheduler or a worker is reachable from another machine."""
    with open_engine(workers=1, mode=mode) as engine:
        assert dict(engine.run(double, [1])) == {0: 2}
        time.sleep(0.1)
        addresses = listening()
    assert addresses, "the dashboard of the scheduler listens at least"
    assert addresses <= {"127.0.0.1", "::1"}


def test_stacks_are_sampled_only_for_a_dashboard(threads: OnDask) -> None:
    """Dask's profiler holds the interpreter's lock a hundred times a second; it runs where someone can see its page."""
    from curate.pipelines.engine import _has_dashboard

    callbacks = next(iter(threads.client.cluster.workers.values())).periodic_callbacks
    assert ("profile" in callbacks) == _has_dashboard()


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The affinity of the process counts, not the machine; a unit's threads share the cores among workers."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("curate.machine.cgroup_limits", Limits)
    assert cores().usable == 6
    with open_engine(mode="inline") as engine:
        assert engine.threads_per_unit == 6
        assert engine.description == "inline, 6 threads"
    monkeypatch.setattr("curate.machine.cgroup_limits", lambda: Limits(cores=2.0))
    with open_engine(mode="inline") as engine:
        assert engine.threads_per_unit == 2, "a container's limit counts too"
