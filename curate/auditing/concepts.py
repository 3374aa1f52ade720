"""Concepts to set against the groups, where a user names none: the words that the pool's captions hold most often.

Function words, words about the picture as such ("photo"), numbers and the word lists' own terms are no concepts.
Words are found by spaces, so a script without them gives none. Candidates are counted in 200,000 captions spread over
the pool, masks are made of all: two passes of 3 microseconds a caption.
"""

# N captions

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.auditing.folding import fold, words_of
from curate.auditing.languages import DEVANAGARI_NEIGHBOURS, FUNCTION_WORDS, HINDI, NEIGHBOURS
from curate.auditing.lexicons import Lexicon
from curate.auditing.traits import TraitSettings

MOST: Final = 20
COUNTED: Final = 200_000
FEWEST: Final = 20  # captions with the word
LARGEST_SHARE: Final = 0.5  # a word of most captions is a form of writing and no concept
SHORTEST: Final = 3  # letters
_BATCH: Final = 65_536
# Words about the picture as such, and of counting and pointing: they tell nothing of what it shows.
_ABOUT_PICTURES: Final = """
    photo photos photograph photography image images picture pictures pic stock vector jpg jpeg png www com http https
    html foto imagen imagem bild bilder illustration shows shown showing labeled labelled three four five six seven
    eight nine ten each other others many several more most"""


def concepts_of(
    captions_N: Sequence[str | None] | pa.ChunkedArray,
    settings: TraitSettings | None = None,
    *,
    most: int = MOST,
    taken: Collection[str] = (),
) -> dict[str, NDArray[np.bool_]]:
    """{word: which captions have it [N]}, the most frequent first, ties by the word.

    Left out are the terms of the lists of `settings` (by default those that come along) and the words in `taken`. A
    word counts from 20 captions on, and up to half of them. Example: of many like "a red cube" and "the blue ball" the
    concepts are "ball", "blue", "cube", "red".
    """
    terms = terms_of((settings or TraitSettings.default()).lexicons())
    left_out = _function_words() | terms | {fold(one) for one in taken}
    step = max(1, -(-len(captions_N) // COUNTED))
    counts: Counter[str] = Counter()
    there = 0
    for start, captions in _batches(captions_N):
        for caption in captions[-start % step :: step]:
            counts.update(_words(caption))
            there += caption is not None
    fine = [
        (-count, word)
        for word, count in counts.items()
        if count * step >= FEWEST and count <= LARGEST_SHARE * there and word not in left_out
    ]
    return _masks(captions_N, [word for _, word in sorted(fine)[:most]])


def terms_of(lexicons: Iterable[Lexicon]) -> frozenset[str]:
    """The single words among the terms of all sets, folded."""
    found: set[str] = set()
    for lexicon in lexicons:
        for terms in lexicon.sets.values():
            for listed in (*terms.terms.values(), *terms.where_known.values()):
                found.update(words[0] for words in map(words_of, map(fold, listed)) if len(words) == 1)
    return frozenset(found)


def _masks(captions_N: Sequence[str | None] | pa.ChunkedArray, words: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    wanted = frozenset(words)
    masks = {word: np.zeros(len(captions_N), bool) for word in words}
    for start, captions in _batches(captions_N):
        for row, caption in enumerate(captions, start):
            if caption is not None:
                for word in wanted.intersection(words_of(fold(caption))):
                    masks[word][row] = True
    return masks


def _batches(captions_N: Sequence[str | None] | pa.ChunkedArray) -> Iterator[tuple[int, Sequence[str | None]]]:
    """The captions in pieces, each with the row of its first; a column of a table is never all Python text at once."""
    for start in range(0, len(captions_N), _BATCH):
        if isinstance(captions_N, pa.ChunkedArray):
            yield start, captions_N.slice(start, _BATCH).to_pylist()
        else:
            yield start, captions_N[start : start + _BATCH]


def _words(caption: str | None) -> set[str]:
    if caption is None:
        return set()
    return {word for word in words_of(fold(caption)) if len(word) >= SHORTEST and not any(map(str.isdigit, word))}


@lru_cache(maxsize=1)
def _function_words() -> frozenset[str]:
    lists = (_ABOUT_PICTURES, *FUNCTION_WORDS.values(), *NEIGHBOURS.values(), HINDI, DEVANAGARI_NEIGHBOURS)
    return frozenset(fold(word) for words in lists for word in words.split())
