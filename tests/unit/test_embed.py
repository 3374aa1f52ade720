"""Embedding: the fast paths against open_clip's own, across kinds of towers, threads and decode scales."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional

from curate.errors import CurateWarning
from curate.models import towers
from curate.models.build import build_untrained
from curate.models.configs import PREPROCESS
from curate.models.embed import DualEncoder
from curate.models.load import encoder_of, load_model
from tests.conftest import MINI

CAPTIONS = ["", "a red circle", "two small blue squares on a beige ground, next to one large star", "x " * 50, "green"]
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {},
    "vision transformer": {"vision_cfg": VISION},
    "layer scale": {"vision_cfg": {**VISION, "ls_init_value": 0.3}},
    "custom text": {"custom_text": True, "vision_cfg": VISION},
    "eos pool": {"text_cfg": {**MINI["text_cfg"], "pool_type": "eos", "eos_id": 49407}},
    "quick gelu": {"quick_gelu": True, "vision_cfg": VISION},
    "projection bias": {"text_cfg": {**MINI["text_cfg"], "proj_bias": True}},
}
UNTRIMMED: dict[str, dict[str, Any]] = {
    "siglip text": {"custom_text": True, "text_cfg": {**MINI["text_cfg"], "no_causal_mask": True, "pool_type": "last"}},
    "class token": {"custom_text": True, "text_cfg": {**MINI["text_cfg"], "embed_cls": True, "output_tokens": False}},
    "qk norm": {"text_cfg": {**MINI["text_cfg"], "qk_norm": True}, "vision_cfg": {**VISION, "qk_norm": True}},
    "average pool": {
        "vision_cfg": {**VISION, "pool_type": "avg"},
        "custom_text": True,
        "text_cfg": {**MINI["text_cfg"], "pool_type": "last"},
    },
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return open_clip.SimpleTokenizer(context_length=MINI["text_cfg"]["context_length"])


def encoder(change: dict[str, Any]) -> DualEncoder:
    config = {**copy.deepcopy(MINI), **change}
    module = build_untrained(config, seed=0, preprocess=PREPROCESS)
    with torch.no_grad():
        for parameter in module.parameters():  # every bias, gain and zero counts
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return encoder_of(module, "test", tokenizer(), architecture=config)


def images(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def theirs(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.rule.mean, model.rule.std))
    with torch.inference_mode():
        return (
            model.module.encode_image((images().float() / 255 - mean) / std, normalize=True),
            model.module.encode_text(model.tokenize(CAPTIONS), normalize=True),
        )


@pytest.mark.parametrize("kind", [*TOWERS, *UNTRIMMED])
def test_equals_open_clip(kind: str) -> None:
    """Images and captions get open_clip's embedding to 1e-5, whatever the towers are."""
    model = encoder({**TOWERS, **UNTRIMMED}[kind])
    image, text = theirs(model)
    torch.testing.assert_close(model.embed_images(images()), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed_texts(model.tokenize(CAPTIONS)), text, atol=1e-5, rtol=0)


def test_which_towers_are_cut_short() -> None:
    """Causal towers pooled at the end of the caption are trimmed; others never are."""
    assert {kind: encoder(change).causal_text for kind, change in TOWERS.items()} == dict.fromkeys(TOWERS, True)
    assert {kind: encoder(change).causal_text for kind, change in UNTRIMMED.items()} == dict.fromkeys(UNTRIMMED, False)


def test_groups_of_many_captions() -> None:
    """More captions than a group holds come back in their own order."""
    model = encoder({})
    captions = [" ".join(["red", "star", "on", "blue"][: 1 + n % 4] * (1 + n % 3)) + f" {n}" for n in range(50)]
    with torch.inference_mode():
        whole = model.module.encode_text(model.tokenize(captions), normalize=True)
    assert model.text is not None
    grouped = towers.encode_text_trimmed(model.text, model.tokenize(captions), group=1)
    torch.testing.assert_close(functional.normalize(grouped, dim=-1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed_texts(model.tokenize(captions)), whole, atol=1e-5, rtol=0)


def test_a_wrong_fast_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast path that differs from open_clip on the probe batch is dropped, with a warning."""
    monkeypatch.setattr(towers, "pooled_position", lambda _, token_BT: torch.zeros(len(token_BT), dtype=torch.long))
    with pytest.warns(CurateWarning, match="short text path differs"):
        model = encoder({})
    _, text = theirs(model)
    torch.testing.assert_close(model.embed_texts(model.tokenize(CAPTIONS)), text, atol=1e-6, rtol=0)
    assert not model.causal_text


def test_wrong_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short way to the tokens that differs from the tokenizer is dropped, with a warning."""
    monkeypatch.setattr("curate.models.load.short_tokens", lambda own: lambda captions: own(captions).flip(1))
    with pytest.warns(CurateWarning, match="short tokens path differs"):
        model = encoder({})
    assert model.fast_tokens is None
    assert torch.equal(model.tokenize(CAPTIONS), tokenizer()(CAPTIONS))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["resnet", "vision transformer"])
