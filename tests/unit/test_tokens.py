"""The short way to CLIP's tokens against open_clip's own tokenizer."""

# ruff: noqa: RUF001 - characters that look like others are what this is about

from __future__ import annotations

from functools import lru_cache
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.models import tokens
from curate.models.tokens import short_tokens

ODD = [
    "",
    " \n\t ",
    "it's 3 o'clock, they'll say 'tis THEY'RE",
    "<start_of_text> in a caption <end_of_text>",
    "a &lt; b &amp;amp; c",
    "“curly” ‘quotes’ – and — dashes…",
    "â€œmojibakeâ€\x9d Ã© voilÃ\xa0 ΟΔΟΣ İstanbul ﬁne ＬＯＵＤ １２",
    "line\r\nends\x0b\x1c\x85\u2028here\u3000",
    "\x1b[31mred\x1b[0m \x00\x7f",
    "日本語 текст 🙂👩\u200d🚀",
    "x" * 500,
    "word " * 500,
    "a1b2 c_d-e.f!!! $9.99 №5 ½",
]
PIECES = [*"aB'sTtreLl<>;#39 \n\r\t.,!0é“”‘’–—…×Ãâ€œ™ñ\x1c\xa0İΣσς日ﬁ１", "&amp;", "<end_of_text>", "'ll", "â€™"]


@lru_cache(maxsize=8)
def tokenizer(context_length: int = 77, clean: str = "lower") -> Any:
    return open_clip.SimpleTokenizer(context_length=context_length, clean=clean)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
@pytest.mark.parametrize("context_length", [2, 8, 77])
def test_odd_captions(context_length: int, clean: str) -> None:
    """Every id is open_clip's, at the first reading and from the table of words, for each kind of cleaning."""
    theirs = tokenizer(context_length, clean)
    ours = short_tokens(theirs)
    assert ours is not None
    for _ in range(2):
        found = ours(ODD)
        assert found.dtype == torch.int64
        assert torch.equal(found, theirs(ODD))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=40)))
def test_any_caption(caption: str) -> None:
    """Whatever the text, the ids are open_clip's."""
    ours = short_tokens(tokenizer())
    assert ours is not None
    assert torch.equal(ours([caption]), tokenizer()([caption]))


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(f"aZ '\"\r\n\t<0~{tokens._MARKS}"), max_size=30))
def test_what_skips_the_cleaning_is_not_changed_by_it(caption: str) -> None:
    """The characters that pass by open_clip's cleaning come out of it as words with straight quotation marks."""
    assert tokens._UNCHANGED.fullmatch(caption)
    assert tokenizer().clean_fn(caption).split() == tokens._straight(caption).lower().split()


def test_the_table_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the table is full, new words are still read right."""
    monkeypatch.setattr(tokens, "_WORDS_KEPT", 3)
    captions = ["one two three four five", "six seven one nine"]
    ours = short_tokens(tokenizer())
    assert ours is not None
    assert torch.equal(ours(captions), tokenizer()(captions))


def test_foreign_tokenizers_are_left_alone() -> None:
    """A tokenizer that draws at random, or that is not CLIP's own class, has no short way."""
    assert short_tokens(open_clip.SimpleTokenizer(reduction_mask="random")) is None
    assert short_tokens(lambda captions: captions) is None
