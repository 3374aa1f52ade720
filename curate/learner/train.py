"""Train a dual encoder on pairs drawn uniformly: AdamW, warm-up, cosine decay. One step costs three forward passes.

Captions are cut at the longest of the batch, and only the vocabulary rows that occur are trained on, which is the same
arithmetic: a row that no caption uses has no gradient, and embeddings are not decayed. With 49,408 rows of 128 numbers
that is most of a small model's optimiser step.
"""

# B batch, C channels, H, W height and width, T tokens, V vocabulary, v the rows of it that occur, W text width

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curate.errors import CurateError, UsageError
from curate.learner.augment import shift_and_zoom
from curate.learner.checkpoint import check_target, save_checkpoint
from curate.learner.dataset import PairSource, Tokenize, open_pairs
from curate.learner.embedding import embed_pairs
from curate.learner.evaluate import retrieval
from curate.learner.losses import sigmoid_loss, softmax_loss
from curate.learner.settings import TrainResult, TrainSettings
from curate.models.build import build_untrained, tokenizer_of
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from curate.models.load import encoder_of
from curate.models.precision import choose_device, has_native_bf16
from curate.models.preprocess import Preprocess
from curate.models.spec import parse_spec
from curate.models.towers import text_parts
from curate.shards.sources import Patterns, expand_shards

MAX_SCALE = 100.0  # CLIP's bound on exp(logit_scale), section 2.5 of arXiv 2103.00020


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run after `step` of `steps`: the batch's loss and the rate so far in samples per second."""

    step: int
    steps: int
    loss: float
    samples_per_second: float


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Start:
    """An untrained model and what its pairs have to be prepared with."""

    module: nn.Module
    architecture: dict[str, Any]
    tokenizer: Tokenize
    rule: Preprocess


def train(
    shards: Patterns,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Report | None = None,
    **settings: Any,
) -> TrainResult:
    """Train on `shards` and write a checkpoint that open_clip loads as `local-dir:OUTPUT`.

    `settings` are the fields of TrainSettings. Errors: UsageError for settings, an output in use or shards without a
    readable pair; ShardError; CurateError where the loss is not finite. Until the end nothing is written; an interrupt
    leaves the output as it was.
    Example: `train(["shards/{0..3}.tar"], "reference", epochs=5).loss`.
    """
    chosen, target = parse_settings(settings), Path(output)
    check_target(target, overwrite=overwrite)
    began = time.perf_counter()
    start, sources = prepare(chosen), expand_shards(shards)
    with open_pairs(sources, start.tokenizer, start.rule, memory_gb=chosen.memory_gb) as opened:
        losses = fit(start.module, opened.pairs, chosen, progress)
        samples, skipped = len(opened.pairs), opened.skipped
    seconds = time.perf_counter() - began
    record = {
        "settings": asdict(chosen),
        "inputs": [asdict(s) for s in sources],
        "samples": samples,
        "skipped": skipped,
        "steps": len(losses),
        "seconds": round(seconds, 3),
        "losses": [round(x, 5) for x in losses],
        "evaluation": _evaluate(start, chosen),
    }
    path = save_checkpoint(start.module, target, architecture=start.architecture, training=record, overwrite=overwrite)
    return TrainResult(path, len(losses), seconds, _tail(losses), samples, skipped)