def test_same_bits_in_every_thread(kind: str) -> None:
    """With one intra-op thread a batch gives the same bits whichever Python thread runs it, and however many do."""
    model = encoder(TOWERS[kind])
    batches = [
        torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
        for n in range(12)
    ]
    tokens = [model.tokenize([f"caption {n}", "short", f"a longer caption of number {n}"]) for n in range(12)]
    alone = [(model.embed_images(b), model.embed_texts(t)) for b, t in zip(batches, tokens, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: (model.embed_images(batches[n]), model.embed_texts(tokens[n])), range(12)))
    assert all(
        torch.equal(a, b) for one, other in zip(alone, together, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_shapes_units_and_emptiness(tiny_checkpoint: Path) -> None:
    """Embeddings are float32 unit vectors on the CPU; an empty batch gives an empty one."""
    model = load_model(str(tiny_checkpoint))
    image, text = model.embed_images(images()), model.embed_texts(model.tokenize(CAPTIONS))
    assert image.shape == (6, model.width)
    assert text.shape == (5, model.width)
    assert image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(torch.cat([image, text]).norm(dim=-1), torch.ones(11))
    assert model.embed_images(images(0)).shape == model.embed_texts(model.tokenize([])).shape == (0, model.width)


def test_embeddings_are_not_inference_tensors_that_break_training(tiny_checkpoint: Path) -> None:
    """What comes out can be used in a training step."""
    model = load_model(str(tiny_checkpoint))
    weight = torch.ones(model.width, requires_grad=True)
    (model.embed_images(images()) * weight).sum().backward()
    assert weight.grad is not None


def test_flops_by_hand() -> None:
    """The count of a text tower is the sum of its matrix products, and grows with the caption."""
    model = encoder({})
    W, T, D, layers = 32, 8, 16, 2
    full = 2 * T * (3 * W * W + W * W + 8 * W * W) + 4 * T * T * W
    last = 2 * T * 2 * W * W + 2 * (W * W + W * W + 8 * W * W) + 4 * T * W
    assert model.flops_text(T) == (layers - 1) * full + last + 2 * W * D
    assert model.flops_text(T) < model.flops_text(16) < model.flops_text(24) == model.flops_text(1000)
    assert model.flops_per_sample(T) == model.flops_image + model.flops_text(T)


def test_flops_of_a_vision_transformer_include_attention() -> None:
    """Attention is counted on the CPU too, where torch's counter sees none."""
    model = encoder(TOWERS["vision transformer"])
    W, T, layers, D = 32, 17, 3, 16
    full = 2 * T * 12 * W * W + 4 * T * T * W
    last = 2 * T * 2 * W * W + 2 * 10 * W * W + 4 * T * W
    assert model.flops_image == 2 * 16 * W * 3 * 64 + (layers - 1) * full + last + 2 * W * D


def test_reduced_decode_changes_little(tiny_checkpoint: Path) -> None:
    """A JPEG decoded at a reduced scale that still covers the input embeds nearly as the full one does."""
    from curate.images.decode import decode_rgb
    from tests.making import make_image

    model = load_model(str(tiny_checkpoint))
    data = make_image("jpeg", 256, 256, seed=3)
    full, reduced = decode_rgb(data)[0], decode_rgb(data, min_side=model.min_side)[0]
    assert reduced.shape < full.shape
    a, b = (model.embed_images(torch.from_numpy(np.stack([model.preprocess(x)])))[0] for x in (full, reduced))
    assert float(functional.cosine_similarity(a, b, dim=0)) > 0.99
