"""What an estimator leaves behind: a few numbers, from which `replay` rebuilds the gradient it put into `.grad`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from curate.estimators.problem import Problem

# K tangents, r touched rows
Layout = Literal["rank-1", "dense", "basis", "activity", "exact", "local", "mixed", "sum"]


@dataclass(frozen=True, slots=True)
class RowSlopes:
    """Parameters whose rows have derivatives of their own: `values[k][i]` belongs to row `rows[i]`, the rest are zero.

    The rows are leaves and nodes of a fast feedforward layer, or entries of a vocabulary, that the batch touched.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class GradReport:
    """One estimate. `names` are the parameters whose `.grad` it filled, `dimensions` how many numbers they hold.

    `slopes[k]` is the directional derivative along tangent k, of the loss through the embeddings; `loss_slopes[k]` is
    the part through the loss's own parameters, which data-parallel workers all know. For `forward-activity`, `slopes`
    holds one number per example and embedding, penalties counting as the last. `coefficient` multiplies tangents in the
    gradient. `parts` are the estimates of a hybrid (layout mixed), or those of workers with tangents of their own,
    which add up (layout sum).
    """

    estimator: str
    layout: Layout
    loss: float
    seed: int
    step: int
    tangents: int
    names: tuple[str, ...]
    dimensions: int
    seconds: float
    slopes: tuple[float, ...] = ()
    loss_slopes: tuple[float, ...] = ()
    coefficient: float = 1.0
    disjoint: bool = False
    rows: tuple[RowSlopes, ...] = ()
    parts: tuple[GradReport, ...] = ()


class GradientEstimator(Protocol):
    """Fills `.grad` of all parameters that require a gradient, replacing what was there."""

    @property
    def name(self) -> str:
        """One of `curate.estimators.names.NAMES`."""

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """Estimate the gradient of `problem.loss(*problem.embed(batch))`."""
