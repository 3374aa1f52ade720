"""What a run will cost over plain training on as many samples: said before it starts, counted when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from curate.costs.flops import selection_flops
from curate.costs.ledger import CostLedger, factor_over_iid
from curate.learner.drawing import Drawer
from curate.learner.plan import Plan
from curate.learner.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Forecast:
    """`factor` of plain training's FLOPs for each pair that is trained on; `text` says what is in it.

    Example: 2.67 at filter ratio 0.8 with the reference cached; 4.33 with one of the learner's size scored now.
    """

    factor: float
    text: str


def forecast(settings: TrainSettings, plan: Plan, drawer: Drawer, *, forward: float, reference: float) -> Forecast:
    """The factor under a plan, from the FLOPs of a forward pass of the learner and those of the reference for each time
    that a candidate is looked at (0: cached)."""
    if plan.criterion == "uniform":
        return Forecast(1.0, "uniform: nothing is scored")
    candidates = plan.candidates(settings.batch)
    widths = drawer.widths(plan)
    drawn = selection_flops(candidates, settings.batch, widths, settings.chunks) / candidates if widths else 0.0
    low = drawer.low_cost if settings.scoring == "flexi" else 1.0
    scoring = (3.0 if plan.criterion == "alignment" else low) * forward if plan.uses_learner_pass else 0.0
    factor = factor_over_iid(
        candidates / settings.batch,
        forward=forward,
        scoring=scoring,
        reference=reference,
        low_share=0.5 if settings.scoring == "flexi" else 0.0,
        low_cost=low,
        selection=drawn,
        reused=drawer.scorer.reuse is not None,
    )
    parts = [f"{candidates} candidates for {settings.batch} trained on"]
    parts += [f"the learner scores at {low:.2f} of a full pass"] if scoring and low < 1 else []
    parts += ["the learner scores each"] if scoring and low == 1 else []
    parts += ["whose pass is kept for training"] if scoring and drawer.scorer.reuse is not None else []
    parts += ["the reference's scores come from the cache" if not reference else "the reference scores each once"]
    return Forecast(factor, ", ".join(parts))


def measured_factor(ledger: CostLedger, plain: float) -> float:
    """What was spent, over what plain backpropagation on the same pairs would have cost."""
    return ledger.flops() / plain if plain else 1.0