def parse_settings(settings: dict[str, Any]) -> TrainSettings:
    """Errors: UsageError for a name that is not a setting."""
    known = [f.name for f in fields(TrainSettings)]
    if unknown := sorted(set(settings) - set(known)):
        raise UsageError(f"training settings: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    return TrainSettings(**settings)


def prepare(settings: TrainSettings) -> Start:
    """Build the untrained model of `settings`. Errors: UsageError where `model` names weights; ModelError."""
    import open_clip

    spec = parse_spec(settings.model)
    if spec.kind != "untrained":
        raise UsageError(
            f"model {settings.model!r}: training starts from an architecture such as curate-tiny or ViT-B-32"
        )
    ours = spec.architecture in CONFIGS
    base = CONFIGS[spec.architecture] if ours else open_clip.get_model_config(spec.architecture)
    architecture = with_loss(base, settings.loss)
    module: Any = build_untrained(architecture, seed=settings.seed, preprocess=PREPROCESS if ours else {})
    return Start(module, architecture, tokenizer_of(spec), Preprocess.from_config(module.visual.preprocess_cfg))


def fit(module: nn.Module, pairs: PairSource, settings: TrainSettings, progress: Report | None = None) -> list[float]:
    """Train `module` in place and return the loss of each step. The same on every run of one machine and thread count.

    Errors: CurateError, naming the step, where the loss is not finite.
    """
    device = choose_device(settings.device)
    module.to(device).train()
    if getattr(getattr(module, "visual", None), "conv1", None) is not None:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    losses: list[float] = []
    began, seen, steps = time.perf_counter(), 0, settings.total_steps(len(pairs))
    with _occurring_vocabulary(module, pairs.token_NT) as compact:
        optimiser = _optimiser(module, settings)
        for step, (image_BCHW, token_BT) in enumerate(_batches(pairs, settings, steps)):
            _set_rate(optimiser, settings, step, steps)
            losses.append(_step(module, optimiser, image_BCHW.to(device), compact(token_BT).to(device), settings, step))
            seen += len(token_BT)
            if progress is not None:
                progress(Progress(step + 1, steps, losses[-1], seen / (time.perf_counter() - began)))
    module.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return losses


def _batches(pairs: PairSource, settings: TrainSettings, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one permutation after another; a batch never crosses the end of an epoch with fewer than two rows."""
    dice = torch.Generator().manual_seed(settings.seed)
    size, made, dry = min(settings.batch, len(pairs)), 0, 0
    if size < 2:
        raise UsageError("training needs at least two readable pairs")
    while made < steps:
        order = torch.randperm(len(pairs), generator=dice).tolist()
        for first in range(0, len(order) - size + 1, size):
            image_BCHW, token_BT = pairs.batch(order[first : first + size])
            dry = 0 if len(token_BT) > 1 else dry + 1
            if dry > len(pairs) // size:
                raise UsageError("no batch with two readable images in a whole epoch; `curate inspect` shows why")
            if len(token_BT) < 2:
                continue
            yield (shift_and_zoom(image_BCHW, dice) if settings.augment else image_BCHW), token_BT
            made += 1
            if made == steps:
                return


def _step(
    module: Any,
    optimiser: torch.optim.Optimizer,
    image_BCHW: Tensor,
    token_BT: Tensor,
    settings: TrainSettings,
    step: int,
) -> float:
    with _autocast(settings, image_BCHW.device):
        image_BD, text_BD = embed_pairs(module, image_BCHW, token_BT)
    scale = module.logit_scale.exp()
    loss = (
        softmax_loss(image_BD, text_BD, scale)
        if module.logit_bias is None
        else sigmoid_loss(image_BD, text_BD, scale, module.logit_bias)
    )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise CurateError(
            f"the loss is {value} at step {step + 1}; nothing was written; lower lr (now {settings.lr}) "
            "or use precision fp32"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), settings.clip_gradient)
    optimiser.step()
    with torch.no_grad():
        module.logit_scale.clamp_(max=math.log(MAX_SCALE))
    return value


def _autocast(settings: TrainSettings, device: torch.device) -> Any:
    wanted = settings.precision == "bf16" or (settings.precision == "auto" and has_native_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def _optimiser(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Matrices and kernels are decayed; gains, biases, embeddings, scale and bias of the loss are not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
    kept = [p for name, p in named if p.ndim <= 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def _set_rate(optimiser: torch.optim.Optimizer, settings: TrainSettings, step: int, steps: int) -> None:
    warm = max(1, round(settings.warmup * steps))
    share = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    for group in optimiser.param_groups:
        group["lr"] = settings.lr * share


@contextmanager
def _occurring_vocabulary(module: nn.Module, token_NT: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Train only the vocabulary rows that occur, and put them back at the end; yields the map of the token ids.

    Ids keep their order, so that the end token stays the largest. A tower that looks for one id is left as it is.
    """
    parts = text_parts(module)
    if parts is None or parts.pool_type != "argmax":
        yield lambda token_BT: token_BT
        return
    whole, used_v = parts.token_embedding, torch.unique(token_NT)
    owner: Any = module if hasattr(module, "token_embedding") else module.text
    owner.token_embedding = nn.Embedding.from_pretrained(
        whole.weight.detach()[used_v.to(whole.weight.device)], freeze=False
    )
    try:
        yield lambda token_BT: torch.searchsorted(used_v, token_BT)
    finally:
        with torch.no_grad():
            whole.weight[used_v.to(whole.weight.device)] = owner.token_embedding.weight.detach()
        owner.token_embedding = whole


def _evaluate(start: Start, settings: TrainSettings) -> dict[str, float] | None:
    if not settings.eval_shards:
        return None
    encoder = encoder_of(
        start.module,
        settings.model,
        start.tokenizer,
        architecture=start.architecture,
        device=choose_device(settings.device),
    )
    with open_pairs(
        expand_shards(settings.eval_shards), start.tokenizer, start.rule, memory_gb=settings.memory_gb
    ) as opened:
        return retrieval(encoder, opened.pairs)


def _tail(losses: Sequence[float]) -> float:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
