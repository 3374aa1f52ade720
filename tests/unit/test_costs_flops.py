"""FLOPs: the analytic count against torch's counter, forward and backward, and against sums worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curate.costs import flops
from curate.costs.flops import (
    contrastive_work,
    image_work,
    optimiser_flops,
    sample_work,
    selection_flops,
    text_work,
)
from curate.costs.products import feedforward_flops
from curate.errors import ModelError, UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.feedforward.report import report
from curate.feedforward.surgery import replace_feedforward
from curate.models.configs import PREPROCESS
from curate.models.embed import encode_images, encode_texts
from curate.models.load import encoder_of
from tests.conftest import MINI

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TEXT: dict[str, Any] = MINI["text_cfg"]
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {},
    "vision transformer": {"vision_cfg": VISION},
    "oblong": {"vision_cfg": {**VISION, "image_size": [16, 40], "patch_size": [8, 4]}},
    "average pool": {"vision_cfg": {**VISION, "pool_type": "avg", "ls_init_value": 0.1}},
    "custom blocks": {
        "vision_cfg": {**VISION, "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True},
        "text_cfg": {**TEXT, "qk_norm": True, "scale_attn": True},
    },
    "class token": {"custom_text": True, "text_cfg": {**TEXT, "embed_cls": True}},
    "bidirectional text": {
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}


def model_of(change: dict[str, Any]) -> Any:
    config = {**MINI, **change}
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    return kind(**config)


@lru_cache
def vit() -> Any:
    return model_of({"vision_cfg": VISION})


def with_leaves() -> Any:
    model = model_of({"vision_cfg": VISION})
    replace_feedforward(model, FeedforwardConfig(depth=3, leaf_width=8))
    return model


def counted(run: Callable[[], Any]) -> tuple[float, float]:
    """torch's own (forward, backward), with attention as two products, which it can see."""
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            out = run()
            forward = counter.get_total_flops()
            out.sum().backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return forward, counter.get_total_flops() - forward


