"""What a user asks of an audit: which labels, word lists, columns, crossings and confounders; checked when it is made.

Nothing of the pool is read here: what only the pool can tell (a column that is not there, keys that do not match) is
said by `curate.auditing.assembling`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from curate.auditing.attributes import Attributes, read_attributes
from curate.auditing.columns import LabelError, shown
from curate.auditing.labels import JOINS, LEAST_MATCH, label_names
from curate.auditing.lexicons import SETS
from curate.auditing.metadata import OUTCOMES
from curate.auditing.traits import FIELD, TraitSettings, WordList, shipped_lists
from curate.errors import UsageError
from curate.storage import canonical_json

CAPTION_LENGTH: Final = "caption length"
MOST_CLUSTERS: Final = 1000  # as many groups as an audit compares


@dataclass(frozen=True)
class AuditRequest:
    """`labels`: a CSV or parquet file, joined `on` key, uid or sample_id; fewer matches than `least_match` are refused.

    `lexicons`: sets that come along (gender, age, identity) and files; files alone are added to all three, and nothing
    at all is no mentions. `attributes`: a file of what a model is asked about the images; none unless one is given.
    `columns`: of the labels (all of them unless some are named), json fields of the samples, columns of the pool's
    table; `field:NAME` for a json field that has the name of another column. `intersect`: columns to cross.
    `confounders`: what is held fixed. `clusters` of the embeddings: None for a number that fits the pool, 0 for none.
    Errors: UsageError, for each of them.
    Example: `AuditRequest(columns=("license",), lexicons=("gender",))`.
    """

    labels: Path | None = None
    on: str = "key"
    least_match: float = LEAST_MATCH
    lexicons: tuple[str, ...] = SETS
    columns: tuple[str, ...] = ()
    intersect: tuple[tuple[str, ...], ...] = ()
    confounders: tuple[str, ...] = (CAPTION_LENGTH,)
    clusters: int | None = None
    label_errors: Mapping[str, LabelError] = field(default_factory=dict)
    seed: int = 0
    attributes: Path | None = None

    def __post_init__(self) -> None:
        if self.on not in JOINS:
            raise UsageError(f"--on {self.on}: labels are joined on {', '.join(JOINS)}")
        if not 0 <= self.least_match <= 1:
            raise UsageError(f"least match {self.least_match}: a share of the pool between 0 and 1, such as 0.5")
        if self.clusters is not None and not 0 <= self.clusters <= MOST_CLUSTERS:
            raise UsageError(f"--clusters {self.clusters}: 0 for none, else up to {MOST_CLUSTERS:,}")
        for option, names in (("--columns", self.columns), ("--confounder", self.confounders)):
            _check_names(option, names)
        for names in self.intersect:
            _check_names("--intersect", names)
            if len(names) < 2:
                raise UsageError(f"--intersect {shown(','.join(names))}: name two columns or more, with commas between")
        if len({frozenset(names) for names in self.intersect}) < len(self.intersect):
            raise UsageError("--intersect: the same columns are crossed twice")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: a whole number from 0, below 2**64")
        made = [name for name in (*self.named, *self.confounders) if name in OUTCOMES]
        if made:
            raise UsageError(f"{made[0]!r} is what the selection did; its groups cannot show what the selection did")
        self.label_columns  # noqa: B018 - these read the files: bad ones are refused now
        self.traits  # noqa: B018
        twice = [name for name in map(shown, self.label_columns) if name in self.predicted]
        if twice:
            raise UsageError(f"{twice[0]!r} is a column of the labels and of the attributes; rename one of them")

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that are asked for, those to be crossed among them."""
        return tuple(dict.fromkeys((*self.columns, *(name for names in self.intersect for name in names))))

    @cached_property
    def traits(self) -> TraitSettings:
        """What must be read of every sample for this."""
        named = [one for one in self.lexicons if one in SETS]
        files = [WordList.of(Path(one)) for one in self.lexicons if one not in SETS]
        own = [name for one in files for name in one.read().sets]
        sets = dict.fromkeys([*(named or (SETS if files else ())), *own])
        lists = (*shipped_lists(), *files)  # for the language of a caption too
        skipped = {*self.label_columns, CAPTION_LENGTH}
        asked = (
            name
            for name in (*self.named, *self.confounders)
            if name not in skipped and shown(name) not in self.predicted
        )
        fields = dict.fromkeys(name.removeprefix(FIELD) for name in asked)
        return TraitSettings(lists, tuple(sets), tuple(fields))

    @cached_property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of the label file that are wanted: those named, or all if none of them is."""
        if self.labels is None:
            return ()
        there = [name for name in label_names(self.labels) if name not in JOINS]
        return tuple(name for name in there if name in self.named) if {*there} & {*self.columns} else tuple(there)

    @cached_property
    def zero_shot(self) -> Attributes | None:
        """What a model is to be asked about the images."""
        return None if self.attributes is None else read_attributes(self.attributes)

    @property
    def predicted(self) -> tuple[str, ...]:
        """The columns that the model makes of them."""
        return () if self.zero_shot is None else self.zero_shot.names

    @cached_property
    def digest(self) -> str:
        """sha256 of all this, the bytes of its files included and their places left out."""
        errors = {name: [one.sensitivity, one.specificity] for name, one in sorted(self.label_errors.items())}
        value: dict[str, Any] = {
            "labels": None if self.labels is None else _sha256(self.labels), "on": self.on,
            "least_match": self.least_match, "traits": self.traits.as_json(), "columns": self.columns,
            "intersect": self.intersect, "confounders": self.confounders, "clusters": self.clusters,
            "label_errors": errors, "seed": self.seed,
        }  # fmt: skip
        if self.zero_shot is not None:
            value["attributes"] = self.zero_shot.as_json()
        return hashlib.sha256(canonical_json(value)).hexdigest()


def _check_names(option: str, names: tuple[str, ...]) -> None:
    if isinstance(names, str):
        raise UsageError(f"{option}: give a list of names, not one text")
    blank = [name for name in names if not name.strip()]
    twice = [name for name in names if names.count(name) > 1]
    if blank or twice:
        raise UsageError(f"{option}: {'a name is blank' if blank else f'{shown(twice[0])!r} is named twice'}")


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
