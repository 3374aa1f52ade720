"""Lists of terms per language, and how a file of them is read and checked. Six languages come along; add by file.

A file is YAML: `language`, `script`, `negation` (words before or after a term that take it back), `slots` (lists that a
term may refer to: "black {person}" stands for as many terms as `person` has words), and `sets` of groups of `terms`.
`where_known` holds terms that count only in a caption whose language is recognised, because they mean something else in
another one; `not` holds longer phrases in which a term is no mention ("isle of man"). Whoever adds a language gives its
`function_words` too, so that it can be recognised.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import regex

from curate.errors import UsageError
from curate.marked_yaml import Marked, Place, read_yaml

SHIPPED: Final = ("en", "es", "fr", "de", "hi", "zh")
SETS: Final = ("gender", "age", "identity")
MOST_TERMS: Final = 200_000
_FOLDER: Final = Path(__file__).parent
_FIELDS: Final = frozenset(
    ("version", "language", "script", "spaces", "negation", "slots", "sets", "function_words", "about")
)
_NEGATION: Final = ("before", "after", "exceptions", "stops", "between")
_SLOT: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Negation:
    """What takes a mention back. Words `before` within three of it, or phrases right `after` it.

    `exceptions` are phrases that begin with such a word and do not ("not only"); a word of `stops` or a punctuation
    mark ends its reach; where `between` has words, only those may stand in between.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    between: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TermSet:
    """Groups of one set in one language: group -> terms, slots filled in. `excluded`: phrases that are no mention."""

    terms: Mapping[str, tuple[str, ...]]
    where_known: Mapping[str, tuple[str, ...]]
    excluded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lexicon:
    """One file: a language, how it is written (`spaces` between words or none), and its sets."""

    source: str
    language: str
    script: str
    spaces: bool
    negation: Negation
    sets: Mapping[str, TermSet]
    function_words: tuple[str, ...] = field(default=())


def shipped_lexicons(languages: Sequence[str] = SHIPPED) -> tuple[Lexicon, ...]:
    """The lists that come with curate. Errors: UsageError for a language that has none."""
    missing = [language for language in languages if language not in SHIPPED]
    if missing:
        raise UsageError(f"no word lists for {missing[0]!r}; there are {', '.join(SHIPPED)}, and files of your own")
    return tuple(read_lexicon(shipped_file(language), source=f"curate's {language}") for language in languages)


def shipped_file(language: str) -> Path:
    """The file of a list that comes with curate."""
    return _FOLDER / f"{language}.yaml"


def read_lexicon(path: Path, *, source: str | None = None) -> Lexicon:
    """Errors: UsageError, naming file, line and field, for anything that is not as the module describes."""
    marked = read_yaml(path)
    top = _mapping(marked, marked.value, ())
    unknown = [name for name in top if name not in _FIELDS]
    if unknown:
        raise marked.error((unknown[0],), f"unknown; there are {', '.join(sorted(_FIELDS))}")
    spaces = top.get("spaces", True)
    if not isinstance(spaces, bool):
        raise marked.error(("spaces",), "true or false")
    slots = {name: _words(marked, ("slots", name)) for name in _mapping(marked, top.get("slots", {}), ("slots",))}
    given = _mapping(marked, top.get("negation", {}), ("negation",))
    wrong = [name for name in given if name not in _NEGATION]
    if wrong:
        raise marked.error(("negation", wrong[0]), f"unknown; there are {', '.join(_NEGATION)}")
    sets = _mapping(marked, top.get("sets"), ("sets",))
    return Lexicon(
        source or str(path),
        _word(marked, top, "language"),
        _script(marked, top),
        spaces,
        Negation(**{name: _words(marked, ("negation", name)) for name in given}),
        {name: _term_set(marked, ("sets", name), slots) for name in sets},
        _words(marked, ("function_words",)) if "function_words" in top else (),
    )


def _term_set(marked: Marked, place: Place, slots: Mapping[str, tuple[str, ...]]) -> TermSet:
    value = _mapping(marked, _at(marked, place), place)
    wrong = [name for name in value if name not in ("groups", "not", "about")]
    if wrong:
        raise marked.error((*place, wrong[0]), "unknown; there are groups, not, about")
    found: dict[str, dict[str, tuple[str, ...]]] = {"terms": {}, "where_known": {}}
    for group in _mapping(marked, value.get("groups"), (*place, "groups")):
        there = (*place, "groups", group)
        for kind in _mapping(marked, _at(marked, there), there):
            if kind not in found:
                raise marked.error((*there, kind), "unknown; there are terms and where_known")
            found[kind][group] = tuple(_filled(marked, (*there, kind), slots))
    excluded = tuple(_filled(marked, (*place, "not"), slots)) if "not" in value else ()
    return TermSet(found["terms"], found["where_known"], excluded)


def _filled(marked: Marked, place: Place, slots: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Each term with every choice of words for its slots."""
    made = 0
    for number, term in enumerate(_words(marked, place)):
        names = _SLOT.findall(term)
        missing = [name for name in names if name not in slots]
        if missing:
            raise marked.error((*place, number), f"{term!r}: no slot {missing[0]!r}; there are {', '.join(slots)}")
        for words in itertools.product(*(slots[name] for name in names)):
            choice = iter(words)
            yield " ".join(_SLOT.sub(lambda _, choice=choice: next(choice), term).split())  # type: ignore[misc]
            made += 1
            if made > MOST_TERMS:
                raise marked.error((*place, number), f"more than {MOST_TERMS:,} terms with its slots filled in")


def _at(marked: Marked, place: Place) -> Any:
    value = marked.value
    for part in place:
        value = value[part]
    return value


def _mapping(marked: Marked, value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise marked.error(place, "a section with names is expected here")
    return value


def _words(marked: Marked, place: Place) -> tuple[str, ...]:
    value = _at(marked, place)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise marked.error(place, "a list of words is expected here; a number needs quotes")
    return tuple(value)


def _word(marked: Marked, top: Mapping[str, Any], name: str) -> str:
    value = top.get(name)
    if not isinstance(value, str) or not value.strip():
        raise marked.error((name,), f"{name} is missing")
    return value


def _script(marked: Marked, top: Mapping[str, Any]) -> str:
    script = _word(marked, top, "script")
    try:
        regex.compile(rf"\p{{Script={script}}}")
    except regex.error:
        raise marked.error(("script",), f"{script!r} is no script of Unicode; Latin and Devanagari are") from None
    return script
