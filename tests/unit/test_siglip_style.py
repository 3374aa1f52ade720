"""Models of SigLIP's kind: a text tower that sees its padding, a Hugging Face tokenizer, all from a local directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from curate.learner.checkpoint import save_checkpoint
from curate.models.build import build_untrained
from curate.models.load import load_model

WORDS = ["a", "photo", "of", "red", "blue", "circle", "square", "two", "three", "dogs", "on", "the", "beach"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tower has no causal mask, pools the last token, and names a local tokenizer."""
    directory = tmp_path_factory.mktemp("siglip")
    config: dict[str, Any] = {
        "embed_dim": 16,
        "init_logit_bias": -10.0,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 64,
            "hf_tokenizer_name": "its-own-directory",  # what open_clip takes for local-dir: models
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    module = build_untrained(config, seed=0)
    path = save_checkpoint(module, directory / "model", architecture=config, training={})
    _save_tokenizer(path, WORDS)
    return path


def _save_tokenizer(directory: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[EOS]"]))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    wrapped.save_pretrained(directory)


def test_it_is_a_sigmoid_model_with_its_own_tokenizer(siglip: Path) -> None:
    """Loss, bias, context and tokenizer are the checkpoint's own."""
    model = load_model(str(siglip))
    assert (model.loss, model.bias, model.context_length) == ("sigmoid", -10.0, 16)
    assert model.tokenize(["a photo of two dogs"]).shape == (1, 16)


def test_its_captions_are_not_trimmed(siglip: Path) -> None:
    """Trimming would change a tower that attends to its padding, so it is off, and embeddings equal open_clip's."""
    model = load_model(str(siglip))
    token_BT = model.tokenize(["two dogs", "a photo of a red circle on the beach"])
    with torch.inference_mode():
        expected_BD = functional.normalize(model.module.encode_text(token_BT), dim=-1)
    assert not model.causal_text
    assert torch.allclose(model.embed_texts(token_BT), expected_BD, atol=1e-6)


def test_another_tokenizer_is_another_identity(siglip: Path, tmp_path: Path) -> None:
    """A changed vocabulary changes the tokenizer's digest, so that a cache would be refused."""
    copy = shutil.copytree(siglip, tmp_path / "model")
    _save_tokenizer(copy, [*WORDS, "aardvark"])
    differences = load_model(str(copy)).identity.differences(load_model(str(siglip)).identity)
    assert [line.partition(":")[0] for line in differences] == ["tokenizer"]
