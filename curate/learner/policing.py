"""A policy over a training run: every sub-batch is drawn within quotas, and what they were owed is kept in the state.

Memberships are made once, before the first step; a step adds the tests of `curate.policy.drawing` to its draw. Where
the criterion is uniform nothing is weighed: the next pairs of the epoch stand as they come, and those that would break
the quota give way to substitutes, drawn evenly from all candidates by the step's own dice. So where nothing binds, the
sub-batches are those of a run without a policy, in every phase. Shares and ratios are those of what was looked at; a
pair that comes again in a later epoch counts again, among candidates and among members.

Cost, 128 of 640 candidates on a busy core: draws within disjoint groups take about as long as without (60 ms), within
overlapping ones under tight bounds 0.4 s more. The price of a joint draw is a second one and two looks at the batch, so
it is taken of some 200 draws spread over the run; that of draws by single scores costs nothing and is taken of all.
"""

# N pairs of the source, M of them candidates, B looked at in a step, b drawn, G groups

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from curate.errors import RunMismatch, UsageError
from curate.learner.candidates import Candidates
from curate.learner.reading_ahead import SuperBatch
from curate.policy.certificate import certificate
from curate.policy.drawing import ConstrainedDraw, Limit
from curate.policy.feasibility import refuse_conflict
from curate.policy.fixed_scores import draw_in_order
from curate.policy.price import Price
from curate.policy.quotas import State, quota
from curate.policy.schema import Policy

_PRICED: Final = 200  # draws of a run, from the first on at equal distances; up to twice as many by rounding
_DICE: Final = (
    2**62
)  # keys of the substitutes' dice, apart from the epochs' (small) and those of held-out pairs (2**63 + n)


@dataclass(frozen=True, slots=True)
class Policing:
    """A policy, and who is in its groups: bool [N, G] along the pairs of the source, groups as in `policy.bounds`.

    `columns` says of each of its columns where it comes from, `kept` in which file the memberships are.
    """

    policy: Policy
    member_NG: NDArray[np.bool_]
    columns: tuple[Mapping[str, Any], ...] = ()
    kept: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.member_NG.dtype != np.bool_ or self.member_NG.shape[1:] != (len(self.policy.bounds),):
            raise UsageError(
                f"memberships are {self.member_NG.dtype} {self.member_NG.shape}; give bool [N, "
                f"{len(self.policy.bounds)}], a row per pair and a column per group of the policy"
            )


@dataclass(frozen=True, slots=True)
class Tally:
    """What the draws so far did: the quotas' state, how many passed somebody over, conflicts, prices by criterion."""

    state: State
    bound: int = 0
    conflicts: int = 0
    substitutes: int = 0
    prices: Mapping[str, Price] = field(default_factory=dict)

    def after(self, drawn: ConstrainedDraw, criterion: str, price: Price | None, substitutes: int) -> Tally:
        """With one more draw counted."""
        prices = dict(self.prices)
        if price is not None:
            prices[criterion] = prices[criterion] + price if criterion in prices else price
        return Tally(
            self.state.after(drawn.quota, drawn.count_G),
            self.bound + drawn.passed_over,
            self.conflicts + bool(drawn.conflict),
            self.substitutes + substitutes,
            prices,
        )

    def as_json(self) -> dict[str, Any]:
        prices = {name: [one.constrained, one.plain, one.members] for name, one in self.prices.items()}
        counts = {"bound": self.bound, "conflicts": self.conflicts, "substitutes": self.substitutes}
        return {"state": self.state.as_json(), **counts, "prices": prices}

    @classmethod
    def from_json(cls, given: Mapping[str, Any], policy: Policy) -> Tally:
        """Errors: RunMismatch for the state of another policy; UsageError for what `as_json` did not write."""
        state = State.from_json(given["state"])
        if state.names != tuple(bound.name for bound in policy.bounds):
            raise RunMismatch(f"the state counts {', '.join(state.names)}, which are not the groups of this policy")
        prices = {name: Price(*values) for name, values in given["prices"].items()}
        return cls(state, given["bound"], given["conflicts"], given["substitutes"], prices)


