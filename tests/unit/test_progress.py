"""Progress where there is no terminal: plain lines, seldom, on standard error."""

from __future__ import annotations

import pytest

from curate import progress
from curate.progress import PlainLines, Silent


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("curate.progress.time.monotonic", lambda: self.now)


def test_a_line_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Done of total, a rate, the time that is left, and the last note."""
    clock, lines = Clock(monkeypatch), list[str]()
    shown = PlainLines("score", 8000, "samples", lines.append)
    clock.now += 10
    shown.advance(2000, "3 quarantined in 00007.tar")
    assert lines == ["score 2,000/8,000 samples, 200 samples/s, 30 s left, 3 quarantined in 00007.tar"]


def test_lines_come_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that advances many times a second prints one line in five seconds, and one at the end."""
    clock, lines = Clock(monkeypatch), list[str]()
    shown = PlainLines("write", 120, "samples", lines.append)
    for _ in range(120):
        clock.now += 0.1
        shown.advance(1)
    assert len(lines) == 2
    shown.close()
    assert lines[-1] == "write 120/120 samples, 10 samples/s"


def test_nothing_done_yet_has_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first piece is done no time is guessed, and nothing divides by zero."""
    clock = Clock(monkeypatch)
    shown = PlainLines("score", 10, "samples", print)
    assert shown.line(clock.now) == "score 0/10 samples, 0 samples/s"


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal the closing line is on standard error; quiet prints nothing; standard output stays clean."""
    with progress.progress("score", 2, "samples") as shown:
        shown.advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("score 2/2 samples, ")
    with progress.progress("score", 2, "samples", quiet=True) as shown:
        assert isinstance(shown, Silent)
        shown.advance(2)
    assert capsys.readouterr() == ("", "")
