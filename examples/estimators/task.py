"""The model and the data of the study: vision transformer and text transformer of open_clip on drawn scenes."""

# N pairs, B batch, C channels, H, W height and width, T tokens, D embedding width

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curate.demonstration.corpus import draw_corpus
from curate.estimators.problem import DualEncoderProblem
from curate.evaluation.recall import recall
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.surgery import replace_feedforward
from curate.learner.dataset import open_pairs
from curate.models.build import build_untrained, tokenizer_of
from curate.models.configs import PREPROCESS, with_loss
from curate.models.preprocess import Preprocess
from curate.models.spec import parse_spec
from curate.shards.sources import expand_shards

PIXELS, PATCH, CONTEXT, HEAD = 64, 16, 32, 32
POOL = 100  # of pairs, in which the held-out ones are ranked
FEW = 1_000  # words of the models that are only timed and weighed


@dataclass(frozen=True, slots=True)
class Task:
    """Pairs in memory, the last `held` of which are held out; `words` is the vocabulary that occurs."""

    image_NCHW: Tensor
    token_NT: Tensor
    held: int
    words: int

    def batch(self, size: int, step: int) -> tuple[Tensor, Tensor]:
        """Training pairs of a step, the same for every estimator."""
        dice = torch.Generator().manual_seed(step)
        row_B = torch.randint(0, len(self.token_NT) - self.held, (size,), generator=dice)
        return self.image_NCHW[row_B], self.token_NT[row_B]

    def measure(self, problem: DualEncoderProblem) -> tuple[float, float]:
        """Loss and recall at one, image to caption, over pools of 100 held-out pairs."""
        problem.module.eval()
        images, texts, losses = [], [], []
        with torch.no_grad():
            for start in range(len(self.token_NT) - self.held, len(self.token_NT), POOL):
                rows = slice(start, start + POOL)
                image_BD, text_BD = problem.embed((self.image_NCHW[rows], self.token_NT[rows]))
                losses.append(float(problem.loss(image_BD, text_BD)))
                images.append(image_BD)
                texts.append(text_BD)
            pool = min(POOL, self.held)
            found = recall(torch.cat(images), torch.cat(texts), torch.arange(self.held), pool=pool, ks=(1,))
        problem.module.train()
        return sum(losses) / len(losses), found.image_to_text[1] / self.held


def read_task(shards: Sequence[str], samples: int, held: int) -> Task:
    """The pairs of `shards`, or so many drawn scenes; `held` of them are held out."""
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        if not shards:
            corpus = draw_corpus(Path(folder), samples=20, shards=2, clean_reference=samples)
            shards = [str(path) for path in corpus.reference]
        rule = Preprocess.from_config({**PREPROCESS, "size": PIXELS})
        tokenizer = tokenizer_of(parse_spec("curate-tiny"))
        with open_pairs(expand_shards(shards), tokenizer, rule) as opened:
            image_NCHW, token_NT = opened.pairs.batch(range(len(opened.pairs)))
    # only words that occur, in their order, so that the end token stays the largest
    used, token_NT = torch.unique(token_NT, return_inverse=True)
    return Task(image_NCHW, token_NT, held, len(used))


def problem_of(width: int, layers: int, words: int, *, fast: bool = False, active: int = 0) -> DualEncoderProblem:
    """Two towers of so many blocks; with `fast`, layers of 8 leaves of `active` neurons in place of 4 x width."""
    vision = {"image_size": PIXELS, "layers": layers, "width": width, "patch_size": PATCH, "head_width": HEAD}
    text = {"context_length": CONTEXT, "vocab_size": words, "width": width, "heads": width // HEAD, "layers": layers}
    config: dict[str, Any] = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    module = build_untrained(with_loss(config, "sigmoid"), seed=0, preprocess=PREPROCESS)
    if fast:
        replace_feedforward(module, FeedforwardConfig(depth=3, leaf_width=active or width // 2))
    return DualEncoderProblem(module.train())


def noise(batch: int) -> tuple[Tensor, Tensor]:
    """Pairs without meaning, captions as long as the context allows, for times and memory."""
    dice = torch.Generator().manual_seed(0)
    image_BCHW = torch.randint(0, 256, (batch, 3, PIXELS, PIXELS), generator=dice, dtype=torch.uint8)
    token_BT = torch.randint(1, FEW - 1, (batch, CONTEXT), generator=dice)
    token_BT[:, -1] = FEW - 1
    return image_BCHW, token_BT
