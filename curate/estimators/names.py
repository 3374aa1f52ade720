"""The estimators by name, as settings and the command line give them."""

from __future__ import annotations

from typing import Final

from curate.errors import UsageError
from curate.estimators.activity import ForwardActivity
from curate.estimators.backprop import Backprop
from curate.estimators.forward import Forward, ForwardExact
from curate.estimators.hybrid import Hybrid, Rule
from curate.estimators.local import ForwardLocal, LocalBackprop
from curate.estimators.report import GradientEstimator
from curate.estimators.zeroth import ZerothOrder

NAMES: Final = (
    "backprop", "backprop-checkpoint", "forward", "forward-dense", "forward-activity", "forward-local",
    "local-backprop", "forward-exact", "zeroth-order", "hybrid",
)  # fmt: skip
_WITH_TANGENTS: Final = ("forward", "forward-dense", "forward-activity", "zeroth-order")


def make_estimator(
    name: str, *, tangents: int = 1, disjoint: bool = False, rules: str | tuple[Rule, ...] = ()
) -> GradientEstimator:
    """An estimator by name. In a hybrid's rules `exact` stands for backprop that goes no further than it must.

    Examples: `make_estimator("forward", tangents=4)`; `make_estimator("hybrid", rules="logit_*:exact,*:backprop")`.
    Errors: UsageError for an unknown name, and for an option that the estimator does not have.
    """
    if name not in NAMES:
        raise UsageError(f"estimator {name!r} is none of {', '.join(NAMES)}")
    for given, option, owners in (
        (tangents != 1, "tangents", (*_WITH_TANGENTS, "hybrid")),
        (disjoint, "disjoint", ("forward", "forward-dense", "hybrid")),
        (bool(rules), "rules", ("hybrid",)),
    ):
        if given and name not in owners:
            raise UsageError(f"estimator {name} has no {option}; {', '.join(owners)} has")
    if name == "hybrid":
        return Hybrid(parse_rules(rules, tangents=tangents, disjoint=disjoint) if isinstance(rules, str) else rules)
    return _single(name, tangents, disjoint)


def parse_rules(text: str, *, tangents: int = 1, disjoint: bool = False) -> tuple[Rule, ...]:
    """Rules from "pattern:estimator,pattern:estimator". Errors: UsageError naming the part that is none."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        pattern, colon, name = part.rpartition(":")
        if not colon or not pattern or name not in (*NAMES, "exact") or name == "hybrid":
            raise UsageError(f"hybrid rule {part!r}: write pattern:estimator, with exact or one of {', '.join(NAMES)}")
        found.append(Rule(pattern, Backprop("exact") if name == "exact" else _single(name, tangents, disjoint)))
    return tuple(found)


def _single(name: str, tangents: int, disjoint: bool) -> GradientEstimator:
    match name:
        case "backprop-checkpoint":
            return Backprop(name, checkpointed=True)
        case "forward":
            return Forward(tangents=tangents, disjoint=disjoint)
        case "forward-dense":
            return Forward(name, "dense", tangents, disjoint)
        case "forward-activity":
            return ForwardActivity(tangents=tangents)
        case "forward-local":
            return ForwardLocal()
        case "local-backprop":
            return LocalBackprop()
        case "forward-exact":
            return ForwardExact()
        case "zeroth-order":
            return ZerothOrder(tangents=tangents)
    return Backprop()
