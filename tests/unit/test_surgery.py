"""Fast feedforward layers in open_clip models: putting them in, saving, pruning, counting."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.conversion import upcycle
from curate.feedforward.dense import Dense
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.pruning import prune_leaves
from curate.feedforward.report import report
from curate.feedforward.surgery import inputs_of, replace_feedforward

VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 64, "width": 48, "heads": 3, "layers": 3}
CONFIG = FeedforwardConfig(depth=2, leaf_width=16, shared_width=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(kind: type[nn.Module] = CLIP, *, vision: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A small untrained model with large feedforward outputs, so that a change of one shows in the embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(16, {**VISION, **(vision or {})}, {**TEXT, **options.pop("text", {})}, **options)
    for name, parameter in model.named_parameters():
        if "c_proj.weight" in name:
            parameter.data.mul_(20)
    return model.eval()


IMAGES, TOKENS = draw(6, 3, 32, 32), torch.randint(1, 64, (6, 12), generator=torch.Generator().manual_seed(1))


def embed(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat((model.encode_image(IMAGES), model.encode_text(TOKENS)))


def feed(model: Any) -> None:
    model.encode_image(IMAGES)
    model.encode_text(TOKENS)


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(
    "options", [{}, {"quick_gelu": True}, {"vision": {"ls_init_value": 0.1}, "text": {"ls_init_value": 0.1}}]
)
def test_copying_every_neuron_leaves_the_model_unchanged(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Leaves as wide as the dense layer give the dense model's embeddings, in both towers of both layouts."""
    model = build(kind, **options)
    before = embed(model)
    for where, neurons in (("vision", 128), ("text", 192)):
        done = replace_feedforward(
            model, FeedforwardConfig(depth=2, leaf_width=neurons), where=where, init="upcycle", calibration=feed
        )
        assert all(layer.unexplained is not None and layer.unexplained < 1e-6 for layer in done.layers)
    assert sum(isinstance(module, FastFeedforward) for module in model.modules()) == 5
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=1e-5)


def test_converting_keeps_more_of_the_model_than_drawing_anew() -> None:
    """With half of the neurons per token, converted layers move the embeddings much less than random ones."""
    before = embed(build())
    config, moved = FeedforwardConfig(depth=1, leaf_width=56, shared_width=8), {}
    for init in ("random", "upcycle"):
        model = build()
        replace_feedforward(model, config, init=init, calibration=[(IMAGES, TOKENS)])  # type: ignore[arg-type]
        moved[init] = float((embed(model) - before).norm() / before.norm())
    assert moved["upcycle"] < 0.5 * moved["random"]


@pytest.mark.parametrize("sequential", [True, False])
def test_calibration_runs_once_per_block_or_once(sequential: bool) -> None:
    """Layer by layer, the batches pass once for every block of the deeper tower; all at once, once."""
    model, calls = build(), []

    def run(given: nn.Module) -> None:
        assert not any(module.training for module in given.modules())
        assert not torch.is_grad_enabled()
        calls.append(sum(isinstance(module, FastFeedforward) for module in given.modules()))
        feed(given)

    model.train()
    replace_feedforward(model, CONFIG, init="upcycle", calibration=run, sequential=sequential)
    assert calls == ([0, 2, 4] if sequential else [0])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [(IMAGES, TOKENS), {"image": IMAGES, "text": TOKENS}])
