"""What no file of the repository says, and how long files are."""

from __future__ import annotations

import re
import statistics
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {".git", ".venv", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__", "dist"}
# A home or a working directory of whoever wrote the file; the brackets keep these lines from finding themselves.
MACHINE = re.compile(r"/(?:home|Users)/[a-z]|/(?:root|work|mnt|scratch)[/]\w|/tmp/\w{1,2}[/]|[A-Z]:\\Users")
MARKERS = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X]|HA[C]K)\b")
LONGEST, MEDIAN = 500, 250


@cache
def files() -> tuple[Path, ...]:
    """The files that belong to the repository: what git knows or would add; in an sdist, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        found = {ROOT / name for name in done.stdout.split("\0") if name}
    except (OSError, subprocess.CalledProcessError):
        found = {path for path in ROOT.rglob("*") if not IGNORED & set(path.relative_to(ROOT).parts)}
    return tuple(sorted(path for path in found if path.is_file()))


@cache
def lines() -> tuple[tuple[str, str], ...]:
    """("file:number", line) for every line of every text file."""
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        name = path.relative_to(ROOT)
        found += [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
    return tuple(found)


def test_no_file_names_a_directory_of_a_machine() -> None:
    """No home, working or scratch directory of a developer's machine is written anywhere."""
    assert [where for where, line in lines() if MACHINE.search(line) or str(ROOT) in line] == []


def test_no_file_has_a_marker_of_unfinished_work() -> None:
    """What is open is in the change log or an issue, not in a comment."""
    assert [where for where, line in lines() if MARKERS.search(line)] == []


# In pieces, so that this file passes its own test.
SAMPLES = [
    "'/ho" + "me/ada/x'",
    "cd /ro" + "ot/curate",
    "/Us" + "ers/ada",
    "/tm" + "p/w/v",
    "# TO" + "DO",
    "# XX" + "X",
]


@pytest.mark.parametrize("line", SAMPLES)
def test_the_patterns_find_what_they_are_for(line: str) -> None:
    """Each kind of word that is forbidden would be found."""
    assert MACHINE.search(line) or MARKERS.search(line)


def test_files_are_short() -> None:
    """Half of the library's files have at most 250 lines, and no Python file has more than 500."""
    count = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files() if path.suffix == ".py"}
    library = [n for path, n in count.items() if path.relative_to(ROOT).parts[0] in ("curate", "kernels", "pipelines")]
    assert statistics.median(library) <= MEDIAN
    assert {str(path.relative_to(ROOT)): n for path, n in count.items() if n > LONGEST} == {}
