"""What an audit found, as frozen values that become plain JSON: one row per group, its column, and the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from curate.auditing.association import Association
from curate.auditing.composition import Composition
from curate.auditing.disparity import Level
from curate.auditing.exposures import EarlyLate, Exposures
from curate.auditing.losses import Losses
from curate.auditing.placebo import Placebo
from curate.auditing.power import Reach
from curate.auditing.strata import Conditional, Ratio
from curate.evaluation.interval import Share


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group against the rest of its column.

    `pool`, `selected` and `never_selected` count rows; `votes` is what they weigh in the test. `ratio` is that of the
    votes, `ratio_of_rows` the plain one: they differ where copies were kept or dropped together. `untested` says why
    there is no p. `shrunken` is the rate after shrinkage, given for intersections.
    """

    column: str
    group: str
    is_unknown: bool
    pool: int
    selected: int
    never_selected: int
    share_of_pool: float
    share_of_selected: float | None
    votes: float
    rate: Share | None
    ratio: Ratio | None
    ratio_of_rows: float | None
    corrected: Ratio | None
    cohens_h: float | None
    test: str | None
    p: float | None
    q: float | None
    level: Level
    untested: str | None
    could_see: Reach
    conditional: tuple[Conditional, ...]
    shrunken: Share | None
    exposures: Exposures | None
    losses: Losses | None
    score_quantiles: tuple[float, ...] | None
    early_late: EarlyLate | None

    @property
    def flagged(self) -> bool:
        """Whether a disparity was detected, large or not."""
        return self.level not in ("untested", "not detected")


@dataclass(frozen=True, slots=True)
class ColumnAudit:
    """A column: where its groups come from, how many rows they cover, what its mix became, and its groups.

    `model` is whose predictions the groups are, None where they are nobody's.
    """

    name: str
    kind: str
    provenance: str
    family: str
    coverage: float
    unknown_share: float
    overlapping: bool
    composition: Composition | None
    groups: tuple[GroupRow, ...]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """All of it. `tests` is the number of tests per family, `rho` how alike duplicates were treated (None without)."""

    pool: int
    selected: int
    exposures: int | None
    alpha: float
    screen: tuple[float, float]
    seed: int
    duplicate_clusters: int | None
    rho: float | None
    tests: dict[str, int]
    columns: tuple[ColumnAudit, ...]
    associations: tuple[Association, ...]
    placebo: Placebo

    @property
    def rows(self) -> tuple[GroupRow, ...]:
        """Every group of every column."""
        return tuple(row for column in self.columns for row in column.groups)

    @property
    def flags(self) -> int:
        """How many groups' disparities were detected."""
        return sum(row.flagged for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, text, numbers and null; an infinite limit is null as well: there is none."""
        plain: dict[str, Any] = as_plain(self)
        return plain | {"flags": self.flags}


def as_plain(value: Any) -> Any:
    """A value of dataclasses, tuples and numbers as JSON has them."""
    if is_dataclass(value):
        return {one.name: as_plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
