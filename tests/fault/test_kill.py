"""Processes killed in the middle of a run: the same command again gives the bytes of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.pools import check_run, make_pool, published
from tests.fault.forking import ForkServer
from tests.fault.resuming import check_resumed, killed_at

MOMENTS: dict[str, Callable[[Path], bool]] = {
    "pinned": lambda out: (out / "_curate" / "RUN.json").exists(),
    "attempting": lambda out: any((out / "_curate" / "attempts").glob("*.tmp")),
    "scored": lambda out: any((out / "_curate" / "commits").glob("score-*")),
    "selected": lambda out: any((out / "_curate" / "commits").glob("selection-*")),
    "accounted": lambda out: any((out / "_curate" / "commits").glob("ledger-*")),
    "written": lambda out: any((out / "_curate" / "commits").glob("shards-*")),
    "published": lambda out: (out / "00000.tar").exists(),
    "listed": lambda out: (out / "_curate" / "manifest.json").exists(),
}
SHARDS = 4


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), shards=SHARDS)


@pytest.fixture(scope="module")
def command(pool: Path, tiny_checkpoint: Path) -> Callable[..., list[str]]:
    """The arguments of one run into a given directory; two samples to a shard, so that writing takes a while."""

    def arguments(output: Path, engine: str = "inline", *more: str) -> list[str]:
        draw = ["--keep", "0.5", "--super-batch", "50", "--chunks", "4", "--samples-per-shard", "2"]
        return [
            "score",
            str(pool),
            "-o",
            str(output),
            "--reference",
            str(tiny_checkpoint),
            *draw,
            "--engine",
            engine,
            *more,
        ]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(
    forks: ForkServer, command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    output = tmp_path_factory.mktemp("runs") / "out"
    code, log = forks.run(command(output))
    assert code == 0, log
    check_run(output)
    return published(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bytes(
    forks: ForkServer, command: Callable[..., list[str]], undisturbed: dict[str, str], tmp_path: Path, moment: str
) -> None:
    """SIGKILL at each step of a run, then the same command: the same bytes, every sample accounted for."""
    output = killed_at(forks, command, tmp_path, MOMENTS[moment])
    check_resumed(forks, command(output), output, undisturbed)


def test_a_run_that_is_killed_again_and_again_gets_there(
    forks: ForkServer, command: Callable[..., list[str]], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Kills after random delays, each resuming what the last one left, change no byte."""
    delays = random.Random(0)
    for _ in range(6):
        until = time.monotonic() + delays.uniform(0.1, 1.0)
        forks.start(command(tmp_path / "out")).kill_when(lambda until=until: time.monotonic() > until, signal.SIGKILL)
    check_resumed(forks, command(tmp_path / "out"), tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_resumes(
    forks: ForkServer, command: Callable[..., list[str]], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C on the threaded engine ends with code 130 within seconds; the same command finishes the run."""
    output = tmp_path / "out"
    driver = start(command(output, "threads"))
    wait_for(lambda: MOMENTS["scored"](output), driver)
    driver.send_signal(signal.SIGINT)
    _, log = driver.communicate(timeout=60)
    assert driver.returncode == 130, log
    assert log.splitlines()[-1] == "curate: interrupted; the same command resumes"
    assert "Traceback" not in log
    check_resumed(forks, command(output), output, undisturbed)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(
    command: Callable[..., list[str]], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL of one worker process during scoring: the run completes by itself, with the same bytes."""
    output = tmp_path / "out"
    driver = start(command(output, "processes", "--workers", "2"))
    wait_for(lambda: MOMENTS["attempting"](output) or MOMENTS["scored"](output), driver)
    workers = [child for child in psutil.Process(driver.pid).children(recursive=True) if is_worker(child)]
    assert len(workers) == 2
    workers[0].kill()
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 0, log
    check_run(output)
    assert published(output) == undisturbed


def test_two_drivers_at_once_make_one_run(
    forks: ForkServer, command: Callable[..., list[str]], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Two runs of one command into one directory, side by side or one after the other, both end well and agree."""
    delays = random.Random(1)
    for attempt in range(4):
        output = tmp_path / f"out{attempt}"
        first = forks.start(command(output))
        time.sleep(delays.uniform(0, 0.5))
        second = forks.start(command(output))
        codes = first.wait(), second.wait()
        assert codes == (0, 0), first.log.read_text() + second.log.read_text()
        check_run(output)
        assert published(output) == undisturbed


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """A real command line, threads, worker processes and all."""
    return subprocess.Popen(
        [sys.executable, "-m", "curate.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        preexec_fn=hear_interrupts,
    )


def hear_interrupts() -> None:
    """A shell starts what it sends to the background deaf to SIGINT; the driver must not inherit that from us."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(reached: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())
