"""Which groups a caption mentions: one matcher per language and set, over words or, without spaces, longest phrases.

Mentions are words in a caption, not people in a picture: a woman who is called "a tourist" is not counted, and "a book
about a man" is. A caption is folded (NFKC, case, invisible characters, nukta), cut into words and punctuation, and at
each place the longest phrase of the list is taken; a negation in reach takes it back ("not a woman").
Which lists apply is a matter of the caption's language (`curate.auditing.languages`); where that is undetermined, all
of its script do, but of terms that mean something else elsewhere only the `assumed` language's.
Cost: one pass; 40,000 captions of twelve words per second with one set, 20,000 with three, on one busy core.
"""

# N captions, G groups

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from curate.auditing.columns import Column, distinct_names, shown
from curate.auditing.folding import fold, words_of
from curate.auditing.languages import Guess, Guesser
from curate.auditing.lexicons import Lexicon
from curate.auditing.matching import Matcher, Mention, Phrase
from curate.auditing.scripts import UNDETERMINED
from curate.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mentions:
    """A column of overlapping groups, and what made it: how often each (group, language, term) counted or was negated.

    `languages` counts captions by the guess; `unread` are those without a caption or in a language without a list.
    """

    column: Column
    terms: Counter[tuple[str, str, str]]
    negated: Counter[tuple[str, str, str]]
    languages: Counter[str]
    unread: int


class MentionReader:
    """All languages of one set. Groups are those of the lists, in their order, whether they occur or not.

    `assumed`: what a caption in Latin letters is read as where its language cannot be told.
    """

    __slots__ = ("_by_script", "_doubted", "_guesser", "_matchers", "_sources", "assumed", "groups", "name")

    def __init__(self, lexicons: Iterable[Lexicon], name: str, *, assumed: Sequence[str] = ("en",)) -> None:
        listed = tuple(lexicons)
        having = [lexicon for lexicon in listed if name in lexicon.sets]
        if not having:
            there = sorted({one for lexicon in listed for one in lexicon.sets})
            raise UsageError(f"no word list has a set {shown(name)!r}; there are: {', '.join(map(shown, there))}")
        self.name, self.assumed = name, tuple(assumed)
        named = (group for lexicon in having for group in (*lexicon.sets[name].terms, *lexicon.sets[name].where_known))
        self.groups = tuple(dict.fromkeys(named))
        self._sources = tuple(dict.fromkeys(lexicon.source for lexicon in having))
        self._matchers: dict[str, list[Matcher]] = {}
        self._by_script: dict[str, list[Matcher]] = {}
        for lexicon in having:
            matcher = Matcher(lexicon, lexicon.sets[name])
            self._matchers.setdefault(lexicon.language, []).append(matcher)
            self._by_script.setdefault(lexicon.script, []).append(matcher)
        self._guesser = guesser_of(listed)
        self._doubted = _doubted(self._by_script.values(), self._guesser, self.assumed)

    def explain(self, caption: str) -> tuple[str, list[Mention] | None]:
        """The guessed language, and the mentions; None where no list is for such a caption."""
        folded = fold(caption)
        words = words_of(folded)
        guess = self._guesser.guess(caption, words)
        return guess.language, self.find(folded, words, guess)

    def find(self, folded: str, words: Sequence[str], guess: Guess) -> list[Mention] | None:
        """As `explain`, of a caption that is folded, cut and guessed already."""
        known = guess.language != UNDETERMINED
        apply = self._matchers.get(guess.language, ()) if known else self._undetermined(guess)
        if not apply and guess.scripts:
            return None
        found: list[Mention] = []
        for matcher in apply:
            sure = known or matcher.language in self.assumed or matcher.language not in self._doubted
            said = words if matcher.spaces else matcher.words(folded)
            found += matcher.find(said, known=sure, doubted=self._doubted.get(matcher.language, frozenset()))
        return list(dict.fromkeys(found))

    def provenance(self) -> str:
        """Where the groups come from, and what they are not."""
        sources, assumed = ", ".join(map(shown, self._sources)), ", ".join(self.assumed)
        return (
            f"words in the caption, by the lists {sources}, negated ones left out: these are mentions, not people "
            f"depicted. Latin captions of undetermined language are read as {assumed}"
        )

    def _undetermined(self, guess: Guess) -> list[Matcher]:
        of_script = (matcher for script in guess.scripts for matcher in self._by_script.get(script, ()))
        return [one for one in of_script if not guess.candidates or one.language in guess.candidates]


