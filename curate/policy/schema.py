"""A policy file: which groups a selection may not lose, in YAML, with the line of every field that is wrong.

    schema: 1
    author: A. Expert
    date: 2026-11-20
    rationale: CLIP filters drop captions that mention women more often (arXiv 2405.08209).
    columns:
      - column: gender
        source: lexicon gender-en            # where the column comes from, in words
        groups: [woman, {name: man, max_ratio: 1.2}]
        min_ratio: 0.8                       # bounds of every group here; a group may have its own
        overlapping: true                    # a caption may mention both
        unknowns: free                       # or `group`: rows without a value are a group `unknown`, bounded alike
        min_coverage: 0.3                    # below this share of known rows a check is indeterminate
        confounders: [caption length]
        severity: error                      # `warning`: checked, enforced and shown, but it decides no exit code
      - intersect: gender,tone               # in place of `column`: columns crossed, as for `curate audit --intersect`
        source: captions and labels          # (or a list of names); groups are called as audits call them
        groups: [woman & dark]
        min_count: 50

A ratio is the group's rate over the rate of the whole pool, unknowns included (the report's ratio to the rest lies
further from 1). min_share is of the selected, min_count of samples. Names are values, never keys: the reader of YAML
turns a dash in a key into an underscore.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from curate.auditing.columns import crossed_name, crossed_names
from curate.errors import UsageError
from curate.marked_yaml import Marked, Place, read_yaml, suggestion

UNKNOWN: Final = "unknown"  # the group of rows without a value, where a column treats them as one
_UNSEEN: Final = ("Cc", "Cs", "Zl", "Zp")  # kinds of characters: controls, lone surrogates, ends of lines
_TURNING: Final = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # and those that change direction
_BOUNDS: Final = ("min_ratio", "max_ratio", "min_share", "min_count")


def _as_text(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        raise ValueError(f"write it in quotes: '{value}'")
    return value


def _as_line(value: Any) -> Any:
    """Text that is printed as it is: a name that turns a terminal's line around, or clears it, is no name."""
    unseen = [one for one in value if _unseen(one)] if isinstance(value, str) else []
    if unseen:
        raise ValueError(
            f"U+{ord(unseen[0]):04X} in it cannot be seen; leave it out (groups are named as audits show them)"
        )
    return _as_text(value)


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN or unicodedata.bidirectional(character) in _TURNING


def _as_group(value: Any) -> Any:
    return value if isinstance(value, dict) else {"name": value}


def _as_date(value: Any) -> Any:
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


def _as_crossed(value: Any) -> Any:
    """Names of columns, in a list or in one text with commas."""
    try:
        names = crossed_names(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from None
    if not isinstance(names, list | tuple):
        return names
    if len(names) < 2:
        raise ValueError("name two columns or more, with commas between")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is named twice")
    return tuple(names)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


_Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1, pattern=r"\S")]
_Line = Annotated[str, BeforeValidator(_as_line), Field(min_length=1, pattern=r"\S")]


