"""Another estimator for each group of parameters, by ordered rules over their names: the first that matches decides.

    logit_*                    exact      scale and bias: two numbers, and the most sensitive
    *.mlp.w[12], *.mlp.b[12]   forward    leaves, with attribution: no backward kernel, no noise where no token went
    *                          backprop

Each estimator runs once over its own parameters while the others are frozen, so costs add up, except that autograd only
goes back as far as some parameter needs it to (exact heads cost hardly more than the forward pass), and that `exact`
and `backprop` share one pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from curate.errors import UsageError
from curate.estimators.backprop import Backprop
from curate.estimators.problem import Problem, trainable
from curate.estimators.report import GradientEstimator, GradReport
from curate.estimators.swapping import Rewind, only_trainable
from curate.estimators.tangents import dimensions


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name matches `pattern` (a shell glob) are left to `estimator`."""

    pattern: str
    estimator: GradientEstimator


@dataclass(frozen=True, slots=True)
class Hybrid:
    """`hybrid`. Errors: UsageError without rules, for a parameter that no rule matches and for a rule that decides
    about no parameter."""

    rules: tuple[Rule, ...]
    name: str = "hybrid"

    def __post_init__(self) -> None:
        if not self.rules:
            raise UsageError("hybrid: no rules; an example is logit_*:exact,*:backprop")

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`; the groups' own reports are the `parts`, in the order of the rules."""
        began, named = time.perf_counter(), trainable(problem.module)
        again, parts = Rewind(problem.module), []
        for estimator, names in groups(self.rules, tuple(named)):
            again.rewind()
            with only_trainable(problem.module, names):
                parts.append(estimator.estimate(problem, batch, seed=seed, step=step))
        return GradReport(
            estimator=self.name,
            layout="mixed",
            loss=parts[0].loss,
            seed=seed,
            step=step,
            tangents=sum(part.tangents for part in parts),
            names=tuple(named),
            dimensions=dimensions(named),
            seconds=time.perf_counter() - began,
            parts=tuple(parts),
        )


def groups(rules: Sequence[Rule], names: Sequence[str]) -> list[tuple[GradientEstimator, frozenset[str]]]:
    """Each estimator with its names; rules with equal estimators share one run."""
    found: dict[GradientEstimator, set[str]] = {rule.estimator: set() for rule in rules}
    used: set[str] = set()
    for name in names:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
        if rule is None:
            patterns = ", ".join(rule.pattern for rule in rules)
            raise UsageError(f"hybrid: no rule matches {name} (rules: {patterns}); end with *:backprop")
        exact, whole = Backprop("exact"), Backprop()
        # one pass finds both
        found[whole if rule.estimator == exact and whole in found else rule.estimator].add(name)
        used.add(rule.pattern)
    if idle := [rule.pattern for rule in rules if rule.pattern not in used]:
        raise UsageError(
            f"hybrid: rule {idle[0]} decides about no parameter; is the name right, or an earlier rule wider?"
        )
    return [(estimator, frozenset(own)) for estimator, own in found.items() if own]
