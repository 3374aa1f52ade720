"""A column of an audit: which group each sample of the pool is in, and how far that can be trusted.

Disjoint groups are a code per sample, -1 where the group is not known; overlapping ones (a caption may mention several)
are a row of yes and no per sample. Unknown is never a group by default: whoever compares groups sees its share.
Memory 4 N bytes, or N G where groups overlap.
"""

# N samples of the pool, G groups

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError

UNKNOWN: Final = -1
MOST_GROUPS: Final = 1000
LONGEST_NAME: Final = 80
_JOINERS: Final = "\u200c\u200d"  # the format characters that scripts and emoji are written with
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True, slots=True)
class LabelError:
    """How often a label is right: of those in the group, and of those not in it, as whoever labelled them states."""

    sensitivity: float
    specificity: float

    def __post_init__(self) -> None:
        if not (0 < self.sensitivity <= 1 and 0 < self.specificity <= 1 < self.sensitivity + self.specificity):
            raise UsageError(
                f"sensitivity {self.sensitivity} and specificity {self.specificity}: each is above 0 and at most 1, "
                "and together above 1, or the label says nothing"
            )


@dataclass(frozen=True, slots=True)
class Column:
    """Groups of the pool's samples. Exactly one of `codes_N` and `members_NG` is there.

    `codes_N` int32: the group of each sample, or -1. `members_NG` bool with `known_N` bool: a sample in no group whose
    row is known is in none; where it is not known, nothing is said. `kind` is "label", "metadata", "mention", "script",
    "language", "cluster", "duplicate" or "zero-shot"; `provenance` says in a sentence where the groups come from.
    `model`: whose predictions the groups are, where they are any's.
    """

    name: str
    kind: str
    provenance: str
    names: tuple[str, ...]
    codes_N: NDArray[np.int32] | None = None
    members_NG: NDArray[np.bool_] | None = None
    known_N: NDArray[np.bool_] | None = None
    label_error: LabelError | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.codes_N is None) == (self.members_NG is None):
            raise ValueError(f"column {self.name}: either codes or members")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"column {self.name}: two groups have the same name")
        codes_N, G = self.codes_N, len(self.names)
        if codes_N is not None and len(codes_N) and not (codes_N.min() >= UNKNOWN and codes_N.max() < G):
            raise ValueError(f"column {self.name}: codes from {codes_N.min()} to {codes_N.max()} for {G} groups")
        if self.members_NG is not None:
            N = len(self.members_NG)
            if self.members_NG.shape != (N, G) or self.known_N is None or self.known_N.shape != (N,):
                raise ValueError(f"column {self.name}: members are [N, {G}], with a known [N] beside")
            if bool(self.members_NG[~self.known_N].any()):
                raise ValueError(f"column {self.name}: a sample that is not known is in a group")

    def __len__(self) -> int:
        return len(self.is_known)

    @property
    def overlapping(self) -> bool:
        """Whether a sample may be in several groups."""
        return self.members_NG is not None

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """[N]: whether anything is known of the sample."""
        known: NDArray[np.bool_] | None = self.known_N if self.codes_N is None else self.codes_N != UNKNOWN
        assert known is not None
        return known

    @property
    def coverage(self) -> float:
        """The share of the pool whose group is known; 0 for an empty pool."""
        known_N = self.is_known
        return float(known_N.mean()) if len(known_N) else 0.0

    @property
    def unknown_share(self) -> float:
        """The share of the pool whose group is not known."""
        return 1 - self.coverage

    @property
    def members(self) -> NDArray[np.bool_]:
        """[N, G]: whether the sample is in the group, for disjoint groups too."""
        if self.members_NG is not None:
            return self.members_NG
        assert self.codes_N is not None
        inside_NG: NDArray[np.bool_] = self.codes_N[:, None] == np.arange(len(self.names), dtype=np.int32)
        return inside_NG

    @property
    def counts(self) -> NDArray[np.int64]:
        """[G]: samples per group."""
        if self.codes_N is not None:
            return np.bincount(self.codes_N[self.codes_N >= 0], minlength=len(self.names)).astype(np.int64)
        assert self.members_NG is not None
        count_G: NDArray[np.int64] = self.members_NG.sum(0, dtype=np.int64)
        return count_G


