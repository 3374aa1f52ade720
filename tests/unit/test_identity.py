"""Digests of a model: what changes them, what does not."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch

from curate.errors import UsageError
from curate.models.identity import ModelIdentity, digest_json, digest_tokenizer, digest_weights

ONE = ModelIdentity("a", "1" * 64, "2" * 64, "3" * 64, "4" * 64, "fp32")


def test_equal_but_for_the_name() -> None:
    """One checkpoint under two paths is one identity."""
    assert ONE.differences(dataclasses.replace(ONE, name="b")) == []


@pytest.mark.parametrize("field", ["architecture", "checkpoint", "preprocessing", "tokenizer"])
def test_a_difference_is_named(field: str) -> None:
    """Each digest that differs gives a line with both sides."""
    other = dataclasses.replace(ONE, **{field: "f" * 64})
    assert ONE.differences(other) == [
        f"{field}: sha256:{getattr(ONE, field)[:12]} here, sha256:{'f' * 12} in the cache"
    ]


def test_precision_is_compared() -> None:
    """Embeddings of another precision are not shared."""
    assert ONE.differences(dataclasses.replace(ONE, precision="bf16")) == ["precision: fp32 here, bf16 in the cache"]


def test_json_round_trip() -> None:
    """An identity survives JSON; a record without a digest is refused."""
    assert ModelIdentity.from_json(ONE.to_json()) == ONE
    with pytest.raises(UsageError, match="checkpoint"):
        ModelIdentity.from_json({k: v for k, v in ONE.to_json().items() if k != "checkpoint"})


def test_weights_digest_sees_name_dtype_shape_and_values() -> None:
    """Order and memory layout do not count; name, dtype, shape and every value do."""
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)
    base = digest_weights({"a": a, "b": b})
    assert digest_weights({"b": b, "a": a.T.contiguous().T}) == base
    changed = a.clone()
    changed[1, 2] += 1e-6
    for other in ({"a": a.view(3, 2), "b": b}, {"a": a.double(), "b": b}, {"c": a, "b": b}, {"a": changed, "b": b}):
        assert digest_weights(other) != base


def test_weights_digest_takes_bfloat16_and_scalars() -> None:
    """Every dtype and rank that a checkpoint holds can be hashed."""
    assert digest_weights({"s": torch.tensor(2.0), "h": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(1)})


def test_json_digest_ignores_key_order() -> None:
    """Configurations are compared by content."""
    assert (
        digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1}) != digest_json({"a": 1, "b": [2, 1]})
    )


def test_tokenizer_digest_sees_context_and_cleaning() -> None:
    """Another context length or cleaning is another tokenizer."""
    base = digest_tokenizer(open_clip.SimpleTokenizer(context_length=32))
    assert base == digest_tokenizer(open_clip.SimpleTokenizer(context_length=32))
    assert base != digest_tokenizer(open_clip.SimpleTokenizer(context_length=64))
    assert base != digest_tokenizer(open_clip.SimpleTokenizer(context_length=32, clean="whitespace"))
