"""CLIP's tokens, id for id, with the repeated work of open_clip's SimpleTokenizer left out.

Three short cuts, each exact. Text of printable ASCII, common typographic marks and line ends, without "&", passes
through open_clip's cleaning (ftfy, HTML entities) unchanged but for its quotation marks, so it skips it. No token spans
white space, so a word's tokens are looked up in one bounded table. And a caption is read no further than the context
reaches. Measured on captions of 276 characters and a context of 32: 28 us each, against 267.
"""

# n captions, T context length

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from torch import Tensor

_WORDS_KEPT: Final = 1 << 17  # about 30 MB; a corpus of any size says most with fewer
_LONGEST_KEPT: Final = 32

# None of ftfy's signs of a wrong encoding consists of these characters alone, and none is changed but the curly quotes.
_MARKS: Final = "\u2013\u2014\u2018\u2019\u201c\u201d\u2026"
_UNCHANGED: Final = re.compile(rf"[\t\n\r -%'-~{_MARKS}]*")
_QUOTES: Final = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}


def short_tokens(tokenizer: Any) -> Callable[[Sequence[str]], Tensor] | None:
    """A quicker `tokenizer(captions)`, int64 [n, T]; None for any tokenizer but CLIP's own, as open_clip has it.

    Example: "a red circle" gives 49406, 320, 736, 7117, 49407 and then zeros.
    """
    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None or not tokenizer.context_length:
        return None
    T = int(tokenizer.context_length)
    lowers = tokenizer.clean_fn is get_clean_fn("lower")
    known: dict[str, tuple[int, ...]] = {}

    def words(caption: str) -> list[str]:
        if lowers and _UNCHANGED.fullmatch(caption):
            # one word gives one token at least; what lies beyond the context would be cut off again
            return _straight(caption).lower().split(None, T)[:T]
        cleaned: str = tokenizer.clean_fn(caption)
        return cleaned.split(" ")

    def ids(word: str) -> tuple[int, ...]:
        found = _word_ids(tokenizer, word)
        if len(known) < _WORDS_KEPT and len(word) <= _LONGEST_KEPT:
            known[word] = found
        return found

    def tokens(captions: Sequence[str]) -> Tensor:
        token_nT: NDArray[np.int64] = np.zeros((len(captions), T), np.int64)
        for row, caption in enumerate(captions):
            line = [tokenizer.sot_token_id]
            for word in words(caption):
                line += known.get(word) or ids(word)
                if len(line) >= T:
                    break
            line = [*line[: T - 1], tokenizer.eot_token_id]
            token_nT[row, : len(line)] = line
        return torch.from_numpy(token_nT)

    return tokens


def _straight(text: str) -> str:
    if not text.isascii():
        for curly, straight in _QUOTES.items():
            text = text.replace(curly, straight)  # four searches take a tenth of the time of `str.translate`
    return text


def _word_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """As `SimpleTokenizer.encode` does for the whole text, here for one word of it."""
    pieces = tokenizer.pat.findall(word)
    byte_pieces = ("".join(map(tokenizer.byte_encoder.__getitem__, piece.encode("utf-8"))) for piece in pieces)
    return tuple(tokenizer.encoder[part] for piece in byte_pieces for part in tokenizer.bpe(piece).split(" "))
