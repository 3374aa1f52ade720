"""What a caption mentions: planted sentences per language, negation, homographs, scripts without spaces, bad files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from curate.auditing.folding import fold, words_of
from curate.auditing.lexicons import SETS, SHIPPED, read_lexicon, shipped_lexicons
from curate.auditing.mentions import MentionReader, read_mentions
from curate.errors import UsageError
from tests.mention_sentences import SENTENCES

LEXICONS = shipped_lexicons()
READERS = {name: MentionReader(LEXICONS, name) for name in SETS}
CASES = [(language, *case) for language, cases in SENTENCES.items() for case in cases]


def groups(caption: str, name: str) -> set[str]:
    """The groups of a set that a caption mentions without taking it back."""
    _, found = READERS[name].explain(caption)
    return {one.group for one in found or () if not one.negated}


@pytest.mark.parametrize(("language", "caption", "expected"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_a_caption_mentions_these_groups_and_no_other(language: str, caption: str, expected: str) -> None:
    """The planted sentence gives just its groups, over all three sets and with all languages' lists there."""
    found = {group for name in SETS for group in groups(caption, name)}
    assert found == {one.strip() for one in expected.split(",") if one.strip()}, (language, caption)


@pytest.mark.parametrize("language", SHIPPED)
def test_there_are_enough_sentences_of_both_kinds(language: str) -> None:
    """Each language has twenty sentences or more (Hindi and Chinese fifteen), a third of them without a mention."""
    cases = SENTENCES[language]
    assert len(cases) >= (15 if language in ("hi", "zh") else 20)
    assert sum(not expected for _, expected in cases) * 3 >= len(cases)


@pytest.mark.parametrize("lexicon", LEXICONS, ids=SHIPPED)
def test_every_term_is_found_on_its_own(lexicon: object) -> None:
    """No term of a list is hidden by another: alone, in its language, it gives its group, and the exclusions none."""
    for lex in LEXICONS:
        if lex is not lexicon:
            continue
        for name, terms in lex.sets.items():
            (matcher,) = (m for m in READERS[name]._matchers[lex.language])
            for kind in (terms.terms, terms.where_known):
                for group, listed in kind.items():
                    for term in listed:
                        found = {one.group for one in matcher.find(matcher.words(fold(term)), known=True)}
                        assert group in found or term in terms.excluded, (name, group, term)
            for phrase in terms.excluded:
                assert matcher.find(matcher.words(fold(phrase)), known=True) == [], phrase


def test_all_languages_have_the_same_groups() -> None:
    """A group that only one language knows would be a finding about the list."""
    for name in SETS:
        for lexicon in LEXICONS:
            assert set(lexicon.sets[name].terms) == set(READERS[name].groups), (lexicon.language, name)


def test_the_librarys_own_words_cut_devanagari_where_re_does_not() -> None:
    r"""`re`'s \w splits Hindi at vowel signs, so that a word would be found inside another; ours keeps words whole."""
    text = "लड़की किताब पढ़ती है"
    assert len(re.findall(r"\w+", text)) > 4
    assert words_of(fold(text)) == [fold(word) for word in text.split()]
    assert groups("महिलाश्रम का भवन", "gender") == set()


@pytest.mark.parametrize(
    ("one", "other"),
    [("लड़की", "लडकी"), ("माँ", "मां"), ("\u0932\u095c\u0915\u0940", "लड़की"), ("\uff37OMAN", "woman"),
     ("wo\u00adman", "woman"), ("wo\u200bman", "woman"), ("GROSSMUTTER", "Großmutter"), ("soeur", "SŒUR"),
     ("nin\u0303a", "niña"), ("\u202ewoman\u202c", "woman")],
)  # fmt: skip
def test_spellings_that_look_alike_are_the_same(one: str, other: str) -> None:
    """Composed and decomposed, wide, invisible characters, nukta, chandrabindu, case."""
    assert fold(one) == fold(other)


def test_accents_are_letters() -> None:
    """Spanish año is not ano, and mama (breast) is not mamá."""
    assert fold("año") != fold("ano")
    assert groups("cáncer de mama en España y en el mundo", "gender") == set()


def test_an_undetermined_caption_is_read_as_the_assumed_language() -> None:
    """ "son" alone is English where English is assumed, and nothing where French is."""
    french = MentionReader(LEXICONS, "gender", assumed=("fr",))
    assert [one.group for one in READERS["gender"].explain("son")[1] or ()] == ["male"]
    assert french.explain("son")[1] == []
    assert [one.language for one in french.explain("femme souriante")[1] or ()] == ["fr"]


def test_a_caption_that_speaks_for_another_language_is_not_read_as_the_assumed_one() -> None:
    """Dutch "man" is no English mention: its function words are Dutch, for which there is no list."""
    assert READERS["gender"].explain("een man met een hoed op de fiets") == ("undetermined", None)
    assert [one.term for one in READERS["gender"].explain("man, fiets")[1] or ()] == ["man"]


