"""The audit's report in a real browser: hostile text stays text, no script but its own runs, no request leaves."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from curate.auditing.audit import audit_columns
from curate.auditing.columns import column_of
from curate.auditing.report import drawn, fetch, render_report
from curate.reporting.page import Section
from tests.e2e.chromium import Page, browser, chromium
from tests.making import make_image, make_tar

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]

FORBIDDEN = 'iframe, form, link, base, input, object, #trap, [onerror], [onload], [onfocus], a:not([href^="#"])'


def hostile(port: int) -> list[str]:
    """What a caption, a label or a file name may try; every one calls `owned` or asks the listening socket."""
    home = f"http://127.0.0.1:{port}"
    return [
        "<script>owned('script')</script>",
        f"<script src={home}/script.js></script>",
        "</script><script>owned('closed')</script>",
        "<!--<script>owned('comment')",
        "</style><script>owned('style')</script>",
        "<img src=x onerror=owned('image')>",
        f"<img src={home}/image.png>",
        f"<svg onload=owned('svg')><image href={home}/svg.png /></svg>",
        f"<iframe src={home}/frame></iframe>",
        f'<meta http-equiv="refresh" content="0;url={home}/refresh">',
        f"<link rel=stylesheet href={home}/style.css>",
        "\" autofocus onfocus=owned('focus') x=\"",
        "' onmouseover=owned('mouse') '",
        "<a href=\"javascript:owned('link')\" id=trap>click</a>",
        f"<form action={home}/form><input autofocus onfocus=owned('input')></form>",
        f"}} body {{ background: url({home}/css.png); display: none }} @import '{home}/import.css';",
        "{{ 7 * 7 }} {% raw %} ${7 * 7} #{7 * 7}",
        "\u202egnp.exe \u2066isolated\u2069 \x00\x1b[31m \u2028 \ufeff",
        "<base href=//127.0.0.1/><plaintext><textarea><title>",
        "&lt;script&gt;owned('entity')&lt;/script&gt; &#60;b&#62;",
    ]


@dataclass
class Listener:
    """A socket that answers nobody, and remembers who called."""

    port: int
    heard: list[bytes] = field(default_factory=list)


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    found, done = Listener(server.getsockname()[1]), threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                caller, _ = server.accept()
            except TimeoutError:
                continue
            with caller:
                caller.settimeout(1)
                found.heard.append(caller.recv(200))

    thread = threading.Thread(target=listen)
    thread.start()
    yield found
    done.set()
    thread.join()
    server.close()


def hostile_report(folder: Path, port: int) -> str:
    """A report in which captions, labels, column names, titles, notes, keys and paths are all hostile."""
    traps = hostile(port)
    shard = folder / "<img src=x onerror=owned(1)> & {{ 7 }}.tar"
    images = {"jpg": make_image("jpeg", 60, 40)}
    make_tar(shard, [(f"{n:03d}", images | {"txt": text.encode()}) for n, text in enumerate(traps)])
    N, G = 3000, len(traps)
    code_N = np.arange(N) % (2 * G)  # half of the rows are of an ordinary group
    labels = [traps[code] if code < G else "ordinary" for code in code_N.tolist()]
    column = column_of(labels, name=traps[0], kind="label", provenance=f"{shard} {traps[2]}")
    selected_N = (np.arange(N) // (2 * G)) % np.where(code_N < G, 12, 2) == 0
    audit = audit_columns(
        [column], selected_N, strata={traps[5]: code_N % 3}, concepts={traps[2]: code_N % 5 == 0}, placebos=2
    )
    assert audit.flags > 5
    galleries = fetch(drawn(audit, [column], selected_N, bytes(range(16)) * N), lambda row: (str(shard), row % G))
    return render_report(
        audit,
        title=traps[2],
        pool_facts={trap: trap for trap in traps},
        galleries=galleries,
        figures=[Section(traps[4], traps[0])],
        notes=traps,
        limits=traps,
    )


def shown(page: Page) -> str:
    return str(page.evaluate("document.body.innerText"))


def test_hostile_text_stays_text(tmp_path: Path, listener: Listener) -> None:
    """Captions, labels and names of every hostile kind are read as they are; nothing runs and no request leaves."""
    report = tmp_path / "report.html"
    report.write_text(hostile_report(tmp_path, listener.port))
    with browser(tmp_path / "profile") as page:
        page.send("Page.addScriptToEvaluateOnNewDocument", source="window.owned = (by) => alert(by)")
        page.open(report)
        text = shown(page)
        assert page.evaluate("document.querySelectorAll('script').length") == 2
        assert page.evaluate(f"document.querySelectorAll({json.dumps(FORBIDDEN)}).length") == 0
        assert page.evaluate("JSON.parse(document.getElementById('audit').textContent).pool") == 3000
    for trap in hostile(listener.port)[:17]:
        assert " ".join(trap.split())[:60] in " ".join(text.split())
    assert not any(mark in text for mark in "\u202e\u2066\x1b\x00")
    assert "{{ 7 * 7 }}" in text
    assert page.dialogs == []
    assert page.problems == []
    assert listener.heard == []
    assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}


def test_the_test_would_see_a_page_that_escapes_nothing(tmp_path: Path, listener: Listener) -> None:
    """The same text unescaped and without a policy opens dialogs and reaches the socket: the silence above is real."""
    open_page = tmp_path / "open.html"
    open_page.write_text(f"<body>{hostile(listener.port)[5]}{hostile(listener.port)[6]}</body>")
    with browser(tmp_path / "profile") as page:
        page.send("Page.addScriptToEvaluateOnNewDocument", source="window.owned = (by) => alert(by)")
        page.open(open_page)
        page.evaluate("0")
    assert page.dialogs == ["image"]
    assert any(b"GET /image.png" in call for call in listener.heard)


def test_the_policy_stops_a_script_that_got_in(tmp_path: Path, listener: Listener) -> None:
    """Were markup to slip through the template, the page's own policy would still run and fetch nothing of it."""
    report = tmp_path / "report.html"
    traps = "".join(hostile(listener.port)[place] for place in (0, 1, 5, 6, 7, 8, 10))
    text = render_report(audit_columns({"c": ["a", "b"] * 50}, np.arange(100) % 3 == 0, placebos=0), title="A")
    report.write_text(text.replace("<footer>", f"{traps}<footer>", 1))
    with browser(tmp_path / "profile") as page:
        page.send("Page.addScriptToEvaluateOnNewDocument", source="window.owned = (by) => alert(by)")
        page.open(report)
        page.evaluate("0")
    assert page.dialogs == []
    assert not any(listener.heard)  # a connection may be opened ahead of its use; nothing is said on it