def test_batches_are_passed_as_they_are(batch: Any) -> None:
    """A tuple gives positional arguments, a mapping named ones."""
    done = replace_feedforward(build(), CONFIG, init="upcycle", calibration=iter([batch]))
    assert [layer.inputs for layer in done.layers] == [6 * 17] * 2 + [6 * 12] * 3
    assert str(done).splitlines()[0].startswith("visual.transformer.resblocks.0.mlp  128 neurons -> leaf 2 x 16 + 4")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("all", ["visual.0", "visual.1", "text.0", "text.1", "text.2"]),
        ("vision", ["visual.0", "visual.1"]),
        ("text", ["text.0", "text.1", "text.2"]),
        ([0], ["visual.0", "text.0"]),
        ([-1], ["visual.1", "text.2"]),
        (lambda name: "resblocks.2" in name, ["text.2"]),
    ],
)
def test_where_chooses_the_blocks(where: Any, names: list[str]) -> None:
    """Towers, places from either end, and a function of the name."""
    done = replace_feedforward(build(CustomTextCLIP), CONFIG, where=where)
    assert [layer.name.replace(".transformer.resblocks", "") for layer in done.layers] == [f"{n}.mlp" for n in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_mode_and_frozen_parts_are_kept(dtype: torch.dtype) -> None:
    """A new layer has the old one's dtype and mode, and learns where the old one did."""
    model: Any = build().to(dtype).train()
    model.visual.requires_grad_(False)
    model.transformer.resblocks[0].mlp.c_proj.bias.requires_grad_(False)
    model.transformer.resblocks[1].eval()
    replace_feedforward(model, CONFIG)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.transformer.get_cast_dtype() == model.visual.transformer.get_cast_dtype() == dtype
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
    first = model.transformer.resblocks[0].mlp
    assert [name for name, parameter in first.named_parameters() if not parameter.requires_grad] == ["b2"]
    assert first.training
    assert not model.transformer.resblocks[1].mlp.training
    assert model.encode_text(TOKENS).dtype == dtype


@pytest.mark.parametrize("config", [CONFIG, FeedforwardConfig(variant="path", depth=3, trees=2)])
def test_state_goes_round_through_a_file(config: FeedforwardConfig, tmp_path: Path) -> None:
    """Saved weights-only and loaded strictly into a model built with the same configuration, the embeddings return."""
    model = build()
    replace_feedforward(model, config)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = build()
    replace_feedforward(again, config, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(embed(again), embed(model))
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(embed(again), embed(model))
    assert torch.equal(embed(copy.deepcopy(model)), embed(model))


def test_the_same_seed_draws_the_same_weights() -> None:
    """Random weights come from the generator, seed 0 without one, and the global state is left alone."""
    models, state = [build(), build()], torch.random.get_rng_state()
    for model in models:
        replace_feedforward(model, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(embed(models[0]), embed(models[1]))


def test_a_replaced_model_learns() -> None:
    """Gradients reach the nodes, the leaves and the shared part of every layer."""
    model = build()
    replace_feedforward(model, FeedforwardConfig(depth=1, leaf_width=8, shared_width=4))
    image, text, _ = model.train()(IMAGES, TOKENS)
    (image @ text.T).square().sum().backward()
    for layer in model.modules():
        if isinstance(layer, FastFeedforward):
            for name, parameter in layer.named_parameters():
                assert parameter.grad is not None, name
                assert bool(parameter.grad.any()), name


def test_a_resnet_has_nothing_to_replace() -> None:
    """ "all" takes the text tower beside a ModifiedResNet; asking for its vision tower is refused."""
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    assert len(replace_feedforward(build(vision=vision), CONFIG).layers) == 3
    with pytest.raises(UsageError, match="vision tower `visual` is a ModifiedResNet; it has no block"):
        replace_feedforward(build(vision=vision), CONFIG, where="vision")


def test_timm_blocks_are_replaced() -> None:
    """timm's fc1, act, fc2 without a norm or dropout are read by their values, whatever their names."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    model: Any = build(CustomTextCLIP, vision=vision)
    images = draw(2, 3, 160, 160)
    before = model.encode_image(images)
    config = FeedforwardConfig(depth=1, leaf_width=model.visual.trunk.blocks[0].mlp.fc1.out_features)
    done = replace_feedforward(
        model, config, where="vision", init="upcycle", calibration=lambda model: model.encode_image(images)
    )
    assert done.layers[0].name == "visual.trunk.blocks.0.mlp"
    torch.testing.assert_close(model.encode_image(images), before, atol=1e-4, rtol=1e-4)


def hugging_face() -> nn.Module:
    """A model whose text tower keeps its feedforward layers in Hugging Face's way."""
    from transformers import BertConfig, BertModel

    class HFTextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=8
            )
            self.transformer = BertModel(sizes)

    model = build(CustomTextCLIP)
    model.text = HFTextEncoder()
    return model


class _Gated(nn.Module):
    """Linear, activation, Linear by its children, but not by what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden) * hidden)


def with_mlp(mlp: nn.Module) -> nn.Module:
    model: Any = build()
    model.visual.transformer.resblocks[1].mlp = mlp.eval()
    return model  # type: ignore[no-any-return]


def linear(inward: int, outward: int) -> nn.Linear:
    return nn.Linear(inward, outward)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hugging_face, "the text tower `text` is a HFTextEncoder around a BertModel; it has no block"),
        (lambda: nn.Linear(2, 2), "a Linear is no open_clip model"),
        (lambda: with_mlp(_Gated()), r"resblocks.1.mlp is _Gated\(fc1: Linear, act: GELU, fc2: Linear\); only"),
        (lambda: with_mlp(nn.Sequential(linear(32, 8), nn.SiLU(), linear(8, 32))), "SiLU"),
        (lambda: with_mlp(nn.Sequential(linear(32, 8), nn.GELU(), nn.LayerNorm(8), linear(8, 32))), "LayerNorm"),
        (lambda: with_mlp(nn.Sequential(linear(32, 8), nn.GELU(), nn.Dropout(0.1), linear(8, 32))), "Dropout"),
        (lambda: with_mlp(nn.Conv1d(2, 2, 1)), "Conv1d"),
        (lambda: with_mlp(CONFIG.build(32)), "resblocks.1.mlp is a FastFeedforward already"),
        (lambda: build(vision={"scale_fc": True}), r"resblocks.0.mlp is Sequential\(c_fc: Linear, gelu: GELU, ln: "),
    ],
)
def test_other_shapes_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    """The refusal names the block and what was found there, and nothing has been replaced."""
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=message):
        replace_feedforward(model, CONFIG)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "warm"}, "init 'warm'"),
        ({"init": "upcycle"}, "needs `calibration`"),
        ({"where": "audio"}, "where='audio'"),
        ({"where": ["vision"]}, "none of all, vision, text, block indices"),
        ({"where": [2]}, "block 2: the vision tower has 2 blocks, 0 to 1"),
        ({"where": lambda _: False}, "`where` chose no feedforward layer; the model has visual.transformer"),
        ({"init": "upcycle", "calibration": [(IMAGES,)]}, "never reached transformer.resblocks.0.mlp"),
        ({"init": "upcycle", "calibration": feed, "config": FeedforwardConfig(depth=1, leaf_width=150)},
         "visual.transformer.resblocks.0.mlp: leaf_width 150"),
        ({"init": "upcycle", "calibration": feed, "config": FeedforwardConfig(depth=7, leaf_width=4)},
         "resblocks.0.mlp: 90 calibration inputs for 128 leaves"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    """Each refusal says what does not fit, and the model is as it was, even where some blocks were converted."""
    model = build()
    with pytest.raises(UsageError, match=message):
        replace_feedforward(model, **{"config": CONFIG, **options})
    assert not any(isinstance(module, FastFeedforward) for module in model.modules())


def test_collected_inputs_are_a_uniform_sample_in_order() -> None:
    """Of a long stream a sample of the asked size stays, from all of it and in its order; the hooks go away."""
    layer = nn.Linear(1, 1)
    with inputs_of({"x": layer, "unused": nn.Linear(1, 1)}, most=100) as kept:
        for start in range(0, 1000, 50):
            layer(torch.arange(start, start + 50).view(5, 10, 1).float())
    x_n = kept["x"].squeeze(1)
    assert list(kept) == ["x"]
    assert len(x_n) == 100
    assert torch.equal(x_n, x_n.sort().values)
    assert 400 < float(x_n.mean()) < 600
    assert not layer._forward_pre_hooks


def pruned_layer(depth: int = 3, shared: int = 2) -> tuple[FastFeedforward, Tensor]:
    """A layer whose leaves are used unevenly by the inputs beside it."""
    layer = FeedforwardConfig(depth=depth, leaf_width=4, shared_width=shared).build(
        6, generator=torch.Generator().manual_seed(3)
    )
    assert isinstance(layer, FastFeedforward)
    nn.init.zeros_(layer.node_bias)
    return layer.eval(), draw(400, 6) + 0.3


def count(layer: FastFeedforward, x_nD: Tensor) -> None:
    layer.count_usage = True
    layer(x_nD)
    layer.count_usage = False


def test_pruning_keeps_the_tokens_whose_leaf_stayed() -> None:
    """Leaves below the share go, their weights with them; tokens of the others give the same bits as before."""
    layer, x_nD = pruned_layer()
    count(layer, x_nD)
    share_L, before, leaf_n = layer.usage / 400, layer(x_nD), layer.leaf_indices(x_nD)
    done = prune_leaves(layer, 0.08)
    stays_L = share_L >= 0.08
    assert done.kept == tuple(stays_L.nonzero().flatten().tolist())
    assert 0 < len(done.dropped) < 8
    assert len(layer.w1) == len(layer.b1) == len(layer.w2) == len(layer.b2) == len(done.kept)
    assert done.moved == pytest.approx(float(share_L[~stays_L].sum()))
    after, stayed_n = layer(x_nD), stays_L[leaf_n]
    torch.testing.assert_close(after[stayed_n], before[stayed_n])
    assert not torch.allclose(after[~stayed_n], before[~stayed_n])
    assert bool(stays_L[layer.leaf_indices(x_nD)].all())


def test_pruned_tokens_go_to_the_sibling_subtree() -> None:
    """A token of a dropped leaf keeps its path up to the first node that still has leaves on its side."""
    layer, x_nD = pruned_layer()
    leaf_n = layer.leaf_indices(x_nD)
    for dropped, level in (({0}, 1), ({0, 1}, 2), ({4, 5, 6, 7}, 3)):
        again, _ = pruned_layer()
        again.usage.copy_(torch.tensor([0 if leaf in dropped else 10 for leaf in range(8)]))
        assert set(prune_leaves(again, 0.01).dropped) == dropped
        moved_n = torch.isin(leaf_n, torch.tensor(sorted(dropped)))
        now_n = again.leaf_indices(x_nD)
        assert torch.equal(now_n[~moved_n], leaf_n[~moved_n])
        assert torch.equal(now_n[moved_n] >> level, leaf_n[moved_n] >> level)
        assert not set(now_n.tolist()) & dropped


def test_a_pruned_layer_is_saved_pruned_again_and_trained(tmp_path: Path) -> None:
    """Its state is read by a fresh layer of the same sizes; pruning it once more and learning work as before."""
    layer, x_nD = pruned_layer()
    count(layer, x_nD)
    prune_leaves(layer, 0.08)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh, _ = pruned_layer()
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), strict=True)
    assert torch.equal(fresh(x_nD), layer(x_nD))
    assert torch.equal(copy.deepcopy(layer)(x_nD), layer(x_nD))
    count(layer, x_nD)
    leaf_n, before, least = layer.leaf_indices(x_nD), layer(x_nD), float(layer.usage[layer.usage > 0].min()) / 400
    stored = len(layer.w1)
    moved = prune_leaves(layer, least + 1e-6).moved
    assert len(layer.w1) == stored - 1
    same_n = layer.leaf_indices(x_nD) == leaf_n
    assert float((~same_n).float().mean()) == pytest.approx(moved)
    torch.testing.assert_close(layer(x_nD)[same_n], before[same_n])
    layer.train()(x_nD).square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.grad is not None)


def test_the_soft_mixture_of_a_pruned_layer_counts_the_leaves_that_are_left() -> None:
    """Depth 1 with one leaf left: mixture and hard routing agree exactly, since the node is fixed."""
    layer, x_nD = pruned_layer(depth=1)
    layer.usage.copy_(torch.tensor([0, 5]))
    prune_leaves(layer, 0.5)
    hard = layer(x_nD)
    layer.soft = True
    torch.testing.assert_close(layer(x_nD), hard)


def test_pruning_refuses_what_it_cannot_know() -> None:
    """Without counts, with an impossible share, or with nothing left there is nothing to prune."""
    layer, x_nD = pruned_layer()
    with pytest.raises(UsageError, match="no tokens were counted"):
        prune_leaves(layer, 0.1)
    count(layer, x_nD)
    with pytest.raises(UsageError, match="min_usage 2"):
        prune_leaves(layer, 2)
    with pytest.raises(UsageError, match=r"no leaf has 0.9 of the tokens"):
        prune_leaves(layer, 0.9)
    assert prune_leaves(layer, 0.0).dropped == ()
    assert layer.remap is None


def test_report_by_hand() -> None:
    """Parameters, active parameters, FLOPs and bytes of a vision block of width 32, dense and replaced."""
    model = build()
    dense = report(model).layers[0]
    assert (dense.kind, dense.parameters, dense.active_parameters) == ("dense", 8352, 8352)  # 2 x 32 x 128 + 128 + 32
    assert (dense.flops, dense.dense_flops, dense.bytes) == (16384, 16384, 33408)
    # attention: 4 products of 32 x 32 and, over 17 tokens, 2 of 17 x 32
    assert dense.block_flops == 16384 + 2 * (4 * 32 * 32 + 2 * 17 * 32)
    replace_feedforward(model, CONFIG, where="vision")
    leaf = report(model).layers[0]
    assert leaf.parameters == 3 * 33 + 4 * (2 * 32 * 16 + 16 + 32) + (2 * 32 * 4 + 4)
    assert leaf.active_parameters == 2 * 33 + (2 * 32 * 16 + 16 + 32) + (2 * 32 * 4 + 4)
    assert (leaf.flops, leaf.dense_flops, leaf.tokens) == (2 * (2 * 32 + 2 * 32 * 16 + 2 * 32 * 4), 16384, 17)
    assert leaf.block_flops == leaf.flops + dense.block_flops - dense.flops
    assert leaf.bytes == 4 * leaf.parameters


def test_report_of_a_path_layer_by_hand() -> None:
    """Two trees of depth 3 hold 15 neurons each, and a token meets 4 of them."""
    model = build()
    replace_feedforward(model, FeedforwardConfig(variant="path", depth=3, trees=2), where=[0])
    path = report(model).layers[0]
    assert (path.kind, path.parameters, path.active_parameters) == ("path 2 x 3", 2 * 15 * 65 + 32, 2 * 4 * 65 + 32)
    assert path.flops == 2 * 2 * 4 * 64


def test_report_sums_are_those_of_the_dense_model() -> None:
    """What the model cost before is what torch counts in the dense model; afterwards only the layers differ."""
    before = report(build())
    model = build()
    replace_feedforward(model, CONFIG)
    after = report(model)
    assert before.model_flops == before.dense_model_flops == after.dense_model_flops
    assert before.dense_flops == after.dense_flops == 2 * 17 * 16384 + 3 * 12 * 4 * 48 * 192
    assert after.model_flops == before.model_flops - before.flops + after.flops
    assert after.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert after.as_dict()["model_flops"] == after.model_flops
    assert f"({after.dense_model_flops / after.model_flops:.2f} times fewer)" in str(after)


def test_report_of_leaf_usage_by_hand() -> None:
    """Counts 6, 2, 0, 0 are 2 dead leaves and exp(entropy) = 1.755 effective ones; reporting counts nothing itself."""
    model: Any = build()
    replace_feedforward(model, CONFIG, where=[0])
    layer = model.visual.transformer.resblocks[0].mlp
    layer.count_usage = True
    layer.usage.copy_(torch.tensor([6, 2, 0, 0]))
    first, *others = report(model).layers
    assert first.usage is not None
    assert (first.usage.tokens, first.usage.leaves, first.usage.dead) == (8, 4, 2)
    assert (first.usage.least, first.usage.most) == (0.0, 0.75)
    assert first.usage.effective == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert [other.usage for other in others] == [None] * 4
    assert layer.usage.tolist() == [6, 2, 0, 0]
    assert "1.8 of 4, 2 dead, 0.0% to 75.0%" in str(report(model))


def test_a_vit_b_32_block_costs_what_the_docstring_says() -> None:
    """The example of `report`, from the shapes alone."""
    from curate.feedforward.report import per_token

    dense = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    leaf = FeedforwardConfig(depth=5, leaf_width=96).build(768)
    assert per_token(dense) == (4_722_432, 9_437_184)
    assert per_token(leaf) == (152_165, 302_592)
    assert sum(parameter.numel() for parameter in leaf.parameters()) == 4_770_079
    assert isinstance(upcycle(_dense(), FeedforwardConfig(depth=1, leaf_width=2), draw(4, 3)), FastFeedforward)


def _dense() -> Dense:
    return Dense(draw(3, 4), draw(4), draw(4, 3), draw(3), "relu")