def blank(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.zeros(1, 3, height, width), torch.ones(1, 24, dtype=torch.long)


def agrees(model: Any) -> None:
    image, tokens = blank(model)
    for work, run in (
        (image_work(model, training=True), lambda: model.encode_image(image)),
        (text_work(model, training=True), lambda: model.encode_text(tokens)),
    ):
        assert work.how == "analytic"
        assert (work.forward, work.backward) == counted(run)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_torch_counter(kind: str) -> None:
    """Forward and backward FLOPs of both towers are those that torch counts when attention is visible to it."""
    agrees(model_of(MODELS[kind]).eval())


FROZEN: dict[str, Callable[[str], bool]] = {
    "text": lambda name: not name.startswith("visual"),
    "image": lambda name: name.startswith("visual"),
    "first block": lambda name: "resblocks.0" in name or "embedding" in name or "conv1" in name or "ln_pre" in name,
    "stem and a layer": lambda name: name.startswith(("visual.conv", "visual.bn", "visual.layer1")),
    "all but a norm": lambda name: not name.endswith("resblocks.1.ln_2.weight"),
    "weights of attention": lambda name: "in_proj" in name,
    "all but one branch": lambda name: name not in ("visual.layer1.0.conv1.weight", "text_projection"),
    "biases": lambda name: name.endswith("bias"),
    "all but a shortcut": lambda name: "layer3.0.downsample" not in name and "ln_final" not in name,
}


@pytest.mark.parametrize("kind", ["resnet", "vision transformer"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_weights_save_what_autograd_skips(kind: str, frozen: str) -> None:
    """With some parameters frozen the way back costs exactly what torch still computes."""
    model = model_of(MODELS[kind]).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    image, tokens = blank(model)
    for work, run in (
        (image_work(model, training=True), lambda: model.encode_image(image)),
        (text_work(model, training=True), lambda: model.encode_text(tokens)),
    ):
        if not run().requires_grad:
            assert work.backward == 0
        else:
            assert (work.forward, work.backward) == counted(run)


def test_a_vision_transformer_by_hand() -> None:
    """A ViT of width 32, 3 blocks, 16 patches of 8 x 8: patches, blocks and the projection, term by term."""
    T, W, D = 17, 32, 16
    patches = 2 * 16 * (3 * 8 * 8) * W  # 196,608
    block = 2 * T * (3 * W * W + W * W + 4 * W * W + 4 * W * W) + 2 * 2 * T * T * W  # 417,792 + 36,992
    work = image_work(vit(), training=True)
    assert work.forward == patches + 3 * block + 2 * W * D == 1_561_984
    # every product twice on the way back, but the pixels have no gradient
    assert work.backward == 2 * work.forward - patches
    assert work.step == work.forward + work.backward


def test_a_text_tower_by_hand() -> None:
    """A text transformer of width 32 and 2 blocks at 8 tokens; attention grows with the square of the tokens."""
    T, W, D = 8, 32, 16
    block = 2 * T * 12 * W * W + 4 * T * T * W  # 196,608 + 8,192
    assert text_work(vit(), T).forward == 2 * block + 2 * W * D == 410_624
    whole = text_work(vit())
    assert whole.forward == text_work(vit(), 24).forward == text_work(vit(), 1000).forward
    assert whole.forward == 2 * (2 * 24 * 12 * W * W + 4 * 24 * 24 * W) + 2 * W * D


def test_attention_that_torch_does_not_see_is_counted() -> None:
    """Where torch counts nothing for attention on a CPU, this count exceeds it by exactly the two products."""
    counter = FlopCounterMode(display=False)
    with counter:
        vit().eval().encode_image(blank(vit())[0])
    assert image_work(vit()).forward - counter.get_total_flops() == 3 * 4 * 17 * 17 * 32


def test_published_size() -> None:
    """ViT-B/32 at 224 pixels and 77 tokens is open_clip's own 14.78e9 to less than 1 %; a step three times that."""
    with torch.device("meta"):
        model = open_clip.CLIP(
            512,
            {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
            {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        )
    work = sample_work(model)
    assert work.forward == pytest.approx(14.78e9, rel=0.01)
    assert work.step == 3 * work.forward - 2 * 49 * 3 * 32 * 32 * 768
    assert work.step == pytest.approx(44.1e9, rel=0.01)


def test_a_smaller_image_costs_its_own_patches() -> None:
    """At half the side the transformer has a quarter of the patches, and the class token stays."""
    small = image_work(vit(), size=(16, 16))
    assert small.forward == 2 * 4 * 192 * 32 + 3 * (2 * 5 * 12 * 32 * 32 + 4 * 25 * 32) + 2 * 32 * 16
    resnet = model_of({})
    assert 0.2 < image_work(resnet, size=(32, 32)).forward / image_work(resnet, size=(64, 64)).forward < 0.3
    with pytest.raises(UsageError, match="4 x 32 is smaller than a patch"):
        image_work(vit(), size=(4, 32))


def test_dropped_patches_are_not_counted_in_training() -> None:
    """Patch dropout leaves half of the patches in training and all of them in scoring."""
    model = model_of({"vision_cfg": {**VISION, "patch_dropout": 0.5}})
    image = blank(model)[0]
    assert image_work(model).forward == image_work(vit()).forward
    work = image_work(model, training=True)
    assert (work.forward, work.backward) == counted(lambda: model.train().encode_image(image))


def test_our_layers_are_counted_where_the_counter_sees_nothing() -> None:
    """A model whose feedforward layers were replaced costs what its report says, in each tower."""
    model = with_leaves()
    assert sample_work(model, training=False).forward == report(model).model_flops
    rest = sample_work(vit(), training=False).forward
    assert sample_work(model, training=False).forward == rest - 2 * (3 * 17 + 2 * 24) * (8 * 32 * 32 - 3 * 32 - 8 * 64)


@pytest.mark.parametrize(
    ("settings", "training", "forward", "backward"),
    [
        ({}, False, 2 * (2 * 32 + 16 * 64), None),
        ({}, True, 2 * (3 * 32 + 16 * 64), 4 * (3 * 32 + 16 * 64)),
        ({"gate": "none"}, True, 2 * (2 * 32 + 16 * 64), 4 * 16 * 64),
        ({"gate": "none", "balance": 0.1}, True, 2 * (3 * 32 + 16 * 64), 4 * (3 * 32 + 16 * 64)),
        ({"gate": "probability"}, False, 2 * (3 * 32 + 16 * 64), None),
        ({"shared_width": 4}, True, 2 * (3 * 32 + 20 * 64), 4 * (3 * 32 + 20 * 64)),
    ],
)
def test_a_leaf_layer_by_hand(settings: Any, training: bool, forward: int, backward: int | None) -> None:
    """Per token: nodes on the path, or all where a gate or penalty needs them, one leaf, the shared part."""
    layer = FastFeedforward(32, depth=2, leaf_width=16, **settings)
    found = feedforward_flops(layer, training=training, live=True)
    assert found[0] == forward
    assert backward is None or found[1] == backward


@pytest.mark.parametrize("soft", [False, True])
def test_a_leaf_layer_against_plain_torch(soft: bool) -> None:
    """Four leaves in one: what torch counts for the soft mixture is the formula, less the mixing of the biases."""
    layer = FastFeedforward(32, depth=2, leaf_width=16, kernel="plain")
    layer.soft = soft
    forward, backward = feedforward_flops(layer, training=True, live=True)
    x = torch.randn(1, 32, requires_grad=True)
    seen = counted(lambda: layer(x))
    if soft:
        assert seen == (forward + 2 * 4 * 32, backward + 4 * 4 * 32)
    else:
        assert seen[0] == pytest.approx(forward, rel=0.05)


def test_a_path_layer_by_hand() -> None:
    """Two trees of depth 3: four neurons each, in and out, three times that in a step."""
    layer = PathFeedforward(32, depth=3, trees=2)
    assert feedforward_flops(layer, training=True, live=True) == (2 * 2 * 4 * 64, 4 * 2 * 4 * 64)
    assert feedforward_flops(layer.requires_grad_(False), training=True, live=False) == (2 * 2 * 4 * 64, 0)


def test_another_tower_is_run_under_the_counter() -> None:
    """A timm tower is counted by running it: the same as torch's count, and the model is left as it was."""
    config: dict[str, Any] = {
        **MINI,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token"},
    }
    model = open_clip.CLIP(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = image_work(model, training=True)
    assert work.how == sample_work(model).how == "counter"
    assert text_work(model).how == "analytic"
    assert (work.forward, work.backward) == counted(lambda: model.encode_image(torch.zeros(1, 3, 224, 224)))
    assert image_work(model).forward == work.forward
    assert image_work(model).backward == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_running_a_known_tower_gives_the_same(frozen: bool) -> None:
    """The way out for unknown towers agrees with the analytic count, our layers and frozen weights included."""
    model = with_leaves()
    for parameter in model.visual.transformer.resblocks[0].parameters():
        parameter.requires_grad_(not frozen)
    for size, tokens, work in (
        ((32, 32), None, image_work(model, training=True)),
        (None, 24, text_work(model, training=True)),
    ):
        run = flops.count(model, size, tokens, True)
        assert (run.forward, run.backward) == (work.forward, work.backward)
    assert isinstance(model.visual.transformer.resblocks[0].mlp, FastFeedforward)


def test_an_unknown_layer_is_run() -> None:
    """A block with a layer of somebody else's makes no wrong sum: the tower is run instead."""
    model = model_of({"vision_cfg": VISION})
    model.visual.transformer.resblocks[1].mlp.add_module("extra", nn.Conv1d(17, 17, 1))
    work = image_work(model, training=True)
    assert work.how == "counter"
    assert work.forward == image_work(vit()).forward + 2 * 17 * 17 * 32
    with pytest.raises(ModelError, match="an image of 8 x 8 does not pass it"):
        image_work(model, size=(8, 8))


def test_no_open_clip_model() -> None:
    """Something without the two towers is refused."""
    with pytest.raises(UsageError, match="no open_clip model with a `visual` tower"):
        image_work(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no open_clip model with a text tower"):
        text_work(nn.Linear(2, 2))


def test_what_is_not_a_tower() -> None:
    """Similarities, the draw and the update have their own counts."""
    assert contrastive_work(128, 64).step == 3 * 2 * 128 * 64
    assert selection_flops(163_840, 32_768, 2 * 768, 16) == pytest.approx(3.1e13, rel=0.01)
    model = vit()
    assert optimiser_flops(model) == 14 * sum(parameter.numel() for parameter in model.parameters())
    layer = nn.Linear(10, 3)
    layer.bias.requires_grad_(False)
    assert optimiser_flops(layer, "sgd") == 60
    with pytest.raises(UsageError, match="'lion' is none of adamw"):
        optimiser_flops(layer, "lion")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["resnet", "vision transformer", "oblong", "average pool", "custom blocks", "class token"]
)
def test_scoring_costs_what_its_path_runs(kind: str) -> None:
    """An encoder's FLOPs, at the caption's own length where the path is cut, are what torch counts while it embeds."""
    model: Any = model_of(MODELS[kind])
    model.visual.preprocess_cfg = {"size": model.visual.image_size, **PREPROCESS}
    encoder = encoder_of(model, "test", open_clip.SimpleTokenizer(context_length=24))
    height, width = encoder.rule.height, encoder.rule.width

    def embedded(run: Callable[[], Any]) -> float:
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
            run()
        return float(counter.get_total_flops())

    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    assert encoder.flops_image == embedded(lambda: encode_images(encoder, image))
    for caption in ("red", "a red circle on a blue square"):
        tokens = encoder.tokenize([caption])
        length = int((tokens != 0).sum())
        assert encoder.flops_text(length) == embedded(lambda tokens=tokens: encode_texts(encoder, tokens))


def test_scoring_with_our_layers() -> None:
    """An encoder with replaced layers costs its formula, the last block's for the one token that goes on."""
    model = with_leaves()
    model.visual.preprocess_cfg = {"size": 32, **PREPROCESS}
    encoder = encoder_of(model, "test", open_clip.SimpleTokenizer(context_length=24))
    dense = image_work(vit(), short=True).forward
    assert encoder.fast_image is not None
    assert encoder.flops_image == dense - 2 * (2 * 17 + 1) * (8 * 32 * 32 - 3 * 32 - 8 * 64)


def test_an_attention_pool_is_run() -> None:
    """CoCa's pooling is not walked; what it costs is counted by running it."""
    model = model_of(
        {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}}
    )
    work = image_work(model, training=True)
    assert work.how == "counter"
    assert (work.forward, work.backward) == counted(lambda: model.encode_image(blank(model)[0]))


class Bert(nn.Module):
    """A text tower as open_clip's HFTextEncoder has it, without a download."""

    def __init__(self, config: Any, context_length: int) -> None:
        super().__init__()
        from transformers import BertModel

        self.transformer, self.context_length = BertModel(config, add_pooling_layer=False), context_length

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.transformer(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]


def test_a_hugging_face_text_tower_is_run() -> None:
    """A BERT is counted by running it: its products by hand, and no gradient left behind in the model."""
    import transformers

    W, T = 32, 24
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=W, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = model_of({"vision_cfg": VISION, "custom_text": True})
    model.text = Bert(config, T)
    work = text_work(model, 5, training=True)
    assert work.how == "counter"
    assert work.forward == 2 * (2 * T * (4 * W * W + 2 * 64 * W) + 4 * T * T * W)
    assert work.backward == 2 * work.forward
    assert all(parameter.grad is None for parameter in model.parameters())
