"""Several crossings side by side: what each is called, and what to type for names that have commas.

A crossing is called "gender & tone". Where a column, or another crossing, has that name as well, the columns of a
crossing stand in quotes, as in a CSV: '"gender" & "tone"'; so no two columns of an audit ever have the same name.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from curate.auditing.columns import Column, crossed_name, intersection


def crossings(columns: Mapping[str, Column], asked: Sequence[Sequence[str]]) -> list[Column]:
    """The intersections of the columns of these names, under names that no column and no other of them has.

    Errors: as `intersection`. Example: of "a", "b" and a column called "a & b" the crossing is called '"a" & "b"'.
    """
    made = [intersection([columns[name] for name in names]) for names in asked]
    times = Counter([*columns, *(one.name for one in made)])
    taken = {*columns}
    for place, one in enumerate(made):
        name = one.name if times[one.name] == 1 else quoted_name([columns[each].name for each in asked[place]])
        while name in taken:
            name += " (crossed)"
        taken.add(name)
        made[place] = dataclasses.replace(one, name=name)
    return made


def quoted_name(names: Sequence[str]) -> str:
    """A crossing's name that can be taken for no other's: '"gender" & "tone"'."""
    return crossed_name([quoted(name) for name in names])


def quoted(name: str) -> str:
    """A name in quotes, its own quotes doubled.

    >>> quoted('5" wide')
    '"5"" wide"'
    """
    return '"' + name.replace('"', '""') + '"'


def quoting_hint(parts: Sequence[str], known: Collection[str]) -> str:
    """What to type where names to be crossed were cut at their own commas; "" where no joining of them is known.

    >>> quoting_hint(["gender", "height", "in cm"], ["gender", "height, in cm"])
    '--intersect \\'gender,"height, in cm"\\''
    """
    joined = _joined(tuple(parts), {_cut(name): name for name in known})
    if joined == tuple(parts):
        return ""
    if len(joined) == 1:
        joined = (*joined, "ANOTHER")  # one column crosses nothing
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(joined)
    return f"--intersect {shlex.quote(line.getvalue())}"


def _cut(name: str) -> tuple[str, ...]:
    """A name as it is read without quotes."""
    return tuple(part.strip() for part in name.split(","))


def _joined(parts: tuple[str, ...], known: Mapping[tuple[str, ...], str]) -> tuple[str, ...]:
    """The parts with neighbours joined to known names, so that the fewest are unknown and then the most stay apart."""
    best: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]  # of the first parts: unknown, joined, names
    for stop in range(1, len(parts) + 1):
        ways = []
        for start in range(stop):
            piece, (lost, glued, names) = parts[start:stop], best[start]
            if piece in known:
                ways.append((lost, glued + len(piece) - 1, (*names, known[piece])))
            elif len(piece) == 1:
                ways.append((lost + 1, glued, (*names, *piece)))
        best.append(min(ways))
    return best[-1][2]
