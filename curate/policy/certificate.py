"""What a policy asked of a draw, what it got and why: one row per group, for a sub-batch or for a whole run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Final

from curate.policy.drawing import ConstrainedDraw
from curate.policy.price import Price
from curate.policy.quotas import State, owed, quota
from curate.policy.schema import Bounds, Policy

MOST_CONFLICTS: Final = 20  # counts differ from draw to draw, and so does the text


@dataclass(frozen=True, slots=True)
class Row:
    """A group: n candidates, F owed, at least L, at most V, C chosen, slack C - L, and the reason for C in words."""

    group: str
    n: int
    F: float
    L: int
    V: int
    C: int
    slack: int
    reason: str


def rows_of(drawn: ConstrainedDraw) -> tuple[Row, ...]:
    """The rows of one sub-batch; F is cumulative, the others are of this sub-batch."""
    asked = drawn.quota
    rows = []
    for group, name in enumerate(asked.names):
        n, low, high, got = (int(one[group]) for one in (asked.present_G, asked.least_G, asked.most_G, drawn.count_G))
        reason = _reason(got, low, high, n) + (f" ({drawn.conflict})" if got < low or got > high else "")
        rows.append(Row(name, n, float(asked.floor_G[group]), low, high, got, got - low, reason))
    return tuple(rows)


def rows_of_run(bounds: Sequence[Bounds], state: State) -> tuple[Row, ...]:
    """The rows of a finished run: its candidates and members as if drawn at once."""
    if not state.chosen:
        return tuple(
            Row(name, n, 0.0, 0, 0, 0, 0, "nothing was drawn")
            for name, n in zip(state.names, state.pool_G, strict=True)
        )
    whole = quota(bounds, State.empty(bounds), state.pool_G, candidates=state.pool, size=state.chosen, last=True)
    floors, _ = owed(bounds, state.pool_G, pool=state.pool, chosen=state.chosen)
    rows = []
    for group, floor in enumerate(floors):
        n, got = state.pool_G[group], state.chosen_G[group]
        low, high = math.ceil(floor), int(whole.most_G[group])
        reason = _short(got, floor, n) if got < low else _reason(got, low, high, n)
        rows.append(Row(state.names[group], n, float(floor), low, max(high, low), got, got - low, reason))
    return tuple(rows)


def _short(got: int, floor: Fraction, n: int) -> str:
    if got >= math.floor(floor):
        return f"short by {float(floor - got):.2g}, less than one sample"
    why = f": the pool has only {n}" if floor > n else ""
    return f"short by {math.ceil(floor) - got}{why}"


def _reason(got: int, low: int, high: int, n: int) -> str:
    if got < low:
        return f"short by {low - got}"
    if got > high:
        return f"over by {got - high}"
    if not n:
        return "no candidates"
    if got == low and low:
        return "at its floor"
    return "at its ceiling" if got == high < n else "within its bounds"


def certificate(
    policy: Policy, state: State, *, conflicts: Sequence[str] = (), price: Price | None = None
) -> dict[str, Any]:
    """`certificate.json` of a run; `conflicts` are those of its draws, of which the most frequent are written out."""
    often = Counter(text for text in conflicts if text)
    return {
        "schema": 1,
        "policy": policy.as_json(),
        "draws": state.draws,
        "candidates": state.pool,
        "chosen": state.chosen,
        "groups": [asdict(row) for row in rows_of_run(policy.bounds, state)],
        "draws_with_conflict": often.total(),
        "conflicts": [{"conflict": text, "draws": count} for text, count in often.most_common(MOST_CONFLICTS)],
        "price": None if price is None else price.as_json(),
    }