@dataclass(frozen=True, slots=True)
class Enforcer:
    """Sets the limits of each draw of a run of `steps` steps; `window` candidates are looked at where nothing is."""

    policing: Policing
    candidates: Candidates
    steps: int
    window: int
    seed: int

    def begin(self) -> Tally:
        return Tally(State.empty(self.policing.policy.bounds))

    def limit(self, tally: Tally, row_B: NDArray[np.int64], size: int, step: int) -> Limit:
        """The limit of step `step` (from 0), of `size` among these rows of the source."""
        member_BG = self.policing.member_NG[row_B]
        present_G = member_BG.sum(axis=0).astype(np.int64)
        bound = quota(
            self.policing.policy.bounds, tally.state, present_G,
            candidates=len(row_B), size=size, last=step + 1 == self.steps, done=Fraction(step + 1, self.steps),
        )  # fmt: skip
        return Limit(member_BG, bound)

    def prices(self, step: int) -> bool:
        """Is the joint draw of this step one of those whose price is taken?"""
        return step % max(1, self.steps // _PRICED) == 0

    def uniformly(self, tally: Tally, batch: SuperBatch, *, step: int) -> tuple[SuperBatch, ConstrainedDraw]:
        """As many as `batch` holds, of it and of substitutes; what was drawn indexes the batch that is returned.

        A substitute whose image is bad is passed over for another.
        """
        size, rest = len(batch), self._substitutes(batch.row_B, step)
        while True:
            limit = self.limit(tally, np.concatenate([batch.row_B, rest]), size, step)
            drawn = draw_in_order(limit.member_BG, limit.quota)
            wanted = rest[drawn.draw.index_b[drawn.draw.index_b >= size] - size]
            row_n, image_nCHW, token_nT = self.candidates.pairs.read(wanted)
            if len(row_n) == len(wanted):
                break
            rest = rest[~np.isin(rest, np.setdiff1d(wanted, row_n))]
        if not len(row_n):
            return batch, drawn
        index_b = np.where(drawn.draw.index_b < size, drawn.draw.index_b, 0)
        index_b[drawn.draw.index_b >= size] = size + np.arange(len(row_n))
        rows, images = np.concatenate([batch.row_B, row_n]), torch.cat([batch.image_BCHW, image_nCHW])
        more = SuperBatch(rows, images, torch.cat([batch.token_BT, token_nT]), batch.position)
        return more, replace(drawn, draw=replace(drawn.draw, index_b=index_b))

    def _substitutes(self, row_B: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Candidates that are not in the batch, so many that there are `window` with it, in the order of the dice."""
        dice = np.random.Generator(np.random.Philox(key=np.array([self.seed, _DICE + step], np.uint64)))
        row_M, count = self.candidates.row_M, min(self.window, len(self.candidates))
        drawn = row_M[dice.choice(len(row_M), count, replace=False)]
        return drawn[~np.isin(drawn, row_B)][: max(0, count - len(row_B))]


def refuse_impossible(policing: Policing, row_M: NDArray[np.int64], *, batch: int, window: int, steps: int) -> None:
    """Refuse a policy that no run of this size could keep to. Errors: UsageError with line, field and conflict.

    Asked of one draw of all candidates at the run's rate, `batch` of each `window`. Samples count as often as they are
    trained on, so of a min_count a run of many epochs owes each of them its share.
    """
    size = max(1, min(len(row_M) * batch // window, steps * batch))
    shared = _with_counts(policing.policy, Fraction(size, steps * batch))
    refuse_conflict(shared, policing.member_NG[row_M], size)


def _with_counts(policy: Policy, share: Fraction) -> Policy:
    """The policy with this share of its counts, rounded down."""
    columns = []
    for column in policy.columns:
        groups = (
            group if group.min_count is None else replace(group, min_count=math.floor(group.min_count * share))
            for group in column.groups
        )
        columns.append(replace(column, groups=tuple(groups)))
    return replace(policy, columns=tuple(columns))


def certified(policing: Policing, tally: Tally, conflicts: Sequence[str], criterion: str) -> dict[str, Any]:
    """certificate.json of a run: its groups over all draws, its conflicts, its price by the criterion and others."""
    prices = {name: one.as_json() for name, one in tally.prices.items()}
    whole = certificate(policing.policy, tally.state, conflicts=conflicts, price=tally.prices.get(criterion))
    return whole | {
        "of": "all draws of a training run; a pair that was looked at or chosen in several of them counts in each",
        "price_unit": criterion,
        "prices": prices,
        "draws_bound": tally.bound,
        "substitutes": tally.substitutes,
        "memberships": None if policing.kept is None else dict(policing.kept),
        "columns": [dict(column) for column in policing.columns],
    }
