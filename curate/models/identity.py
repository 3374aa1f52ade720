"""Say which model made an embedding: five digests. A cache serves one identity; anything else is refused.

Hashing reads every weight once: about one second per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from curate.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Name and digests (sha256, hex) of a loaded model; `precision` is "fp32", "bf16" or "fp16".

    The name is for people and is not compared: one checkpoint may lie under two paths.
    """

    name: str
    architecture: str
    checkpoint: str
    preprocessing: str
    tokenizer: str
    precision: str

    def differences(self, other: ModelIdentity) -> list[str]:
        """What differs from `other`, one readable line each; empty where embeddings may be shared.

        Example: `["checkpoint: sha256:ab12cd34ef56 here, sha256:0011aabbccdd in the cache"]`.
        """
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "name"]
        return [
            f"{what}: {_short(what, here)} here, {_short(what, there)} in the cache"
            for what, here, there in pairs
            if here != there
        ]

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelIdentity:
        """Errors: UsageError where a field is missing or is not text."""
        names = [f.name for f in fields(cls)]
        bad = [name for name in names if not isinstance(record.get(name), str)]
        if bad:
            raise UsageError(f"model identity: {', '.join(bad)} missing or not text; it has {sorted(record)}")
        return cls(**{name: record[name] for name in names})


def _short(what: str, value: str) -> str:
    return value if what == "precision" else f"sha256:{value[:12]}"


def digest_json(record: Any) -> str:
    """sha256 of the canonical JSON of a record: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of a state dict; the same for every file format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=8)
def digest_tokenizer(tokenizer: Any) -> str:
    """sha256 of what decides a caption's tokens: class, vocabulary, merges, context length and cleaning."""
    record: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "context_length": getattr(tokenizer, "context_length", None),
        "clean": getattr(getattr(tokenizer, "clean_fn", None), "__name__", None),
        "mode": getattr(tokenizer, "tokenizer_mode", None),
        "strip_sep_token": getattr(tokenizer, "strip_sep_token", None),
    }
    if hasattr(tokenizer, "bpe_ranks"):
        record |= {
            "vocabulary": tokenizer.encoder,
            "merges": list(tokenizer.bpe_ranks),
            "pattern": tokenizer.pat.pattern,
        }
    elif hasattr(tokenizer, "tokenizer"):
        backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
        record["vocabulary"] = backend.to_str() if backend is not None else tokenizer.tokenizer.get_vocab()
    return digest_json(record)