class _Section(BaseModel):
    """Keys that are not known are refused, and so is text where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Bounded(_Section):
    min_ratio: float | None = Field(default=None, ge=0)
    max_ratio: float | None = Field(default=None, gt=0)
    min_share: float | None = Field(default=None, ge=0, le=1)
    min_count: int | None = Field(default=None, ge=0)


class _Group(_Bounded):
    name: _Line


class _Column(_Bounded):
    column: _Line | None = None
    intersect: Annotated[tuple[_Line, ...] | None, BeforeValidator(_as_crossed)] = None
    source: _Text
    groups: Annotated[
        tuple[Annotated[_Group, BeforeValidator(_as_group)], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ]
    overlapping: bool = False
    unknowns: Literal["free", "group"] = "free"
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    confounders: Annotated[tuple[_Text, ...], BeforeValidator(_as_tuple)] = ()
    severity: Literal["error", "warning"] = "error"


class _Policy(_Section):
    version: Literal[1] = Field(alias="schema")
    author: _Line
    date: Annotated[datetime.date, BeforeValidator(_as_date)]
    rationale: _Text
    columns: Annotated[tuple[_Column, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a group may not fall below or rise above; None where nothing is asked. Exact: 0.8 is 4/5."""

    name: str
    min_ratio: Fraction | None = None
    max_ratio: Fraction | None = None
    min_share: Fraction | None = None
    min_count: int | None = None

    def as_json(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in _BOUNDS if getattr(self, name) is not None}
        return {"name": self.name} | {
            name: value if name == "min_count" else float(value) for name, value in given.items()
        }


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a policy: its groups with their bounds (`unknown` last, where unknowns are a group).

    `crossed`: the columns that it is the intersection of; of one that is there as it is, none.
    """

    name: str
    source: str
    groups: tuple[Bounds, ...]
    overlapping: bool
    unknowns: Literal["free", "group"]
    min_coverage: float
    confounders: tuple[str, ...]
    severity: Literal["error", "warning"]
    crossed: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The columns that have to be known for it."""
        return self.crossed or (self.name,)

    def as_json(self) -> dict[str, Any]:
        crossed = {"intersect": list(self.crossed)} if self.crossed else {}
        plain = ("source", "overlapping", "unknowns", "min_coverage", "severity")
        return {"column": self.name} | crossed | {name: getattr(self, name) for name in plain} | {
            "confounders": list(self.confounders), "groups": [group.as_json() for group in self.groups]
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """A checked policy."""

    author: str
    date: datetime.date
    rationale: str
    columns: tuple[Column, ...]
    marked: Marked = field(default=Marked("", None, {}), compare=False, repr=False)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """The groups of all columns in order, each named `column=group`, as quotas and draws count them."""
        return tuple(
            Bounds(f"{column.name}={group.name}", *(getattr(group, name) for name in _BOUNDS))
            for column in self.columns
            for group in column.groups
        )

    def as_json(self) -> dict[str, Any]:
        head = {"author": self.author, "date": self.date.isoformat(), "rationale": self.rationale}
        return {"schema": 1} | head | {"columns": [column.as_json() for column in self.columns]}

    def require(self, known: Mapping[str, Collection[str]], *, all_known: bool = True) -> None:
        """Errors: UsageError with line and field for a column that is not there, or a group that no row has.

        Unless `all_known`, a column that is not among these may be there.
        """
        for number, column in enumerate(self.columns):
            place: Place = ("columns", number)
            lost = [name for name in (*column.crossed, column.name) if name not in known]
            if lost and not all_known:
                continue
            if lost:
                key = "intersect" if column.crossed else "column"
                raise self.marked.error((*place, key), _unknown("column", lost[0], known))
            for other in column.confounders:
                if other not in known and all_known:
                    raise self.marked.error((*place, "confounders"), _unknown("column", other, known))
            for position, group in enumerate(column.groups):
                if group.name not in known[column.name] and (group.name != UNKNOWN or column.unknowns != "group"):
                    text = _unknown(f"group of {column.name}", group.name, known[column.name])
                    raise self.marked.error((*place, "groups", position), text)


def read_policy(path: Path) -> Policy:
    """Errors: UsageError naming file, line and field: `p.yaml:7: columns.0.min_ration: unknown; did you mean ...`."""
    return check_policy(read_yaml(path))


def check_policy(marked: Marked) -> Policy:
    """The policy that a file says. Errors: as `read_policy`."""
    if not isinstance(marked.value, dict):
        raise marked.error((), "a policy has keys and values")
    try:
        found = _Policy(**marked.value)
    except ValidationError as error:
        items = sorted(error.errors(), key=lambda item: item["type"] == "missing")  # a misspelt key is also missing
        raise UsageError("; ".join(str(_problem(item, marked)) for item in items)) from None
    columns = tuple(_column(marked, number, column) for number, column in enumerate(found.columns))
    _check_together(marked, columns)
    return Policy(found.author, found.date, found.rationale, columns, marked)


def _problem(item: Any, marked: Marked) -> UsageError:
    place: Place = tuple(item["loc"])
    if item["type"] in ("model_type", "model_attributes_type", "tuple_type"):
        wanted = "a list" if item["type"] == "tuple_type" else "keys and values"
        return marked.error(place, f"{wanted} expected here")
    models: dict[int, type[_Section]] = {1: _Policy, 3: _Column}  # by how deep the key stands
    fields = models.get(len(place), _Group).model_fields
    return marked.problem(place, item, sorted(info.alias or key for key, info in fields.items()))


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    return suggestion(f"no {kind} is called {name!r}", name, sorted(map(str, known)))


def _column(marked: Marked, number: int, given: _Column) -> Column:
    place: Place = ("columns", number)
    groups = [_bounds(marked, place, given, group, position) for position, group in enumerate(given.groups)]
    if given.unknowns == "group":
        groups.append(_bounds(marked, place, given, _Group(name=UNKNOWN), None))
    name, crossed = _named(marked, place, given)
    column = Column(
        name, given.source, tuple(groups), given.overlapping, given.unknowns,
        given.min_coverage, given.confounders, given.severity, crossed,
    )  # fmt: skip
    _check_column(marked, place, column)
    return column


def _named(marked: Marked, place: Place, given: _Column) -> tuple[str, tuple[str, ...]]:
    """The name of a column, and of which it is the intersection."""
    if given.intersect is None:
        if given.column is None:
            raise marked.error((*place, "column"), "is missing; name a column, or cross several: intersect: a,b")
        return given.column, ()
    if given.column is not None:
        raise marked.error((*place, "intersect"), f"its column is {given.column!r}; give one of the two")
    return crossed_name(given.intersect), given.intersect


def _bounds(marked: Marked, place: Place, column: _Column, group: _Group, position: int | None) -> Bounds:
    """A group's bounds: its own, else those of its column."""
    own = {name: getattr(group, name) for name in _BOUNDS}
    value = {name: getattr(column, name) if own[name] is None else own[name] for name in _BOUNDS}
    here: Place = place if position is None else (*place, "groups", position)

    def at(name: str) -> Place:
        return (*here, name) if own[name] is not None else (*place, name)

    if all(one is None for one in value.values()):
        raise marked.error(here, f"nothing is asked of {group.name!r}; give it one of {', '.join(_BOUNDS)}")
    low, high = value["min_ratio"], value["max_ratio"]
    if low is not None and high is not None and low > high:
        wrong = "min_ratio" if own["min_ratio"] is not None else "max_ratio"
        raise marked.error(at(wrong), f"min_ratio {low:g} of {group.name!r} is above its max_ratio {high:g}")
    exact = {name: None if value[name] is None else Fraction(str(value[name])) for name in _BOUNDS[:3]}
    return Bounds(group.name, exact["min_ratio"], exact["max_ratio"], exact["min_share"], value["min_count"])


def _check_column(marked: Marked, place: Place, column: Column) -> None:
    twice = [name for name, count in Counter(group.name for group in column.groups).items() if count > 1]
    if twice:
        hint = ", and unknowns are a group of that name" if twice[0] == UNKNOWN and column.unknowns == "group" else ""
        raise marked.error((*place, "groups"), f"{twice[0]!r} is named twice{hint}")
    total = sum((group.min_share or Fraction(0) for group in column.groups), Fraction(0))
    if total > 1 and not column.overlapping:
        shares = ", ".join(f"{group.name} {float(group.min_share):g}" for group in column.groups if group.min_share)
        hint = "lower them, or say overlapping: true if one row may be in several"
        raise marked.error((*place, "groups"), f"min_share adds up to {float(total):g} ({shares}); {hint}")
    if column.name in column.confounders:
        raise marked.error((*place, "confounders"), f"{column.name!r} would be compared within itself")


def _check_together(marked: Marked, columns: tuple[Column, ...]) -> None:
    twice = [name for name, count in Counter(column.name for column in columns).items() if count > 1]
    if twice:
        raise marked.error(("columns",), f"column {twice[0]!r} is given twice; name all its groups in one place")
    if all(column.severity == "warning" for column in columns):
        raise marked.error(("columns",), "every column only warns, so no check could fail; make one `severity: error`")
