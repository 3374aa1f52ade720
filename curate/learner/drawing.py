"""How a step comes to its sub-batch: the learner looks at the candidates, the reference is looked up, a draw is made.

Costs one forward of the learner per candidate where the plan weighs it (at reduced resolution with flexi scoring),
three for alignment, none for uniform and easy-reference; and 4 B b FLOPs per embedding number for the draw.
"""

# B candidates, b drawn, C channels, H, W height and width, T tokens

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from curate.costs.flops import selection_flops
from curate.learner.candidates import Candidates
from curate.learner.choosing import Chosen, alone, everything, jointly, own_scores
from curate.learner.plan import Plan
from curate.learner.policing import Enforcer, Tally
from curate.learner.reading_ahead import SuperBatch
from curate.learner.scoring_pass import Scorer
from curate.learner.settings import TrainSettings
from curate.learner.trimming import trim
from curate.learner.watch import distinct
from curate.learner.work import PassCosts
from curate.policy.price import Price, price
from curate.selection.alignment import alignment_flops, alignment_scores
from curate.selection.criteria import Criterion
from curate.selection.joint import Pairs


@dataclass(frozen=True, slots=True)
class Drawer:
    """Draws for one learner. `trusted` is the batch whose gradient alignment follows, on the learner's device.

    With an `enforcer` draws are within a policy's quotas, which a tally of the draws before is asked for.
    """

    settings: TrainSettings
    candidates: Candidates
    scorer: Scorer
    costs: PassCosts
    trusted: tuple[Tensor, Tensor] | None = None
    enforcer: Enforcer | None = None

    def look(self, plan: Plan, image_BCHW: Tensor, token_BT: Tensor) -> Pairs | None:
        """What the learner thinks of candidates now; None where the plan does not ask it."""
        return self.scorer(image_BCHW, token_BT) if plan.uses_learner else None

    def draw(
        self, plan: Plan, batch: SuperBatch, learner: Pairs | None, *, step: int, tally: Tally | None = None
    ) -> tuple[SuperBatch, Chosen]:
        """The sub-batch of step `step`, counted from 0, and the candidates that its positions are of: `batch`, and in a
        uniform phase under a policy substitutes after it."""
        settings, size = self.settings, min(self.settings.batch, len(batch))
        if plan.criterion == "uniform":
            return self._uniform(batch, size, step, tally)
        id_B16, limit = self.candidates.pairs.places.id_N16[batch.row_B], None
        if self.enforcer is not None and tally is not None:
            limit = self.enforcer.limit(tally, batch.row_B, size, step)
        dice: Any = {"size": size, "seed": settings.seed, "step": step, "limit": limit}
        if plan.criterion == "alignment":
            return batch, alone(self._alignment(batch), id_B16, gain=plan.gain, **dice)
        if plan.criterion == "trim":
            _, caption_B = distinct(batch.token_BT)
            return batch, trim(self._weighed(plan, batch, learner), id_B16, caption_B, noise=1 - plan.keep, **dice)
        return batch, jointly(
            self._reference(plan, batch), learner, id_B16,
            criterion=plan.criterion, loss=settings.loss, gain=plan.gain, chunks=settings.chunks, **dice,
        )  # fmt: skip

    def _uniform(self, batch: SuperBatch, size: int, step: int, tally: Tally | None) -> tuple[SuperBatch, Chosen]:
        if self.enforcer is None or tally is None:
            return batch, everything(size)
        more, kept = self.enforcer.uniformly(tally, batch, step=step)
        return more, replace(everything(size), index_b=kept.draw.index_b, kept=kept)

    def price(self, plan: Plan, batch: SuperBatch, learner: Pairs | None, chosen: Chosen, *, step: int) -> Price | None:
        """What a draw under a policy gave up; None where nothing is weighed, or for a joint draw that is not priced.

        A joint draw that the policy changed is made again without it.
        """
        if not self._priced(plan, chosen, step) or chosen.kept is None:
            return chosen.price
        settings, how = self.settings, cast(Criterion, plan.criterion)
        return price(
            chosen.kept, self._reference(plan, batch), learner, self.candidates.pairs.places.id_N16[batch.row_B],
            chunks=settings.chunks, criterion=how, loss=settings.loss, gain=plan.gain, seed=settings.seed, step=step,
        )  # fmt: skip

    def price_flops(self, plan: Plan, counted: int, chosen: Chosen, *, step: int) -> float:
        """What `price` costs: scores within the batch, once, or twice and a draw where the policy changed it."""
        if not self._priced(plan, chosen, step) or chosen.kept is None:
            return 0.0
        size = len(chosen.index_b)
        each = 2 * selection_flops(2 * size, size, self.widths(plan), 2)  # one comparison of all: twice the half of two
        return 2 * each + self._drawn(plan, counted) if chosen.kept.passed_over else each

    def _priced(self, plan: Plan, chosen: Chosen, step: int) -> bool:
        joint = chosen.kept is not None and plan.criterion not in ("uniform", "alignment", "trim")
        return joint and self.enforcer is not None and self.enforcer.prices(step)

    def flops(self, plan: Plan, batch: SuperBatch, counted: int) -> float:
        """What looking at a super-batch and drawing from it costs; `counted` candidates were read."""
        if plan.criterion == "alignment":
            each = self.costs.forward(len(batch), batch.token_BT) / len(batch)
            return alignment_flops(
                each, trusted=0 if self.trusted is None else len(self.trusted[0]), candidates=len(batch)
            )
        looked = self.scorer.flops(self.costs, batch.token_BT) if plan.uses_learner else 0.0
        return looked + self._drawn(plan, counted)

    def ageing(
        self, plan: Plan, batch: SuperBatch, learner: Pairs, chosen: Chosen, *, step: int, tally: Tally | None = None
    ) -> dict[str, float]:
        """Rank correlation of the candidates' own scores with fresh ones, and the share of the draw that stays."""
        fresh = self.look(plan, batch.image_BCHW, batch.token_BT)
        _, again = self.draw(plan, batch, fresh, step=step, tally=tally)
        both = [self._own(plan, batch, side) for side in (learner, fresh)]
        return {
            "rank_correlation": rank_correlation(*both),
            "overlap": len(np.intersect1d(chosen.index_b, again.index_b)) / len(chosen.index_b),
        }

    def _own(self, plan: Plan, batch: SuperBatch, learner: Pairs | None) -> Tensor:
        criterion = "hard-learner" if plan.criterion == "trim" else plan.criterion
        return own_scores(self._reference(plan, batch), learner, criterion, self.settings.loss)

    def _weighed(self, plan: Plan, batch: SuperBatch, learner: Pairs | None) -> list[tuple[Pairs, float]]:
        """The models that trimming goes by, and their scales."""
        models = []
        if learner is not None:
            models.append((learner, learner.scale if plan.learner_scale is None else plan.learner_scale))
        reference = self._reference(plan, batch)
        return models if reference is None else [*models, (reference, plan.reference_scale)]

    def _reference(self, plan: Plan, batch: SuperBatch) -> Pairs | None:
        reference = self.candidates.reference
        return reference.pairs(batch.row_B) if plan.uses_reference and reference is not None else None

    def _drawn(self, plan: Plan, counted: int) -> float:
        """The products of the draw itself; trimming compares all candidates with all."""
        widths = self.widths(plan)
        if plan.criterion == "trim":
            return 2.0 * counted * counted * widths
        size = min(self.settings.batch, counted)
        return selection_flops(counted, size, widths, self.settings.chunks) if widths else 0.0

    def widths(self, plan: Plan) -> int:
        """Embedding widths of the models that the joint draw compares."""
        if plan.criterion in ("uniform", "alignment"):
            return 0
        reference = self.candidates.reference
        own = int(self.scorer.width) if plan.uses_learner else 0
        return own + (reference.image_ND.shape[1] if plan.uses_reference and reference is not None else 0)

    @property
    def low_cost(self) -> float:
        """What a look at reduced resolution costs over one at the full."""
        return self.scorer.low_cost

    def _alignment(self, batch: SuperBatch) -> Tensor:
        assert self.trusted is not None
        module: Any = self.scorer.problem.module
        device = self.scorer.device
        token_BT = self.scorer.compact(batch.token_BT)
        return alignment_scores(module, self.trusted, (batch.image_BCHW.to(device), token_BT.to(device))).cpu()


def rank_correlation(a_B: Tensor, b_B: Tensor) -> float:
    """Spearman's: the correlation of the ranks, ties by position; 1 for a single candidate."""
    ranks = torch.stack([side.argsort(stable=True).argsort(stable=True).double() for side in (a_B, b_B)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(a_B) > 1 else 1.0
