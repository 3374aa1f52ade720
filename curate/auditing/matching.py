"""Terms in a caption's words: at each place the longest phrase of a list, and whether a negation takes it back.

A phrase is found by its first word, so a caption without any first word of the list costs one set operation. Text
without spaces is cut by the list itself: the longest phrase that stands there, else a single character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from curate.auditing.folding import MARKS, fold, words_of
from curate.auditing.lexicons import Lexicon, Negation, TermSet

REACH: Final = 3  # words before a term in which a negation takes it back
Phrase = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mention:
    """A term in a caption: its group, the words as folded, the language of the list; `negated` ones do not count."""

    group: str
    term: str
    language: str
    negated: bool = False


class Matcher:
    """One set in one language. `find` takes the words of a caption; `curate.auditing.mentions` reads whole columns."""

    __slots__ = ("_cut", "_first", "_longest", "_negation", "_phrases", "_sure", "language", "spaces")

    def __init__(self, lexicon: Lexicon, terms: TermSet) -> None:
        self.language, self.spaces = lexicon.language, lexicon.spaces
        parts = (terms.terms, terms.where_known, lexicon.negation)
        self._cut = None if self.spaces else _phrase_cutter(*parts, terms.excluded)
        groups: dict[Phrase, list[str]] = {self._split(term): [] for term in terms.excluded}
        sure = set(groups)
        for kind, found in (("sure", terms.terms), ("doubtful", terms.where_known)):
            for group, listed in found.items():
                for term in listed:
                    groups.setdefault(self._split(term), []).append(group)
                    if kind == "sure":
                        sure.add(self._split(term))
        groups.pop((), None)
        self._sure = frozenset(sure)
        self._phrases = {phrase: tuple(dict.fromkeys(named)) for phrase, named in groups.items()}
        self._first = frozenset(phrase[0] for phrase in groups)
        self._longest = {word: max(len(one) for one in groups if one[0] == word) for word in self._first}
        self._negation = _Negator(lexicon.negation, self._split)

    @property
    def terms(self) -> frozenset[Phrase]:
        """Every phrase that counts for a group."""
        return frozenset(phrase for phrase, groups in self._phrases.items() if groups)

    def groups(self, phrase: Phrase) -> tuple[str, ...]:
        """The groups a phrase counts for; none if it is not listed, or only as no mention."""
        return self._phrases.get(phrase, ())

    def words(self, folded: str) -> list[str]:
        """The words of a folded caption; without spaces, its longest listed phrases and single characters."""
        return words_of(folded) if self._cut is None else self._cut.findall(folded)

    def find(self, words: Sequence[str], *, known: bool, doubted: frozenset[Phrase] = frozenset()) -> list[Mention]:
        """Mentions in the order of the words. `known`: the caption is in this language; else `doubted` terms are left.

        Example (English, gender): "not a woman , a man" gives female, negated, and male.
        """
        if self._first.isdisjoint(words):
            return []
        found, place = [], 0
        while place < len(words):
            phrase = self._longest_at(words, place)
            groups = self._phrases[phrase] if phrase else ()
            if phrase and groups and (known or (phrase in self._sure and phrase not in doubted)):
                negated = self._negation.negates(words, place, place + len(phrase))
                term = (" " if self.spaces else "").join(phrase)
                found += [Mention(group, term, self.language, negated) for group in groups]
            place += len(phrase) or 1
        return found

    def _longest_at(self, words: Sequence[str], place: int) -> Phrase:
        for length in range(self._longest.get(words[place], 0), 0, -1):
            phrase = tuple(words[place : place + length])
            if len(phrase) == length and phrase in self._phrases:
                return phrase
        return ()

    def _split(self, term: str) -> Phrase:
        return tuple(words_of(fold(term))) if self.spaces else (fold(term),)


class _Negator:
    """Whether a negation reaches a phrase."""

    __slots__ = ("_after", "_before", "_between", "_exceptions", "_stops")

    def __init__(self, given: Negation, cut: Callable[[str], Phrase]) -> None:
        self._before, self._stops, self._between = (
            frozenset(cut(word)[0] for word in words) for words in (given.before, given.stops, given.between)
        )
        self._after, self._exceptions = ([cut(one) for one in words] for words in (given.after, given.exceptions))

    def negates(self, words: Sequence[str], start: int, end: int) -> bool:
        if any(tuple(words[end : end + len(phrase)]) == phrase for phrase in self._after):
            return True
        for place in range(start - 1, max(start - 1 - REACH, -1), -1):
            word = words[place]
            if word in self._before:
                return not any(tuple(words[place : place + len(one)]) == one for one in self._exceptions)
            if word in MARKS or word in self._stops or (self._between and word not in self._between):
                return False
        return False


def _phrase_cutter(
    terms: Mapping[str, tuple[str, ...]], doubtful: Mapping[str, tuple[str, ...]], negation: Negation,
    excluded: Sequence[str],
) -> re.Pattern[str]:  # fmt: skip
    """Cuts text without spaces: the longest listed phrase, else a run of letters of other scripts, else a character."""
    listed = [*excluded, *negation.before, *negation.after, *negation.exceptions, *negation.stops, *negation.between]
    listed += [term for found in (terms, doubtful) for group in found.values() for term in group]
    phrases = sorted({fold(one) for one in listed} - {""}, key=lambda one: (-len(one), one))
    return re.compile("|".join(map(re.escape, phrases)) + r"|[a-z0-9]+|\S|\n")
