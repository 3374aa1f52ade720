"""Build the model that a run starts from: an architecture at random, or weights of an earlier run or of open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.dense import choose, parts_of
from curate.feedforward.surgery import replace_feedforward
from curate.learner.dataset import Tokenize
from curate.learner.settings import TrainSettings
from curate.models.build import build, build_untrained, config_of, safe_weights, stored_feedforward, tokenizer_of
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from curate.models.preprocess import Preprocess
from curate.models.spec import ModelSpec, parse_spec


@dataclass(frozen=True, slots=True)
class Start:
    """A model to train, and what its pairs have to be prepared with."""

    module: nn.Module
    architecture: dict[str, Any]
    tokenizer: Tokenize
    rule: Preprocess
    feedforward: FeedforwardConfig | None = None


def prepare(settings: TrainSettings) -> Start:
    """Build the model of `settings`. Errors: ModelError; UsageError for weights of another loss, or blocks that take no
    fast feedforward layers."""
    spec = parse_spec(settings.model)
    module, architecture = _untrained(spec, settings) if spec.kind == "untrained" else _trained(spec, settings)
    feedforward = stored_feedforward(spec) or _replaced(module, settings)
    rule = Preprocess.from_config(module.visual.preprocess_cfg)
    return Start(module, architecture, tokenizer_of(spec), rule, feedforward)


def _untrained(spec: ModelSpec, settings: TrainSettings) -> tuple[Any, dict[str, Any]]:
    import open_clip

    ours = spec.architecture in CONFIGS
    base = CONFIGS[spec.architecture] if ours else open_clip.get_model_config(spec.architecture)
    architecture = with_loss(base, settings.loss)
    return build_untrained(architecture, seed=settings.seed, preprocess=PREPROCESS if ours else {}), architecture


def _trained(spec: ModelSpec, settings: TrainSettings) -> tuple[Any, dict[str, Any]]:
    module: Any = build(spec, safe_weights(spec), "fp32", settings.seed)
    own = "softmax" if module.logit_bias is None else "sigmoid"
    if own != settings.loss:
        raise UsageError(f"model {spec.text!r} was trained with the {own} loss; go on with --loss {own}")
    return module.float(), config_of(spec)


def _replaced(module: nn.Module, settings: TrainSettings) -> FeedforwardConfig | None:
    """Fast feedforward layers in place of the dense ones, as wide in all leaves together as these unless told."""
    if settings.ffn == "dense":
        return None
    sites = choose(module, "all")
    if not sites:
        raise UsageError(f"model {settings.model!r} has no transformer blocks to put fast feedforward layers into")
    neurons = min(parts_of(site).inward.out_features for site in sites)
    width = settings.ffn_leaf_width or max(1, neurons >> settings.ffn_depth)
    config = FeedforwardConfig(depth=settings.ffn_depth, leaf_width=width, balance=0.01 if settings.penalised else 0.0)
    dice = torch.Generator().manual_seed(settings.seed)
    replace_feedforward(module, config, generator=dice)
    return config
