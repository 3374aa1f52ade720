"""Progress with rate and time left: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

PLAIN_SECONDS = 5.0


class Progress(Protocol):
    """Told of each finished piece of work."""

    def advance(self, amount: float, note: str = "") -> None: ...


class Silent:
    """Says nothing."""

    def advance(self, amount: float, note: str = "") -> None:
        pass


class PlainLines:
    """One line at the start of work, every five seconds, and at the end."""

    def __init__(self, title: str, total: float, unit: str, write: Callable[[str], object]) -> None:
        self._title, self._total, self._unit, self._write = title, total, unit, write
        self._done, self._note = 0.0, ""
        self._started = self._last = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        self._note = note
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._write(self.line(now))

    def line(self, now: float) -> str:
        """`score 1200/8025 samples, 410 samples/s, 17 s left`."""
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        times = f", {left:.0f} s left" if left != float("inf") and left > 0 else ""
        note = f", {self._note}" if self._note else ""
        done = f"{self._title} {self._done:,.0f}/{self._total:,.0f} {self._unit}"
        return f"{done}, {rate:,.0f} {self._unit}/s{times}{note}"

    def close(self) -> None:
        self._write(self.line(time.monotonic()))


@contextlib.contextmanager
def progress(title: str, total: float, unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Show the progress of one pass on standard error."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as bar:
            yield bar
    else:
        lines = PlainLines(title, total, unit, lambda text: print(text, file=sys.stderr, flush=True))
        yield lines
        lines.close()


@contextlib.contextmanager
def _bar(title: str, total: float, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=int(total), rate="", note="")

        class Bar:
            def advance(self, amount: float, note: str = "") -> None:
                bars.advance(task, amount)
                speed = bars.tasks[task].speed
                bars.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "", note=note)

        yield Bar()
