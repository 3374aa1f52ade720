"""Command lines in processes of their own without the seconds that each needs to import torch.

One process imports everything and, before any thread runs in it, forks a child for every command line. The children
are real processes that a test may kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, threading
import curate.cli, curate.pipelines.repeating, curate.pipelines.runner, distributed, open_clip, pyarrow.parquet
assert threading.active_count() == 1, "a fork would lose these threads"  # (jemalloc has one of its own)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 99
            try:
                if request["limit"]:
                    import resource
                    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
                code = curate.cli.main(request["arguments"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    print(answer, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Child:
    """A running command line."""

    server: ForkServer
    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return self.server.ask({"wait": self.pid})

    def kill_when(self, reached: Callable[[], bool], sign: int) -> int:
        """Send `sign` as soon as `reached`; the exit code."""
        while not reached():
            if self.exited:
                return self.wait()
            time.sleep(0.0005)
        os.kill(self.pid, sign)
        return self.wait()

    @property
    def exited(self) -> bool:
        return b") Z " in Path(f"/proc/{self.pid}/stat").read_bytes()


class ForkServer:
    """Starts command lines of curate."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._started = logs, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )

    def start(self, arguments: list[str], *, limit: int = 0) -> Child:
        """Run `curate ARGUMENTS`, with no file larger than `limit` bytes if that is given."""
        self._started += 1
        log = self._logs / f"{self._started}.log"
        return Child(self, self.ask({"arguments": arguments, "log": str(log), "limit": limit}), log)

    def run(self, arguments: list[str], *, limit: int = 0) -> tuple[int, str]:
        """Run to the end: the exit code, and what was printed."""
        child = self.start(arguments, limit=limit)
        return child.wait(), child.log.read_text()

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
