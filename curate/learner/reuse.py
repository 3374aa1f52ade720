"""Reuse the scoring pass as the forward pass of training: the products of the chosen rows are not computed again.

A super-batch is scored with the weights that its sub-batch is then trained with, so that the forward pass of the chosen
rows has been computed already: of B F + 3 b F FLOPs, b F are repeated (an eighth at B = 5 b). Here the scoring pass
keeps what matrix products, convolutions and attention return. In training, autograd runs as ever and saves every true
input; below it, a `TorchDispatchMode` answers those operations with the kept rows. What lies between (norms,
activations, sums) is computed again, so that the backward pass is exact.

It holds where a row's activations depend on that row alone, which `curate.learner.trial` finds out, for each tower by
itself; what is not understood is computed. The price is memory: 10 W floats for each token and block of a transformer
of width W, for all B candidates (`Reuse.nbytes`).

Measured on one busy AVX2 core (CPU time, medians of alternate steps, B = 320, b = 64, images of 65 tokens, captions of
16): a step takes 0.95 of the time at width 192 with 6 blocks, 1.0 GB kept, and 0.92 at width 384 with 4 blocks, 1.4 GB
kept; FLOPs 0.876 in both: 115 and 230 FLOPs for each byte kept. Where captions alone can be reused (curate-tiny in
training, B = 640, b = 128) it saves 1 % of the FLOPs and costs 1.5 % of the time; a ConvNet of 24, 48 and 96 channels
(a dozen FLOPs for each byte) took 1.37 of the time. So ask `Reuse.pays` first.
"""

# B candidates of a super-batch, b chosen, U distinct captions, u those of the chosen, m full images of a flexi batch,
# T tokens, D embedding width

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curate.costs.flops import Size, image_work, text_work
from curate.estimators.problem import DualEncoderProblem, Embeddings
from curate.learner.embedding import embed_images, embed_texts
from curate.learner.resolution import at_size, full_size
from curate.learner.tape import OtherCourseError, Plan, Tape
from curate.learner.trial import noise_images, noise_tokens, plan_of
from curate.models.modes import evaluating
from curate.models.towers import pooled_position, text_parts

WORTHWHILE = 0.03  # share of a step's FLOPs from which on the time follows
INTENSITY = 64.0  # FLOPs of a forward pass for each byte kept: below it, keeping costs more than it saves
_OTHER = "the forward pass took another course than in the trial"


