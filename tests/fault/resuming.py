"""Kill a command at a moment, and what has to be there when the same command has run again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.pools import check_run, published
from tests.fault.forking import ForkServer


def killed_at(
    forks: ForkServer, command: Callable[[Path], list[str]], folder: Path, moment: Callable[[Path], bool]
) -> Path:
    """The output directory of a run that was killed at the moment; a run that ends before the signal is tried again."""
    for attempt in range(5):
        output = folder / f"out{attempt}"
        code = forks.start(command(output)).kill_when(lambda output=output: moment(output), signal.SIGKILL)
        if code == -signal.SIGKILL:
            return output
    raise AssertionError("the run was over before the signal came, five times")


def check_resumed(forks: ForkServer, arguments: list[str], output: Path, undisturbed: dict[str, str]) -> None:
    """The same command ends well, with the same bytes and nothing left over."""
    code, log = forks.run(arguments)
    assert code == 0, log
    check_run(output)
    assert published(output) == undisturbed
