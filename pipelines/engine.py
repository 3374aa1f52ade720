"""Where units of work run: inline, on an embedded Dask with threads, on processes of this machine, on a scheduler.

A unit is `function(spec) -> receipt` and knows nothing of Dask; the ledger is the truth, so engines can be exchanged.
A client-side window of futures keeps the scheduler's memory bounded whatever the input.

Units of one process can share its threads (`shared_threads`): then `run(..., overlapping=True)` begins one more than
otherwise, whose work fills the gaps that a unit's beginning and end leave.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import logging
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

from curate.errors import CurateError, UsageError
from curate.machine import cores

Spec = TypeVar("Spec")
Result = TypeVar("Result")
Mode = Literal["inline", "threads", "processes"]


class Engine(Protocol):
    """Runs a unit over specs and yields results as they finish, with the spec's position."""

    @property
    def threads_per_unit(self) -> int: ...

    @property
    def shared_threads(self) -> int | None: ...

    @property
    def description(self) -> str: ...

    def run(
        self, unit: Callable[[Spec], Result], specs: Iterable[Spec], *, overlapping: bool = False
    ) -> Iterator[tuple[int, Result]]: ...


@dataclass(frozen=True, slots=True)
class Inline:
    """One unit after the other in this thread; a unit's own threads use all cores."""

    threads_per_unit: int
    shared_threads: None = None

    @property
    def description(self) -> str:
        return f"inline, {self.threads_per_unit} threads"

    def run(
        self,
        unit: Callable[[Spec], Result],
        specs: Iterable[Spec],
        *,
        overlapping: bool = False,  # noqa: ARG002 - nothing runs beside
    ) -> Iterator[tuple[int, Result]]:
        for position, spec in enumerate(specs):
            yield position, unit(spec)


@dataclass(frozen=True, slots=True)
class OnDask:
    """Units as Dask tasks, at most `window` submitted at a time; one more where they overlap in one process, whose
    `shared_threads` they then share."""

    client: Any
    window: int
    threads_per_unit: int
    description: str
    shared_threads: int | None = None

    def run(
        self, unit: Callable[[Spec], Result], specs: Iterable[Spec], *, overlapping: bool = False
    ) -> Iterator[tuple[int, Result]]:
        from distributed import as_completed

        waiting = enumerate(specs)
        window = self.window + (overlapping and self.shared_threads is not None)
        running = {self._submit(unit, spec): position for position, spec in islice(waiting, window)}
        finished = as_completed(list(running))
        try:
            for future in finished:
                yield running.pop(future), _result(future)
                for position, spec in islice(waiting, 1):
                    running[successor := self._submit(unit, spec)] = position
                    finished.add(successor)
        finally:
            self.client.cancel(list(running))

    def _submit(self, unit: Callable[[Spec], Result], spec: Spec) -> Any:
        # pure=False: Dask must not guess from the arguments that two tasks are one; receipts decide that
        return self.client.submit(unit, spec, pure=False)


@contextlib.contextmanager
def open_engine(
    *, workers: int | None = None, scheduler: str | None = None, mode: Mode | None = None, allow_remote: bool = False
) -> Iterator[Inline | OnDask]:
    """The engine for these settings.

    Without any, an embedded Dask in this process that runs one unit for every four cores, at most four; the threads of
    a unit share the cores, and more units would only wait for the interpreter's lock. `scheduler` is the address of a
    cluster of the user's; one that is neither on loopback nor encrypted needs `allow_remote`, since Dask's protocol
    lets whoever reaches it run code.
    """
    usable = cores().usable
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one, or leave the option out")
    if scheduler is not None:
        with _given(scheduler, allow_remote) as engine:
            yield engine
    elif mode == "inline":
        yield Inline(usable)
    else:
        count = workers or (usable if mode == "processes" else max(1, min(usable // 4, 4)))
        kind = mode or ("threads" if count <= 4 else "processes")
        with _local(count, max(1, usable // count), processes=kind == "processes") as engine:
            yield engine


@contextlib.contextmanager
def _local(workers: int, threads: int, *, processes: bool) -> Iterator[OnDask]:
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.admin.large-graph-warning-threshold": "100MB",
        "distributed.worker.memory.terminate": False,
        # Dask looks at every thread's stack a hundred times a second, holding the interpreter's lock, for a page of the
        # dashboard: a twentieth of the processor time of scoring with a small model
        "distributed.worker.profile.enabled": _has_dashboard(),
        "distributed.admin.tick.interval": "1s",  # and whether its loop is late fifty times a second
    }
    loopback = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    if processes:
        shape: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "host": "127.0.0.1"}
    else:
        shape = {"n_workers": 1, "threads_per_worker": workers + 1, "protocol": "inproc://"}
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with (
        contextlib.nullcontext() if processes else _uncollected(),
        _restored(logging.getLogger("tornado.application")) as callbacks,
        dask.config.set(settings),
        LocalCluster(processes=processes, silence_logs=logging.ERROR, **shape, **loopback) as cluster,
        Client(cluster) as client,
    ):
        place = "worker processes" if processes else "units at a time in this process"
        shape_said = f"Dask, {workers} {place}, {threads} threads each{_dashboard(client)}"
        # in one process the window alone says how many units run; elsewhere there is always one waiting
        window, shared = (2 * workers, None) if processes else (workers, workers * threads)
        try:
            yield OnDask(client, window, threads, shape_said, shared)
        except KeyboardInterrupt:
            callbacks.setLevel(logging.CRITICAL)  # what still runs finds its cluster gone, as it must
            raise


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector passes over the objects that are there already; cycles that come later it finds as ever.

    torch, Dask and open_clip make half a million, and no other thread runs while the collector looks at them: 0.27 s
    every 20,000 samples. Whoever has frozen objects before keeps them so; what is frozen meanwhile is thawed at the
    end, and of two engines at once the first to end thaws for both.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _restored(logger: logging.Logger) -> Iterator[logging.Logger]:
    """A logger whose level may be changed for a while."""
    level = logger.level
    try:
        yield logger
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _given(address: str, allow_remote: bool) -> Iterator[OnDask]:
    from distributed import Client

    _check_address(address, allow_remote)
    try:
        client = Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
    with client:
        slots = client.nthreads()
        if not slots:
            raise UsageError(f"--scheduler {address}: it has no workers yet; start some, then run this again")
        total = sum(slots.values())
        description = f"Dask at {address}, {len(slots)} workers, {total} threads{_dashboard(client)}"
        yield OnDask(client, 2 * total, 1, description)


def _check_address(address: str, allow_remote: bool) -> None:
    parts = urllib.parse.urlsplit(address if "://" in address else f"tcp://{address}")
    if not (_is_loopback(parts.hostname or "") or parts.scheme in {"tls", "inproc"} or allow_remote):
        raise UsageError(
            f"--scheduler {address}: Dask's protocol is code execution for whoever can reach it; use tls://, or say "
            "--allow-remote-scheduler if that network is yours alone"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # 127.example.org is a name on the network


def _dashboard(client: Any) -> str:
    link = client.dashboard_link if _has_dashboard() else ""
    return f", dashboard {link}" if link else ""


def _has_dashboard() -> bool:
    import importlib.util

    return importlib.util.find_spec("bokeh") is not None


def _result(future: Any) -> Any:
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise CurateError(
            f"a worker died three times over the same unit of work ({error}); what is finished is kept: free memory or "
            "lower --workers, then run the same command again"
        ) from error