class Reuse:
    """A learner whose scoring pass is kept for the sub-batch that is drawn from it. One super-batch at a time.

        reuse = Reuse(module, limit_bytes=2e9)                  # reuse.why_not: None, or the reason
        image_BD, text_BD = reuse.score(image_BCHW, token_BT)   # no graph
        problem = ReusedProblem(module, reuse)
        report = Backprop().estimate(problem, (image_BCHW[:0], row_b), seed=0, step=0)

    `size` is the resolution of scoring, `micro` the rows that run together, `distinct` embeds repeated captions once. A
    tower of which nothing can be reused is scored in evaluation mode, and computed again in training
    (`image.why_not`, `text.why_not`). Where the weights or the mode have changed since, or the limit would be passed,
    `refused` says so and the rows are computed. `saved_flops` adds up. Images are kept as they were scored: what is
    augmented is augmented before.
    """

    def __init__(
        self,
        module: Any,
        *,
        size: Size | None = None,
        limit_bytes: float = 2e9,
        micro: int = 64,
        bf16: bool = False,
        distinct: bool = False,
    ) -> None:
        self._module, self._size, self._micro = module, size or full_size(module), micro
        self._bf16, self._distinct, self.limit_bytes = bf16, distinct, limit_bytes
        self.refused: str | None = None
        self.saved_flops = 0.0
        self._scored: _Scored | None = None
        device = next(module.parameters()).device
        image_3CHW, token_3T = noise_images(self._size, device), noise_tokens(module, device)
        self._trial_tokens, self._trial_modes = token_3T.shape[1], _modes(module)
        with self._casting(device):
            self.image = plan_of(module, "image", image_3CHW, self._images)
            self.text = plan_of(module, "text", token_3T, lambda part: self._texts(part, self._trial_tokens))

    @property
    def why_not(self) -> str | None:
        """Why nothing at all is reused; None where a tower is."""
        both = self.image.why_not and self.text.why_not
        return f"{self.image.why_not}; {self.text.why_not}" if both else None

    def nbytes(self, rows: int, tokens: int) -> float:
        """Bytes that a super-batch leaves, with captions of `tokens` tokens.

        Example: a ViT of width 192, 6 blocks and 65 tokens keeps 3.0 MB of each image.
        """
        return rows * (self.image.row_bytes + self.text.row_bytes * tokens / self._trial_tokens)

    def saving(self, candidates: int, chosen: int, tokens: int | None = None) -> float:
        """Share of a step's FLOPs (scoring `candidates` pairs, training on `chosen` of them) that reuse saves.

        Example: 0.125 for 64 of 320 where both towers are reused, b F of (B + 3 b) F.
        """
        work = (
            (self.image, image_work(self._module, size=self._size, training=True)),
            (self.text, text_work(self._module, tokens, training=True)),
        )
        saved = chosen * sum(w.forward for plan, w in work if plan.why_not is None)
        return saved / sum(candidates * w.forward + chosen * w.step for _, w in work)

    def pays(self, candidates: int, chosen: int, tokens: int | None = None) -> bool:
        """Is there enough to be saved, and for few enough bytes, that a step takes less time?"""
        if self.why_not is not None or self.saving(candidates, chosen, tokens) < WORTHWHILE:
            return False
        work = ((self.image, image_work(self._module, size=self._size)), (self.text, text_work(self._module, tokens)))
        flops = candidates * sum(w.forward for plan, w in work if plan.why_not is None)
        return flops >= INTENSITY * self.nbytes(candidates, tokens or self._trial_tokens)

    def score(self, image_BCHW: Tensor, token_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] of a super-batch, without a graph; what can be reused is kept until the next call."""
        self.release()
        token_UT, caption_B = token_BT, torch.arange(len(token_BT), device=token_BT.device)
        if self._distinct:
            token_UT, caption_B = torch.unique(token_BT, dim=0, return_inverse=True)
        parts = text_parts(self._module)
        length = token_BT.shape[1] if parts is None else int(pooled_position(parts, token_BT).max()) + 1
        self.refused = self._objection(len(token_BT), length)
        plans = [Plan(why_not=self.refused) if self.refused else plan for plan in (self.image, self.text)]
        scored = _Scored(image_BCHW, token_UT, caption_B, length, _state(self._module), Tape(plans[0]), Tape(plans[1]))
        with self._casting(image_BCHW.device):
            image_BD = self._pass(scored.image, self._images, image_BCHW)
            text_UD = self._pass(scored.text, lambda part: self._texts(part, length), token_UT)
        self._scored = scored
        return image_BD, text_UD[caption_B]

    def embed(self, row_b: Tensor, *, images_from: int = 0) -> tuple[Tensor, Tensor]:
        """Embeddings of chosen rows with their graph; of the images those from `images_from` on.

        What was kept is used once: a second call computes. Errors: RuntimeError before a super-batch was scored.
        """
        scored = self._scored
        if scored is None:
            raise RuntimeError("no super-batch has been scored that rows could be taken from")
        row_b = row_b.to(scored.caption_B.device)
        if scored.state != _state(self._module):
            self.refused = "the weights have changed since the scoring pass"
            scored.image.give_up(self.refused)
            scored.text.give_up(self.refused)
        row_n = row_b[images_from:]
        caption_u, back_b = torch.unique(scored.caption_B[row_b], return_inverse=True)
        with self._casting(row_b.device):
            text_uD = self._again(
                scored.text, lambda part: self._texts(part, scored.length), scored.token_UT, caption_u
            )
            if not len(row_n):
                return text_uD.new_zeros(0, text_uD.shape[1]), text_uD[back_b]
            ascending_n, order_n = row_n.sort()
            image_nD = self._again(scored.image, self._images, scored.image_BCHW, ascending_n)
        return image_nD[order_n.argsort()], text_uD[back_b]

    def embed_full(self, image_mCHW: Tensor) -> Tensor:
        """Embeddings of images at the model's own size, with their graph."""
        with self._casting(image_mCHW.device):
            return embed_images(self._module, image_mCHW)

    def release(self) -> None:
        """Let go of what is kept, the super-batch included."""
        self._scored = None

    def _objection(self, rows: int, tokens: int) -> str | None:
        if _modes(self._module) != self._trial_modes:
            return "the model went from training to evaluation, or back, since the trial"
        needed = self.nbytes(rows, tokens)
        if needed > self.limit_bytes:
            return (
                f"{needed / 1e9:.3g} GB to keep for {rows} candidates, above the limit of {self.limit_bytes / 1e9:.3g}"
            )
        return None

    def _pass(self, tape: Tape, embed: Callable[[Tensor], Tensor], input_BX: Tensor) -> Tensor:
        made = []
        for part in _parts(input_BX, self._micro):
            if tape.plan.why_not is None:
                try:
                    made.append(tape.record(lambda part=part: embed(part), len(part)))  # type: ignore[misc]
                    continue
                except OtherCourseError:
                    self.refused = _OTHER
                    tape.give_up(_OTHER)
            with evaluating(self._module), torch.no_grad():  # batch norms keep their statistics
                made.append(embed(part))
        return torch.cat(made)

    def _again(self, tape: Tape, embed: Callable[[Tensor], Tensor], input_BX: Tensor, row_b: Tensor) -> Tensor:
        chosen_bX = input_BX[row_b.to(input_BX.device)]
        if tape.plan.why_not is None and tape.kept:
            try:
                embedding, saved = tape.replay(lambda: embed(chosen_bX), row_b)
            except OtherCourseError:
                self.refused = _OTHER
            else:
                self.saved_flops += saved
                return embedding
            finally:
                tape.kept.clear()
        return embed(chosen_bX)

    def _images(self, image_BCHW: Tensor) -> Tensor:
        with at_size(self._module, self._size):
            return embed_images(self._module, image_BCHW)

    def _texts(self, token_UT: Tensor, length: int) -> Tensor:
        return embed_texts(self._module, token_UT, length=length)

    def _casting(self, device: torch.device) -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext()