def guesser_of(lexicons: Iterable[Lexicon]) -> Guesser:
    """A guesser that knows the lists' own function words too."""
    return Guesser({one.language: one.function_words for one in lexicons if one.function_words})


def read_mentions(
    captions_N: Sequence[str | None],
    lexicons: Sequence[Lexicon],
    names: Sequence[str],
    *,
    assumed: Sequence[str] = ("en",),
) -> tuple[Mentions, ...]:
    """One column per set, from one pass over the captions. None, or a language without a list, is unknown.

    Example: ["a woman", "no woman", None, "女性"] with set gender: female of the first and the last, known 1, 1, 0, 1.
    Errors: UsageError for a set that no list has.
    """
    tallies = [_Tally(MentionReader(lexicons, name, assumed=assumed), len(captions_N)) for name in names]
    guesser = guesser_of(lexicons)
    languages: Counter[str] = Counter()
    for row, caption in enumerate(captions_N):
        if caption is None:
            languages["no caption"] += 1
            continue
        folded = fold(caption)
        words = words_of(folded)
        guess = guesser.guess(caption, words)
        languages[guess.language] += 1
        for tally in tallies:
            tally.add(row, tally.reader.find(folded, words, guess))
    return tuple(tally.close(languages) for tally in tallies)


class _Tally:
    """A column in the making."""

    def __init__(self, reader: MentionReader, rows: int) -> None:
        self.reader = reader
        self._number = {group: code for code, group in enumerate(reader.groups)}
        self._members_NG, self._known_N = np.zeros((rows, len(reader.groups)), bool), np.zeros(rows, bool)
        self._terms: Counter[tuple[str, str, str]] = Counter()
        self._negated: Counter[tuple[str, str, str]] = Counter()

    def add(self, row: int, found: Sequence[Mention] | None) -> None:
        if found is None:
            return
        self._known_N[row] = True
        for one in found:
            (self._negated if one.negated else self._terms)[one.group, one.language, one.term] += 1
            if not one.negated:
                self._members_NG[row, self._number[one.group]] = True

    def close(self, languages: Counter[str]) -> Mentions:
        reader = self.reader
        column = Column(
            f"caption mentions: {shown(reader.name)}", "mention", reader.provenance(), distinct_names(reader.groups),
            members_NG=self._members_NG, known_N=self._known_N,
        )  # fmt: skip
        return Mentions(column, self._terms, self._negated, languages, int((~self._known_N).sum()))


def _doubted(
    scripts: Iterable[Sequence[Matcher]], guesser: Guesser, assumed: Sequence[str]
) -> dict[str, frozenset[Phrase]]:
    """Per language the terms that decide nothing alone: another's function words, or in another group of another.

    Terms of an assumed language are left to its own list, which knows where they are no mention ("baby elephant").

    Only languages that share their script are there: the others are told by it.
    """
    doubted: dict[str, frozenset[Phrase]] = {}
    for matchers in scripts:
        for one in matchers:
            others = [other for other in matchers if other.language != one.language]
            if others:
                strange: set[Phrase] = {
                    term
                    for other in others
                    for term in other.terms
                    if other.language in assumed or other.groups(term) != one.groups(term)
                }
                strange |= {
                    (w,) for language, words in guesser.words.items() if language != one.language for w in words
                }
                doubted[one.language] = doubted.get(one.language, frozenset()) | (one.terms & strange)
    return doubted