def test_the_column_says_what_was_read() -> None:
    """Missing captions and languages without a list are unknown; a caption of digits is read and mentions no one."""
    captions = ["a woman", "no woman", None, "女性和男性", "Женщина и мужчина", "123", "女の子がいる", ""]
    (mentions,) = read_mentions(captions, LEXICONS, ["gender"])
    column = mentions.column
    assert column.is_known.tolist() == [True, True, False, True, False, True, False, True]
    assert column.members[:, column.names.index("female")].tolist() == [True, *[False] * 2, True, *[False] * 4]
    assert column.members[:, column.names.index("male")].sum() == 1
    assert mentions.unread == 3
    assert mentions.negated == {("female", "en", "woman"): 1}
    assert mentions.terms["female", "zh", "女性"] == 1
    assert mentions.languages["no caption"] == 1
    assert "mentions, not people" in column.provenance
    assert column.coverage == 5 / 8


def test_sets_read_together_are_as_read_alone() -> None:
    """One pass over three sets gives each set's column, and `explain` the same groups caption by caption."""
    captions = [caption for _, caption, _ in CASES]
    together = read_mentions(captions, LEXICONS, SETS)
    for name, mentions in zip(SETS, together, strict=True):
        (alone,) = read_mentions(captions, LEXICONS, [name])
        assert np.array_equal(alone.column.members, mentions.column.members)
        for row, caption in enumerate(captions):
            inside = {mentions.column.names[code] for code in np.flatnonzero(mentions.column.members[row])}
            assert inside == groups(caption, name)


ITALIAN = """
language: it
script: Latin
function_words: [il, la, una, un, di, con, e, che, nella, della, sono, gli]
negation: {before: [non, senza], stops: [e, ma], exceptions: [non solo]}
slots: {person: [donna, uomo]}
sets:
  gender:
    groups:
      female: {terms: [donna, donne, ragazza]}
      male: {terms: [uomo, uomini, ragazzo]}
    not: [uomo ragno]
  job:
    groups:
      doctor: {terms: ["{person} medico", dottoressa]}
"""


def test_a_file_adds_a_language_and_a_set(tmp_path: Path) -> None:
    """Function words make the language known, slots are filled in, and a set of one's own stands beside ours."""
    file = tmp_path / "it.yaml"
    file.write_text(ITALIAN, encoding="utf-8")
    lexicons = (*LEXICONS, read_lexicon(file))
    gender, job = (MentionReader(lexicons, name) for name in ("gender", "job"))
    language, found = gender.explain("una donna con gli occhiali nella casa")
    assert (language, [one.group for one in found or ()]) == ("it", ["female"])
    assert gender.explain("non è una donna con gli occhiali")[1][0].negated  # type: ignore[index]
    assert gender.explain("la maschera di uomo ragno con gli occhi")[1] == []
    assert [one.term for one in job.explain("una donna medico")[1] or ()] == ["donna medico"]
    assert gender.groups == ("female", "male", "nonbinary")


@pytest.mark.parametrize(
    ("content", "message"),
    [("language: it\nscript: Latin\nsets: {}\nwords: []", ":4: words: unknown"),
     ("language: it\nscript: Ladin\nsets: {}", ":2: script: 'Ladin' is no script"),
     ("script: Latin\nsets: {}", "language is missing"),
     ("language: it\nscript: Latin", "sets: a section with names"),
     ("language: it\nscript: Latin\nsets:\n  a:\n    groups:\n      b: {terms: [1]}", ":6: sets.a.groups.b.terms: a"),
     ("language: it\nscript: Latin\nsets:\n  a:\n    groups:\n      b:\n        terms: ['{x} c']", "no slot 'x'"),
     ("language: it\nscript: Latin\nsets:\n  a:\n    groups:\n      b: {words: [c]}", "sets.a.groups.b.words: unknown"),
     ("language: it\nscript: Latin\nnegation: {near: [non]}\nsets: {}", ":3: negation.near: unknown")],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    """Unknown fields, scripts, slots and values are named with file, line and field."""
    file = tmp_path / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(message)):
        read_lexicon(file)


def test_slots_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Slots of slots that multiply to millions of terms are refused."""
    words = ", ".join(f"w{n}" for n in range(100))
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"language: it\nscript: Latin\nslots: {{x: [{words}]}}\n"
        "sets:\n  a:\n    groups:\n      b: {terms: ['{x} {x} {x} {x}']}\n"
    )
    with pytest.raises(UsageError, match="more than 200,000 terms"):
        read_lexicon(file)


def test_a_set_or_language_that_is_not_there_is_refused() -> None:
    """The message says what there is."""
    with pytest.raises(UsageError, match="there are: age, gender, identity"):
        MentionReader(LEXICONS, "hats")
    with pytest.raises(UsageError, match="no word lists for 'it'"):
        shipped_lexicons(["it"])