@dataclass(frozen=True, slots=True)
class ReusedProblem(DualEncoderProblem):
    """The learner's problem on rows of the super-batch that `reuse` scored.

    A batch is (uint8 images [m, C, H, W], rows [b] of the super-batch, int64): the first m pairs are trained with these
    images, as flexi does at full resolution, the others with those that were scored; m is 0 without flexi. Gradients
    are those of backprop to rounding. An estimator that embeds twice computes the second time.
    """

    reuse: Reuse

    def embed(self, batch: Any) -> Embeddings:
        image_mCHW, row_b = batch
        image_nD, text_bD = self.reuse.embed(row_b, images_from=len(image_mCHW))
        if not len(image_mCHW):
            return image_nD, text_bD
        return torch.cat([self.reuse.embed_full(image_mCHW), image_nD]), text_bD

    def read(self, side: int, output: Tensor, batch: Any) -> Tensor | None:  # noqa: ARG002
        return None


@dataclass(slots=True)
class _Scored:
    """A super-batch, and what its scoring pass left."""

    image_BCHW: Tensor
    token_UT: Tensor
    caption_B: Tensor
    length: int
    state: list[tuple[int, int]]
    image: Tape
    text: Tape


def _parts(input_BX: Tensor, micro: int) -> Sequence[Tensor]:
    """Micro-batches of about one size; none has a single row, for which torch takes other operations."""
    B = len(input_BX)
    return input_BX.tensor_split(max(1, min(-(-B // micro), B // 2)))


def _state(module: nn.Module) -> list[tuple[int, int]]:
    # by identity too: an estimator may put other tensors in the place of parameters
    return [(id(parameter), parameter._version) for parameter in module.parameters()]


def _modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]