def column_of(values_N: Sequence[str | None], *, name: str, kind: str, provenance: str) -> Column:
    """A column whose groups are the distinct values, sorted; None is unknown. Errors: UsageError above 1,000 groups."""
    distinct = sorted({value for value in values_N if value is not None})
    check_group_count(name, len(distinct))
    number: dict[str | None, int] = {value: code for code, value in enumerate(distinct)}
    codes_N = np.fromiter((number.get(value, UNKNOWN) for value in values_N), np.int32, len(values_N))
    return Column(shown(name), kind, provenance, distinct_names(distinct), codes_N)


def check_group_count(name: str, groups: int) -> None:
    """Errors: UsageError for more groups than anyone can compare."""
    if groups > MOST_GROUPS:
        raise UsageError(
            f"column {shown(name)!r} has {groups:,} distinct values; an audit compares at most {MOST_GROUPS:,} groups. "
            "Name a column with fewer, or put its values into classes first"
        )


def intersection(columns: Sequence[Column]) -> Column:
    """Every combination of groups that occurs; known where all columns are. Overlapping where one of them is.

    Errors: UsageError above 1,000 groups, and where two combinations would have the same name.
    Example: gender (female, male) and age (old, young) give "female & old", "female & young", ... as far as they occur.
    """
    if len(columns) < 2 or len({len(column) for column in columns}) != 1:
        raise ValueError("an intersection takes two columns or more, of one pool")
    names, members_NG = columns[0].names, columns[0].members
    for column in columns[1:]:
        names = tuple(crossed_name([one, other]) for one in names for other in column.names)
        members_NG = (members_NG[:, :, None] & column.members[:, None, :]).reshape(len(column), -1)
        there_G = np.flatnonzero(members_NG.any(0))
        names = tuple(names[one] for one in there_G)
        check_group_count(crossed_name([each.name for each in columns]), len(names))
        members_NG = members_NG[:, there_G]
    known_N = np.logical_and.reduce([column.is_known for column in columns])
    name = crossed_name([column.name for column in columns])
    if twice := [group for group, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"column {name!r}: two of its groups would be called {twice[0]!r}; rename those that have ' & ' in their "
            "own names"
        )
    provenance = "; ".join(column.provenance for column in columns)
    model = " and ".join(dict.fromkeys(column.model for column in columns if column.model)) or None
    if any(column.overlapping for column in columns):
        return Column(name, "intersection", provenance, names, None, members_NG, known_N, model=model)
    codes_N = np.where(known_N, members_NG.argmax(1) if names else UNKNOWN, UNKNOWN).astype(np.int32)
    return Column(name, "intersection", provenance, names, codes_N, model=model)


def crossed_name(names: Sequence[str]) -> str:
    """What the intersection of columns is called, and of groups of them: "gender & tone"."""
    return " & ".join(names)


def crossed_names(text: str) -> tuple[str, ...]:
    """The names of columns that are written with commas between them, quoted as in a CSV where one has a comma.

    Errors: UsageError for quotes that do not fit.

    >>> crossed_names('gender, "height, in cm"')
    ('gender', 'height, in cm')
    """
    try:
        [names] = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise UsageError(f"{shown(text)}: {error}; write names as a CSV does, 'a,\"b, c\"'") from None
    return tuple(name.strip() for name in names)


def shown(text: str) -> str:
    """Text as a name that hides nothing: control, direction and other unseen characters become escapes, 80 at most.

    Markup stays text, which whoever writes HTML escapes.

    >>> shown("a\\u202eb\\n<i>")
    'a\\\\u202eb\\\\n<i>'
    """
    safe = text.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
    seen = "".join(_seen(one, before) for before, one in zip(" " + safe, safe, strict=False))
    return seen if len(seen) <= LONGEST_NAME else seen[: LONGEST_NAME - 1] + "…"


def distinct_names(raw: Sequence[str]) -> tuple[str, ...]:
    """Each value as `shown` gives it; what would look like an earlier one gets a number: "a (2)"."""
    names: dict[str, None] = {}
    for value in raw:
        name, copy = shown(value), 2
        while name in names:
            name, copy = f"{shown(value)} ({copy})", copy + 1
        names[name] = None
    return tuple(names)


def spreadsheet_cell(text: str) -> str:
    """Text for a CSV: what a spreadsheet would take for a formula gets an apostrophe in front.

    >>> spreadsheet_cell('=HYPERLINK("http://x")')
    '\\'=HYPERLINK("http://x")'
    """
    return f"'{text}" if text.lstrip(" \ufeff").startswith(_FORMULA) else text


def _seen(character: str, before: str) -> str:
    if character.isprintable() or (character in _JOINERS and unicodedata.category(before)[0] in "LMS"):
        return character
    return character.encode("unicode_escape").decode()
