"""A real browser for tests: headless Chromium over its debugging pipe, without a driver or a package.

`with browser(folder) as page:` gives a page with `open`, `evaluate`, `click`, `resize` and what it logged. Messages are
JSON that end in a zero byte, over two pipes at the browser's file descriptors 3 and 4.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-pipe",
)  # fmt: skip
# Puts the two pipes where Chromium looks for them; what is in the way moves up first.
LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]);"
    "os.dup2(r, 3); os.dup2(w, 4); os.closerange(5, 64); os.execvp(sys.argv[3], sys.argv[3:])"
)
MIDDLE = """(() => {
  const element = document.querySelector(%s);
  element.scrollIntoView({ block: "center" });
  const box = element.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()"""


def chromium() -> str | None:
    """The browser's program, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One tab. `requests` are the addresses it asked for, `dialogs` and `problems` what its scripts did."""

    reading: int
    writing: int
    deadline: float
    session: str = ""
    number: int = 0
    buffer: bytes = b""
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    loaded: int = 0

    def open(self, path: Path) -> None:
        """Load a file and wait until it has all it asked for."""
        before = self.loaded
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.loaded == before:
            self._take()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        x, y = self.evaluate(MIDDLE % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page a window of this size, that of a phone with its viewport rules."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip

    def send(self, method: str, **given: Any) -> dict[str, Any]:
        """One command and its answer."""
        number = self._post(method, given)
        while True:
            got = self._take()
            if got.get("id") == number:
                assert "error" not in got, f"{method}: {got['error']}"
                answer: dict[str, Any] = got["result"]
                return answer

    def _post(self, method: str, given: dict[str, Any]) -> int:
        self.number += 1
        of_tab = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": given} | of_tab
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        return self.number

    def _take(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, self.deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium said nothing in time")
            piece = os.read(self.reading, 1 << 20)
            assert piece, "Chromium ended"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(told["message"])
            self._post("Page.handleJavaScriptDialog", {"accept": True})
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(told["exceptionDetails"].get("text")))


@contextmanager
def browser(folder: Path, seconds: float = 60.0) -> Iterator[Page]:
    """A page of a browser whose profile lies under `folder`; all of it ends with the block or after `seconds`."""
    program = chromium()
    assert program is not None
    (out_r, out_w), (in_r, in_w) = os.pipe(), os.pipe()
    launch = [sys.executable, "-c", LAUNCH, str(in_r), str(out_w)]
    command = [*launch, program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    started = subprocess.Popen(
        command, pass_fds=(in_r, out_w), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(in_r)
    os.close(out_w)
    page = Page(out_r, in_w, time.monotonic() + seconds)
    try:
        yield _attached(page)
    finally:
        started.terminate()
        started.wait(20)
        os.close(out_r)
        os.close(in_w)


def _attached(page: Page) -> Page:
    targets = page.send("Target.getTargets")["targetInfos"]
    tab = next(one["targetId"] for one in targets if one["type"] == "page")
    page.session = page.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network"):
        page.send(f"{domain}.enable")
    return page
