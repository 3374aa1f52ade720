"""One update of the learner: gradients by any estimator, clipped, a step of the optimiser, the scale in bounds."""

# B batch, C channels, H, W height and width, T tokens

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curate.costs.flops import Size
from curate.estimators.penalised import Penalised
from curate.estimators.problem import Problem, trainable
from curate.estimators.report import GradientEstimator, GradReport
from curate.estimators.tangents import dimensions
from curate.learner.augment import augmented
from curate.learner.optimiser import set_rate
from curate.learner.resolution import shrink
from curate.learner.reuse import Reuse, ReusedProblem
from curate.learner.settings import TrainSettings
from curate.learner.work import PassCosts, forwards_per_step

MAX_SCALE = 100.0  # CLIP's bound on exp(logit_scale), section 2.5 of arXiv 2103.00020


@dataclass(frozen=True, slots=True)
class Update:
    """The loss before the update (None, without an update, where something is not finite), the learning rate, and the
    FLOPs of the forward pass that the scoring pass had computed already."""

    loss: float | None
    rate: float
    saved: float = 0.0


@dataclass(frozen=True, slots=True)
class Stepper:
    """Updates one learner in place."""

    settings: TrainSettings
    problem: Problem
    estimator: GradientEstimator
    optimiser: torch.optim.Optimizer
    compact: Callable[[Tensor], Tensor]
    device: torch.device
    costs: PassCosts
    low: Size | None = None
    reuse: Reuse | None = None

    def step(self, batch: tuple[Tensor, Tensor], *, step: int, steps: int, scored: Tensor | None = None) -> Update:
        """One update. `scored`: rows of the super-batch that `reuse` has just scored, which these pairs are."""
        image_BCHW, token_BT = batch
        module: Any = self.problem.module
        module.train()
        if self.settings.augment:
            image_BCHW = augmented(image_BCHW, seed=self.settings.seed, step=step)
        rate = set_rate(self.optimiser, self.settings, step, steps)
        if self.reuse is None or scored is None:
            problem, given, saved = self.problem, self._given(image_BCHW, token_BT), 0.0
            report = self.estimator.estimate(problem, given, seed=self.settings.seed, step=step)
        else:
            report, saved = self._reused(self.reuse, image_BCHW, scored, step)
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip_gradient)
        if not math.isfinite(report.loss) or not bool(torch.isfinite(norm)):
            return Update(None, rate, saved)
        self.optimiser.step()
        with torch.no_grad():
            module.logit_scale.clamp_(max=math.log(MAX_SCALE))
        return Update(report.loss, rate, saved)

    def _reused(self, reuse: Reuse, image_bCHW: Tensor, row_b: Tensor, step: int) -> tuple[GradReport, float]:
        """Gradients on rows whose forward products were kept, and the FLOPs that this saved."""
        problem: Problem = ReusedProblem(self.problem.module, reuse)
        if isinstance(self.problem, Penalised):
            problem = Penalised(problem)
        full_mCHW = image_bCHW[:0] if self.low is None else image_bCHW[::2]
        row_b = row_b if self.low is None else torch.cat([row_b[::2], row_b[1::2]])
        before = reuse.saved_flops
        given = (full_mCHW.to(self.device), row_b.to(self.device))
        report = self.estimator.estimate(problem, given, seed=self.settings.seed, step=step)
        reuse.release()
        return report, reuse.saved_flops - before

    def flops(self, batch: tuple[Tensor, Tensor]) -> float:
        """What the gradients of a batch cost."""
        image_BCHW, token_BT = batch
        if self.low is not None:
            return self._flexi_flops(len(image_BCHW), token_BT)
        forwards = forwards_per_step(
            self.estimator.name, self.settings.tangents, dimensions(trainable(self.problem.module))
        )
        if forwards is None:
            return self.costs.step(len(image_BCHW), token_BT)
        return forwards * self.costs.forward(len(image_BCHW), token_BT)

    def plain_flops(self, batch: tuple[Tensor, Tensor]) -> float:
        """What backpropagation at full resolution and the update cost: plain training's share."""
        return self.costs.step(len(batch[0]), batch[1]) + self.costs.update

    def _given(self, image_BCHW: Tensor, token_BT: Tensor) -> tuple[Tensor, ...]:
        """A batch as the problem takes it; with a low resolution every second image is shrunk."""
        tokens = self.compact(token_BT).to(self.device)
        if self.low is None:
            return image_BCHW.to(self.device), tokens
        low = shrink(image_BCHW[1::2], self.low)  # by turns: rows come in the order drawn, best first
        return image_BCHW[::2].to(self.device), low.to(self.device), torch.cat([tokens[::2], tokens[1::2]])

    def _flexi_flops(self, images: int, token_BT: Tensor) -> float:
        full, none = math.ceil(images / 2), token_BT[:0]
        return self.costs.step(full, token_BT) + self.costs.step(images - full, none, self.low)
