"""The joint draw within floors and ceilings per group: the same kernel, noise and order, some candidates passed over.

Within a chunk candidates are visited by logit + Gumbel, and one is accepted unless the sub-batch could then no longer
be finished with every group between its floor and its ceiling. For disjoint groups that is the rule: accept i of group
g unless c_g = V_g, or g needs nothing more and the summed needs already fill the remaining slots. For overlapping ones
it is asked of the atoms (`atoms.py`), exactly: nobody is passed over needlessly, and no dead end is entered.

So if the bounds can be met the sub-batch has exactly `size` members within them (each acceptance keeps it finishable),
and if the plain draw is within them already it is this one, bit for bit: none of its members is ever passed over.

Cost over the plain draw: one test per chunk while nothing binds; where something does, log2(chunk) tests for every atom
that is then passed over. A passed-over atom stays so to the end of the sub-batch, which is why the longest acceptable
run of candidates can be found by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curate.kernels.selection import Loss, PairKernel
from curate.policy.atoms import Atoms, Frame, Ints, atoms_of, membership
from curate.policy.quotas import Quota
from curate.policy.settling import Settled, settle
from curate.selection.criteria import Criterion
from curate.selection.joint import Draw, Pairs, draw_with, joint_kernel, largest

# B candidates, b drawn, G groups, A atoms


@dataclass(frozen=True, slots=True)
class Limit:
    """What a draw has to keep to: who of the candidates is in which group, and the quota."""

    member_BG: NDArray[np.bool_]
    quota: Quota


@dataclass(frozen=True, slots=True)
class ConstrainedDraw:
    """A draw, its members per group, and the bounds that it kept (the quota's own where `conflict` is empty)."""

    draw: Draw
    quota: Quota
    count_G: Ints
    least_G: Ints
    most_G: Ints
    conflict: str
    passed_over: bool  # False: no candidate was, and this is the plain draw

    @property
    def shortfall(self) -> Ints:
        """Members missing to the quota's floor, [G]."""
        missing_G: Ints = np.maximum(self.quota.least_G - self.count_G, 0)
        return missing_G


def draw_constrained(
    reference: Pairs | None,
    learner: Pairs | None,
    sample_ids: NDArray[np.uint8],
    groups: NDArray[np.generic],
    quota: Quota,
    *,
    chunks: int = 16,
    criterion: Criterion = "learnability",
    loss: Loss,
    gain: float = 100.0,
    seed: int = 0,
    step: int = 0,
    threads: int | None = None,
) -> ConstrainedDraw:
    """`draw_joint` of `quota.size` pairs within the quota.

    `groups` is bool [B, G], or, for disjoint groups, the group's number per row (-1: none). Bounds that cannot be met
    are settled (`settling.py`), and the conflict is named in the answer. Errors: `UsageError` as `draw_joint`, and for
    groups that do not fit the quota.
    """
    member_BG = membership(groups, len(quota.names))
    kernel = joint_kernel(reference, learner, sample_ids, criterion=criterion, loss=loss, threads=threads)
    return draw_within(kernel, sample_ids, member_BG, quota, chunks=chunks, gain=gain, seed=seed, step=step)


def draw_within(
    kernel: PairKernel,
    sample_ids: NDArray[np.uint8],
    member_BG: NDArray[np.bool_],
    quota: Quota,
    *,
    chunks: int,
    gain: float,
    seed: int,
    step: int,
) -> ConstrainedDraw:
    """`draw_constrained` with any fresh kernel."""
    visit = Visit(member_BG, quota)
    draw = draw_with(
        kernel, sample_ids, size=quota.size, chunks=chunks, gain=gain, seed=seed, step=step, choose=visit.choose
    )
    return visit.drawn(draw)


def _frame(member_BG: NDArray[np.bool_], quota: Quota, settled: Settled) -> Frame:
    """Of groups that are bounded at all only: fewer atoms, and often disjoint ones."""
    binding_G = (settled.least_G > 0) | (settled.most_G < np.minimum(quota.present_G, quota.size))
    atoms = atoms_of(member_BG[:, binding_G])
    return Frame(atoms, settled.least_G[binding_G], settled.most_G[binding_G], quota.size)


class Visit:
    """What was taken so far in one sub-batch, per atom, and which atoms are closed for the rest of it."""

    def __init__(self, member_BG: NDArray[np.bool_], quota: Quota) -> None:
        self._member_BG, self._quota, self._settled = member_BG, quota, settle(quota, atoms_of(member_BG))
        self._frame = _frame(member_BG, quota, self._settled)
        self._taken_A: Ints = np.zeros_like(self._atoms.count_A)
        self._closed_A = np.zeros(len(self._taken_A), dtype=np.bool_)

    def drawn(self, draw: Draw) -> ConstrainedDraw:
        """A draw whose members this visit chose, with the bounds that it kept."""
        count_G, settled = self._member_BG[draw.index_b].sum(axis=0).astype(np.int64), self._settled
        bounds = (settled.least_G, settled.most_G, settled.conflict)
        return ConstrainedDraw(draw, self._quota, count_G, *bounds, bool(self._closed_A.any()))

    def choose(self, value_B: NDArray[np.float64], standing: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """In the place of `largest`: the first `count` acceptable rows, largest value first."""
        atom_B = self._atoms.atom_B
        queue = largest(value_B, standing, len(standing))
        queue = queue[~self._closed_A[atom_B[queue]]]
        chosen = [queue[:0]]
        while count:
            front = queue[:count]
            assert len(front), "a finishable sub-batch has an acceptable candidate"
            run = self._longest_run(atom_B[front])
            self._taken_A = self._with(atom_B[front[:run]])
            chosen.append(front[:run])
            count, queue = count - run, queue[run:]
            if run < len(front):
                self._closed_A[atom_B[queue[0]]] = True
                queue = queue[~self._closed_A[atom_B[queue]]]
        return np.concatenate(chosen)

    @property
    def _atoms(self) -> Atoms:
        return self._frame.atoms

    def _longest_run(self, atom_n: Ints) -> int:
        """How many of these, from the first on, can be accepted; what cannot stays so, hence bisection."""
        if self._frame.completable(self._with(atom_n)):
            return len(atom_n)
        low, high = 0, len(atom_n)  # low can be accepted, high cannot
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._frame.completable(self._with(atom_n[:middle])) else (low, middle)
        return low

    def _with(self, atom_n: Ints) -> Ints:
        counted: Ints = self._taken_A + np.bincount(atom_n, minlength=len(self._taken_A))
        return counted
