"""Train only the vocabulary rows that occur: the same arithmetic, a hundredth of the optimiser's work and memory.

A row that no caption names has no gradient and no decay, so leaving it out changes nothing. A tower that looks for one
token id is left as it is.
"""

# V rows of the vocabulary that occur, N captions, T tokens

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curate.models.towers import text_parts


class Vocabulary:
    """Which rows occur, and the two tables; made by `occurring`. Ids keep their order: the end token is the largest."""

    def __init__(self, module: Any, used_V: Tensor) -> None:
        self._owner: Any = module if hasattr(module, "token_embedding") else module.text
        self._used_V = used_V
        self._whole: nn.Embedding = self._owner.token_embedding
        rows_V = used_V.to(self._whole.weight.device)
        self._small = nn.Embedding.from_pretrained(self._whole.weight.detach()[rows_V], freeze=False)

    def compact(self, token_BT: Tensor) -> Tensor:
        """Token ids as row numbers of the small table."""
        return torch.searchsorted(self._used_V, token_BT)

    def shrink(self) -> None:
        """Put the small table into the module."""
        self._owner.token_embedding = self._small

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The full table in the module for a while, up to date."""
        self.restore()
        try:
            yield
        finally:
            self.shrink()

    def restore(self) -> None:
        """Put the full table back, with what was learnt."""
        with torch.no_grad():
            self._whole.weight[self._used_V.to(self._whole.weight.device)] = self._small.weight.detach()
        self._owner.token_embedding = self._whole


class AsItIs:
    """The stand-in for towers that keep their table."""

    def compact(self, token_BT: Tensor) -> Tensor:
        return token_BT

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield


@contextmanager
def occurring(module: nn.Module, token_NT: Tensor) -> Iterator[Vocabulary | AsItIs]:
    """Train the rows of `token_NT` only while the context lasts; afterwards they stand in the full table again."""
    parts = text_parts(module)
    if parts is None or parts.pool_type != "argmax":
        yield AsItIs()
        return
    vocabulary = Vocabulary(module, torch.unique(token_NT))
    vocabulary.shrink()
    try:
        yield vocabulary
    finally:
        vocabulary.restore()
