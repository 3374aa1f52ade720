"""Script and language of captions: what can be told, what stays undetermined, and the figures on 58 locales."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict

import pytest

from curate.auditing.folding import fold, words_of
from curate.auditing.languages import Guesser, language_column
from curate.auditing.lexicons import SHIPPED
from curate.auditing.scripts import script_column, script_of
from tests.making import data_root

# Locales of the corpus whose guess may be named otherwise: written Cantonese here is in the Chinese script.
ALSO = {"yue-Hans": {"zh"}}


def language_of(caption: str) -> str:
    """The guess for one caption."""
    return Guesser().guess(caption, words_of(fold(caption))).language


@pytest.mark.parametrize(
    ("caption", "script"),
    [("A red cube", "Latin"), ("naïve café", "Latin"), ("Красный куб", "Cyrillic"), ("赤い立方体", "Japanese"),
     ("カメラ", "Japanese"), ("红色立方体", "Han"), ("빨간 큐브", "Korean"), ("大韓民國 서울", "Korean"),
     ("लाल घन", "Devanagari"), ("مكعب أحمر", "Arabic"), ("κύβος", "Greek"), ("123 !? 🙂", "undetermined"),
     ("", "undetermined"), ("red 红色立方体 cube", "mixed"), ("iPad手机", "mixed"),
     ("Adobe Photoshop 教程 download", "Latin"),
     ("e\u0301e\u0301e\u0301", "Latin"), ("\U00010330\U00010331", "Gothic"), ("𓀀𓀁", "other script")],
)  # fmt: skip
def test_the_script_is_the_one_of_most_letters(caption: str, script: str) -> None:
    """Three quarters of the letters decide; marks, digits and emoji are of no script."""
    assert script_of(caption) == script


@pytest.mark.parametrize(
    ("caption", "language"),
    [("the dog on the table", "en"), ("a man with a hat", "en"), ("el perro en la mesa del jardín", "es"),
     ("un chien sur une table avec des fleurs", "fr"), ("ein Hund auf dem Tisch", "de"), ("कुत्ता मेज पर है", "hi"),
     ("桌子上的狗", "zh"), ("机の上の犬", "ja"), ("책상 위의 개", "ko"), ("สุนัขบนโต๊ะ", "th"),
     ("dog", "undetermined"), ("Paris 2019", "undetermined"), ("IMG_0231.JPG", "undetermined"), ("", "undetermined"),
     ("un cane sul tavolo della cucina", "undetermined"), ("um cachorro na mesa com uma flor", "undetermined"),
     ("een hond op de tafel", "undetermined"), ("en hund på bordet og en katt", "undetermined"),
     ("собака на столе", "undetermined"), ("कुत्रा टेबलावर आहे", "undetermined"), ("犬", "undetermined"),
     ("女性", "undetermined"), ("el gos amb flors a la taula", "undetermined"),
     ("la ĉevalo kaj la hundo sur la tablo", "undetermined")],
)  # fmt: skip
def test_a_language_is_named_only_where_it_can_be_told(caption: str, language: str) -> None:
    """Function words and scripts decide; names, single words, and languages without a list stay undetermined."""
    assert language_of(caption) == language


def test_added_function_words_make_a_language_known() -> None:
    """A list for Italian turns what was undetermined into "it"; the others stay as they were."""
    guesser = Guesser({"it": ("un", "sul", "della", "il", "con", "di")})
    guess = guesser.guess("un cane sul tavolo della cucina", words_of("un cane sul tavolo della cucina"))
    assert guess.language == "it"
    assert guesser.guess("the dog", ["the", "dog"]).language == "en"


def test_the_columns_keep_undetermined_as_a_group() -> None:
    """Undetermined is a group that can be left out by a selection; only a missing caption is unknown."""
    captions = ["the dog on the table", None, "собака", "42"]
    script, language = script_column(captions), language_column(captions)
    assert script.codes_N is not None
    assert language.codes_N is not None
    assert [script.names[code] if code >= 0 else None for code in script.codes_N] == [
        "Latin", None, "Cyrillic", "undetermined",
    ]  # fmt: skip
    assert [language.names[code] if code >= 0 else None for code in language.codes_N] == [
        "en", None, "undetermined", "undetermined",
    ]  # fmt: skip
    assert script.coverage == language.coverage == 0.75


@pytest.mark.data
def test_languages_of_58_locales(capsys: pytest.CaptureFixture[str]) -> None:
    """Of names of emoji in 58 locales few are told, and of those at least 99 % rightly; the figures are printed."""
    file = data_root() / "emoji-annotations" / "annotations.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    guesser, told = Guesser(), defaultdict[str, Counter[str]](Counter)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % 7 == 0:  # a seventh: 18,600 names
                for locale, name in json.loads(line)["names"].items():
                    told[locale][guesser.guess(name, words_of(fold(name))).language] += 1
    right, wrong, undetermined = (0, 0, 0)
    for locale, counts in told.items():
        fitting = ALSO.get(locale, {locale.partition("-")[0]})
        right += sum(counts[language] for language in fitting)
        undetermined += counts["undetermined"]
        wrong += sum(count for language, count in counts.items() if language not in {*fitting, "undetermined"})
    total = right + wrong + undetermined
    shares = {one: round(told[one]["undetermined"] / told[one].total(), 2) for one in (*SHIPPED, "ja", "ko", "th")}
    with capsys.disabled():
        print(
            f"\n{len(told)} locales, {total} names: {right} right, {wrong} wrong, {undetermined} undetermined; {shares}"
        )
    assert len(told) >= 50
    assert right > 1000
    assert wrong <= 0.01 * (right + wrong)