def column_of_table(page: Page, place: int) -> Sequence[str]:
    rows = "[...document.querySelector('#column-1 table').tBodies[0].rows]"
    found: list[str] = page.evaluate(f"{rows}.map((row) => row.cells[{place}].querySelector('span').textContent)")
    return found


def test_tables_are_sorted_by_a_click(tmp_path: Path) -> None:
    """A click on a heading sorts by its numbers, the next turns the order around, a third restores it."""
    size_of = {"alpha": 900, "beta": 30, "gamma": 1200, "delta": 100}
    labels = [name for name, size in size_of.items() for _ in range(size)]
    report = tmp_path / "report.html"
    audit = audit_columns({"c": labels}, np.arange(len(labels)) % 4 == 0, placebos=0)
    report.write_text(render_report(audit, title="Sorting"))
    with browser(tmp_path / "profile") as page:
        page.resize(1200, 800)
        page.open(report)
        heading = "#column-1 table thead th:nth-child(2) button"
        before = column_of_table(page, 0)
        page.click(heading)
        assert column_of_table(page, 1) == ["30", "100", "900", "1,200"]
        assert page.evaluate("document.querySelector('#column-1 thead th:nth-child(2)').ariaSort") == "ascending"
        page.click(heading)
        assert column_of_table(page, 0) == ["gamma", "alpha", "delta", "beta"]
        page.click(heading)
        assert column_of_table(page, 0) == before
        page.click("#column-1 table thead th:nth-child(1) button")
        assert column_of_table(page, 0) == sorted(size_of)
        assert page.problems == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_no_width_makes_the_page_scroll_sideways(tmp_path: Path, width: int) -> None:
    """On a phone wide tables scroll in their own frame; the page stays as wide as the screen."""
    report = tmp_path / "report.html"
    report.write_text(hostile_report(tmp_path, 9))
    with browser(tmp_path / "profile") as page:
        page.resize(width, 800, phone=width < 600)
        page.open(report)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("innerWidth") == width


def test_it_reads_without_scripts(tmp_path: Path) -> None:
    """With scripts switched off every row is there, and no button that would do nothing."""
    report = tmp_path / "report.html"
    audit = audit_columns({"c": ["a", "b", "b"] * 50}, np.arange(150) % 4 == 0, placebos=0)
    report.write_text(render_report(audit, title="Plain"))
    with browser(tmp_path / "profile") as page:
        page.send("Emulation.setScriptExecutionDisabled", value=True)
        page.open(report)
        assert len(column_of_table(page, 0)) == 2
        assert page.evaluate("document.querySelectorAll('button').length") == 0
        printed = page.send("Page.printToPDF", printBackground=False)
        assert printed["data"].startswith("JVBERi0")  # %PDF-
